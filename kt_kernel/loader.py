"""Fills the experts of a layer from a checkpoint or from a folder of converted experts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from kt_kernel.checkpoint import ModelSizes, resolve_folder
from kt_kernel.checkpoint_source import CheckpointSource
from kt_kernel.config import MoEConfig
from kt_kernel.experts import CpuExperts, Layouts, packed_bytes
from kt_kernel.methods import Method
from kt_kernel.packed_folder import PackedFolder, is_packed_folder, read_manifest
from kt_kernel.progress import Progress

logger = logging.getLogger("kt_kernel.loader")

# Source bytes quantized by one call of the pool: enough to keep every thread busy, little beside a layer.
_BATCH_BYTES = 64 << 20


class ExpertSource(Protocol):
    """Where experts come from."""

    folder: Path

    def layouts(self, layer: int) -> Layouts:
        """Packed layouts of w13 and w2 of a layer."""

    @property
    def sizes(self) -> ModelSizes:
        """Sizes of the model's experts; ``top_k`` is 0 where the files do not say it."""

    @property
    def layers(self) -> list[int]:
        """Layers with experts."""

    def check(self, config: MoEConfig) -> None:
        """Refuse, with one sentence, a model that this source does not fit."""

    def expert_bytes(self, layer: int) -> int:
        """Bytes to read for one expert of a layer."""

    def fill(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        """Load ``logical[i]`` into ``slots[i]``."""

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up ``[I, H]`` and down ``[H, I]`` of one expert, in a float type, on the CPU."""

    def biases(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        """Biases of gate, up ``[I]`` and down ``[H]`` of one expert; None without any, or with zeros only."""

    def conclude(self) -> None:
        """Say what came of loading, after the last layer."""

    def close(self) -> None:
        """Let go of the files; the next use opens them again."""


class PackedSource:
    """Experts of a converted folder, copied to the nodes that own them."""

    def __init__(self, folder: Path, method: Method) -> None:
        self.folder = folder
        # The method before the files: a wrong --kt-method is the likelier mistake.
        found = read_manifest(folder)["method"]
        if found != method.name:
            raise ValueError(
                f"{folder} was converted for method {found}, but method {method.name} was asked for; give "
                f"--kt-method {found} or convert again."
            )
        self.packed = PackedFolder(folder)
        self._layout = self.packed.layout
        logger.info("%s holds experts converted for %s (%s)", folder, found, self._layout)

    def layouts(self, layer: int) -> Layouts:
        return self._layout, self._layout

    @property
    def sizes(self) -> ModelSizes:
        model = self.packed.model
        return ModelSizes(
            model_type="unknown",
            num_experts=model["num_experts"],
            top_k=model.get("top_k", 0),
            hidden_size=model["hidden_size"],
            intermediate_size=model["intermediate_size"],
            num_hidden_layers=None,
        )

    @property
    def layers(self) -> list[int]:
        return self.packed.layers

    def check(self, config: MoEConfig) -> None:
        w13_bytes, w2_bytes = packed_bytes(
            self.layouts(config.layer_idx), hidden_size=config.hidden_size, intermediate_size=config.intermediate_size
        )
        self.packed.check_sizes(
            config.layer_idx,
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            w13_bytes=w13_bytes,
            w2_bytes=w2_bytes,
        )

    def expert_bytes(self, layer: int) -> int:
        return self.packed.expert_bytes(layer)

    def fill(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        pairs = [self.packed.expert(layer, expert) for expert in logical]
        experts.load_packed(slots, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w13, w2 = self.packed.expert(layer, expert)
        hidden, inter = self.packed.model["hidden_size"], self.packed.model["intermediate_size"]
        gate, up = torch.ops.kt_kernel.dequantize_w13(w13, self._layout, inter, hidden)
        return gate, up, torch.ops.kt_kernel.dequantize(w2, self._layout, hidden, inter)

    def biases(self, layer: int, expert: int) -> None:
        return None  # the converter refuses checkpoints that have some

    def conclude(self) -> None:
        return

    def close(self) -> None:
        self.packed.close()


_sources: dict[tuple[str, Method], tuple[tuple, ExpertSource]] = {}
_sources_lock = threading.Lock()


def _fingerprint(folder: Path) -> tuple:
    """Changes when the contents of a folder, or a file or one beside it, were replaced."""
    root = folder.parent if folder.is_file() else folder
    patterns = ("*.gguf",) if folder.is_file() else ("*.gguf", "*.json", "*.safetensors", "_layer_*/_numa_*")
    stats = []
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        with suppress(OSError):
            status = path.stat()
            stats.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(stats)


def open_source(weight_path: str | Path, method: Method) -> ExpertSource:
    """Open and index a weight path; the same object for every layer of a model.

    Parameters
    ----------
    weight_path : str or Path
        Folder of a Hugging Face checkpoint or of converted experts, a model id, or a GGUF file or folder.
    method : Method
        Decides the layout of a checkpoint's experts; must be that of a converted folder.

    Raises
    ------
    ValueError
        What is wrong with it and what would be right, in one sentence.
    """
    folder = resolve_folder(weight_path)
    key = (str(folder.resolve()), method)
    with _sources_lock:
        fingerprint = _fingerprint(folder)
        cached = _sources.get(key)
        if cached is not None and cached[0] == fingerprint:
            return cached[1]
        source: ExpertSource
        if is_packed_folder(folder):
            source = PackedSource(folder, method)
        else:
            source = CheckpointSource(folder, method)
        _sources[key] = (fingerprint, source)
        return source


def close_sources() -> None:
    """Forget every opened weight path; mapped files are closed with their last view."""
    with _sources_lock:
        _sources.clear()


class _LoadingReport:
    """One progress over all layers that are going to be loaded: they are announced when they are made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._announced = 0
        self._progress: Progress | None = None

    def announce(self) -> None:
        with self._lock:
            self._announced += 1

    def withdraw(self) -> None:
        with self._lock:
            self._announced = max(self._announced - 1, 0)

    def begin_layer(self, layer_bytes: int) -> Progress:
        with self._lock:
            if self._progress is None:
                layers = max(self._announced, 1)
                self._progress = Progress(
                    "loading CPU experts", total_bytes=layers * layer_bytes, total_layers=layers, logger=logger
                )
            return self._progress

    def finish_layer(self, layer: int) -> bool:
        """Whether it was the last one."""
        with self._lock:
            progress = self._progress
            if progress is None:
                return False
            progress.finish_layer(layer)
            if progress.done_layers < progress.total_layers:
                return False
            self._end()
            return True

    def abandon(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._progress = None
        self._announced = 0


_report = _LoadingReport()


def announce_layer() -> None:
    """Count a layer whose weights will be loaded, so that progress knows how far it is."""
    _report.announce()


def withdraw_layer() -> None:
    """Take back an announcement: the layer gets its weights from elsewhere."""
    _report.withdraw()


def load_layer(experts: CpuExperts, source: ExpertSource, physical_to_logical: list[int]) -> None:
    """Load every expert that lives in ``experts``.

    Memory: the packed layer plus a few experts of the source (``_BATCH_BYTES``). The files of the source are mapped
    while the layer is loaded: their pages are the kernel's cache and not memory of the process.

    Parameters
    ----------
    experts : CpuExperts
        The layer to fill.
    source : ExpertSource
        From :func:`open_source`; :meth:`ExpertSource.check` must have passed.
    physical_to_logical : list of int
        Slot p holds the model's expert ``physical_to_logical[p]``.

    Raises
    ------
    ValueError, RuntimeError
        A weight that is NaN or infinite, a broken file.
    """
    layer = experts.config.layer_idx
    slots = experts.expert_ids
    size = source.expert_bytes(layer)
    progress = _report.begin_layer(size * len(slots))
    try:
        _fill(experts, source, slots, physical_to_logical, lambda count: progress.add(size * count))
    except BaseException:
        _report.abandon()
        raise
    if _report.finish_layer(layer):
        source.conclude()


def load_late(experts: CpuExperts, source: ExpertSource, slots: list[int], physical_to_logical: list[int]) -> None:
    """Load experts of ``experts.reserved_ids``; otherwise as :func:`load_layer`, with one line in the log."""
    started = time.monotonic()
    before = experts.bytes
    _fill(experts, source, slots, physical_to_logical, lambda count: None)
    named = ", ".join(map(str, slots[:8])) + (", ..." if len(slots) > 8 else "")
    logger.info(
        "layer %d: loaded %d more experts for the CPU (%s), %.2f GB in %.1f s",
        experts.config.layer_idx, len(slots), named, (experts.bytes - before) / 1e9, time.monotonic() - started,
    )  # fmt: skip


def _fill(
    experts: CpuExperts,
    source: ExpertSource,
    slots: list[int],
    physical_to_logical: list[int],
    filled: Callable[[int], None],
) -> None:
    layer = experts.config.layer_idx
    step = max(1, min(_BATCH_BYTES // max(source.expert_bytes(layer), 1), 64))
    try:
        for start in range(0, len(slots), step):
            batch = slots[start : start + step]
            source.fill(experts, batch, layer, [physical_to_logical[slot] for slot in batch])
            filled(len(batch))
    finally:
        source.close()
