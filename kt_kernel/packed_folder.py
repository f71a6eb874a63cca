"""The folder of converted experts: its manifest, reading it, checking it. Writing is in ``packed_writer.py``.

    manifest.json                      what was made from what, checksum and quantization error of every tensor
    kt-layer-00012-00000.safetensors   first file of MoE layer 12: ``experts.{e}.w13``, ``experts.{e}.w2``, uint8 packed
                                       bytes of so many experts, in order, as fit in a file
    config.json, tokenizer*, ...       copies, so that the folder says which model it is

The bytes depend on the checkpoint, the layout and nothing else: not on threads, NUMA nodes or the instruction set.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from kt_kernel.files import OpenFiles, is_file_name, open_safetensors, read_small_file

MANIFEST = "manifest.json"
FORMAT = "kt-packed-experts"
FORMAT_VERSION = 2
_SHARD_PREFIX = "kt-layer-"
# What a manifest must hold to be read. A dict of one type: any names, each with that; int: not negative.
_FORM = {
    "method": str,
    "layout": str,
    "complete": bool,
    "model": {"num_experts": int, "hidden_size": int, "intermediate_size": int},
    "moe_layers": [int],
    "layers": {str: {str: {"bytes": int, "tensors": {str: {"bytes": int, "crc32": str}}}}},
    "copied_files": {str: str},
}


@dataclass(frozen=True)
class PackedDescription:
    """What is converted from what; a folder is resumed only by a conversion of equal :meth:`identity`.

    Attributes
    ----------
    method, layout : str
        Name of the method and key of the packed layout.
    package_version : str
        Version of kt_kernel that began the folder. Information only: layout and format version decide the bytes.
    input_type : str
        What ``--input-type`` calls the source's weights: ``"bf16"``, ``"fp8"``.
    model : dict
        model_type, num_experts, top_k, hidden_size, intermediate_size, num_hidden_layers.
    moe_layers : list of int
        Layers that have experts, ascending.
    source_bytes : dict
        Size of every source file that holds experts, by name.
    config_sha256 : str
        Hash of the source's config.json, where it has one.
    """

    method: str
    layout: str
    package_version: str
    input_type: str
    model: dict
    moe_layers: list[int]
    source_bytes: dict[str, int]
    config_sha256: str

    def to_json(self) -> dict:
        """Everything, as the manifest holds it."""
        return asdict(self)

    def identity(self) -> dict:
        """What makes two conversions the same."""
        return {key: value for key, value in self.to_json().items() if key != "package_version"}


def shard_file_name(layer: int, shard: int) -> str:
    """Name of one file of a layer, e.g. ``kt-layer-00012-00000.safetensors``."""
    return f"{_SHARD_PREFIX}{layer:05d}-{shard:05d}.safetensors"


def shard_metadata(layout: str) -> dict[str, str]:
    """What the header of a file says; a single entry, because safetensors writes several in random order."""
    return {FORMAT: layout}


def manifest_tensors(manifest: dict) -> Iterator[tuple[int, str, dict]]:
    """Layer, name and entry (bytes, crc32, relative_error) of every tensor that a manifest lists."""
    for layer, files in manifest["layers"].items():
        for file in files.values():
            for name, tensor in file["tensors"].items():
                yield int(layer), name, tensor


def encode_manifest(manifest: dict) -> bytes:
    """Manifest as stored: JSON with a checksum of the rest as last key."""
    body = {key: value for key, value in manifest.items() if key != "manifest_crc32"}
    body["manifest_crc32"] = f"{_body_crc32(body):08x}"
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def _body_crc32(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _manifest_bytes(folder: Path) -> bytes | None:
    """Contents of a folder's manifest.json, None where there is no such file."""
    if not folder.is_dir():
        return None
    try:
        return read_small_file(folder / MANIFEST)
    except FileNotFoundError:
        return None


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a folder, which may be unfinished.

    Raises
    ------
    ValueError
        Missing, unreadable, damaged, or of another format version.
    """
    path = folder / MANIFEST
    data = _manifest_bytes(folder)
    if data is None:
        raise ValueError(f"{folder} has no {MANIFEST}; it is no folder of converted experts.")
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); convert again into an empty folder.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of kt_kernel; give a folder made by scripts/convert_cpu_weights.py.")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!a} and this kt_kernel reads version {FORMAT_VERSION}; convert the "
            f"checkpoint again or install the kt_kernel that wrote it ({manifest.get('package_version')!a})."
        )
    body = {key: value for key, value in manifest.items() if key != "manifest_crc32"}
    if manifest.get("manifest_crc32") != f"{_body_crc32(body):08x}":
        raise ValueError(f"{path} does not match its own checksum; convert again into an empty folder.")
    misfit = _misfit({"copied_files": {}} | manifest, _FORM, "")
    if misfit is None:
        names = [name for entries in manifest["layers"].values() for name in entries]
        names += manifest.get("copied_files", ())
        outside = [name for name in names if not is_file_name(name)]
        layers = [layer for layer in manifest["layers"] if not re.fullmatch("0|[1-9][0-9]{0,8}", layer)]
        misfit = next((f"name {name[:80]!a}" for name in outside + layers), None)
    if misfit is not None:
        raise ValueError(f"{path} has a {misfit} that no conversion writes; convert again into an empty folder.")
    return manifest


def _misfit(value: object, form: object, place: str) -> str | None:
    """The first place below a value that is not of its form, which has the shape of :data:`_FORM`; None: none."""
    if isinstance(form, type):
        fits = type(value) is form and (value >= 0 if form is int else value.isprintable() if form is str else True)
        return None if fits else f"value of {place.lstrip('.')}"
    if type(value) is not type(form):
        return f"value of {place.lstrip('.')}"
    if isinstance(value, list):
        below = [(item, form[0], f"{place}[{index}]") for index, item in enumerate(value)]
    elif str in form:
        odd = next((name for name in value if not name or not name.isprintable()), None)
        if odd is not None:
            return f"name {odd[:80]!a}"
        below = [(item, form[str], f"{place}.{name}") for name, item in value.items()]
    else:
        below = [(value.get(name), item, f"{place}.{name}") for name, item in form.items()]
    return next(filter(None, (_misfit(*each) for each in below)), None)


def is_packed_folder(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours: finished or not, whole or damaged.

    A damaged one is told by the files beside it, so that :func:`read_manifest` can say what is wrong.

    Raises
    ------
    ValueError
        A manifest.json that cannot be read.
    """
    data = _manifest_bytes(folder)
    if data is None:
        return False
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
        return True
    return FORMAT.encode() in data or any(folder.glob(f"{_SHARD_PREFIX}*.safetensors"))


