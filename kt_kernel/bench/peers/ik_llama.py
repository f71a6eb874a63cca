"""ik_llama.cpp: the library of the wheel ik-llama-cpp-python, an AVX2 build with its row-interleaved types."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sysconfig
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

from .ggml_graph import TO_FLOAT, GgmlSystem, open_libraries
from .layer_data import LayerData

UNARY_SILU = 10


class TypeTraits(ctypes.Structure):
    """ggml_type_traits_t of this fork."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", TO_FLOAT),
        ("from_float", c_void_p),
        ("from_float_ref", c_void_p),
        ("from_float_to_mat", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
        ("ncols", c_int64),
        ("gemv", c_void_p),
        ("gemm", c_void_p),
        ("row_meta_size", c_int64),
    ]


FUNCTIONS: dict[str, tuple] = {
    "ggml_moe_up_gate": (c_void_p, [c_void_p] * 5 + [c_int]),
    "ggml_multi_add": (c_void_p, [c_void_p, c_void_p, c_int]),
    "ggml_internal_get_type_traits": (TypeTraits, [c_int]),
}


class System(GgmlSystem):
    """The fused up-gate node and the types that its ``-rtr`` makes; see `worker.SystemProtocol`."""

    types = {
        "Q8_0_R8": (208, 8),
        "Q4_0_R8": (202, 2),
        "Q4_K_R4": (212, 12),
        "F16": (1, 1),
    }

    def __init__(self, data: LayerData, threads: int) -> None:
        folder = Path(sysconfig.get_path("platlib")) / "ik_llama_cpp" / "lib"
        super().__init__(data, threads, open_libraries([folder / "libggml.so"], FUNCTIONS))
        self.version = importlib.metadata.version("ik-llama-cpp-python")

    def to_float_function(self, ggml_type: int) -> Callable:
        """From the table of types."""
        return self.lib.ggml_internal_get_type_traits(ggml_type).to_float

    def up_gate(self, context: int, up: int, gate: int, x: int, ids: int) -> int:
        """Both products, SILU and product in one node."""
        return self.lib.ggml_moe_up_gate(context, up, gate, x, ids, UNARY_SILU)

    def add_slots(self, context: int, rows: int, sizes: tuple[int, int, int]) -> int:
        """One node for all slots, as this fork's graphs have it."""
        hidden, slots, tokens = sizes
        if slots == 1:
            return super().add_slots(context, rows, sizes)
        view = self.lib.ggml_view_2d(context, rows, hidden, tokens, 4 * hidden * slots, 0)
        return self.lib.ggml_multi_add(context, view, slots)
