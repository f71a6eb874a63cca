"""How the weights of an expert lie in tensors: one table of encodings, and from their tensors to a source's parts.

A source is what ``csrc/format/source.h`` decodes: a string and tensors in a fixed order, its parts. An encoding says
which tensors of a checkpoint these are, of which types and shapes, for a matrix of n rows and k columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kt_kernel.checkpoint.quantization import Quantization

FLOAT = "float"
FLOAT_SOURCES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_FLOATS = ("BF16", "F16", "F32")
_BYTES = ("U8", "I8")
_EXPONENTS = ("U8", "F8_E8M0")
WEIGHTS = ("weight", "weight_packed", "qweight", "blocks")
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "scales")
_GROUPED = ("pack_quantized", "gptq", "gptq_v2", "awq", "mxfp4", "nvfp4")
# Tensors that change what the others mean.
_ZERO_POINT, _ORDER, _SHAPE = "weight_zero_point", ("g_idx", "weight_g_idx"), "weight_shape"
_GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale")  # the second divides

Shape = tuple[int, ...]


class Header(NamedTuple):
    """What a file says of a tensor: its type in safetensors' words, and its shape."""

    type: str
    shape: Shape


@dataclass(frozen=True)
class Numbers:
    """What shapes depend on: the matrix ``[n, k]``, the elements of k and the block of rows and columns of a scale."""

    n: int
    k: int
    group: int
    block: tuple[int, int]


