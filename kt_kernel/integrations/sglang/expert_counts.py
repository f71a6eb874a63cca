"""Records how often each expert is chosen, over time, into the file that ``KT_EXPERT_COUNTS`` names.

The library counts every (token, expert) pair itself, those of experts on the GPU included; ids of -1 are no pair. After
every few forwards the counts since the last time become a snapshot; a thread writes the snapshots when there is
something new, so that an idle server's file is complete. ``python -m kt_kernel.placement`` reads the file. Moving the
file away starts a new record.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_kernel.files import write_atomically
from kt_kernel.integrations.sglang import layers
from kt_kernel.placement.record import COUNTS_KEY, GPU_KEY

logger = logging.getLogger(__name__)

VARIABLE = "KT_EXPERT_COUNTS"
WRITE_SECONDS = 1.0
SNAPSHOT_FORWARDS = 4  # at first; doubled whenever the snapshots are too many
MAX_SNAPSHOTS = 64

_recorder: Recorder | None = None


class Recorder:
    """Snapshots of growing counts, and their file. Thread-safe.

    Parameters
    ----------
    path : Path
        Rewritten whole at every write.
    read_totals : callable
        Gives all counts so far: ``[num_layers, num_experts]``, int64, by the model's own expert numbers. A layer whose
        weights are replaced counts from 0 again.
    gpu_experts : Tensor
        ``[num_layers, num_experts]``, bool, told in the file.
    """

    def __init__(self, path: Path, read_totals: Callable[[], Tensor], gpu_experts: Tensor) -> None:
        self._path = path
        self._read_totals = read_totals
        self._gpu_experts = gpu_experts
        self._lock = threading.Lock()
        self._snapshots: list[Tensor] = []
        # counts of the weights in use, and of those that were replaced
        self._read = self._before = torch.zeros_like(gpu_experts, dtype=torch.int64)
        self._counted: Tensor | None = None  # totals at the end of the last snapshot
        self._written: Tensor | None = None  # totals in the file
        self._num_forwards = 0
        self._stride = SNAPSHOT_FORWARDS
        self._failed = False

    def after_forward(self) -> None:
        """Count a forward. What came before the first one (start-up, captured graphs) is not in the record."""
        with self._lock:
            if self._counted is None:
                self._counted = self._totals()
                return
            self._num_forwards += 1
            if self._num_forwards % self._stride == 0:
                self._restart_if_moved()
                self._snapshots, self._counted = self._with_new(self._totals())
                if len(self._snapshots) >= MAX_SNAPSHOTS:
                    pairs = zip(self._snapshots[::2], self._snapshots[1::2], strict=True)
                    self._snapshots = [first + second for first, second in pairs]
                    self._stride *= 2

    def write(self) -> None:
        """Write the file if there are new counts.

        A disk that is full does not stop the server: it is logged once, and tried again the next time.
        """
        with self._lock:
            if self._counted is None:
                return
            self._restart_if_moved()
            totals = self._totals()
            snapshots, _ = self._with_new(totals)
            if not snapshots or (self._written is not None and torch.equal(totals, self._written)):
                return
            buffer = io.BytesIO()
            torch.save({COUNTS_KEY: torch.stack(snapshots), GPU_KEY: self._gpu_experts}, buffer)
            try:
                write_atomically(self._path, buffer.getvalue())
            except OSError as error:
                if not self._failed:
                    logger.warning("kt_kernel: expert counts are not recorded: %s", error.strerror or error)
                self._failed = True
                return
            self._failed = False
            self._written = totals

    def _totals(self) -> Tensor:
        """Everything that was ever counted; what a layer counted after the last look at its old weights is lost."""
        read = self._read_totals()
        fell = (read < self._read).any(dim=1, keepdim=True)
        self._before = self._before + torch.where(fell, self._read, 0)
        self._read = read
        return self._before + read

    def _with_new(self, totals: Tensor) -> tuple[list[Tensor], Tensor]:
        """Snapshots with one more for what was counted since the last, and where that one ends."""
        assert self._counted is not None
        new = totals - self._counted
        return ([*self._snapshots, new] if new.any() else self._snapshots), totals

    def _restart_if_moved(self) -> None:
        if self._written is None or self._path.exists():
            return
        # everything up to the last write is in the file that was moved away
        self._snapshots = []
        self._counted, self._written = self._written, None
        self._num_forwards = 0
        self._stride = SNAPSHOT_FORWARDS


def after_load_model(_result: None, model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Start recording where ``KT_EXPERT_COUNTS`` is set and this process has CPU experts."""
    global _recorder
    value = os.environ.get(VARIABLE, "").strip()
    methods = [method for method in layers.wrapped_methods() if method.wrapper is not None]
    if not value or not methods or model_runner.is_draft_worker:
        return
    path = record_path(Path(value).expanduser(), model_runner)
    if path.exists():
        logger.warning("kt_kernel: %s is from an earlier run and will be overwritten", path)
    num_layers = model_runner.model_config.num_hidden_layers
    num_layers = max(num_layers, *(method.kt_config.layer_idx + 1 for method in methods))
    _recorder = Recorder(path, lambda: logical_counts(methods, num_layers), gpu_experts(methods, num_layers))
    atexit.register(_recorder.write)
    threading.Thread(target=_write_regularly, args=(_recorder,), name="kt-expert-counts", daemon=True).start()
    logger.info("kt_kernel: recording expert counts in %s", path)


def after_forward(_result: Any, model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Count a forward of the model, if this process records."""
    if _recorder is not None and not model_runner.is_draft_worker:
        _recorder.after_forward()


def record_path(path: Path, model_runner: Any) -> Path:
    """Return the file of this process: the named one, with the number of the process in it for all but the first.

    Only the first tensor-parallel rank has CPU experts, so pipeline stages and data-parallel replicas remain.
    """
    parts = []
    for name in ("pp_rank", "dp_rank"):
        rank = getattr(model_runner, name, None)
        if rank is None:
            rank = getattr(getattr(model_runner, "ps", None), name, None)
        if rank:
            parts.append(f"{name.removesuffix('_rank')}{rank}")
    return path.with_name("-".join([path.stem, *parts]) + path.suffix)


def logical_counts(methods: list[Any], num_layers: int) -> Tensor:
    """Return the counts so far by the model's own expert numbers, ``[num_layers, num_experts]``, int64.

    ``counts[l, map[l, slot]] += expert_counts_l[slot]``
    """
    counts = torch.zeros(num_layers, methods[0].global_num_experts, dtype=torch.int64)
    for method in methods:
        if method.wrapper.moe is None:  # its weights are being replaced
            continue
        of_slots = torch.as_tensor(method.wrapper.moe.counters()["expert_counts"], dtype=torch.int64)
        counts[method.kt_config.layer_idx].index_add_(0, layers.physical_to_logical_map(method), of_slots)
    return counts


def gpu_experts(methods: list[Any], num_layers: int) -> Tensor:
    """Return which experts of the model are on the GPU, ``[num_layers, num_experts]``, bool."""
    mask = torch.zeros(num_layers, methods[0].global_num_experts, dtype=torch.bool)
    for method in methods:
        on_gpu = method.wrapper.gpu_experts_mask.to("cpu").nonzero().flatten()
        mask[method.kt_config.layer_idx, layers.physical_to_logical_map(method)[on_gpu]] = True
    return mask


def _write_regularly(recorder: Recorder) -> None:
    pause = threading.Event()
    while not pause.wait(WRITE_SECONDS):
        recorder.write()