class PackedFolder:
    """A finished folder of converted experts, opened for reading.

    Checks the manifest, and existence and size of every file; the contents are checked by :func:`verify`.
    Thread-safe. Tensors are views of mapped files; :meth:`close` after a layer lets the files go.

    Raises
    ------
    ValueError
        Unfinished, damaged, of another version: one sentence.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.method: str = self.manifest["method"]
        self.layout: str = self.manifest["layout"]
        self.model: dict = self.manifest["model"]
        self.layers: list[int] = list(self.manifest["moe_layers"])
        if not self.manifest.get("complete"):
            raise ValueError(
                f"{self.folder} is an unfinished conversion ({len(self.manifest['layers'])} of {len(self.layers)} "
                f"layers); start the same convert_cpu_weights.py command again, it goes on where it stopped."
            )
        for layer in self.layers:
            for name, entry in self._entries(layer).items():
                path = self.folder / name
                size = path.stat().st_size if path.is_file() else None
                if size != entry["bytes"]:
                    found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                    raise ValueError(
                        f"{path} {found}; copy it again, or delete it and start the same convert_cpu_weights.py "
                        f"command."
                    )
        self._files = OpenFiles(self.folder)

    def _entries(self, layer: int) -> dict[str, dict]:
        """Manifest entries of the files of a layer, by file name."""
        entries = self.manifest["layers"].get(str(layer))
        if entries is None:
            raise ValueError(f"{self.folder / MANIFEST} promises layer {layer} and does not list it; convert again.")
        return entries

    def _file_name(self, layer: int, tensor: str) -> str:
        for name, entry in self._entries(layer).items():
            if tensor in entry["tensors"]:
                return name
        raise ValueError(f"{self.folder / MANIFEST} lists no tensor {tensor} in layer {layer}; convert again.")

    def expert_bytes(self, layer: int) -> int:
        """Packed bytes of one expert of a layer."""
        return sum(tensor.numel() for tensor in self.expert(layer, 0))

    def check_sizes(
        self, layer: int, *, num_experts: int, hidden_size: int, intermediate_size: int, w13_bytes: int, w2_bytes: int
    ) -> None:
        """Check that a layer is there and has the sizes of the model that is being served.

        Parameters
        ----------
        layer : int
            Index of the layer in the model.
        num_experts : int
            Expert ids that the served model routes to; more than there are experts are redundant copies, fewer cannot
            be.
        hidden_size, intermediate_size : int
            Of the served model; must be equal.
        w13_bytes, w2_bytes : int
            Packed size of each expert's matrices.

        Raises
        ------
        ValueError
            Another model's folder; the message names size, value found and value wanted.
        """
        found_experts = self.model["num_experts"]
        if num_experts < found_experts:
            raise ValueError(
                f"{self.folder} has {found_experts} experts a layer, but the model being served has {num_experts}; "
                f"convert the checkpoint of the served model."
            )
        wanted = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for key, value in wanted.items():
            if self.model[key] != value:
                raise ValueError(
                    f"{self.folder} was converted from a model with {key} {self.model[key]}, but the model being "
                    f"served has {value}; convert the checkpoint of the served model."
                )
        if layer not in self.layers:
            raise ValueError(
                f"{self.folder} has no experts for layer {layer}; it was converted from another model, so convert "
                f"the checkpoint of the served model."
            )
        for expert in range(found_experts):
            for part, size in (("w13", w13_bytes), ("w2", w2_bytes)):
                tensor = f"experts.{expert}.{part}"
                header = self._slice(layer, tensor)
                if (header.get_dtype(), header.get_shape()) != ("U8", [size]):
                    raise ValueError(
                        f"tensor {tensor} of {self.folder / self._file_name(layer, tensor)} has "
                        f"shape {header.get_shape()} of {header.get_dtype()} instead of [{size}] of U8; convert again."
                    )

    def _slice(self, layer: int, tensor: str):
        file = self._file_name(layer, tensor)
        try:
            return self._files[file].get_slice(tensor)
        except SafetensorError:
            raise ValueError(f"tensor {tensor} of {self.folder / file} is missing; convert again.") from None

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed w13 and w2 of an expert: uint8 views of the mapped file."""
        w13, w2 = (self._slice(layer, f"experts.{expert}.{part}")[:] for part in ("w13", "w2"))
        return w13, w2

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use opens them again."""
        self._files.close()


def check_file(
    path: Path, entry: dict, layout: str, progress: Callable[[int], None] = lambda num_bytes: None
) -> str | None:
    """Compare one file with its manifest entry: what the header says, and every byte of the tensors.

    Parameters
    ----------
    path : Path
        The file.
    entry : dict
        ``manifest["layers"][layer][path.name]``.
    layout : str
        ``manifest["layout"]``.
    progress : callable
        Called with the bytes of each tensor read.

    Returns
    -------
    str or None
        What is wrong, in one sentence that names file and tensor; None if nothing is.
    """
    if not path.is_file():
        return f"{path} is missing."
    if path.stat().st_size != entry["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}."
    try:
        file = open_safetensors(path)
    except ValueError as error:
        return str(error)
    recorded = entry["tensors"]
    problem = f"the header of {path} does not match the manifest."
    if set(file.keys()) != set(recorded) or file.metadata() != shard_metadata(layout):
        return problem
    for name, tensor in recorded.items():
        header = file.get_slice(name)
        if (header.get_dtype(), header.get_shape()) != ("U8", [tensor["bytes"]]):
            return problem
    for name, tensor in recorded.items():
        if f"{zlib.crc32(file.get_tensor(name).numpy()):08x}" != tensor["crc32"]:
            return f"tensor {name} of {path} does not match its checksum."
        progress(tensor["bytes"])
    return None


def verify(
    folder: str | Path,
    progress: Callable[[int], None] = lambda num_bytes: None,
    finished: Callable[[int], None] = lambda layer: None,
) -> list[str]:
    """Check every byte of a converted folder against the manifest.

    Parameters
    ----------
    folder : str or Path
        Folder made by the converter.
    progress : callable
        Called with the bytes of each tensor read.
    finished : callable
        Called with each listed layer when all of it has been checked.

    Returns
    -------
    list of str
        One sentence per defect, naming file and tensor; empty if the folder is whole.

    Raises
    ------
    ValueError
        No folder of ours, unfinished, or a damaged manifest.
    """
    from hashlib import sha256

    root = Path(folder)
    manifest = read_manifest(root)
    problems = []
    if not manifest.get("complete"):
        problems.append(f"{root} is an unfinished conversion.")
    for layer in manifest["moe_layers"]:
        entries = manifest["layers"].get(str(layer))
        if entries is None and manifest.get("complete"):
            problems.append(f"{root / MANIFEST} does not list layer {layer}.")
        for name, entry in (entries or {}).items():
            problem = check_file(root / name, entry, manifest["layout"], progress)
            if problem:
                problems.append(problem)
        if entries is not None:
            finished(layer)
    for name, digest in manifest.get("copied_files", {}).items():
        path = root / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"{path} does not match its checksum.")
    return problems