class Part(NamedTuple):
    """A tensor of an encoding: names it goes by, types it may have, and shapes, of which several can be usual."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    shapes: Callable[[Numbers], Sequence[Shape]]
    needed: bool = True

    def find(self, present: Mapping[str, object]) -> str | None:
        """The name it has among those that are present."""
        return next((name for name in self.names if name in present), None)


@dataclass(frozen=True)
class Encoding:
    """One way to store a matrix; `parts` in the order of the source, tensors that are only checked at the end."""

    name: str
    title: str
    parts: tuple[Part, ...]
    group: int = 0


def _whole(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.n, numbers.k),)


def _half(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.n, numbers.k // 2), (numbers.n, numbers.k // 32, 16))


def _blocks(numbers: Numbers) -> Sequence[Shape]:
    return ((-(-numbers.n // numbers.block[0]), -(-numbers.k // numbers.block[1])),)


def _rows(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.n, 1), (numbers.n,), (1, numbers.n), (1, 1), (1,), ())


def _groups(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.n, numbers.k // numbers.group),)


def _groups_down(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.k // numbers.group, numbers.n),)


def _zeros_down(numbers: Numbers) -> Sequence[Shape]:
    return ((numbers.k // numbers.group, numbers.n // 8),)


def _one(numbers: Numbers) -> Sequence[Shape]:
    return ((), (1,))


_ORDER_PART = Part(_ORDER, ("I32", "I64"), lambda m: ((m.k,),), needed=False)
_GPTQ = (
    Part(("qweight",), ("I32",), lambda m: ((m.k // 8, m.n),)),
    Part(("scales",), _FLOATS, _groups_down),
    Part(("qzeros",), ("I32",), _zeros_down),
    _ORDER_PART,
)
ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding(FLOAT, "unquantized weights", (Part(("weight",), _FLOATS, _whole),)),
        Encoding(
            "fp8_block",
            "fp8 weights with a scale a block",
            (
                Part(("weight",), ("F8_E4M3", "U8"), _whole),
                Part(SCALES, ("F32", "BF16", "F8_E8M0"), _blocks),
            ),
        ),
        Encoding(
            "fp8_row",
            "fp8 weights with a scale a row",
            (
                Part(("weight",), ("F8_E4M3", "U8"), _whole),
                Part(SCALES, ("F32", "BF16"), _rows),
            ),
        ),
        Encoding(
            "mxfp8",
            "MXFP8 weights",
            (
                Part(("weight",), ("F8_E4M3", "U8"), _whole),
                Part(SCALES, _EXPONENTS, lambda m: ((m.n, -(-m.k // 32)),)),
            ),
        ),
        Encoding(
            "pack_quantized",
            "compressed-tensors int4 weights (pack-quantized)",
            (
                Part(("weight_packed",), ("I32", "U8"), lambda m: ((m.n, m.k // 8), (m.n, m.k // 2))),
                Part(("weight_scale",), _FLOATS, _groups),
                Part((_SHAPE,), ("I64", "I32"), lambda m: ((2,),), needed=False),
                _ORDER_PART,
            ),
        ),
        Encoding("gptq", "GPTQ int4 weights", _GPTQ),
        Encoding("gptq_v2", "GPTQ int4 weights (gptq_v2)", _GPTQ),
        Encoding(
            "awq",
            "AWQ int4 weights",
            (
                Part(("qweight",), ("I32",), lambda m: ((m.k, m.n // 8),)),
                Part(("qzeros",), ("I32",), _zeros_down),
                Part(("scales",), _FLOATS, _groups_down),
            ),
        ),
        Encoding(
            "mxfp4",
            "MXFP4 weights",
            (
                Part(("weight", "weight_packed", "blocks"), _BYTES, _half),
                Part(SCALES, _EXPONENTS, _groups),
            ),
            group=32,
        ),
        Encoding(
            "nvfp4",
            "NVFP4 weights",
            (
                Part(("weight", "weight_packed"), _BYTES, _half),
                Part(("weight_scale",), ("F8_E4M3",), _groups),
                Part(_GLOBAL_SCALES, ("F32",), _one),
            ),
            group=16,
        ),
    )
}


# Names of all parts that some encoding looks at: models have others beside them, as scales of activations.
PART_NAMES = {name for encoding in ENCODINGS.values() for part in encoding.parts for name in part.names} | {_ZERO_POINT}


def recognize(headers: Mapping[str, Header], n: int, k: int, declared: Quantization | None) -> str | None:
    """The encoding of a matrix ``[n, k]``, from the tensors it has; None: none that is known.

    The config only decides where the tensors do not: between GPTQ and AWQ, and for the blocks of fp8 scales.

    Parameters
    ----------
    headers : mapping
        Tensors by the name of their part, each of one expert; fused ones may be transposed.
    n, k : int
        Rows and columns.
    declared : Quantization, optional
        What the config says.
    """
    if "qweight" in headers:
        named = [name for name in (declared.encodings if declared else ()) if name in ("gptq", "gptq_v2", "awq")]
        return named[0] if named else "awq" if headers["qweight"].shape == (k, n // 8) else "gptq"
    scale = next((headers[name] for name in SCALES if name in headers), None)
    if "weight_packed" in headers or "blocks" in headers:
        if scale is None or scale.type in _FLOATS:
            return "mxfp4" if "blocks" in headers else "pack_quantized"
        return "nvfp4" if scale.type == "F8_E4M3" else "mxfp4"
    weight = headers.get("weight")
    if weight is None:
        return None
    if weight.type in _FLOATS and scale is None:
        return FLOAT
    if weight.type in _BYTES and scale is not None and math.prod(weight.shape) == n * (k // 2):
        return {"F8_E4M3": "nvfp4", "U8": "mxfp4", "F8_E8M0": "mxfp4"}.get(scale.type)
    if weight.type == "F8_E4M3" or (weight.type == "U8" and scale is not None):
        return _recognize_fp8(scale, n, k, declared)
    return None


def _recognize_fp8(scale: Header | None, n: int, k: int, declared: Quantization | None) -> str:
    if scale is None:
        return "fp8_block" if declared and declared.block else "fp8_row"
    if scale.type in _EXPONENTS and scale.shape in ((n, -(-k // 32)), (-(-k // 32), n)):
        return "mxfp8"
    block = declared.block if declared else None
    shapes = _blocks(Numbers(n, k, 1, block))[0] if block else ()
    if block and scale.shape in (shapes, shapes[::-1]):
        return "fp8_block"
    return "fp8_row" if math.prod(scale.shape) in (1, n) else "fp8_block"


def group_size(encoding: str, headers: Mapping[str, Header], k: int, declared: Quantization | None) -> int:
    """Elements of k that share a scale: those of the encoding or of the config, else by the shape of the scales.

    Raises
    ------
    ValueError
        A group that does not divide k, or is no multiple of 16; a fragment of a sentence that begins after the name of
        a tensor.
    """
    size = ENCODINGS[encoding].group
    if not size and declared and declared.group_size is not None:
        size = k if declared.group_size == -1 else declared.group_size
    if not size:
        scale = headers.get("weight_scale") or headers.get("scales")
        axis = 0 if encoding in ("gptq", "gptq_v2", "awq") else -1
        groups = scale.shape[axis] if scale is not None and scale.shape else 1
        size = k // max(groups, 1) or 1
    unit = 16 if encoding == "nvfp4" else 32
    if encoding in _GROUPED and (k % size or size % unit):
        raise ValueError(
            f"has scales for groups of {size} of {k} elements; kt_kernel reads groups that divide them and are a "
            f"multiple of {unit}"
        )
    return size


def numbers_of(encoding: str, headers: Mapping[str, Header], n: int, k: int, declared: Quantization | None) -> Numbers:
    """What the shapes of the tensors must follow; errors are those of :func:`group_size`."""
    block = declared.block if declared else None
    return Numbers(n, k, group_size(encoding, headers, k, declared), block or (128, 128))


def gptq_version(encoding: str, qzeros: torch.Tensor | None, declared: Quantization | None) -> str:
    """``"gptq_v2"`` for symmetric weights that are called gptq but store their zero points as 8, else the encoding.

    The first version stores a zero point less 1, so these would be 9, which no symmetric weights have. Files of both
    kinds are on the hub; kernels for symmetric weights (Marlin's) never look at the zero points.
    """
    if encoding != "gptq" or qzeros is None or not (declared and declared.symmetric):
        return encoding
    return "gptq_v2" if bool((qzeros.view(torch.uint8) == 0x88).all()) else encoding


def source_of(encoding: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
    """The source string: ``"fp8_block128x128"``, ``"gptq"``, ``"bf16"``."""
    if encoding == FLOAT:
        return FLOAT_SOURCES[dtype]
    return f"fp8_block{block[0]}x{block[1]}" if encoding == "fp8_block" else encoding


def describe(encoding: str, weight_type: str, numbers: Numbers) -> str:
    """What weights are, in words: ``"fp8 weights with a scale a block of 128 x 128"``."""
    title = ENCODINGS[encoding].title
    if encoding == FLOAT:
        return f"unquantized weights ({weight_type})"
    if encoding == "fp8_block":
        return f"{title} of {numbers.block[0]} x {numbers.block[1]}"
    if encoding in _GROUPED and not ENCODINGS[encoding].group:
        return f"{title}, groups of {numbers.group}"
    return title


def source_parts(encoding: str, tensors: Mapping[str, torch.Tensor], numbers: Numbers) -> list[torch.Tensor]:
    """The parts of a source from the tensors of one matrix, which have the shapes of the table.

    Parameters
    ----------
    encoding : str
        Name in :data:`ENCODINGS`.
    tensors : mapping
        By the name of their part, of one matrix ``[n, k]`` each.
    numbers : Numbers
        From :func:`numbers_of`.

    Raises
    ------
    ValueError
        Values that a tensor beside the weights must not have; a fragment that begins after the name of the matrix.
    """
    _check_order(tensors, numbers)
    parts = []
    for part in ENCODINGS[encoding].parts:
        name = part.find(tensors)
        if name is None or not part.needed:
            continue
        tensor = tensors[name]
        if name in _GLOBAL_SCALES:
            tensor = _global_scale(name, tensor)
        elif encoding == "fp8_row" and name in SCALES:
            tensor = tensor.reshape(-1).expand(numbers.n).contiguous()
        elif encoding == "fp8_block" and tensor.dtype == torch.float8_e8m0fnu:
            tensor = tensor.to(torch.bfloat16)
        elif tensor.dtype in (torch.int8, torch.float8_e8m0fnu):
            tensor = tensor.view(torch.uint8)
        parts.append(tensor.reshape(numbers.n, -1) if tensor.dim() > 2 else tensor)
    return parts


def _global_scale(name: str, tensor: torch.Tensor) -> torch.Tensor:
    scale = float(tensor)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"has a {name} of {scale:g}, which is no scale; download the checkpoint again")
    return tensor.reshape(1) if name == "weight_scale_2" else 1 / tensor.reshape(1)


def _check_order(tensors: Mapping[str, torch.Tensor], numbers: Numbers) -> None:
    shape = tensors.get(_SHAPE)
    if shape is not None and shape.tolist() != [numbers.n, numbers.k]:
        raise ValueError(
            f"has a weight_shape of {shape.tolist()} but config.json means [{numbers.n}, {numbers.k}]; copy the "
            f"checkpoint again"
        )
    name = next((name for name in _ORDER if name in tensors), None)
    if name is None:
        return
    order, in_order = tensors[name].long(), torch.arange(numbers.k) // numbers.group
    # compressed-tensors writes -1 before it has an order, and reads that as columns in order
    is_unset = name == "weight_g_idx" and bool((order == -1).any())
    if not (is_unset or torch.equal(order, in_order)):
        raise ValueError(
            "has columns in the order of activations (desc_act, actorder: group), which kt_kernel does not read; give "
            "a checkpoint quantized with desc_act=false or actorder: weight"
        )


def is_asymmetric(parts: set[str]) -> bool:
    """Whether compressed-tensors int4 weights have zero points beside them."""
    return _ZERO_POINT in parts
