"""Fills the experts of a layer from a checkpoint or from a folder of converted experts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from kt_kernel.checkpoint import Checkpoint, ExpertWeights, expert_weights, is_float, resolve_folder
from kt_kernel.config import MoEConfig
from kt_kernel.experts import CpuExperts, Layouts, packed_bytes
from kt_kernel.methods import FLOAT_METHODS, Method, method_of, source_kind
from kt_kernel.packed_folder import MANIFEST, PackedFolder, is_packed_folder, read_manifest
from kt_kernel.progress import Progress

logger = logging.getLogger("kt_kernel.loader")

# Source bytes quantized by one call of the pool: enough to keep every thread busy, little beside a layer.
_BATCH_BYTES = 64 << 20


class ExpertSource(Protocol):
    """Where experts come from."""

    folder: Path

    def layouts(self, layer: int) -> Layouts:
        """Packed layouts of w13 and w2 of a layer."""

    def num_experts(self) -> int:
        """Logical experts of the model."""

    def check(self, config: MoEConfig) -> None:
        """Refuse, with one sentence, a model that this source does not fit."""

    def expert_bytes(self, layer: int) -> int:
        """Bytes to read for one expert of a layer."""

    def fill(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        """Load ``logical[i]`` into ``slots[i]``."""

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up ``[I, H]`` and down ``[H, I]`` of one expert, in a float type, on the CPU."""

    def conclude(self) -> None:
        """Say what came of loading, after the last layer."""

    def close(self) -> None:
        """Let go of the files; the next use opens them again."""


