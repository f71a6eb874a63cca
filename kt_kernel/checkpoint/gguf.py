"""Experts of GGUF files: which tensors they are, and their raw blocks as views of the mapped files.

    blk.{L}.ffn_{gate,up}_exps.weight   [E, I, H]
    blk.{L}.ffn_gate_up_exps.weight     [E, 2 I, H], gate first; in place of both
    blk.{L}.ffn_down_exps.weight        [E, H, I]
    blk.{L}.ffn_{...}_exps.bias         [E, n], of all of them or of none

Each tensor has a type of its own; the rows of a matrix are whole blocks, one after the other.
"""

from __future__ import annotations

import mmap
import re
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from kt_kernel.checkpoint.gguf_header import GgufHeader, TensorInfo, read_header
from kt_kernel.checkpoint.model_folder import ModelSizes, describe_layers

READABLE_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    "BF16", "F16", "F32",
)  # fmt: skip

_EXPERTS = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,5})\.ffn_(?P<part>gate|up|down|gate_up)_exps\.(?P<kind>.+)")
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Linux on x86: a private mapping that claims no swap for its size. Private, because torch wants to be able to write.
_MAP_NORESERVE = 0x4000


class _Place(NamedTuple):
    file: GgufHeader
    tensor: TensorInfo


class GgufCheckpoint:
    """A GGUF file, its splits or a folder of one model, indexed by layer, expert and projection.

    Headers are read when it is opened and weights only when they are asked for. Layers that draft tokens (multi-token
    prediction) are left out. Reading is thread-safe. Weights are views of mapped files; :meth:`close` after a layer
    lets the files go.

    Parameters
    ----------
    path : str or Path
        A file, or a folder whose ``*.gguf`` files (not those of its folders) hold the experts of one model. Any one
        split stands for all.

    Raises
    ------
    ValueError
        No such model, damaged, incomplete, or experts of a type that cannot be read: one sentence each.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.root = self.folder if self.folder.is_dir() else self.folder.parent
        headers = _model_headers(self.folder)
        self.sizes = _model_sizes(headers[0])
        self._layers: dict[int, dict[str, _Place]] = {}
        self._biases: dict[int, dict[str, _Place]] = {}
        self._lock = threading.Lock()
        self._mapped: dict[Path, torch.Tensor] = {}
        for header in headers:
            self._index(header)
        if not self._layers:
            self._refuse_without_experts(headers)
        for layer, places in self._layers.items():
            missing = {"gate", "up", "down"} - set(places)
            if "gate_up" in places:
                missing -= {"gate", "up"}
            if missing or ("gate_up" in places and len(places) != 2):
                raise ValueError(
                    f"{self.folder} has {', '.join(sorted(places))} as the experts of layer {layer}; kt_kernel "
                    f"needs gate, up and down, or gate_up and down, so download it again."
                )
            self.check_layer(layer)

    def _index(self, header: GgufHeader) -> None:
        for name, tensor in header.tensors.items():
            match = _EXPERTS.fullmatch(name)
            if not match:
                continue
            layer = int(match["layer"])
            if self.sizes.num_hidden_layers is not None and layer >= self.sizes.num_hidden_layers:
                continue
            tables = {"weight": (self._layers, READABLE_TYPES), "bias": (self._biases, tuple(_FLOATS))}
            if match["kind"] not in tables:
                raise ValueError(
                    f"{header.path} has a {match['kind']} for its experts (tensor {name}); kt_kernel reads weights and "
                    f"biases."
                )
            table, types = tables[match["kind"]]
            if tensor.type_name not in types:
                raise ValueError(
                    f"tensor {name} of {header.path} has type {tensor.type_name}; kt_kernel reads {', '.join(types)}, "
                    f"so take a quantization that uses only these for its experts."
                )
            places = table.setdefault(layer, {})
            if match["part"] in places:
                raise ValueError(
                    f"tensor {name} is in {places[match['part']].file.path} and in {header.path}; download them again."
                )
            places[match["part"]] = _Place(header, tensor)

    def _refuse_without_experts(self, headers: list[GgufHeader]) -> None:
        if any(map(_has_experts, headers)):
            raise ValueError(
                f"{self.folder} has experts only beyond the {self.sizes.num_hidden_layers} layers that its block_count "
                f"promises; download it again."
            )
        names = [name for header in headers for name in header.tensors]
        raise ValueError(
            f"{self.folder} holds no expert tensors that kt_kernel knows (first of {len(names)} tensors: "
            f"{names[0] if names else 'none'}); known are blk.N.ffn_gate_exps.weight, ffn_up_exps, ffn_down_exps and "
            f"ffn_gate_up_exps."
        )

    # --- what is there ---

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with experts, ascending."""
        return sorted(self._layers)

    def files(self, layer: int) -> list[str]:
        """Names of the files that hold experts of a layer, ascending."""
        return sorted({place.file.path.name for place in self._layers[layer].values()})

    @property
    def typical_layer(self) -> int:
        """The first layer."""
        return self.layers[0]

    def dtypes(self, layer: int) -> set[str]:
        """Types of the expert tensors of a layer, as GGUF names them: ``Q4_K``, ``Q6_K``."""
        return {place.tensor.type_name for place in self._layers[layer].values()}

    def describe(self) -> str:
        """What the experts are, in words: ``"GGUF weights (Q4_K, Q6_K)"``."""
        return f"GGUF weights ({', '.join(sorted(set().union(*map(self.dtypes, self._layers))))})"

    def expert_bytes(self, layer: int) -> int:
        """Bytes one expert of a layer takes in the files."""
        return sum(place.tensor.num_bytes for place in self._layers[layer].values()) // self.sizes.num_experts

    def check_layer(self, layer: int) -> None:
        """Check that a layer has experts of the shapes that the file's own sizes mean.

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
        experts, hidden, inter = self.sizes.num_experts, self.sizes.hidden_size, self.sizes.intermediate_size
        shapes = {"gate_up": (experts, 2 * inter, hidden), "down": (experts, hidden, inter)}
        wanted = {part: shapes.get(part, (experts, inter, hidden)) for part in self._layers[layer]}
        biases = self._biases.get(layer, {})
        if biases and set(biases) != set(wanted):
            raise ValueError(
                f"{self.folder} has biases for {', '.join(sorted(biases))} of layer {layer} only; download it again."
            )
        found = [(place, wanted[part]) for part, place in self._layers[layer].items()]
        for (header, tensor), shape in [*found, *((place, wanted[part][:2]) for part, place in biases.items())]:
            if tensor.shape != shape:
                raise ValueError(
                    f"tensor {tensor.name} of {header.path} has shape {list(tensor.shape)}, but the file's own sizes "
                    f"({experts} experts, hidden size {hidden}, expert intermediate size {inter}) mean {list(shape)}."
                )

    # --- weights ---

    def source(self, layer: int, expert: int, projection: str) -> tuple[str, list[torch.Tensor]]:
        """Raw blocks of one matrix.

        Parameters
        ----------
        layer, expert : int
            Layer of the model and logical expert.
        projection : str
            ``gate``, ``up`` or ``down``.

        Returns
        -------
        tuple
            ``"gguf:Q4_K"`` and one uint8 tensor ``[n, row_bytes]``, a view of the mapped file.
        """
        places = self._layers[layer]
        return f"gguf:{self._tensor(places, projection).type_name}", [self._rows(places, expert, projection)]

    def biases(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        """Biases of gate, up and down of one expert, a vector each; None where there are none."""
        places = self._biases.get(layer)
        if places is None:
            return None
        return [
            self._rows(places, expert, projection)
            .flatten()
            .clone()
            .view(_FLOATS[self._tensor(places, projection).type_name])
            for projection in ("gate", "up", "down")
        ]

    def _tensor(self, places: dict[str, _Place], projection: str) -> TensorInfo:
        return places[projection if projection in places else "gate_up"].tensor

    def _rows(self, places: dict[str, _Place], expert: int, projection: str) -> torch.Tensor:
        """The rows of one matrix, or the elements of one bias, as uint8 ``[n, bytes of a row]``."""
        header, tensor = places[projection if projection in places else "gate_up"]
        rows = self.sizes.hidden_size if projection == "down" else self.sizes.intermediate_size
        first = rows if projection == "up" and "up" not in places else 0
        row_bytes = tensor.num_bytes // (tensor.shape[0] * tensor.shape[1])
        begin = tensor.offset + (expert * tensor.shape[1] + first) * row_bytes
        return self._bytes_of(header)[begin : begin + rows * row_bytes].view(rows, row_bytes)

    def tensor_name(self, layer: int, expert: int, projection: str) -> str:
        """Name in the files of ``gate``, ``up`` or ``down`` of an expert, for messages."""
        return f"{self._tensor(self._layers[layer], projection).name}[{expert}]"

    def _bytes_of(self, header: GgufHeader) -> torch.Tensor:
        with self._lock:
            if header.path not in self._mapped:
                self._mapped[header.path] = _map_file(header)
            return self._mapped[header.path]

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use maps them again."""
        with self._lock:
            self._mapped.clear()


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of them without safetensors of a model beside."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


