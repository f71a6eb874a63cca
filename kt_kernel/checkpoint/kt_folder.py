"""Folders that kt-kernel's converter wrote for AMXINT4 and AMXINT8: where the bytes are, and whether they can be right.

Two forms with the same bytes: ``_layer_L/_numa_N/INT4_gate_E_8192Byte_quant_.kt`` (and ``_scale_``), a file for each
expert, projection and NUMA part; or safetensors with ``blk.L.ffn_gate_exps.E.numa.N.weight`` (and ``.scale``). Gate and
up are cut by rows into NUMA parts, down by columns, each part packed on its own with one fp32 scale a row.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from kt_kernel.checkpoint.model_folder import ModelSizes, describe_layers, model_sizes
from kt_kernel.files import OpenFiles, open_safetensors

# Bits of a code by method.
_BITS = {"AMXINT8": 8, "AMXINT4": 4}
_METHOD_OF = {bits: method for method, bits in _BITS.items()}
_PROJECTIONS = ("gate", "up", "down")

_FILE = re.compile(
    r"(?P<method>INT4|INT8)_(?P<projection>gate|up|down)_(?P<expert>\d+)_(?P<bytes>\d+)Byte_(?P<kind>quant|scale)_\.kt"
)
_OTHER_METHOD = re.compile(r"(MOE_INT[48])_")
_BACKWARD_FILE = re.compile(r"\w+_(?:gate|up|down)_bwd_")
_TENSOR = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<projection>gate|up|down)_exps\.(?P<expert>\d+)\.numa\.(?P<part>\d+)"
    r"\.(?P<kind>weight|scale)"
)
_WHOLE_TENSOR = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)_exps\.\d+\.(?:weight|scale|qzeros)")


class _Key(NamedTuple):
    expert: int
    projection: str
    part: int
    kind: str  # weight or scale


class _Place(NamedTuple):
    """A file of its own, or a tensor in a safetensors file."""

    file: str
    tensor: str | None

    @property
    def name(self) -> str:
        return self.tensor or self.file


def is_kt_folder(folder: Path) -> bool:
    """Whether a folder is one of kt-kernel's converter, of a method that is read here or not."""
    if any(folder.glob("_layer_*/_numa_*")):
        return True
    first = min(folder.glob("*.safetensors"), default=None)
    names = [] if first is None else open_safetensors(first).keys()
    return any(name.startswith("blk.") for name in names)


