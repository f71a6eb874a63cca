"""Checkpoints of safetensors files: which tensors are experts, whether they are whole, and their weights.

Reads headers when a checkpoint is opened and weights only when they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from kt_kernel.checkpoint import encodings
from kt_kernel.checkpoint.encodings import ENCODINGS, FLOAT, Header, Numbers, Part
from kt_kernel.checkpoint.model_folder import describe_layers, model_sizes
from kt_kernel.checkpoint.names import is_interleaved, known_names, parse_name
from kt_kernel.checkpoint.quantization import read_quantization
from kt_kernel.checkpoint.tensor_index import tensor_files
from kt_kernel.files import OpenFiles

_ALL = -1  # in place of an expert: one tensor holds all experts of a layer
_SINGLE = ("gate", "up", "down")
_FUSED = ("gate_up", "down")
_BIAS = Part(("bias",), ("BF16", "F16", "F32"), lambda numbers: ((numbers.n,),), needed=False)
_TYPE_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I64": 8, "F64": 8}


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: str
    name: str


class _Stored(NamedTuple):
    """How the tensors of a projection lie in a layer; of gate and up together where they are one tensor."""

    encoding: str
    weight_type: str  # as safetensors writes it; only to be said
    numbers: Numbers
    merged: bool  # gate and up in one tensor
    interleaved: bool
    transposed: bool = False


_Parts = dict[str, _Place]


class Checkpoint:
    """A folder of safetensors files, indexed by layer, expert and projection.

    Layers from ``num_hidden_layers`` on are left out: they draft tokens (multi-token prediction), and the model that
    is served does not have them. Reading is thread-safe. Weights are views of mapped files; :meth:`close` after a
    layer lets the files go, so that no more than a layer is mapped at a time.

    Raises
    ------
    ValueError
        No such model, incomplete, or in a form that is not read: one sentence each.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = self.root = Path(folder)
        self.sizes = model_sizes(self.folder)
        self.quantization = read_quantization(self.folder)
        self._files = OpenFiles(self.folder)
        self._layers: dict[int, dict[tuple[int, str], _Parts]] = {}
        self._stored: dict[int, dict[str, _Stored]] = {}
        names = tensor_files(self.folder, self._files)
        self._index(names)
        if not self._layers:
            self._refuse_without_experts(names)
        for layer in self._layers:
            self._check_complete(layer)

    # --- index ---

    def _index(self, names: dict[str, str]) -> None:
        num_layers = self.sizes.num_hidden_layers
        for name, file in names.items():
            tensor = parse_name(name)
            if tensor is None or (num_layers is not None and tensor.layer >= num_layers):
                continue
            expert = _ALL if tensor.expert is None else tensor.expert
            parts = self._layers.setdefault(tensor.layer, {}).setdefault((expert, tensor.projection), {})
            if tensor.part in parts:
                raise ValueError(
                    f"{self.folder} has two tensors for one weight, {parts[tensor.part].name} and {name}; use a "
                    f"checkpoint that has each once."
                )
            parts[tensor.part] = _Place(file, name)

    def _refuse_without_experts(self, names: dict[str, str]) -> None:
        for name in names:
            if parse_name(name):
                raise ValueError(
                    f"{self.folder} has experts only beyond the {self.sizes.num_hidden_layers} layers that config.json "
                    f"promises (first: {name}); copy config.json again."
                )
            if name.startswith("blk.") and "_exps." in name:
                raise ValueError(
                    f"{self.folder} holds experts converted by another program (tensor {name}); convert the "
                    f"original checkpoint with scripts/convert_cpu_weights.py."
                )
        example = next(iter(names), "none")
        raise ValueError(
            f"{self.folder} holds no expert tensors that kt_kernel knows (first of {len(names)} tensors: {example}); "
            f"known are {known_names()}."
        )

    def _is_fused(self, layer: int) -> bool:
        return (_ALL, "down") in self._layers[layer] or (_ALL, "gate_up") in self._layers[layer]

    def _check_complete(self, layer: int) -> None:
        """Every expert is there once, and every one has the tensors that the first has, as far as any are read."""
        matrices = self._layers[layer]
        fused = self._is_fused(layer)
        num_experts = self.sizes.num_experts
        if fused and set(matrices) != {(_ALL, projection) for projection in _FUSED}:
            found = ", ".join(_weights_name(parts) for _, parts in sorted(matrices.items())[:3])
            raise ValueError(
                f"{self.folder} holds only {found} of the experts of layer {layer}; kt_kernel needs gate, up and down "
                f"of each, or both tensors of all, so download it again."
            )
        for expert in (_ALL,) if fused else range(num_experts):
            for projection in _FUSED if fused else _SINGLE:
                if (expert, projection) not in matrices:
                    raise ValueError(
                        f"{self.folder} lacks {projection} of expert {expert} in layer {layer}; config.json promises "
                        f"{num_experts} experts, so the checkpoint is incomplete."
                    )
                first = matrices[_ALL if fused else 0, projection]
                read = (name for name in first if name in encodings.PART_NAMES or name in _BIAS.names)
                missing = next((name for name in read if name not in matrices[expert, projection]), None)
                if missing:
                    raise ValueError(
                        f"{self.folder} lacks {missing} of {projection} of expert {expert} in layer {layer}, which "
                        f"expert 0 has ({first[missing].name}), so the checkpoint is incomplete."
                    )
        biased = {projection: "bias" in parts for (_, projection), parts in matrices.items()}
        if len(set(biased.values())) > 1:
            has = ", ".join(projection for projection, found in biased.items() if found)
            raise ValueError(
                f"{self.folder} has biases for {has} of layer {layer} only; download the checkpoint again."
            )
        if not fused and len(matrices) != 3 * num_experts:
            highest = max(expert for expert, _ in matrices)
            raise ValueError(
                f"{self.folder} has an expert {highest} in layer {layer}, but config.json says there are "
                f"{num_experts} experts."
            )

    # --- what is there ---

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with experts, ascending."""
        return sorted(self._layers)

    @property
    def typical_layer(self) -> int:
        """The first layer whose experts are quantized, by the tensors they have; the first where none is."""
        layers = self.layers
        plain = {"weight", "bias"}
        return next((i for i in layers if any(set(parts) - plain for parts in self._layers[i].values())), layers[0])

    def files(self, layer: int) -> list[str]:
        """Names of the files that hold experts of a layer, ascending."""
        return sorted({place.file for parts in self._layers[layer].values() for place in parts.values()})

    def describe(self) -> str:
        """What the experts are, in words: ``"MXFP4 weights"``."""
        stored = self._storage(self.typical_layer)
        return " and ".join(
            dict.fromkeys(encodings.describe(s.encoding, s.weight_type, s.numbers) for s in stored.values())
        )

    def expert_bytes(self, layer: int) -> int:
        """Bytes one expert of a layer takes in the checkpoint."""
        fused = self._is_fused(layer)
        total = 0
        for projection in _FUSED if fused else _SINGLE:
            for place in self._layers[layer][_ALL if fused else 0, projection].values():
                header = self._header(place)
                total += torch.Size(header.shape).numel() * _TYPE_BYTES.get(header.type, 1)
        return total // (self.sizes.num_experts if fused else 1)

    def check_layer(self, layer: int) -> None:
        """Check that a layer has experts, of the shapes and types that can be read.

        Raises
        ------
        ValueError
            It has not; the message names the tensor.
        """
        if layer not in self._layers:
            raise ValueError(
                f"{self.folder} has no experts in layer {layer}; layers with experts are "
                f"{describe_layers(self.layers)}."
            )
        stored = self._storage(layer)
        for (expert, projection), parts in self._layers[layer].items():
            for part in (*ENCODINGS[stored[projection].encoding].parts, _BIAS):
                name = part.find(parts)
                if name is not None:
                    self._check_part(parts[name], part, stored[projection], fused=expert == _ALL)
                elif part.needed:
                    raise ValueError(
                        f"{self.folder} lacks {part.names[0]} beside {_weights_name(parts)}; "
                        f"{ENCODINGS[stored[projection].encoding].title} need it, so download the checkpoint again."
                    )
            if stored[projection].encoding == "gptq":
                self._check_zero_points(parts["qzeros"])

    # --- headers ---

    def _check_zero_points(self, place: _Place) -> None:
        """Refuse a stored 15: here, because some methods come to the values of a layer only when they pack it."""
        pairs = self._files[place.file].get_tensor(place.name).view(torch.uint8)
        if bool(((pairs & 0x0F == 0x0F) | (pairs >= 0xF0)).any()):
            raise ValueError(
                f"tensor {place.name} of {self.folder} stores zero point 15, which readers of GPTQ's first version "
                f"take for 0 or for 16; quantize the model again with checkpoint_format gptq_v2."
            )

    def _slice(self, place: _Place):
        try:
            return self._files[place.file].get_slice(place.name)
        except SafetensorError:
            raise ValueError(
                f"{place.file} lacks tensor {place.name}, which the index places there; download it again."
            ) from None

    def _header(self, place: _Place) -> Header:
        tensor = self._slice(place)
        return Header(tensor.get_dtype(), tuple(tensor.get_shape()))

    def _matrix(self, projection: str) -> tuple[int, int]:
        """Rows and columns of a projection."""
        hidden, inter = self.sizes.hidden_size, self.sizes.intermediate_size
        return {"gate_up": (2 * inter, hidden), "down": (hidden, inter)}.get(projection, (inter, hidden))

    def _storage(self, layer: int) -> dict[str, _Stored]:
        """How each projection of a layer is stored, told by its first expert."""
        if layer not in self._stored:
            fused = self._is_fused(layer)
            stored = {
                projection: self._recognize(layer, _ALL if fused else 0, projection)
                for projection in (_FUSED if fused else _SINGLE)
            }
            if fused:
                stored = self._with_orientation(layer, stored)
            elif stored["gate"].encoding != stored["up"].encoding:
                raise ValueError(
                    f"layer {layer} of {self.folder} has {ENCODINGS[stored['gate'].encoding].title} for gate and "
                    f"{ENCODINGS[stored['up'].encoding].title} for up; kt_kernel reads both in one form only."
                )
            self._stored[layer] = stored
        return self._stored[layer]

    def _recognize(self, layer: int, expert: int, projection: str) -> _Stored:
        parts = self._layers[layer][expert, projection]
        headers = {name: self._header(place) for name, place in parts.items()}
        if expert == _ALL:
            headers = {name: Header(h.type, self._one_expert(h.shape)) for name, h in headers.items()}
        n, k = self._matrix(projection)
        name = _weights_name(parts)
        found = encodings.recognize(headers, n, k, self.quantization)
        if found is None or (expert == _ALL and found in ("gptq", "gptq_v2", "awq")):
            types = ", ".join(f"{part} {header.type}" for part, header in headers.items())
            titles = ", ".join(encoding.title for encoding in ENCODINGS.values())
            raise ValueError(
                f"tensor {name} of {self.folder} is quantized in a way that kt_kernel does not read ({types}); it "
                f"reads {titles}."
            )
        self._check_declared(found, name)
        if encodings.is_asymmetric(set(parts)):
            raise ValueError(
                f"tensor {name} has zero points, which kt_kernel does not read for {ENCODINGS[found].title}; give a "
                f"symmetric checkpoint."
            )
        try:
            numbers = encodings.numbers_of(found, headers, n, k, self.quantization)
        except ValueError as error:
            raise ValueError(f"tensor {name} {error}.") from None
        weight = ENCODINGS[found].parts[0].find(headers)
        merged = projection == "gate_up"
        return _Stored(
            found, headers[weight].type if weight else "", numbers, merged, merged and is_interleaved(set(parts))
        )

    def _one_expert(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if shape[:1] == (self.sizes.num_experts,) else shape

    def _check_declared(self, found: str, name: str) -> None:
        """Refuse quantized tensors of which the config says something else."""
        declared = self.quantization
        if found == FLOAT or declared is None or found in declared.encodings:
            return
        if not declared.encodings:
            reason = f" that {declared.reason}" if declared.reason else ""
            raise ValueError(
                f"{self.folder} is a {declared.name} checkpoint{reason}, which kt_kernel does not read; give one in "
                f"bf16, or quantized in another way."
            )
        raise ValueError(
            f"config.json of {self.folder} says {declared.name}, but tensor {name} is of {ENCODINGS[found].title}; "
            f"copy the checkpoint again."
        )

    def _with_orientation(self, layer: int, stored: dict[str, _Stored]) -> dict[str, _Stored]:
        """Which tensors of all experts are stored transposed, ``[E, in, out]``.

        A square tensor follows its sibling: 2 I = H and I = H cannot both hold, so one of the two always decides.
        """
        verdicts = {}
        for projection, kind in stored.items():
            parts = self._layers[layer][_ALL, projection]
            part = ENCODINGS[kind.encoding].parts[0]
            name = part.find(parts)
            if name is None:
                continue  # check_layer says what is missing
            found = self._header(parts[name]).shape
            straight = [(self.sizes.num_experts, *shape) for shape in part.shapes(kind.numbers)]
            swapped = [(shape[0], shape[2], shape[1]) for shape in straight if len(shape) == 3]
            if found not in (*straight, *swapped):
                raise ValueError(self._wrong_shape(parts[name].name, found, [*straight, *swapped]))
            verdicts[projection] = None if found in straight and found in swapped else found in swapped
        decided = next((verdict for verdict in verdicts.values() if verdict is not None), False)
        return {
            projection: kind._replace(transposed=decided if verdicts.get(projection) is None else verdicts[projection])
            for projection, kind in stored.items()
        }

    def _check_part(self, place: _Place, part: Part, kind: _Stored, *, fused: bool) -> None:
        found = self._header(place)
        if found.type not in part.types:
            raise ValueError(
                f"tensor {place.name} has type {found.type}; {ENCODINGS[kind.encoding].title} have "
                f"{' or '.join(part.types)} there."
            )
        wanted = list(part.shapes(kind.numbers))
        if kind.transposed:
            wanted = [shape[::-1] if len(shape) == 2 else shape for shape in wanted]
        if fused:
            shared = [shape for shape in wanted if shape in ((), (1,))]
            wanted = [(self.sizes.num_experts, *shape) for shape in wanted] + shared
        if found.shape not in wanted:
            raise ValueError(self._wrong_shape(place.name, found.shape, wanted))

    def _wrong_shape(self, name: str, found: tuple[int, ...], wanted: list[tuple[int, ...]]) -> str:
        sizes = self.sizes
        means = " or ".join(str(list(shape)) for shape in dict.fromkeys(wanted))
        return (
            f"tensor {name} has shape {list(found)}, but config.json ({sizes.num_experts} experts, hidden size "
            f"{sizes.hidden_size}, expert intermediate size {sizes.intermediate_size}) means {means}."
        )

    # --- weights ---

    def source(self, layer: int, expert: int, projection: str) -> tuple[str, list[torch.Tensor]]:
        """One matrix as the files have it.

        Shapes and types are those of :meth:`check_layer`, which must have been called.

        Parameters
        ----------
        layer, expert : int
            Layer of the model and logical expert.
        projection : str
            ``gate``, ``up`` or ``down``.

        Returns
        -------
        tuple
            Source string and parts (``csrc/format/source.h``), views of the mapped file where the layout allows.

        Raises
        ------
        ValueError
            A value beside the weights that they cannot have: another shape or order of columns, a scale of 0.
        """
        tensors, kind = self._tensors(layer, expert, projection)
        n, k = self._matrix(projection)
        numbers = Numbers(n, k, kind.numbers.group, self._split_block(kind))
        try:
            parts = encodings.source_parts(kind.encoding, tensors, numbers)
        except ValueError as error:
            raise ValueError(f"{self.tensor_name(layer, expert, projection)} {error}.") from None
        encoding = encodings.gptq_version(kind.encoding, tensors.get("qzeros"), self.quantization)
        return encodings.source_of(encoding, parts[0].dtype, numbers.block), parts

    def biases(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        """Biases of gate, up and down of one expert, a vector each; None where there are none."""
        fused = self._is_fused(layer)
        if "bias" not in self._layers[layer][_ALL if fused else expert, "down"]:
            return None
        found = []
        for projection in _SINGLE:
            key = projection if not fused or projection == "down" else "gate_up"
            place = self._layers[layer][_ALL if fused else expert, key]["bias"]
            bias = self._slice(place)[expert] if fused else self._files[place.file].get_tensor(place.name)
            if key == "gate_up":
                kind = self._storage(layer)[key]
                bias = self._half(bias, kind, is_scale=False, first=projection == "gate").contiguous()
            found.append(bias)
        return found

    def _tensors(self, layer: int, expert: int, projection: str) -> tuple[dict[str, torch.Tensor], _Stored]:
        """Tensors of one matrix by the name of their part."""
        stored = self._storage(layer)
        if not self._is_fused(layer):
            places = self._layers[layer][expert, projection]
            kind = stored[projection]
            names = _used(kind.encoding, places)
            return {name: self._files[places[name].file].get_tensor(places[name].name) for name in names}, kind
        key = "down" if projection == "down" else "gate_up"
        kind, places = stored[key], self._layers[layer][_ALL, key]
        tensors = {}
        for name in _used(kind.encoding, places):
            tensor = self._slice(places[name])
            own = tuple(tensor.get_shape())[:1] == (self.sizes.num_experts,)
            tensor = tensor[expert] if own else self._files[places[name].file].get_tensor(places[name].name)
            tensor = tensor.t() if kind.transposed and tensor.dim() == 2 else tensor
            if key == "gate_up":
                tensor = self._half(tensor, kind, is_scale=name in encodings.SCALES, first=projection == "gate")
            tensors[name] = tensor.contiguous()
        return tensors, kind

    def _split_block(self, kind: _Stored) -> tuple[int, int]:
        """The block of an fp8 scale of gate or of up alone: of single rows where the tensor of both cannot be cut."""
        rows, columns = kind.numbers.block
        uneven = kind.merged and (kind.interleaved or self.sizes.intermediate_size % rows)
        return (1, columns) if uneven else (rows, columns)

    def _half(self, tensor: torch.Tensor, kind: _Stored, *, is_scale: bool, first: bool) -> torch.Tensor:
        """Rows of gate, or of up, of a tensor of both."""
        if is_scale and kind.encoding == "fp8_block" and self._split_block(kind) != kind.numbers.block:
            tensor = tensor.repeat_interleave(kind.numbers.block[0], 0)[: kind.numbers.n]
        elif tensor.numel() == 1:
            return tensor
        elif is_scale and kind.encoding == "fp8_row":
            tensor = tensor.reshape(-1)
        if kind.interleaved:
            return tensor[0 if first else 1 :: 2]
        half = tensor.shape[0] // 2
        return tensor[:half] if first else tensor[half:]

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use opens them again."""
        self._files.close()

    def tensor_name(self, layer: int, expert: int, projection: str) -> str:
        """Name in the checkpoint of ``gate``, ``up`` or ``down`` of an expert, for messages."""
        matrices = self._layers[layer]
        if not self._is_fused(layer):
            return _weights_name(matrices[expert, projection])
        key = "down" if projection == "down" else "gate_up"
        return f"{_weights_name(matrices[_ALL, key])}[{expert}]"


def _weights_name(parts: _Parts) -> str:
    """Name of the tensor with the weights among those of a matrix; of any, where it is not there."""
    return next((parts[name] for name in encodings.WEIGHTS if name in parts), next(iter(parts.values()))).name


def _used(encoding: str, present: _Parts) -> list[str]:
    """Names of the tensors that an encoding reads."""
    return [name for part in ENCODINGS[encoding].parts if (name := part.find(present))]
