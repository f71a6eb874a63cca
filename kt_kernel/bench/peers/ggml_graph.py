"""The MoE layer as a graph of ggml, through ctypes: what llama.cpp and ik_llama.cpp have in common.

    gate, up = MUL_MAT_ID(x); h = SILU(gate) * up; MUL_MAT_ID(h) * routing weight, added over the slots of a token

Weights are made by the library's own quantizer and put in the buffer type its model loader would take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from .layer_data import Batch, LayerData, to_float

F32, I32 = 0, 26
# Tensors and a graph of at most 2048 nodes, without their data.
GRAPH_BYTES = 4 << 20
TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name: (result, arguments); of the functions both libraries have
FUNCTIONS: dict[str, tuple] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_cont": (c_void_p, [c_void_p] * 2),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_set_output": (None, [c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_blck_size": (c_int64, [c_int]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_gallocr_new": (c_void_p, [c_void_p]),
    "ggml_gallocr_alloc_graph": (c_bool, [c_void_p] * 2),
}


def open_libraries(files: list[Path], more: dict[str, tuple]) -> ctypes.CDLL:
    """Load the files in order and type the functions; the last one sees all of them.

    Raises
    ------
    OSError, AttributeError
        A library that does not load here, or has not a function that is needed.
    """
    for file in files:
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    everything = ctypes.CDLL(None)
    for name, (result, arguments) in {**FUNCTIONS, **more}.items():
        function = getattr(library, name, None) or getattr(everything, name)
        function.restype, function.argtypes = result, arguments
        setattr(everything, name, function)
    return everything


class GgmlSystem:
    """One set of weight tensors a format; see `worker.SystemProtocol`. An engine adds what differs in it.

    Attributes
    ----------
    types : dict
        Format to ``(ggml_type stored, ggml_type with the same values in plain order)``.
    """

    types: dict[str, tuple[int, int]]
    version: str

    def __init__(self, data: LayerData, threads: int, library: ctypes.CDLL) -> None:
        self.data, self.lib = data, library
        self.backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.weights: dict[str, tuple[int, int, int]] = {}
        self.graphs: dict[tuple[str, int], Graph] = {}

    # --- what differs between the engines ---

    def buffer_types(self) -> list[int]:
        """Buffer types for weights, the best first; the last one takes any tensor."""
        return [self.lib.ggml_backend_cpu_buffer_type()]

    def takes(self, buffer_type: int, tensor: int) -> bool:
        """Whether a weight tensor that lies in this buffer type can be computed."""
        return True

    def to_float_function(self, ggml_type: int) -> Callable:
        """The library's function from a row of a type to fp32."""
        raise NotImplementedError

    def up_gate(self, context: int, up: int, gate: int, x: int, ids: int) -> int:
        """SILU(gate x) * (up x), ``[I, k, T]``."""
        raise NotImplementedError

    def add_slots(self, context: int, rows: int, sizes: tuple[int, int, int]) -> int:
        """The sum over the slots of ``[H, k, T]``, as llama.cpp's graph adds them."""
        hidden, slots, tokens = sizes
        views = [
            self.lib.ggml_view_2d(context, rows, hidden, tokens, 4 * hidden * slots, 4 * hidden * slot)
            for slot in range(slots)
        ]
        total = views[0]
        for view in views[1:]:
            total = self.lib.ggml_add(context, total, view)
        return self.lib.ggml_cont(context, total) if slots == 1 else total

    # --- the protocol of a worker ---

    def load(self, name: str) -> float:
        """Quantize the different experts and store a copy of one for every expert."""
        tensors, total = [], 0
        block = self.lib.ggml_blck_size(self.types[name][0])
        sizes = self.data.sizes
        if sizes.hidden_size % block or sizes.intermediate_size % block:
            raise ValueError(
                f"{name} has blocks of {block}, which do not divide {sizes.hidden_size} and {sizes.intermediate_size}."
            )
        for bits in (self.data.up, self.data.gate, self.data.down):
            quantized = [self.quantize(self.types[name][0], to_float(matrix)) for matrix in bits]
            experts = self.data.sizes.num_experts
            stored = np.concatenate([quantized[expert % len(quantized)] for expert in range(experts)])
            tensors.append(self.store(name, bits.shape[1:], stored))
            total += stored.nbytes
        self.weights[name] = (tensors[0], tensors[1], tensors[2])
        return total / self.data.sizes.num_experts

    def quantize(self, ggml_type: int, weight: np.ndarray) -> np.ndarray:
        """The bytes of a matrix ``[N, K]`` in a type."""
        rows, columns = weight.shape
        weight = np.ascontiguousarray(weight)
        out = np.zeros(rows * self.lib.ggml_row_size(ggml_type, columns), np.uint8)
        self.lib.ggml_quantize_chunk(ggml_type, weight.ctypes.data, out.ctypes.data, 0, rows, columns, None)
        return out

    def store(self, name: str, shape: tuple[int, ...], stored: np.ndarray) -> int:
        """A weight tensor ``[K, N, E]`` in the best buffer type that takes it."""
        for buffer_type in self.buffer_types():
            context = self.lib.ggml_init(InitParams(GRAPH_BYTES, None, True))
            tensor = self.lib.ggml_new_tensor_3d(
                context, self.types[name][0], shape[1], shape[0], self.data.sizes.num_experts
            )
            if not self.takes(buffer_type, tensor):
                self.lib.ggml_free(context)
                continue
            if not self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type):
                raise MemoryError(f"ggml has no memory for {stored.nbytes} bytes of weights.")
            size = self.lib.ggml_nbytes(tensor)
            if size != stored.nbytes:
                raise ValueError(f"ggml stores {size} bytes where the quantizer made {stored.nbytes}.")
            self.lib.ggml_backend_tensor_set(tensor, stored.ctypes.data, 0, size)
            return tensor
        raise ValueError(f"no buffer type of ggml takes {name}.")

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Quantized in plain order, and back by the library's own function."""
        plain = self.types[name][1]
        function = self.to_float_function(plain)

        def round_trip(weight: np.ndarray) -> np.ndarray:
            row_bytes = self.lib.ggml_row_size(plain, weight.shape[1])
            source = self.quantize(plain, weight)
            out = np.zeros(weight.shape, np.float32)
            for row in range(len(weight)):
                function(
                    source.ctypes.data + row * row_bytes,
                    out[row].ctypes.data_as(POINTER(c_float)),
                    weight.shape[1],
                )
            return out

        gate, up, down = (
            np.stack([round_trip(to_float(matrix)) for matrix in bits])
            for bits in (self.data.gate, self.data.up, self.data.down)
        )
        return gate, up, down

    def prepare(self, name: str, batch: Batch):
        """A graph for this number of tokens, kept. The forward copies its inputs, as ours does."""
        key = name, len(batch.ids)
        if key not in self.graphs:
            self.graphs[key] = Graph(self, name, key[1])
        graph = self.graphs[key]
        inputs = to_float(batch.hidden), batch.ids.astype(np.int32), batch.weights
        copies = [(to, array.ctypes.data, array.nbytes) for to, array in zip(graph.inputs, inputs, strict=True)]

        def forward(alive: tuple[np.ndarray, ...] = inputs) -> None:
            for copy in copies:
                ctypes.memmove(*copy)
            status = self.lib.ggml_backend_graph_compute(self.backend, graph.graph)
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}.")

        return forward, graph.output