class KtFolder:
    """Converted experts, indexed by layer, expert, projection and NUMA part; otherwise as :class:`Checkpoint`.

    ``sizes`` are those of config.json, which the converter copies beside the safetensors form; a tree of ``.kt`` files
    has none, so there they are told from the files, with ``top_k`` 0 and ``model_type`` unknown. The number of NUMA
    parts says how the files were cut, and nothing of where they can be used.

    In safetensors, weights of MOE_INT4 and MOE_INT8 have the names and sizes of AMXINT4 and AMXINT8, in another order:
    no reader can tell them apart, so who asks for these methods is refused.

    Parameters
    ----------
    folder : str or Path
        For which :func:`is_kt_folder` holds.
    method : str
        The method asked for, by the name that the caller gave; must be that of the files.

    Raises
    ------
    ValueError
        Of another method, incomplete, or of other sizes than config.json says: one sentence each.
    """

    def __init__(self, folder: str | Path, method: str) -> None:
        self.folder = self.root = Path(folder)
        self._files = OpenFiles(self.folder)
        has_config = (self.folder / "config.json").exists()
        self._config = model_sizes(self.folder) if has_config else None
        self._layers: dict[int, dict[_Key, _Place]] = {}
        self._index_tensors()
        if self._layers and method.startswith("MOE_"):
            raise ValueError(
                f"{self.folder} holds experts that kt-kernel converted, and what it converts for {method} is in an "
                f"order of bytes that kt_kernel does not read; give the original checkpoint, or convert that with "
                f"scripts/convert_cpu_weights.py."
            )
        if not self._layers:
            self._index_files(method)
        if not self._layers:
            raise ValueError(
                f"{self.folder} holds no experts of AMXINT4 or AMXINT8; convert the original checkpoint with "
                f"scripts/convert_cpu_weights.py."
            )
        self.num_parts = 1 + max(key.part for key in self._layers[self.layers[0]])
        for layer in self.layers:
            self._check_complete(layer)
        self.sizes, self._bits = self._read_sizes()
        if _BITS.get(method) != self._bits:
            raise self._wrong_method(_METHOD_OF[self._bits], method)
        self._check_sizes()

    # --- index ---

    def _index_tensors(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            names = self._files[path.name].keys()
            for name in names:
                match = _TENSOR.fullmatch(name)
                if match:
                    self._add(int(match["layer"]), match, int(match["part"]), match["kind"], _Place(path.name, name))
                elif _WHOLE_TENSOR.fullmatch(name):
                    raise ValueError(
                        f"{self.folder} holds experts that kt-kernel converted from AWQ (tensor {name}), which are not "
                        f"read; give the AWQ checkpoint itself."
                    )

    def _index_files(self, method: str) -> None:
        others = set()
        for folder, part, layer in self._part_folders():
            for name in sorted(os.listdir(folder)):
                if not name.endswith(".kt") or _BACKWARD_FILE.match(name):
                    continue
                file = f"{folder.parent.name}/{folder.name}/{name}"
                if other := _OTHER_METHOD.match(name):
                    raise ValueError(
                        f"{self.folder} was converted for {other[1]} (file {file}), which kt_kernel does not read; "
                        f"convert the original checkpoint with scripts/convert_cpu_weights.py."
                    )
                match = _FILE.fullmatch(name)
                if match is None:
                    raise ValueError(
                        f"{self.folder} has a file {file}, which is none of AMXINT4 or AMXINT8; take it away, or "
                        f"convert the original checkpoint with scripts/convert_cpu_weights.py."
                    )
                if f"AMX{match['method']}" == method:
                    kind = "scale" if match["kind"] == "scale" else "weight"
                    self._add(layer, match, part, kind, _Place(file, None))
                else:
                    others.add(f"AMX{match['method']}")
        if not self._layers and others:
            raise self._wrong_method(min(others), method)

    def _part_folders(self) -> list[tuple[Path, int, int]]:
        """Folders of NUMA parts, with the part and the layer."""
        found = []
        for path in sorted(self.folder.glob("_layer_*/_numa_*")):
            layer, part = path.parent.name.removeprefix("_layer_"), path.name.removeprefix("_numa_")
            if layer.isdecimal() and part.isdecimal() and path.is_dir():
                found.append((path, int(part), int(layer)))
        return found

    def _add(self, layer: int, match: re.Match[str], part: int, kind: str, place: _Place) -> None:
        if self._config and self._config.num_hidden_layers and layer >= self._config.num_hidden_layers:
            return  # drafts tokens; the served model does not have it
        places = self._layers.setdefault(layer, {})
        key = _Key(int(match["expert"]), match["projection"], part, kind)
        if key in places:
            raise ValueError(
                f"{self.folder} has the {kind} of {match['projection']} of expert {key.expert} in layer {layer} twice "
                f"({places[key].file} and {place.file}); take the one of an earlier conversion away."
            )
        places[key] = place

    def _wrong_method(self, found: str, method: str) -> ValueError:
        return ValueError(
            f"{self.folder} was converted for method {found}, but method {method} was asked for; give --kt-method "
            f"{found} or another folder."
        )

    def _num_experts(self) -> int:
        if self._config:
            return self._config.num_experts
        return 1 + max(key.expert for places in self._layers.values() for key in places)

    def _check_complete(self, layer: int) -> None:
        places, num_experts = self._layers[layer], self._num_experts()
        # Not made before they are looked for: names of files may promise any number.
        wanted = (
            _Key(expert, projection, part, kind)
            for expert in range(num_experts)
            for projection in _PROJECTIONS
            for part in range(self.num_parts)
            for kind in ("weight", "scale")
        )
        for key in wanted:
            if key not in places:
                raise ValueError(
                    f"{self.folder} lacks the {key.kind} of {key.projection} of expert {key.expert} in layer {layer}, "
                    f"NUMA part {key.part} of {self.num_parts} ({num_experts} experts a layer); copy or convert it "
                    f"again."
                )
        if len(places) != 2 * len(_PROJECTIONS) * num_experts * self.num_parts:
            place = next(p for key, p in places.items() if key.expert >= num_experts or key.part >= self.num_parts)
            raise ValueError(
                f"{self.folder} has {place.name}, but the model has {num_experts} experts and the first layer "
                f"{self.num_parts} NUMA parts; copy or convert it again."
            )

    # --- sizes ---

    def _read_sizes(self) -> tuple[ModelSizes, int]:
        """Sizes and bits of a code as the first expert has them."""
        places = self._layers[self.layers[0]]
        rows = self._num_bytes(places[_Key(0, "gate", 0, "scale")]) // 4
        hidden = self._num_bytes(places[_Key(0, "down", 0, "scale")]) // 4
        weight = places[_Key(0, "gate", 0, "weight")]
        found = self._num_bytes(weight)
        bits = next((bits for bits in _METHOD_OF if found * 8 == rows * hidden * bits > 0), None)
        if bits is None:
            raise ValueError(
                f"{weight.name} of {self.folder} has {found} bytes, which are no 4 or 8 bits for each of [{rows}, "
                f"{hidden}] weights, as many as there are scales; copy or convert it again."
            )
        inter = rows * self.num_parts
        if self._config is None:
            return ModelSizes("unknown", self._num_experts(), 0, hidden, inter, None), bits
        if (hidden, inter) != (self._config.hidden_size, self._config.intermediate_size):
            raise ValueError(
                f"{self.folder} holds experts of hidden size {hidden} and intermediate size {inter} in "
                f"{self.num_parts} NUMA parts, but config.json says {self._config.hidden_size} and "
                f"{self._config.intermediate_size}; copy both again."
            )
        return self._config, bits

    def _check_sizes(self) -> None:
        """The byte order has steps of 64 (INT8) or 128 (INT4) along k: H for gate and up, I / parts for down."""
        step, rows = 512 // self._bits, self.sizes.intermediate_size // self.num_parts
        if rows % step or self.sizes.hidden_size % step:
            raise ValueError(
                f"{self.folder} holds NUMA parts of {rows} intermediate and {self.sizes.hidden_size} hidden columns, "
                f"which {_METHOD_OF[self._bits]} has only in multiples of {step}; convert the original checkpoint with "
                f"scripts/convert_cpu_weights.py."
            )

    def _wanted_bytes(self, key: _Key) -> int:
        hidden, rows = self.sizes.hidden_size, self.sizes.intermediate_size // self.num_parts
        if key.kind == "weight":
            return hidden * rows * self._bits // 8
        return 4 * (hidden if key.projection == "down" else rows)

    def _num_bytes(self, place: _Place) -> int:
        """Bytes of a file or a tensor.

        Raises
        ------
        ValueError
            Not those of its name, or of another type or shape than bytes and fp32 scales in a row.
        """
        if place.tensor is None:
            path = self.folder / place.file
            if not path.is_file():
                raise ValueError(f"{path} is gone; copy it again.")
            found = path.stat().st_size
            promised = int(_FILE.fullmatch(place.file.rpartition("/")[2])["bytes"])
            if found != promised:
                raise ValueError(f"{path} has {found} bytes, not the {promised} of its name; copy it again.")
            return found
        header = self._files[place.file].get_slice(place.tensor)
        dtype, shape = header.get_dtype(), header.get_shape()
        types = {"F32": 4} if place.tensor.endswith(".scale") else {"I8": 1, "U8": 1}
        if dtype not in types or len(shape) != 1:
            raise ValueError(
                f"tensor {place.tensor} of {self.folder} has type {dtype} and shape {shape}, where one row of "
                f"{' or '.join(types)} is meant; copy or convert it again."
            )
        return shape[0] * types[dtype]

    # --- what is there ---

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with experts, ascending."""
        return sorted(self._layers)

    @property
    def typical_layer(self) -> int:
        """The first layer: all are alike."""
        return self.layers[0]

    def describe(self) -> str:
        """What the experts are, in words."""
        return f"{_METHOD_OF[self._bits]} experts that kt-kernel converted for {self.num_parts} NUMA nodes"

    def files(self, layer: int) -> list[str]:
        """Files that hold experts of a layer, relative to the folder, ascending."""
        return sorted({place.file for place in self._layers[layer].values()})

    def expert_bytes(self, layer: int) -> int:
        """Bytes one expert of a layer takes in the files."""
        return sum(self._wanted_bytes(key) for key in self._layers[layer] if key.expert == 0)

    def check_layer(self, layer: int) -> None:
        """Check that a layer has experts, and every file or tensor of it the right size.

        Raises
        ------
        ValueError
            It has not; the message names the file or the tensor.
        """
        if layer not in self._layers:
            raise ValueError(
                f"{self.folder} has no experts in layer {layer}; layers with experts are "
                f"{describe_layers(self.layers)}."
            )
        for key, place in self._layers[layer].items():
            found, wanted = self._num_bytes(place), self._wanted_bytes(key)
            if found != wanted:
                raise ValueError(
                    f"{place.name} of {self.folder} has {found} bytes, but INT{self._bits} of hidden size "
                    f"{self.sizes.hidden_size} and intermediate size {self.sizes.intermediate_size} in "
                    f"{self.num_parts} NUMA parts means {wanted}; copy or convert it again."
                )

    # --- weights ---

    def source(self, layer: int, expert: int, projection: str) -> tuple[str, list[torch.Tensor]]:
        """One matrix as the files have it; :meth:`check_layer` must have been called.

        Parameters
        ----------
        layer, expert : int
            Layer of the model and logical expert.
        projection : str
            ``gate``, ``up`` or ``down``.

        Returns
        -------
        tuple
            Source string (``kt_int4x2_rows``: codes, NUMA parts, how they are cut) and, for each NUMA part, its bytes
            (uint8) and its scales (fp32), views of the mapped files.

        Raises
        ------
        ValueError
            A file that is gone, a scale that is negative, infinite or NaN.
        """
        parts = []
        for part in range(self.num_parts):
            for kind in ("weight", "scale"):
                key = _Key(expert, projection, part, kind)
                parts.append(self._load(self._layers[layer][key], self._wanted_bytes(key), kind))
            scale = parts[-1]
            if not (scale.isfinite() & (scale >= 0)).all():
                raise ValueError(
                    f"{self._layers[layer][key].name} of {self.folder} has a scale that is negative, infinite or NaN; "
                    f"copy or convert it again."
                )
        cut = "columns" if projection == "down" else "rows"
        return f"kt_int{self._bits}x{self.num_parts}_{cut}", parts

    def _load(self, place: _Place, num_bytes: int, kind: str) -> torch.Tensor:
        dtype = torch.uint8 if kind == "weight" else torch.float32
        if place.tensor is not None:
            return self._files[place.file].get_tensor(place.tensor).view(dtype)
        path = self.folder / place.file
        try:
            return torch.from_file(str(path), shared=False, size=num_bytes // dtype.itemsize, dtype=dtype)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be mapped ({error}); copy it again.") from error

    def biases(self, layer: int, expert: int) -> None:
        """None: the converter leaves them out."""

    def tensor_name(self, layer: int, expert: int, projection: str) -> str:
        """Name of the first tensor or file of ``gate``, ``up`` or ``down`` of an expert, for messages."""
        return self._layers[layer][_Key(expert, projection, 0, "weight")].name

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use opens them again."""
        self._files.close()
