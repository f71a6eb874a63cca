"""Experts of a checkpoint for the layers of the library: in which layouts, and how they get there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NoReturn

import torch

from kt_kernel.checkpoint import (
    FLOAT_SOURCES,
    ModelSizes,
    SourceReader,
    expert_biases,
    expert_weights,
    is_float,
    matrix_shape,
    matrix_weights,
    open_checkpoint,
)
from kt_kernel.config import MoEConfig
from kt_kernel.experts import CpuExperts, Layouts
from kt_kernel.methods import FLOAT_METHODS, METHODS, Method, method_of, source_kind, weight_dtype_of

logger = logging.getLogger("kt_kernel.loader")

_GGUF_FLOATS = ("gguf:BF16", "gguf:F16", "gguf:F32")
# The layout of these depends on their zero points and scales, which are others in each matrix.
_JUDGED_BY_VALUES = ("gptq", "gptq_v2", "awq")


class CheckpointSource:
    """Experts of a checkpoint, packed while they are loaded: with the codes they have, or quantized by us.

    Raises
    ------
    ValueError
        The checkpoint cannot be read, or is of other weights than the method's; one sentence.
    """

    def __init__(self, folder: Path, method: Method) -> None:
        self.folder = folder
        self.checkpoint: SourceReader = open_checkpoint(folder, method.alias or method.name)
        self._method = method
        self._layouts: dict[int, Layouts] = {}
        self._rounded = _RoundingCount()
        typical = self.checkpoint.typical_layer
        self.checkpoint.check_layer(typical)
        source, _ = self.checkpoint.source(typical, 0, "gate")
        self.checkpoint.close()
        self._keeps = source_kind(source) in method.sources
        if not (self._keeps or method.packed):
            self._refuse_method(source)
        how = "kept as they are" if self._keeps else f"packed as {method.layout}"
        logger.info("%s holds %s, %s for %s", folder, self.checkpoint.describe(), how, method.name)

    def _refuse_method(self, source: str) -> NoReturn:
        own = method_of(source_kind(source))
        fitting = list(dict.fromkeys(([own.name] if own else []) + list(FLOAT_METHODS)))
        raise ValueError(
            f"{self.folder} holds {self.checkpoint.describe()}, but method {self._method.name} is for other files; "
            f"give --kt-method {', '.join(fitting[:-1])} or {fitting[-1]}."
        )

    def layouts(self, layer: int) -> Layouts:
        if layer not in self._layouts:
            # here, because the layouts of all layers are asked for before the first is packed
            self.checkpoint.check_layer(layer)
            if self._keeps:
                pair = self._kept_layout(layer, "gate", "up"), self._kept_layout(layer, "down")
            else:
                pair = self._method.layout, self._method.layout
            self._layouts[layer] = pair
            self.checkpoint.close()
        return self._layouts[layer]

    def _kept_layout(self, layer: int, *projections: str) -> str:
        """The layout of the codes of gate and up, or of down; bf16 for floats, and for two that differ."""
        matrices = {projection: self.checkpoint.source(layer, 0, projection) for projection in projections}
        names = {source for source, _ in matrices.values()}
        for source in names:
            if not (_is_any_float(source) or source_kind(source) in self._method.sources):
                self._refuse_method(source)
        if len(names) > 1 or any(map(_is_any_float, names)):
            return METHODS["BF16"].layout
        experts = range(self.checkpoint.sizes.num_experts if names & {*_JUDGED_BY_VALUES} else 1)
        places = [(expert, projection) for expert in experts for projection in projections]
        found = dict.fromkeys(self._layout_of(layer, *place) for place in places)
        if len(found) > 1:  # zero points for all where some have them
            found = dict.fromkeys(self._layout_of(layer, *place, with_zeros=True) for place in places)
        return next(iter(found))

    def _layout_of(self, layer: int, expert: int, projection: str, *, with_zeros: bool = False) -> str:
        source, parts = self.checkpoint.source(layer, expert, projection)
        shape = matrix_shape(self.checkpoint.sizes, projection)
        try:
            return torch.ops.kt_kernel.source_layout(parts, source, *shape, with_zeros)
        except RuntimeError as error:
            name = self.checkpoint.tensor_name(layer, expert, projection)
            raise ValueError(f"{name} of {self.folder} cannot be kept as it is: {error}") from error

    @property
    def sizes(self) -> ModelSizes:
        return self.checkpoint.sizes

    @property
    def layers(self) -> list[int]:
        return self.checkpoint.layers

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
        first, gate_up = self._read(layer, logical, experts.layouts[0], "gate", "up")
        second, down = self._read(layer, logical, experts.layouts[1], "down")
        parts = {**gate_up, **down}
        try:
            if first == second and is_float(first):
                experts.load_experts(slots, **parts)
            else:
                experts.load_sources(slots, first, second, **parts)
            biases = {slot: self.biases(layer, expert) for slot, expert in zip(slots, logical, strict=True)}
            biased = {slot: found for slot, found in biases.items() if found}
            if biased:
                experts.load_biases(list(biased), *map(list, zip(*biased.values(), strict=True)))
        except RuntimeError as error:
            raise ValueError(
                f"experts {logical[0]}-{logical[-1]} of layer {layer} of {self.folder} cannot be packed: {error}"
            ) from error

    def _read(
        self, layer: int, logical: list[int], layout: str, *projections: str
    ) -> tuple[str, dict[str, list[torch.Tensor]]]:
        """The source that all of these matrices are, and their parts: as floats where there is no one source."""
        found = {name: [self.checkpoint.source(layer, expert, name) for expert in logical] for name in projections}
        names = {source for matrices in found.values() for source, _ in matrices}
        source = names.pop()
        if not names and not _is_any_float(source):
            return source, {name: [part for _, parts in found[name] for part in parts] for name in projections}
        weights = {
            name: [matrix_weights(self.checkpoint, layer, expert, name) for expert in logical] for name in projections
        }
        dtypes = {matrix.dtype for matrices in weights.values() for matrix in matrices}
        if len(dtypes) > 1:
            weights = {name: [matrix.float() for matrix in matrices] for name, matrices in weights.items()}
        if weight_dtype_of(layout) == "bf16":
            self._rounded.add([matrix for matrices in weights.values() for matrix in matrices])
        return FLOAT_SOURCES[next(iter(weights.values()))[0].dtype], weights

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return expert_weights(self.checkpoint, layer, expert)

    def biases(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        return expert_biases(self.checkpoint, layer, expert)

    def conclude(self) -> None:
        self._rounded.report(self.folder)

    def close(self) -> None:
        self.checkpoint.close()


def _is_any_float(source: str) -> bool:
    """Whether a source has no codes: weights in a float type, of safetensors or of GGUF."""
    return is_float(source) or source in _GGUF_FLOATS


class _RoundingCount:
    """How many weights change when they become bf16."""

    def __init__(self) -> None:
        self._changed, self._total, self._dtype = 0, 0, torch.bfloat16

    def add(self, matrices: list[torch.Tensor]) -> None:
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