class CheckpointSource:
    """Experts of a checkpoint, packed while they are loaded: with the codes they have, or quantized by us."""

    def __init__(self, folder: Path, method: Method) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(folder)
        self._method = method
        self._rounded = _RoundingCount()
        typical = self.checkpoint.typical_layer
        self.checkpoint.check_layer(typical)
        self._check_method(self.checkpoint.source(typical, 0, "gate")[0])
        self.checkpoint.close()
        how = f"quantized to {method.layout}" if method.packed else "kept as they are"
        logger.info("%s holds %s, %s for %s", folder, self.checkpoint.describe(), how, method.name)

    def _check_method(self, source: str) -> None:
        """Refuse a method that keeps other codes than these files have."""
        kind, method = source_kind(source), self._method
        if method.packed or kind in method.sources:
            return
        own = method_of(kind)
        fitting = ([own.name] if own else []) + list(FLOAT_METHODS)
        raise ValueError(
            f"{self.folder} holds {self.checkpoint.describe()}, but method {method.name} is for other files; give "
            f"--kt-method {' or '.join((', '.join(fitting[:-1]), fitting[-1]))}."
        )

    def layouts(self, layer: int) -> Layouts:
        if self._method.packed:
            return self._method.layout, self._method.layout
        self.checkpoint.check_layer(layer)
        hidden, inter = self.checkpoint.sizes.hidden_size, self.checkpoint.sizes.intermediate_size
        found = []
        for projection, n, k in (("gate", inter, hidden), ("down", hidden, inter)):
            source, parts = self.checkpoint.source(layer, 0, projection)
            if not is_float(source):  # a few layers may have been left unquantized
                self._check_method(source)
            try:
                found.append(torch.ops.kt_kernel.source_layout(parts, source, n, k))
            except RuntimeError as error:
                name = self.checkpoint.tensor_name(layer, 0, projection)
                raise ValueError(f"{name} cannot be kept as it is: {error}") from error
        self.checkpoint.close()
        return found[0], found[1]

    def num_experts(self) -> int:
        return self.checkpoint.sizes.num_experts

    def check(self, config: MoEConfig) -> None:
        sizes = self.checkpoint.sizes
        for key in ("hidden_size", "intermediate_size"):
            if getattr(sizes, key) != getattr(config, key):
                raise ValueError(
                    f"the checkpoint {self.folder} has {key} {getattr(sizes, key)}, but the model being served has "
                    f"{getattr(config, key)}; give the checkpoint of the served model."
                )
        # More ids than experts are redundant copies (SGLang's expert location); fewer cannot be.
        if config.num_experts < sizes.num_experts:
            raise ValueError(
                f"{self.folder} has {sizes.num_experts} experts a layer, but the model being served has "
                f"{config.num_experts}; give the checkpoint of the served model."
            )
        self.checkpoint.check_layer(config.layer_idx)

    def expert_bytes(self, layer: int) -> int:
        return self.checkpoint.expert_bytes(layer)

    def fill(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        try:
            if all(is_float(self.checkpoint.source(layer, logical[0], name)[0]) for name in ("gate", "down")):
                self._fill_floats(experts, slots, layer, logical)
            else:
                self._fill_sources(experts, slots, layer, logical)
        except RuntimeError as error:
            raise ValueError(
                f"experts {logical[0]}-{logical[-1]} of layer {layer} of {self.folder} cannot be packed: {error}"
            ) from error

    def _fill_floats(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        weights = [_one_dtype(*expert_weights(self.checkpoint, layer, expert)) for expert in logical]
        if experts.layouts[0].startswith("bf16"):
            for matrices in weights:
                self._rounded.add(matrices)
        experts.load_experts(slots, [w[0] for w in weights], [w[1] for w in weights], [w[2] for w in weights])

    def _fill_sources(self, experts: CpuExperts, slots: list[int], layer: int, logical: list[int]) -> None:
        sources: dict[str, str] = {}
        parts: dict[str, list[torch.Tensor]] = {projection: [] for projection in ExpertWeights._fields}
        for expert in logical:
            for projection in ExpertWeights._fields:
                source, tensors = self.checkpoint.source(layer, expert, projection)
                kind = "w2" if projection == "down" else "w13"
                if sources.setdefault(kind, source) != source:
                    raise ValueError(
                        f"{self.checkpoint.tensor_name(layer, expert, projection)} is {source} but others of gate and "
                        f"up, or of other experts, are {sources[kind]}; kt_kernel reads one form in a layer, so use "
                        f"a checkpoint that has one."
                    )
                parts[projection] += tensors
        experts.load_sources(slots, sources["w13"], sources["w2"], **parts)

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return expert_weights(self.checkpoint, layer, expert)

    def conclude(self) -> None:
        self._rounded.report(self.folder)

    def close(self) -> None:
        self.checkpoint.close()


class _RoundingCount:
    """How many weights change when they become bf16."""

    def __init__(self) -> None:
        self._changed, self._total, self._dtype = 0, 0, torch.bfloat16

    def add(self, matrices: tuple[torch.Tensor, ...]) -> None:
        for matrix in matrices:
            if matrix.dtype != torch.bfloat16:
                self._dtype = matrix.dtype
                self._changed += int((matrix.bfloat16().to(matrix.dtype) != matrix).sum())
                self._total += matrix.numel()

    def report(self, folder: Path) -> None:
        """Warn, if any did, and start again."""
        if self._changed:
            logger.warning(
                "%s holds %s weights; %d of %d (%.1f %%) have no equal in bf16 and were rounded to it",
                folder, str(self._dtype).removeprefix("torch."), self._changed, self._total,
                100 * self._changed / self._total,
            )  # fmt: skip
        self._changed = self._total = 0


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

    def layouts(self, layer: int) -> Layouts:
        return self._layout, self._layout

    def num_experts(self) -> int:
        return self.packed.model["num_experts"]

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

    def conclude(self) -> None:
        return

    def close(self) -> None:
        self.packed.close()


def _one_dtype(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if gate.dtype == up.dtype == down.dtype:
        return gate, up, down
    return gate.float(), up.float(), down.float()


_sources: dict[tuple[str, str], tuple[tuple, ExpertSource]] = {}
_sources_lock = threading.Lock()


def _fingerprint(folder: Path) -> tuple:
    """Changes when the folder's contents were replaced."""
    names = ("config.json", "model.safetensors.index.json", "model.safetensors", MANIFEST)
    stats = []
    for name in names:
        try:
            status = (folder / name).stat()
            stats.append((status.st_mtime_ns, status.st_size))
        except OSError:
            stats.append(None)
    return tuple(stats)


def open_source(weight_path: str | Path, method: Method) -> ExpertSource:
    """Open and index a weight path; the same object for every layer of a model.

    Parameters
    ----------
    weight_path : str or Path
        Folder of a Hugging Face checkpoint, a model id, or a folder of converted experts.
    method : Method
        Decides the layout of a checkpoint's experts; must be that of a converted folder.

    Raises
    ------
    ValueError
        What is wrong with it and what would be right, in one sentence.
    """
    folder = resolve_folder(weight_path)
    key = (str(folder.resolve()), method.name)
    with _sources_lock:
        fingerprint = _fingerprint(folder)
        cached = _sources.get(key)
        if cached is not None and cached[0] == fingerprint:
            return cached[1]
        source: ExpertSource
        if is_packed_folder(folder):
            source = PackedSource(folder, method)
        else:
            _refuse_foreign(folder)
            source = CheckpointSource(folder, method)
        _sources[key] = (fingerprint, source)
        return source


def _refuse_foreign(folder: Path) -> None:
    if any(folder.glob("_layer_*")):
        raise ValueError(
            f"{folder} holds experts converted by another program (_layer_* folders); convert the original checkpoint "
            f"with scripts/convert_cpu_weights.py."
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds GGUF files, which kt_kernel does not read yet; give a safetensors checkpoint."
        )


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
