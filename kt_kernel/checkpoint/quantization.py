"""What config.json says of a checkpoint's quantized weights. How they lie in the files is in ``encodings.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_kernel.checkpoint.model_folder import read_config, read_json_object, text_config
from kt_kernel.files import sayable

# Beside config.json: what older tools wrote there.
_OLDER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

_MAX_BLOCK = 1 << 20  # no model has longer rows
_FP8 = ("fp8_block", "fp8_row")
_MX = ("mxfp4", "mxfp8")
# compressed-tensors: the encodings of each format. None: any, each layer says for itself.
_COMPRESSED_FORMATS: dict[str, tuple[str, ...]] = {
    "float-quantized": _FP8,
    "naive-quantized": _FP8,
    "pack-quantized": ("pack_quantized",),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp8-quantized": ("mxfp8",),
    "mixed-precision": (*_FP8, *_MX, "pack_quantized", "nvfp4"),
}
_MODELOPT_ALGORITHMS: dict[str, tuple[str, ...]] = {
    "FP8": ("fp8_row",),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_row",),
    "FP8_PB_WO": ("fp8_block",),
    "NVFP4": ("nvfp4",),
    "W4A16_NVFP4": ("nvfp4",),
    "MXFP8": ("mxfp8",),
    "MXFP4": ("mxfp4",),
    "MIXED_PRECISION": (*_FP8, *_MX, "nvfp4"),
}


@dataclass(frozen=True)
class Quantization:
    """How quantized weights are encoded, as far as the config says.

    Attributes
    ----------
    name : str
        Method and format, for messages.
    encodings : tuple of str
        Names of the encodings (``encodings.py``) that quantized weights may have; empty: none that is read here.
    reason : str
        Why it is empty, where that is not the method itself: "has 3-bit weights".
    group_size : int, optional
        Elements of k under one scale; -1: all.
    block : pair of int, optional
        Rows and columns under one scale of fp8 weights.
    symmetric : bool
        The config says that no 4-bit code has a zero point of its own.
    """

    name: str
    encodings: tuple[str, ...]
    reason: str = ""
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = False


def read_quantization(folder: Path) -> Quantization | None:
    """What the config of a folder says of quantized weights; None: nothing.

    Raises
    ------
    ValueError
        A value of the wrong type; the message names file and key.
    """
    config = read_config(folder)
    content = config.get("quantization_config") or text_config(config).get("quantization_config")
    source = f"quantization_config of {folder / 'config.json'}"
    if not content:
        # before transformers 4.45 also compression_config
        content = config.get("compression_config")
    for name in _OLDER_FILES:
        if not content and (folder / name).is_file():
            content, source = read_json_object(folder / name), str(folder / name)
            content = content.get("quantization", content)
    if not content:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"{source} is {sayable(repr(content))}, which is no JSON object; copy the file again.")
    return _Reader(content, source).read()


class _Reader:
    """One quantization_config."""

    def __init__(self, content: dict[str, Any], source: str) -> None:
        self._content = content
        self._source = source

    def read(self) -> Quantization:
        method = sayable(self._content.get("quant_method") or self._guess()).lower()
        read = {
            "fp8": self._fp8,
            "mxfp8": self._fp8,
            "fbgemm_fp8": self._fp8,
            "compressed-tensors": self._compressed,
            "compressed_tensors": self._compressed,
            "gptq": self._gptq,
            "awq": self._awq,
            "auto-round": self._auto_round,
            "auto_round": self._auto_round,
            "mxfp4": lambda: Quantization("mxfp4", ("mxfp4",)),
        }.get(method)
        if read is not None:
            return read()
        if method.startswith("modelopt"):
            return self._modelopt()
        return Quantization(method, ())

    def _guess(self) -> str:
        """The method of a file that does not name it: those of the tools that wrote such."""
        if "quant_algo" in self._content:
            return "modelopt"
        if "w_bit" in self._content:
            return "awq"
        return "gptq" if "desc_act" in self._content else "unnamed"

    def _number(self, content: dict[str, Any], *keys: str) -> int | None:
        for key in keys:
            value = content.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(
                    f"{key} in {self._source} is {sayable(repr(value))}, which is no whole number; copy the file again."
                )
            return value
        return None

    def _group_size(self, content: dict[str, Any]) -> int | None:
        """Raises ValueError for a size that no weights have."""
        size = self._number(content, "group_size", "q_group_size")
        if size is not None and size != -1 and size <= 0:
            raise ValueError(f"group_size in {self._source} is {size}, which no weights have; copy the file again.")
        return size

    def _block(self, value: Any, key: str) -> tuple[int, int] | None:
        if value is None:
            return None
        pair = value if isinstance(value, list) and len(value) == 2 else (0, 0)
        if not all(type(size) is int and 0 < size <= _MAX_BLOCK for size in pair):
            raise ValueError(
                f"{key} in {self._source} is {sayable(repr(value))}, which is no pair of positive numbers; copy the "
                f"file again."
            )
        return pair[0], pair[1]

    def _fp8(self) -> Quantization:
        # models whose other weights are fp8 have fp4 experts under the same method
        return Quantization(
            sayable(self._content["quant_method"]),
            (*_FP8, *_MX),
            block=self._block(self._content.get("weight_block_size"), "weight_block_size"),
        )

    def _modelopt(self) -> Quantization:
        algorithm = sayable(self._content.get("quant_algo") or "unnamed").upper()
        return Quantization(
            f"modelopt {algorithm}",
            _MODELOPT_ALGORITHMS.get(algorithm, ()),
            block=(128, 128) if algorithm == "FP8_PB_WO" else None,
        )

    def _compressed(self) -> Quantization:
        groups = self._content.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        schemes = [group for group in groups if isinstance(group, dict)]
        weights = [group["weights"] for group in schemes if isinstance(group.get("weights"), dict)]
        form = sayable(self._content.get("format") or "unnamed")
        encodings = _COMPRESSED_FORMATS.get(form, ())
        reason = ""
        bits = {self._number(w, "num_bits") for w in weights}
        if encodings == ("pack_quantized",) and 4 not in bits:
            said = "- and ".join(map(str, sorted(bits - {None})))
            encodings, reason = (), f"has {said}-bit weights" if said else "says no num_bits"
        # with several groups the tensors alone tell which are whose
        sizes = {self._group_size(w) for w in weights}
        blocks = {self._block(w.get("block_structure"), "block_structure") for w in weights}
        return Quantization(
            f"compressed-tensors {form}",
            encodings,
            reason,
            group_size=sizes.pop() if len(sizes) == 1 and encodings == ("pack_quantized",) else None,
            block=blocks.pop() if len(blocks) == 1 else None,
        )

    def _four_bits(self, name: str, encoding: str) -> Quantization:
        bits = self._number(self._content, "bits", "w_bit")
        if bits not in (None, 4):
            return Quantization(name, (), f"has {bits}-bit weights")
        symmetric = self._content.get("sym") is True
        return Quantization(name, (encoding,), group_size=self._group_size(self._content), symmetric=symmetric)

    def _gptq(self) -> Quantization:
        form = sayable(self._content.get("checkpoint_format") or "gptq").lower()
        if form not in ("gptq", "gptq_v2"):
            return Quantization("gptq", (), f"has checkpoint_format {form}")
        return self._four_bits(form, form)

    def _awq(self) -> Quantization:
        version = sayable(self._content.get("version") or "gemm").lower()
        if version != "gemm":
            return Quantization("awq", (), f"has version {version}")
        return self._four_bits("awq", "awq")

    def _auto_round(self) -> Quantization:
        packing = sayable(self._content.get("packing_format") or "unnamed").lower()
        encoding = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing)
        if encoding is None:
            return Quantization("auto-round", (), f"has packing_format {packing}")
        return self._four_bits(f"auto-round ({packing})", encoding)
