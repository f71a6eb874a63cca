"""The folder of converted experts: its manifest, reading it, checking it. Writing is in ``packed_writer.py``.

    manifest.json                  what was made from what, checksum and quantization error of every tensor
    kt-layer-00012.safetensors     one file per MoE layer: ``experts.{e}.w13``, ``experts.{e}.w2``, uint8 packed bytes
    config.json, tokenizer*, ...   copies, so that the folder says which model it is

The bytes depend on the checkpoint, the layout and nothing else: not on threads, NUMA nodes or the instruction set.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kt_kernel.safetensors_file import SafetensorsFile

MANIFEST = "manifest.json"
FORMAT = "kt-packed-experts"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackedDescription:
    """What makes two conversions the same; a folder is resumed only for an equal description.

    Attributes
    ----------
    method, layout : str
        Name of the method and key of the packed layout.
    package_version : str
        Version of kt_kernel that wrote the folder.
    input_type : str
        ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    model : dict
        model_type, num_experts, top_k, hidden_size, intermediate_size, num_hidden_layers.
    moe_layers : list of int
        Layers that have experts, ascending.
    source_bytes : dict
        Size of every source file that holds experts, by name.
    config_sha256 : str
        Hash of the source's config.json.
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
        return asdict(self)


def layer_file_name(layer: int) -> str:
    """File name of one layer, e.g. ``kt-layer-00012.safetensors``."""
    return f"kt-layer-{layer:05d}.safetensors"


def encode_manifest(manifest: dict) -> bytes:
    """Manifest as stored: JSON with a checksum of the rest as last key."""
    body = {key: value for key, value in manifest.items() if key != "manifest_crc32"}
    body["manifest_crc32"] = f"{_body_crc32(body):08x}"
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def _body_crc32(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a folder, which may be unfinished.

    Raises
    ------
    ValueError
        Missing, damaged, or of another format version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}; it is no folder of converted experts.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); convert again into an empty folder.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of kt_kernel; give a folder made by scripts/convert_cpu_weights.py.")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r} and this kt_kernel reads version {FORMAT_VERSION}; convert the "
            f"checkpoint again or install the kt_kernel that wrote it ({manifest.get('package_version')})."
        )
    body = {key: value for key, value in manifest.items() if key != "manifest_crc32"}
    if manifest.get("manifest_crc32") != f"{_body_crc32(body):08x}":
        raise ValueError(f"{path} does not match its own checksum; convert again into an empty folder.")
    return manifest


def is_packed_folder(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours (finished or not)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


class PackedFolder:
    """A finished folder of converted experts, opened for reading.

    Checks the manifest, and existence and size of every file; the contents are checked by :func:`verify`.
    Thread-safe but for the first access to a layer.

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
            entry = self._entry(layer)
            path = self.folder / entry["file"]
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                raise ValueError(
                    f"{path} {found}; copy it again, or delete it and start the same convert_cpu_weights.py command."
                )
        self._files: dict[int, SafetensorsFile] = {}

    def _entry(self, layer: int) -> dict:
        entry = self.manifest["layers"].get(str(layer))
        if entry is None:
            raise ValueError(f"{self.folder / MANIFEST} promises layer {layer} and does not list it; convert again.")
        return entry

    def _file(self, layer: int) -> SafetensorsFile:
        if layer not in self._files:
            self._files[layer] = SafetensorsFile(self.folder / self._entry(layer)["file"])
        return self._files[layer]

    def expert_bytes(self, layer: int) -> int:
        """Packed bytes of one expert of a layer."""
        tensors = self._entry(layer)["tensors"]
        return sum(tensors[f"experts.0.{part}"]["bytes"] for part in ("w13", "w2"))

    def check_sizes(
        self, layer: int, *, num_experts: int, hidden_size: int, intermediate_size: int, w13_bytes: int, w2_bytes: int
    ) -> None:
        """Check that a layer is there and has the sizes of the model that is being served.

        Raises
        ------
        ValueError
            Another model's folder; the message names size, value found and value wanted.
        """
        wanted = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
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
        tensors = self._file(layer).tensors
        for expert in range(num_experts):
            for part, size in (("w13", w13_bytes), ("w2", w2_bytes)):
                info = tensors.get(f"experts.{expert}.{part}")
                if info is None or info.num_bytes != size:
                    found = "is missing" if info is None else f"has {info.num_bytes} bytes instead of {size}"
                    raise ValueError(
                        f"tensor experts.{expert}.{part} of {self._file(layer).path} {found}; convert again."
                    )

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed w13 and w2 of an expert: uint8 views of the mapped file."""
        file = self._file(layer)
        return file.tensor(f"experts.{expert}.w13"), file.tensor(f"experts.{expert}.w2")

    def prefetch(self, layer: int, expert: int) -> None:
        """Let the kernel read an expert ahead."""
        for part in ("w13", "w2"):
            self._file(layer).prefetch(f"experts.{expert}.{part}")

    def release(self, layer: int, expert: int) -> None:
        """Give the pages of an expert back."""
        for part in ("w13", "w2"):
            self._file(layer).release(f"experts.{expert}.{part}")


def check_layer_file(folder: Path, entry: dict, progress: Callable[[int], None] = lambda num_bytes: None) -> str | None:
    """Compare one layer file with its manifest entry, byte by byte.

    Parameters
    ----------
    folder : Path
        Folder of the file.
    entry : dict
        ``manifest["layers"][layer]``.
    progress : callable
        Called with the bytes of each tensor read.

    Returns
    -------
    str or None
        What is wrong, in one sentence that names file and tensor; None if nothing is.
    """
    path = folder / entry["file"]
    try:
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}."
        file = SafetensorsFile(path)
    except FileNotFoundError:
        return f"{path} is missing."
    except ValueError as error:
        return str(error)
    if f"{file.header_crc32:08x}" != entry["header_crc32"] or set(file.tensors) != set(entry["tensors"]):
        return f"the header of {path} does not match its checksum."
    for name, recorded in entry["tensors"].items():
        found = zlib.crc32(memoryview(file.tensor(name).numpy()))
        file.release(name)
        if f"{found:08x}" != recorded["crc32"]:
            return f"tensor {name} of {path} does not match its checksum."
        progress(recorded["bytes"])
    return None


def verify(folder: str | Path, progress: Callable[[int], None] = lambda num_bytes: None) -> list[str]:
    """Check every byte of a converted folder against the manifest.

    Parameters
    ----------
    folder : str or Path
        Folder made by the converter.
    progress : callable
        Called with the bytes of each tensor read.

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
        entry = manifest["layers"].get(str(layer))
        if entry is not None:
            problem = check_layer_file(root, entry, progress)
            if problem:
                problems.append(problem)
        elif manifest.get("complete"):
            problems.append(f"{root / MANIFEST} does not list layer {layer}.")
    for name, digest in manifest.get("copied_files", {}).items():
        path = root / name
        if not path.exists():
            problems.append(f"{path} is missing.")
        elif sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"{path} does not match its checksum.")
    return problems
