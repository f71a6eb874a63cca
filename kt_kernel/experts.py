"""Experts of one MoE layer on the CPU: engines shared by layers, and the layer itself."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

import torch

from kt_kernel import _ext, ops
from kt_kernel.config import EngineConfig, MoEConfig, apply_log_level

logger = logging.getLogger("kt_kernel")

_engines: dict[EngineConfig, _ext.Engine] = {}
_engines_lock = threading.Lock()


def _forget_engines() -> None:
    """In a fork: the engines have no threads there, and a thread that is not there may hold the lock."""
    global _engines_lock
    _engines.clear()
    _engines_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_engines)


def get_engine(config: EngineConfig) -> _ext.Engine:
    """Worker pool, CPU stream and scratch for a configuration; the same one for every layer that asks for it.

    Warnings of the pool (clamped nodes, no permission to bind) are logged once, when it is made.

    Raises
    ------
    ValueError, RuntimeError
        The pool cannot be made as asked (unknown node ids).
    """
    with _engines_lock:
        engine = _engines.get(config)
        if engine is None:
            apply_log_level()
            engine = _ext.Engine(
                num_threads=config.num_threads, num_nodes=config.num_nodes, node_ids=list(config.node_ids)
            )
            for warning in engine.warnings:
                logger.warning("%s", warning)
            _engines[config] = engine
        return engine


# Layout keys of a layer's w13 and w2 (csrc/format/packed_layout.h).
Layouts = tuple[str, str]


def packed_bytes(layouts: Layouts, *, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """Bytes of one expert's packed w13 and w2.

    gate and up are interleaved by 32 rows, so w13 counts as ``2 * round_up(intermediate_size, 32)`` rows.
    """
    rows = (intermediate_size + 31) // 32 * 64
    w13 = _ext.layout_info(layouts[0], rows, hidden_size)["matrix_bytes"]
    w2 = _ext.layout_info(layouts[1], hidden_size, intermediate_size)["matrix_bytes"]
    return int(w13), int(w2)


# csrc/moe/moe_layer.cpp cuts a batch into passes of at most so many tokens and rows (tokens x top_k).
_PASS_TOKENS, _PASS_ROWS = 4096, 32768
# csrc/moe/forward_pass.cpp: columns of a panel, rows of a tile, the activation values up to which every worker
# quantizes all of them for itself, and the output sums that it keeps at a time.
_PANEL_COLUMNS, _TILE_ROWS, _REDUNDANT_VALUES, _SUMS_BYTES = 64, 48, 16384, 1 << 20
# csrc/kernels/kernel.h: rows of an AMX tile.
_AMX_ROWS = 16
_HUGE_PAGE = 2 << 20


def _sums(tokens: int, hidden_size: int) -> int:
    """Most bytes of a worker's output sums, for up to so many tokens: as many w2 panels as fit _SUMS_BYTES, or one."""
    panel = 4 * tokens * _PANEL_COLUMNS
    return max(panel, min(_SUMS_BYTES, panel * -(-hidden_size // _PANEL_COLUMNS)))


def scratch_bytes(
    layouts: Sequence[Layouts],
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    num_tokens: int,
    top_k: int,
    num_threads: int,
) -> int:
    """Most that an engine's buffers can grow to: ``Engine.scratch_bytes`` after any batches of up to `num_tokens`.

    ``intermediate[rows, I] fp32 + codes[tokens, H] + codes[rows, I] + threads x (sums[panels, tokens, 64] fp32 + ...)``

    Where kernels in AMX tiles were chosen, ``packed[rows, H] + packed[rows, I]`` besides, each expert in whole tiles.

    Parameters
    ----------
    layouts : sequence of (str, str)
        Layouts of the layers that share the engine; each buffer is as large as the most demanding one needs.
    num_experts, hidden_size, intermediate_size, top_k : int
        Sizes of every layer.
    num_tokens : int
        Tokens of the largest batch.
    num_threads : int
        Threads of the pool.
    """
    tokens = min(num_tokens, _PASS_TOKENS, max(1, _PASS_ROWS // top_k))
    rows = tokens * top_k
    few_tokens = min(tokens, _REDUNDANT_VALUES // hidden_size)
    few_rows = min(rows, _REDUNDANT_VALUES // intermediate_size)
    token_codes, row_codes, packed_tokens, packed_rows, worker = 0, 0, 0, 0, 0

    def codes(count: int, info: dict) -> int:
        # codes, scales and group sums begin on a cache line each
        row = info["padded_k"] * (2 if info["bf16_rows"] else 1)
        return count * (row + 4 * info["num_activation_blocks"] + 4 * info["num_groups"]) + 3 * 64

    for w13, w2 in layouts:
        sizes = ((w13, hidden_size), (w2, intermediate_size))
        wide, narrow = (_ext.layout_info(layout, 1, k) for layout, k in sizes)
        token_codes = max(token_codes, codes(tokens, wide))
        row_codes = max(row_codes, codes(rows, narrow))
        k = max(wide["padded_k"], narrow["padded_k"])
        expanded = max(_ext.expanded_bytes(layout, k) for layout, k in sizes)
        in_tiles = (rows // _AMX_ROWS + min(num_experts, rows)) * _AMX_ROWS
        # packed_value_bytes 0: no kernel in tiles
        packed_tokens = max(packed_tokens, in_tiles * wide["padded_k"] * _ext.packed_value_bytes(w13))
        packed_rows = max(packed_rows, in_tiles * narrow["padded_k"] * _ext.packed_value_bytes(w2))
        columns = _sums(tokens, hidden_size)
        few = _sums(few_tokens, hidden_size) + codes(few_tokens, wide) + codes(few_rows, narrow)
        worker = max(worker, 4 * _TILE_ROWS * _PANEL_COLUMNS + 4 * k + 64 + expanded + max(columns, few))
    intermediate = 4 * rows * -(-intermediate_size // _PANEL_COLUMNS) * _PANEL_COLUMNS
    shared = (intermediate, token_codes, row_codes, packed_tokens, packed_rows)
    return sum(map(_grown, shared)) + num_threads * _grown(worker)


def _grown(num_bytes: int) -> int:
    """Bytes of a buffer of ``csrc/moe/moe_scratch.h`` that was asked for so many: an eighth more, whole huge pages."""
    return -(-(num_bytes + num_bytes // 8) // _HUGE_PAGE) * _HUGE_PAGE


class CpuExperts:
    """The experts of one layer that are computed on the CPU.

    ``output[t] = sum_s topk_weights[t, s] * (down_e act(gate_e x_t + b, up_e x_t + b) + b)``, e = topk_ids[t, s] if it
    is here, act the layer's activation, b the biases of experts that were given some

    Parameters
    ----------
    config : MoEConfig
        Sizes of the layer.
    layouts : (str, str)
        Packed layouts of w13 and of w2, decide the kernels.
    engine : Engine
        From :func:`get_engine`.
    expert_ids : sequence of int, optional
        Experts that live here; the others take no memory. All by default.
    reserved_ids : sequence of int, optional
        Others that may be loaded later: address space until then, memory only once they are loaded.

    Raises
    ------
    ValueError, RuntimeError
        Sizes or layout the library cannot compute, or no memory for it.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        layouts: Layouts,
        engine: _ext.Engine,
        expert_ids: Sequence[int] | None = None,
        reserved_ids: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.layouts = layouts
        self.engine = engine
        self.expert_ids = sorted(range(config.num_experts) if expert_ids is None else expert_ids)
        self.reserved_ids = sorted(reserved_ids)
        self.layer = _ext.Layer(
            engine,
            config.layer_idx,
            config.num_experts,
            config.top_k,
            config.hidden_size,
            config.intermediate_size,
            *layouts,
            self.expert_ids,
            self.reserved_ids,
            config.activation.name,
            config.activation.limit,
            config.activation.alpha,
        )
        self._handle: int = self.layer.handle

    # --- weights ---

    def load_experts(
        self,
        experts: Sequence[int],
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
    ) -> None:
        """Quantize and pack experts on the pool.

        Parameters
        ----------
        experts : sequence of int
            Ids to fill.
        gate, up, down : sequence of Tensor
            One per id: ``[intermediate_size, hidden_size]`` twice, ``[hidden_size, intermediate_size]``; bf16, fp16 or
            fp32, CPU, contiguous.

        Raises
        ------
        ValueError, RuntimeError
            Wrong shapes or types, NaN or infinity in a weight, an expert that does not live here.
        """
        torch.ops.kt_kernel.load_experts(self._handle, list(experts), list(gate), list(up), list(down))
        self._check_tiles()

    def load_sources(
        self,
        experts: Sequence[int],
        w13_source: str,
        w2_source: str,
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
    ) -> None:
        """Pack experts that are encoded in some way, on the pool.

        Codes are kept where the layer's layouts are those of the sources (``torch.ops.kt_kernel.source_layout``);
        where they are layouts of :meth:`load_experts`, weights are decoded and quantized.

        Parameters
        ----------
        experts : sequence of int
            Ids to fill.
        w13_source, w2_source : str
            What gate and up, and down, are (``csrc/format/source.h``).
        gate, up, down : sequence of Tensor
            Parts of the sources, those of one id after the other.

        Raises
        ------
        ValueError, RuntimeError
            Parts of another form, a scale that is NaN or infinite, an expert that does not live here.
        """
        torch.ops.kt_kernel.load_source(
            self._handle, list(experts), w13_source, w2_source, list(gate), list(up), list(down)
        )
        self._check_tiles()

    def load_biases(
        self,
        experts: Sequence[int],
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
    ) -> None:
        """Add biases to the outputs of gate, up and down from now on, also where weights are loaded again.

        Parameters
        ----------
        experts : sequence of int
            Ids they are of.
        gate, up, down : sequence of Tensor
            One per id: ``[intermediate_size]`` twice, ``[hidden_size]``; bf16, fp16 or fp32, CPU.

        Raises
        ------
        ValueError, RuntimeError
            Wrong shapes or types, NaN or infinity, an expert that does not live here.
        """
        torch.ops.kt_kernel.load_bias(self._handle, list(experts), list(gate), list(up), list(down))

    def load_packed(self, experts: Sequence[int], w13: Sequence[torch.Tensor], w2: Sequence[torch.Tensor]) -> None:
        """Copy packed experts to the nodes that own them.

        Parameters
        ----------
        experts : sequence of int
            Ids to fill.
        w13, w2 : sequence of Tensor
            One per id: the packed bytes, uint8, CPU.

        Raises
        ------
        ValueError, RuntimeError
            Another number of bytes than the layout has, an expert that does not live here.
        """
        torch.ops.kt_kernel.load_packed(self._handle, list(experts), list(w13), list(w2))
        self._check_tiles()

    def _check_tiles(self) -> None:
        """Check kernels in AMX tiles on the first expert that they are for, once a process, and say what came of it."""
        found, right = self.layer.check_tiles()
        if found:
            logger.log(logging.INFO if right else logging.ERROR, "%s", found)

    def export_packed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed bytes of one expert (w13, w2), uint8: the inverse of :meth:`load_packed`."""
        return torch.ops.kt_kernel.export_packed(self._handle, expert)

    def write_expert(
        self,
        expert: int,
        w13_addresses: Sequence[int],
        w2_addresses: Sequence[int],
        w13_scale_addresses: Sequence[int] = (),
        w2_scale_addresses: Sequence[int] = (),
    ) -> int:
        """Queue the writing of one expert into host memory, cut for ranks of a tensor-parallel group.

        Without scales as bf16; with scales as the codes and scales of its files (``csrc/moe/native_export.h``).

        Rank r of R holds ``I' = I / R`` features: w13 ``[2 * I', H]`` (gate rows, then up rows) and w2 ``[H, I']``
        (``csrc/moe/expert_export.h``).

        Parameters
        ----------
        expert : int
            An expert that is loaded here.
        w13_addresses, w2_addresses : sequence of int
            One address for each rank. The memory belongs to the write until :meth:`wait_written` has returned.
        w13_scale_addresses, w2_scale_addresses : sequence of int, optional
            Likewise, of the scales; both or none.

        Returns
        -------
        int
            The ticket for :meth:`wait_written`.
        """
        addresses = [list(a) for a in (w13_addresses, w2_addresses, w13_scale_addresses, w2_scale_addresses)]
        return int(torch.ops.kt_kernel.write_expert(self._handle, expert, len(addresses[0]), *addresses))

    @staticmethod
    def wait_written(ticket: int) -> None:
        """Wait for one write; an error of it is raised here."""
        torch.ops.kt_kernel.wait_written(ticket)

    # --- compute ---

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queue a forward and return at once; all inputs are copied before that.

        Parameters
        ----------
        hidden_states : Tensor
            ``[num_tokens, hidden_size]``, bf16, fp16 or fp32, CPU, contiguous.
        topk_ids : Tensor
            ``[num_tokens, top_k]``, int32 or int64, CPU; -1 = no expert.
        topk_weights : Tensor
            ``[num_tokens, top_k]``, fp32, CPU.
        skip : Tensor, optional
            ``[num_experts]``, bool, CPU: experts computed elsewhere.

        Returns
        -------
        Tensor
            The ticket for :meth:`sync`: int64 ``[1]``.
        """
        return ops.submit(hidden_states, topk_ids, topk_weights, skip, self._handle)

    @staticmethod
    def sync(ticket: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Wait for a ticket; returns a fresh ``[num_tokens, hidden_size]`` tensor of hidden_states' dtype.

        Raises
        ------
        ValueError, RuntimeError
            What went wrong in the forward, e.g. an id out of range or an expert that was never loaded.
        """
        return ops.sync(ticket, hidden_states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute now: arguments of :meth:`submit`, result of :meth:`sync`."""
        return ops.moe_forward(hidden_states, topk_ids, topk_weights, skip, self._handle)

    def submit_on_stream(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        skip: torch.Tensor | None,
        stream: int,
        current_stream: int,
    ) -> torch.Tensor:
        """Enqueue a forward on a device's stream; may be captured. See :func:`kt_kernel.ops.submit_on_stream`."""
        return ops.submit_on_stream(hidden_states, topk_ids, topk_weights, skip, self._handle, stream, current_stream)

    @staticmethod
    def sync_on_stream(
        ticket: torch.Tensor, hidden_states: torch.Tensor, *, stream: int, current_stream: int
    ) -> torch.Tensor:
        """Enqueue the wait for it; the result is used by `current_stream`."""
        return ops.sync_on_stream(ticket, hidden_states, stream, current_stream)

    # --- state ---

    @property
    def bytes(self) -> int:
        """Memory of the packed experts."""
        return self.layer.bytes

    @property
    def explain(self) -> str:
        """The kernels in use, as one line."""
        return self.layer.explain

    def counters(self) -> dict:
        """Forwards, tokens, rows, bytes needed and read, barriers and busy time since construction.

        ``expert_counts``, int64 ``[num_experts]``, counts every id of every forward, also of experts that are computed
        elsewhere; ids of -1 are not counted.
        """
        counters = self.layer.counters()
        counters["expert_counts"] = torch.tensor(counters["expert_counts"], dtype=torch.int64)
        return counters

    def close(self) -> None:
        """Free the memory; later calls raise."""
        self.layer.close()


def check_devices() -> None:
    """Raise what went wrong in forwards that a graph or a stream asked for since the last call that raised.

    Errors of a launched graph meet no Python call of the graph's own: call this after each pass.

    Raises
    ------
    RuntimeError
        The first error, with the layer.
    """
    for engine in list(_engines.values()):
        engine.check_devices()


def clear_device_buffers() -> None:
    """Free the pinned buffers that neither a graph nor a forward under way refers to."""
    for engine in list(_engines.values()):
        engine.clear_device_buffers()
