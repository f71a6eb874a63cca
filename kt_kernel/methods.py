"""The methods of ``--kt-method``: names of SGLang, each with what it computes in and from which files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Method:
    """How the experts of a layer are stored and computed.

    Attributes
    ----------
    name : str
        Value of ``--kt-method``.
    description : str
        One line for tables and messages.
    packed : str
        Versioned layout key (``csrc/format/packed_layout.h``) that other weights than those of `sources` are packed
        into; empty: there are no others.
    sources : tuple of str
        The kinds of sources (:func:`source_kind`) whose codes are kept, in a layout that each source decides.
    formats : tuple of str
        The weight formats (``csrc/base/weight_format.h``) that the codes of `sources` are kept in.
    alias : str
        The name in :data:`ALIASES` it was asked for by; empty: its own.
    """

    name: str
    description: str
    packed: str = ""
    sources: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    alias: str = ""

    @property
    def layout(self) -> str:
        """The layout key that float weights are packed into.

        Raises
        ------
        ValueError
            The method keeps codes that its files bring.
        """
        if self.packed:
            return self.packed
        raise ValueError(
            f"method {self.name} keeps the codes of quantized files and makes none of its own; use one of "
            f"{', '.join(FLOAT_METHODS)} for other weights."
        )

    def can_have(self, layout: str) -> bool:
        """Whether experts of this method may be packed so: by us in groups of any size, or as the codes of files, which
        are never rotated; a method that packs nothing by itself keeps floats among its files in bf16.
        """
        plain, packed = (re.sub(r"g\d+_", "_", key) for key in (layout, self.packed or METHODS["BF16"].packed))
        return plain == packed or (plain.partition("_")[0] in self.formats and "_r" not in plain)

    @property
    def weight_dtype(self) -> str:
        """``"int8"``, ``"int4"`` or ``"bf16"``: the weight format of :attr:`layout`."""
        return weight_dtype_of(self.layout)

    def layout_with_group(self, group_size: int | None) -> str:
        """Layout key for another group size.

        Parameters
        ----------
        group_size : int or None
            Elements of k that share one scale, a multiple of 32; 0 or -1: the whole row; None: the default.

        Raises
        ------
        ValueError
            No multiple of 32, or a method that has one scale a row anyway.
        """
        if group_size is None:
            return self.layout
        if self.weight_dtype != "int4":
            raise ValueError(
                f"group size {group_size} was given, but {self.name} has no groups; only AMXINT4 takes a group size."
            )
        if group_size in (0, -1):
            return "int4_n64k8_r512_v1"
        if group_size < 0 or group_size % 32:
            raise ValueError(f"group size {group_size} is no multiple of 32; use 32, 64, 128, ... or 0 for whole rows.")
        return f"int4g{group_size}_n64k8_r512_v1"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "AMXINT8",
            "8-bit weights with one scale a row, rotated; 8.1 bits a weight, close to bf16",
            packed="int8_n64k4_r512_v1",
            sources=("kt_int8",),
            formats=("int8", "int8f"),
        ),
        Method(
            "AMXINT4",
            "4-bit weights with a searched scale per group of 32, rotated; 4.5 bits a weight",
            packed="int4g32_n64k8_r512_v1",
            sources=("kt_int4",),
            formats=("int4f",),
        ),
        Method("BF16", "bf16 weights as in the checkpoint; 16 bits a weight", packed="bf16_n64k2_v1"),
        Method(
            "FP8",
            "fp8 (e4m3) weights with a scale a block, mostly 128 x 128, as in the files",
            sources=("fp8_block",),
            formats=("fp8f",),
        ),
        Method(
            "FP8_PERCHANNEL",
            "fp8 (e4m3) weights with a scale a row, as in the files",
            sources=("fp8_row",),
            formats=("fp8f",),
        ),
        Method(
            "MXFP8",
            "fp8 (e4m3) weights with a power of two per group of 32, as in the files",
            sources=("mxfp8",),
            formats=("fp8",),
        ),
        Method(
            "RAWINT4",
            "compressed-tensors int4 (pack-quantized) in groups of any multiple of 32, as in the files",
            sources=("pack_quantized",),
            formats=("int4", "int4h", "int4f"),
        ),
        Method(
            "GPTQ_INT4",
            "GPTQ int4, symmetric or with zero points, as in the files",
            sources=("gptq", "gptq_v2"),
            formats=("int4h", "int4z", "int4", "int4f"),
        ),
        Method("AWQ", "AWQ int4 with zero points, as in the files", sources=("awq",), formats=("int4z",)),
        Method(
            "MXFP4",
            "fp4 (E2M1) weights with a power of two per group of 32, as in the files",
            sources=("mxfp4",),
            formats=("fp4",),
        ),
        Method(
            "NVFP4",
            "fp4 (E2M1) weights with an fp8 scale per group of 16 and one a matrix, as in the files",
            sources=("nvfp4",),
            formats=("fp4c",),
        ),
        Method(
            "LLAMAFILE",
            "GGUF files: the codes of each tensor's own type",
            sources=("gguf",),
            formats=(
                "bf16",
                "int8h",
                "int6k",
                "int5h",
                "int5m",
                "int5km",
                "int4h",
                "int4m",
                "int4km",
                "int3k",
                "int2km",
                "iq4h",
                "iq4k",
                "fp4",
            ),  # fmt: skip
        ),
    )
}
# Those that pack weights of any float type, and whatever can be decoded to one.
FLOAT_METHODS = {name: method for name, method in METHODS.items() if method.packed}
# Other names for the same, but for files that kt-kernel converted: its kernels of these names pack weights otherwise.
ALIASES = {"MOE_INT4": "AMXINT4", "MOE_INT8": "AMXINT8"}

_REFUSED = {
    "SYCL_GPTQ_INT4": "computes on Intel GPUs, which kt_kernel does not; use GPTQ_INT4 for the same files",
}


def weight_dtype_of(layout: str) -> str:
    """The weight format a layout key begins with: ``"int8"``, ``"int4h"``, ``"bf16"``."""
    match = re.match(r"([a-z]+\d+[a-z]*?)(?:g\d+)?_", layout)
    if match is None:
        raise ValueError(f"layout {layout!r} is unknown; known layouts begin with int8, int4, bf16, fp8, ...")
    return match[1]


def source_kind(source: str) -> str:
    """What a source string is without its sizes and types: ``fp8_block128x128`` is ``fp8_block``, ``gguf:Q4_K`` is
    ``gguf``, ``kt_int4x2_rows`` is ``kt_int4``.
    """
    return re.sub(r"(?<=_block)\d+x\d+$|:.*$|(?<=^kt_int\d)x\d+_\w+$", "", source)


def method_of(kind: str) -> Method | None:
    """The method that keeps the codes of a kind of sources; None for floats, which have no codes."""
    return next((method for method in METHODS.values() if kind in method.sources), None)


def get_method(name: str | None) -> Method:
    """Look a method up.

    Parameters
    ----------
    name : str or None
        Value of ``--kt-method``; None means AMXINT4, SGLang's default.

    Raises
    ------
    ValueError
        Unknown or refused name; the message lists the supported ones.
    """
    if name is None:
        name = "AMXINT4"
    method = METHODS.get(ALIASES.get(name, name))
    if method is not None:
        return replace(method, alias=name) if name in ALIASES else method
    if name in _REFUSED:
        raise ValueError(f"method {name} {_REFUSED[name]}.")
    raise ValueError(f"method {name!r} is unknown; kt_kernel supports {', '.join((*METHODS, *ALIASES))}.")


def get_float_method(name: str) -> Method:
    """As :func:`get_method`, for weights in memory: refuses a method that only keeps the codes of files as well."""
    method = get_method(name)
    _ = method.layout
    return method
