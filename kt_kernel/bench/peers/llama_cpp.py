"""llama.cpp: ggml of the source package llama-cpp-python, compiled for this machine by `install.py`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

from .ggml_graph import F32, GRAPH_BYTES, I32, TO_FLOAT, GgmlSystem, InitParams, open_libraries
from .layer_data import LayerData


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", TO_FLOAT),
        ("from_float_ref", c_void_p),
    ]


FUNCTIONS: dict[str, tuple] = {
    "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
    "ggml_version": (c_char_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
}
# struct ggml_tensor: its type, then the buffer, then the sizes
BUFFER_OFFSET, NE_OFFSET = 8, 16
LIBRARIES = ("libggml-base.so", "libggml-cpu.so")


class System(GgmlSystem):
    """ggml with its repacked weights where it has them; see `worker.SystemProtocol`."""

    types = {"Q8_0": (8, 8), "Q4_0": (2, 2), "Q4_K": (12, 12), "BF16": (30, 30)}

    def __init__(self, data: LayerData, threads: int) -> None:
        folder = Path(sys.prefix) / "ggml"
        library = open_libraries([folder / name for name in LIBRARIES], FUNCTIONS)
        super().__init__(data, threads, library)
        self.version = f"ggml {library.ggml_version().decode()}"
        registry = library.ggml_backend_cpu_reg()
        self.device = library.ggml_backend_reg_dev_get(registry, 0)
        address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        list_extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
        found = list_extra(self.device)
        self.extra: list[int] = []
        while found and found[len(self.extra)]:
            self.extra.append(found[len(self.extra)])

    def buffer_types(self) -> list[int]:
        """Those that repack, then plain memory."""
        return [*self.extra, *super().buffer_types()]

    def takes(self, buffer_type: int, tensor: int) -> bool:
        """Ask the device for a product whose weights lie there, as llama.cpp's model loader does."""
        if buffer_type not in self.extra:
            return True
        sizes = self.data.sizes
        context = self.lib.ggml_init(InitParams(GRAPH_BYTES, None, True))
        columns = c_int64.from_address(tensor + NE_OFFSET).value
        x = self.lib.ggml_new_tensor_3d(context, F32, columns, sizes.top_k, 512)
        ids = self.lib.ggml_new_tensor_2d(context, I32, sizes.top_k, 512)
        product = self.lib.ggml_mul_mat_id(context, tensor, x, ids)
        buffer = c_void_p.from_address(tensor + BUFFER_OFFSET)
        buffer.value = self.lib.ggml_backend_buft_alloc_buffer(buffer_type, 0)
        taken = self.lib.ggml_backend_dev_supports_op(self.device, product)
        self.lib.ggml_backend_buffer_free(buffer.value)
        buffer.value = None
        self.lib.ggml_free(context)
        return taken

    def to_float_function(self, ggml_type: int) -> Callable:
        """From the table of types."""
        return self.lib.ggml_get_type_traits(ggml_type).contents.to_float

    def up_gate(self, context: int, up: int, gate: int, x: int, ids: int) -> int:
        """Two products, then SILU and product in one node."""
        products = [self.lib.ggml_mul_mat_id(context, matrix, x, ids) for matrix in (up, gate)]
        return self.lib.ggml_swiglu_split(context, products[1], products[0])
