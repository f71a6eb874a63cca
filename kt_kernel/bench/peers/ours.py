"""Our own layer, one for each format: int8, int4 in groups of 32, bf16; or int4 and fp8 as files have them."""

from __future__ import annotations

import numpy as np
import torch

from kt_kernel import __version__, _ext, ops
from kt_kernel.bench.layer import load_layer
from kt_kernel.bench.shapes import Shape
from kt_kernel.config import EngineConfig
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import get_method

from .kt_wheel import fp8, rawint4
from .layer_data import Batch, LayerData, to_float

PEAK_MILLISECONDS = 5
# Formats of files: the source they are, and who makes the codes and scales.
ENCODED = {"RAWINT4": ("pack_quantized", rawint4), "FP8": ("fp8_block128x128", fp8)}


def as_bf16(bits: np.ndarray) -> torch.Tensor:
    """A bf16 tensor of its bits."""
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Codes, fp32 scales, or bf16 scales by their bits."""
    return as_bf16(array) if array.dtype == np.uint16 else torch.from_numpy(np.ascontiguousarray(array))


class System:
    """One :class:`CpuExperts` a format; see `worker.SystemProtocol`."""

    def __init__(self, data: LayerData, threads: int) -> None:
        self.data = data
        self.engine = get_engine(EngineConfig.resolve(threads))
        self.layers: dict[str, CpuExperts] = {}
        self.version = f"{__version__} {_ext.cpu_features()['tier']}"

    def load(self, name: str) -> float:
        """Quantize and pack every expert."""
        sizes = self.data.sizes
        shape = Shape(sizes.hidden_size, sizes.intermediate_size, sizes.num_experts, sizes.top_k)
        kinds = [tuple(map(as_bf16, self.data.of_expert(kind))) for kind in range(sizes.kinds)]
        if name in ENCODED:
            experts = self.load_encoded(shape, name)
        else:
            experts = load_layer(shape, get_method(name).layout, self.engine, kinds)
        self.layers[name] = experts
        experts.layer.probe_read()  # first touch of the scratch, frequency, page tables
        return experts.bytes / sizes.num_experts

    def load_encoded(self, shape: Shape, name: str) -> CpuExperts:
        """A layer of codes that are given, made as the kt-kernel wheel's are."""
        source, encode = ENCODED[name]
        kinds = []
        for kind in range(self.data.sizes.kinds):
            matrices = self.data.of_expert(kind)
            kinds.append([[as_tensor(array) for array in encode(to_float(matrix))[:2]] for matrix in matrices])
        sizes = ((shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
        w13, w2 = (
            torch.ops.kt_kernel.source_layout(kinds[0][which], source, *size)
            for which, size in zip((0, 2), sizes, strict=True)
        )
        experts = CpuExperts(shape.config(), layouts=(w13, w2), engine=self.engine)
        for e in range(shape.num_experts):
            experts.load_sources([e], source, source, *kinds[e % len(kinds)])
        return experts

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The packed bytes as fp32."""
        sizes, layer = self.data.sizes, self.layers[name]
        found = []
        for kind in range(sizes.kinds):
            w13, w2 = layer.export_packed(kind)
            layout, inter, hidden = layer.layouts[0], sizes.intermediate_size, sizes.hidden_size
            gate_up = torch.ops.kt_kernel.dequantize_w13(w13, layout, inter, hidden)
            down = torch.ops.kt_kernel.dequantize(w2, layout, hidden, inter)
            found.append([matrix.numpy() for matrix in (*gate_up, down)])
        gate, up, down = (np.stack(matrices) for matrices in zip(*found, strict=True))
        return gate, up, down

    def prepare(self, name: str, batch: Batch):
        """One call of `ops.moe_forward`."""
        arguments = as_bf16(batch.hidden), torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        handle = self.layers[name].layer.handle
        outputs: list[torch.Tensor] = []

        def forward() -> None:
            outputs[:] = [ops.moe_forward(*arguments, None, handle)]

        return forward, lambda: outputs[0].float().numpy()

    def calibrate(self, name: str) -> dict[str, float]:
        """Read bandwidth over the format's own bytes, and the register peak of its products."""
        layer = self.layers[name].layer
        return {"read": layer.probe_read(), "peak": layer.probe_peak(milliseconds=PEAK_MILLISECONDS)}