def _map_file(header: GgufHeader) -> torch.Tensor:
    """A whole file as uint8, unmapped with the last view of it."""
    try:
        with header.path.open("rb") as file:
            mapped = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{header.path} cannot be mapped ({error}); copy it again, or allow more address space (ulimit -v)."
        ) from error
    if len(mapped) != header.file_bytes:
        raise ValueError(f"{header.path} changed while it was being read; start again when it is complete.")
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    # torch keeps the mapping alive; nothing may close it, which would leave views without memory.
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _model_headers(path: Path) -> list[GgufHeader]:
    """Headers of the files of the one model at a path, first split first."""
    if not path.is_dir():
        return _split_headers(path)
    # A folder may hold a projector of images or an importance matrix beside the model.
    firsts = {}
    for file in sorted(path.glob("*.gguf")):
        match = _SPLIT.fullmatch(file.name)
        firsts.setdefault((match["prefix"], match["count"]) if match else file.name, file)
    if not firsts:
        raise ValueError(f"{path} has no *.gguf file; give a GGUF file or the folder of one.")
    models = [_split_headers(file) for file in firsts.values()]
    with_experts = [headers for headers in models if any(map(_has_experts, headers))]
    if len(with_experts) == 1:
        return with_experts[0]
    if with_experts:
        names = ", ".join(headers[0].path.name for headers in with_experts)
        raise ValueError(f"{path} holds {len(with_experts)} models with experts ({names}); give the file of one.")
    return models[0]


