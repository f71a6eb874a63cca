"""Experts of one MoE layer on the CPU: engines shared by layers, and the layer itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from kt_kernel import _ext, ops
from kt_kernel.config import EngineConfig, MoEConfig, apply_log_level

logger = logging.getLogger("kt_kernel")

_engines: dict[EngineConfig, _ext.Engine] = {}
_engines_lock = threading.Lock()


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


def packed_bytes(layout: str, *, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """Bytes of one expert's packed w13 and w2.

    gate and up are interleaved by 32 rows, so w13 counts as ``2 * round_up(intermediate_size, 32)`` rows.
    """
    rows = (intermediate_size + 31) // 32 * 64
    w13 = _ext.layout_info(layout, rows, hidden_size)["matrix_bytes"]
    w2 = _ext.layout_info(layout, hidden_size, intermediate_size)["matrix_bytes"]
    return int(w13), int(w2)


class CpuExperts:
    """The experts of one layer that are computed on the CPU.

    ``output[t] = sum_s topk_weights[t, s] * down_e(silu(gate_e x_t) * up_e x_t)``, e = topk_ids[t, s] if it is here

    Parameters
    ----------
    config : MoEConfig
        Sizes of the layer.
    layout : str
        Packed layout, decides the kernels.
    engine : Engine
        From :func:`get_engine`.
    expert_ids : sequence of int, optional
        Experts that live here; the others take no memory. All by default.

    Raises
    ------
    ValueError, RuntimeError
        Sizes or layout the library cannot compute, or no memory for it.
    """

    def __init__(
        self, config: MoEConfig, *, layout: str, engine: _ext.Engine, expert_ids: Sequence[int] | None = None
    ) -> None:
        self.config = config
        self.layout = layout
        self.engine = engine
        self.expert_ids = sorted(range(config.num_experts) if expert_ids is None else expert_ids)
        self.layer = _ext.Layer(
            engine,
            config.layer_idx,
            config.num_experts,
            config.top_k,
            config.hidden_size,
            config.intermediate_size,
            layout,
            self.expert_ids,
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

    def export_packed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed bytes of one expert (w13, w2), uint8: the inverse of :meth:`load_packed`."""
        return torch.ops.kt_kernel.export_packed(self._handle, expert)

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
        """Forwards, tokens, rows, weight bytes and busy time since construction."""
        return self.layer.counters()

    def close(self) -> None:
        """Free the memory; later calls raise."""
        self.layer.close()