class Graph:
    """The nodes and the memory of one forward of `tokens` tokens."""

    def __init__(self, system: GgmlSystem, name: str, tokens: int) -> None:
        lib, sizes = system.lib, system.data.sizes
        hidden, slots = sizes.hidden_size, sizes.top_k
        self.lib, self.shape = lib, (tokens, hidden)
        self.context = lib.ggml_init(InitParams(GRAPH_BYTES, None, True))
        inputs = lib.ggml_init(InitParams(GRAPH_BYTES, None, True))
        x = lib.ggml_new_tensor_3d(inputs, F32, hidden, 1, tokens)
        ids = lib.ggml_new_tensor_2d(inputs, I32, slots, tokens)
        scales = lib.ggml_new_tensor_3d(inputs, F32, 1, slots, tokens)
        cpu = lib.ggml_backend_cpu_buffer_type()
        lib.ggml_backend_alloc_ctx_tensors_from_buft(inputs, cpu)
        self.inputs = [lib.ggml_get_data(tensor) for tensor in (x, ids, scales)]
        up, gate, down = system.weights[name]
        rows = system.up_gate(self.context, up, gate, x, ids)
        rows = lib.ggml_mul_mat_id(self.context, down, rows, ids)
        rows = lib.ggml_mul(self.context, rows, scales)
        self.result = system.add_slots(self.context, rows, (hidden, slots, tokens))
        lib.ggml_set_output(self.result)
        self.graph = lib.ggml_new_graph(self.context)
        lib.ggml_build_forward_expand(self.graph, self.result)
        self.allocator = lib.ggml_gallocr_new(cpu)
        if not lib.ggml_gallocr_alloc_graph(self.allocator, self.graph):
            raise MemoryError(f"ggml has no memory for a graph of {tokens} tokens.")

    def output(self) -> np.ndarray:
        """Result of the last forward."""
        out = np.zeros(self.shape, np.float32)
        self.lib.ggml_backend_tensor_get(self.result, out.ctypes.data, 0, out.nbytes)
        return out
