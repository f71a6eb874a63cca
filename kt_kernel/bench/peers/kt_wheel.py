"""kt-kernel from its PyPI wheel, through the classes of its extension: ``CPUInfer`` and ``moe``.

Runs in an environment of its own: the wheel's package has our package's name. Only its extension is loaded, by path,
for its package would import torch, which the extension does not need.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np

from .layer_data import Batch, LayerData, to_bf16, to_float

CLASSES = {
    "INT8": "AMXInt8_MOE",
    "INT4": "AMXInt4_MOE",
    "RAWINT4": "AMXInt4_KGroup_MOE",
    "FP8": "AMXFP8_MOE",
    "BF16": "AMXBF16_MOE",
}
RAWINT4_GROUP = 32
FP8_BLOCK = 128
# e4m3: the values of the codes 0 to 126; 127 is NaN
FP8_VALUES = np.array(
    [(i & 7) * 2.0**-9 if i < 8 else 2.0 ** ((i >> 3) - 7) * (1 + (i & 7) / 8) for i in range(127)], np.float32
)


def load_module(name: str, path: Path) -> ModuleType:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded as a module.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_extension() -> ModuleType:
    """The variant of the extension that the wheel itself would choose on this machine."""
    folder = Path(sysconfig.get_path("platlib")) / "kt_kernel"
    variant = load_module("cpu_detect", folder / "_cpu_detect.py").detect_cpu_features()
    found = sorted(folder.glob(f"_kt_kernel_ext_{variant}.*.so"))
    if not found:
        raise ImportError(f"{folder} has no extension for {variant}.")
    return load_module("kt_kernel_ext", found[0])


def int8_rows(weight: np.ndarray) -> np.ndarray:
    """Weights ``[..., N, K]`` as INT8 keeps them: one scale a row."""
    scale = np.abs(weight).max(-1, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def int4_rows(weight: np.ndarray) -> np.ndarray:
    """As INT4 keeps them: rounded to sixteenths of a step first, then to steps, halves away from zero."""
    sixteenth = np.abs(weight).max(-1, keepdims=True) / 112
    fine = np.rint(weight / sixteenth)
    return np.copysign((np.abs(fine) + 8) // 16 * 16, fine) * sixteenth


def rawint4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nibbles ``[N, K/2]`` (code + 8, even k low), bf16 scales ``[N, K/32]``, and the values as fp32."""
    groups = weight.reshape(*weight.shape[:-1], -1, RAWINT4_GROUP)
    scales = to_bf16(np.abs(groups).max(-1) / 7)
    scale = to_float(scales)[..., None]
    codes = np.clip(np.rint(groups / scale), -8, 7)
    nibbles = (codes + 8).astype(np.uint8).reshape(weight.shape)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scales, (codes * scale).reshape(weight.shape)


def fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e4m3 codes ``[N, K]``, fp32 scales ``[N/128, K/128]``, and the values as fp32."""
    n, k = weight.shape
    blocks = weight.reshape(n // FP8_BLOCK, FP8_BLOCK, k // FP8_BLOCK, FP8_BLOCK)
    scales = (np.abs(blocks).max((1, 3)) / FP8_VALUES[-1]).astype(np.float32)
    scaled = blocks / scales[:, None, :, None]
    codes = np.searchsorted((FP8_VALUES[1:] + FP8_VALUES[:-1]) / 2, np.abs(scaled)).astype(np.uint8)
    values = np.copysign(FP8_VALUES[codes], scaled) * scales[:, None, :, None]
    signs = np.signbit(scaled).astype(np.uint8) << 7
    return (codes | signs).reshape(weight.shape), scales, values.reshape(weight.shape)


class System:
    """One ``moe`` object a format on one ``CPUInfer``; see `worker.SystemProtocol`."""

    def __init__(self, data: LayerData, threads: int) -> None:
        self.data = data
        self.extension = load_extension()
        self.version = f"{importlib.metadata.version('kt-kernel')} {self.extension.__cpu_variant__}"
        pool = self.extension.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self.infer = self.extension.CPUInfer(pool)
        self.on_gpu = np.zeros(data.sizes.num_experts, np.uint8)
        self.layers: dict[str, object] = {}

    def load(self, name: str) -> float:
        """Give the weights as the format wants them; the extension packs its own copy."""
        sizes = self.data.sizes
        if name == "FP8" and (sizes.hidden_size % FP8_BLOCK or sizes.intermediate_size % FP8_BLOCK):
            raise ValueError(
                f"FP8 has blocks of {FP8_BLOCK}, which do not divide {sizes.hidden_size} and {sizes.intermediate_size}."
            )
        config = self.extension.moe.MOEConfig(
            sizes.num_experts, sizes.top_k, sizes.hidden_size, sizes.intermediate_size, self.on_gpu.ctypes.data
        )
        config.layer_idx, config.pool = 0, self.infer.backend_
        config.max_len = max(sizes.max_tokens, 32)
        sources = self.give_weights(config, name)
        layer = getattr(self.extension.moe, CLASSES[name])(config)
        same_place = np.arange(sizes.num_experts, dtype=np.int64)
        self.infer.submit(layer.load_weights_task(same_place.ctypes.data))
        self.infer.sync()
        del sources
        self.layers[name] = layer
        weights = sizes.expert_weights
        rows = 2 * sizes.intermediate_size + sizes.hidden_size
        return {
            "INT8": weights + 4.0 * rows,
            "INT4": weights / 2 + 4.0 * rows,
            "RAWINT4": weights / 2 + 4.0 * weights / RAWINT4_GROUP,  # it keeps fp32 scales
            "FP8": weights + 4.0 * weights / FP8_BLOCK**2,
            "BF16": 2.0 * weights,
        }[name]

    def give_weights(self, config, name: str) -> list[np.ndarray]:
        """Set the addresses of the sources in `config`; return the sources, to be kept until they are packed."""
        kept = []
        which = [kind % self.data.sizes.kinds for kind in range(self.data.sizes.num_experts)]
        for field in ("gate", "up", "down"):
            bits = getattr(self.data, field)
            if name in ("INT8", "INT4"):  # all experts in one array
                kept.append(np.ascontiguousarray(bits[which]))
                setattr(config, f"{field}_proj", kept[-1].ctypes.data)
                continue
            if name == "BF16":
                kinds = [(np.array(matrix),) for matrix in bits]
            else:
                encode = rawint4 if name == "RAWINT4" else fp8
                kinds = [tuple(map(np.ascontiguousarray, encode(to_float(matrix))[:2])) for matrix in bits]
            kept += [array for arrays in kinds for array in arrays]
            setattr(config, f"{field}_projs", [[kinds[kind][0].ctypes.data for kind in which]])
            if name != "BF16":
                setattr(config, f"{field}_scales", [[kinds[kind][1].ctypes.data for kind in which]])
        if name in ("RAWINT4", "FP8"):
            config.quant_config.bits = 4 if name == "RAWINT4" else 8
            config.quant_config.group_size = RAWINT4_GROUP if name == "RAWINT4" else FP8_BLOCK
            config.quant_config.zero_point = False
        return kept

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the extension makes of the sources."""
        rules = {
            "INT8": int8_rows,
            "INT4": int4_rows,
            "RAWINT4": lambda weight: rawint4(weight)[2],
            "FP8": lambda weight: fp8(weight)[2],
            "BF16": lambda weight: weight,
        }
        gate, up, down = (
            np.stack([rules[name](to_float(matrix)) for matrix in getattr(self.data, field)])
            for field in ("gate", "up", "down")
        )
        return gate, up, down

    def prepare(self, name: str, batch: Batch):
        """One task on the pool, and the wait for it."""
        layer = self.layers[name]
        tokens = np.array([len(batch.ids)], np.int32)
        output = np.zeros_like(batch.hidden)
        arrays = (batch.ids, batch.weights, batch.hidden, output)
        addresses = [array.ctypes.data for array in arrays]

        def forward(alive: tuple[np.ndarray, ...] = (tokens, *arrays)) -> None:
            task = layer.forward_task(tokens.ctypes.data, batch.ids.shape[1], *addresses, False)
            self.infer.submit(task)
            self.infer.sync()

        return forward, lambda: to_float(output)