def _has_experts(header: GgufHeader) -> bool:
    return any(_EXPERTS.fullmatch(name) for name in header.tensors)


def _split_headers(path: Path) -> list[GgufHeader]:
    """Headers of a file, or of all splits where it is one of several, in their order."""
    match = _SPLIT.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count == 0:
        headers = [read_header(path)]
    else:
        files = [
            path.with_name(f"{match['prefix']}-{part:05d}-of-{match['count']}.gguf") for part in range(1, count + 1)
        ]
        for file in files:
            if not file.exists():
                raise ValueError(f"{path} is one of {count} files, of which {file.name} is missing; download it.")
        headers = [read_header(file) for file in files]
    num_tensors = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        # A file that was merged from splits says 0.
        found = (header.values.get("split.no", 0), header.values.get("split.count") or 1)
        if found != (number, len(headers)):
            raise ValueError(
                f"{header.path} is by its own account split {found[0]!a} of {found[1]!a}, counted from 0, and by its "
                f"name {number} of {len(headers)}; give all files of the model the names they were published with."
            )
        promised = header.values.get("split.tensors.count", num_tensors)
        if promised != num_tensors:
            raise ValueError(
                f"{header.path} promises {promised!a} tensors, but {num_tensors} are there; download the model again."
            )
    return headers


def _model_sizes(header: GgufHeader) -> ModelSizes:
    """Sizes of the routed experts from the values of the first file."""
    values = header.values
    arch = values.get("general.architecture")
    if not isinstance(arch, str) or not arch.isprintable():
        raise ValueError(f"{header.path} does not say its general.architecture; download it again.")

    def find(*keys: str) -> int | None:
        for key in keys:
            value = values.get(f"{arch}.{key}")
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def size(*keys: str) -> int:
        value = find(*keys)
        if value is not None:
            return value
        raise ValueError(
            f"{header.path} has no {' or '.join(f'{arch}.{key}' for key in keys)}; kt_kernel needs the GGUF file of a "
            f"mixture-of-experts model."
        )

    blocks = find("block_count")
    return ModelSizes(
        model_type=arch,
        num_experts=size("expert_count"),
        top_k=size("expert_used_count"),
        hidden_size=size("embedding_length"),
        intermediate_size=size("expert_feed_forward_length", "feed_forward_length"),
        # Blocks that draft tokens are counted, and are the last.
        num_hidden_layers=None if blocks is None else blocks - (find("nextn_predict_layers") or 0),
    )
