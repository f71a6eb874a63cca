"""Experts written into host buffers of the caller: what SGLang's fork needs for a prefill on the GPU alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kt_kernel.config import MoEConfig, is_count
from kt_kernel.experts import CpuExperts


@dataclass(frozen=True)
class ExpertBuffers:
    """Host memory for one expert: addresses, one for each rank of the GPU's tensor-parallel group.

    The memory belongs to the write until it was waited for. Addresses of scales are 0, or empty, where bf16 is wanted.
    """

    tp_count: int
    w13: Sequence[int]
    w13_scales: Sequence[int]
    w2: Sequence[int]
    w2_scales: Sequence[int]


class ExpertWriter:
    """Writes experts of one layer into host memory: on the worker pool, in the order they were submitted.

    Rank r of R holds ``I' = I / R`` features, row-major:

    ``w13[r] = cat(gate[r * I' : (r + 1) * I'], up[r * I' : (r + 1) * I'])``  ``[2 * I', H]``

    ``w2[r] = down[:, r * I' : (r + 1) * I']``  ``[H, I']``

    Method BF16 gives the bits of the checkpoint; the others give the values their codes stand for, rounded to bf16, so
    every method serves a GPU layer in bf16. With addresses of scales, RAWINT4, FP8, FP8_PERCHANNEL, MXFP4 and MXFP8
    give the codes and scales of their files, as ``csrc/moe/native_export.h`` lists them.
    """

    def __init__(self) -> None:
        self._tickets: deque[int] = deque()

    def check(self, config: MoEConfig, expert: int, buffers: ExpertBuffers) -> None:
        """Refuse what cannot be written, before anything is.

        Raises
        ------
        ValueError
            An id out of range, wrong counts, scale addresses for some ranks only.
        """
        count = buffers.tp_count
        if not is_count(count) or count < 1:
            raise ValueError(f"gpu_tp_count is {count!r}; it must be an integer of at least 1.")
        if config.intermediate_size % count:
            raise ValueError(
                f"gpu_tp_count is {count}; the intermediate size {config.intermediate_size} cannot be cut into so many "
                f"equal parts."
            )
        if not is_count(expert) or not 0 <= expert < config.num_experts:
            raise ValueError(
                f"expert_id is {expert!r}; layer {config.layer_idx} has experts 0 to {config.num_experts - 1}."
            )
        for name in ("w13", "w2"):
            addresses, scales = getattr(buffers, name), getattr(buffers, name + "_scales")
            if len(addresses) != count:
                raise ValueError(
                    f"{name}_weight_ptrs has {len(addresses)} addresses; it must have one for each of {count} ranks."
                )
            if not all(addresses):
                raise ValueError(f"{name}_weight_ptrs is {list(addresses)}; 0 is no address of host memory.")
            if len(scales) not in (0, count) or (scales and any(scales) != all(scales)):
                raise ValueError(
                    f"{name}_scale_ptrs is {list(scales)}; give an address for each of {count} ranks, or 0 for each to "
                    f"have bf16 without scales."
                )
        if any(buffers.w13_scales) != any(buffers.w2_scales):
            raise ValueError("one of w13_scale_ptrs and w2_scale_ptrs has addresses; give both, or 0 for both.")

    def submit(self, experts: CpuExperts, expert: int, buffers: ExpertBuffers) -> None:
        """Queue one write that :meth:`check` has passed.

        Raises
        ------
        RuntimeError
            An expert that has no place on the CPU, addresses that are odd or buffers that overlap, or scales of a
            method that is written as bf16 only.
        """
        scales = (buffers.w13_scales, buffers.w2_scales) if any(buffers.w13_scales) else ()
        self._tickets.append(experts.write_expert(expert, buffers.w13, buffers.w2, *scales))

    def sync(self) -> None:
        """Wait for every write that was submitted; the first error of one is raised after all have ended."""
        first_error: Exception | None = None
        while self._tickets:
            try:
                CpuExperts.wait_written(self._tickets.popleft())
            except (ValueError, RuntimeError) as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
