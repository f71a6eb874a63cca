"""The methods of ``--kt-method``: names of SGLang, each with the packed layout it computes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How the experts of a layer are stored and computed.

    Attributes
    ----------
    name : str
        Value of ``--kt-method``.
    layout : str
        Versioned layout key of the packed weights (``csrc/format/packed_layout.h``).
    description : str
        One line for tables and messages.
    """

    name: str
    layout: str
    description: str

    @property
    def weight_dtype(self) -> str:
        """``"int8"``, ``"int4"`` or ``"bf16"``: the row of the kernel table it uses."""
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
            "int8_n64k4_r512_v1",
            "8-bit weights with one scale a row, rotated; 8.1 bits a weight, close to bf16",
        ),
        Method(
            "AMXINT4",
            "int4g32_n64k8_r512_v1",
            "4-bit weights with a searched scale per group of 32, rotated; 4.5 bits a weight",
        ),
        Method("BF16", "bf16_n64k2_v1", "bf16 weights as in the checkpoint; 16 bits a weight"),
    )
}

# Names other releases of SGLang accept. A user who types one must learn that it is known and not there yet.
LATER_METHODS = (
    "FP8",
    "FP8_PERCHANNEL",
    "RAWINT4",
    "GPTQ_INT4",
    "MXFP4",
    "MXFP8",
    "LLAMAFILE",
    "MOE_INT4",
    "MOE_INT8",
    "SYCL_GPTQ_INT4",
)


def weight_dtype_of(layout: str) -> str:
    """The code type a layout key begins with: ``"int8"``, ``"int4"`` or ``"bf16"``."""
    for dtype in ("int8", "int4", "bf16"):
        if layout.startswith(dtype):
            return dtype
    raise ValueError(f"layout {layout!r} is unknown; known layouts begin with int8, int4 or bf16.")


def get_method(name: str | None) -> Method:
    """Look a method up.

    Parameters
    ----------
    name : str or None
        Value of ``--kt-method``; None means AMXINT4, SGLang's default.

    Raises
    ------
    ValueError
        Unknown name; the message lists the supported ones.
    """
    if name is None:
        name = "AMXINT4"
    method = METHODS.get(name)
    if method is not None:
        return method
    supported = ", ".join(METHODS)
    if name in LATER_METHODS:
        raise ValueError(f"method {name} is not supported by this version of kt_kernel yet; use one of {supported}.")
    raise ValueError(f"method {name!r} is unknown; kt_kernel supports {supported}.")
