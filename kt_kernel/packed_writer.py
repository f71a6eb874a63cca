"""Writing a folder of converted experts: layer by layer, atomically, resumed by itself after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from kt_kernel.packed_folder import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PackedDescription,
    check_layer_file,
    encode_manifest,
    layer_file_name,
    read_manifest,
)
from kt_kernel.safetensors_file import SafetensorsWriter, write_atomically

logger = logging.getLogger("kt_kernel.converter")

_LOCK = ".kt-convert.lock"
# Sizes, times and hashes of source files already read: spares a resumed run from hashing terabytes again. Removed at
# the end, so the result depends on the source's contents only.
_STATE = ".kt-source-state.json"


class PackedWriter:
    """Owner of a folder that is being written.

    States of a layer on disk: ``.part`` file (being written) -> final name (whole, on disk) -> listed in the manifest
    (checked when resumed). A kill in any of them costs at most the layer being written.

    Parameters
    ----------
    folder : Path
        Created where missing. Must be empty or an unfinished (or finished) conversion of the same description.
    description : PackedDescription
        What is being made.
    progress : callable
        Called with bytes while finished layers are checked.

    Raises
    ------
    ValueError
        The folder holds something else, or another conversion is writing to it.
    OSError
        The disk is full or fails (one sentence).
    """

    def __init__(
        self, folder: Path, description: PackedDescription, progress: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        self.folder = folder
        self.manifest: dict = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self.manifest = self._begin(description)
            self._check_finished_layers(progress)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        self._lock_fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise ValueError(f"another conversion is writing to {self.folder}; wait for it or stop it.") from None

    def _begin(self, description: PackedDescription) -> dict:
        wanted = description.to_json()
        if not (self.folder / MANIFEST).exists():
            foreign = [
                path.name
                for path in self.folder.iterdir()
                if not path.name.startswith(".kt-") and not path.name.endswith(".part")
            ]
            if foreign:
                raise ValueError(
                    f"output folder {self.folder} is not empty (it holds {sorted(foreign)[0]}) and is no conversion "
                    f"of kt_kernel; give an empty folder."
                )
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False, **wanted, "layers": {}}
            write_atomically(self.folder / MANIFEST, encode_manifest(manifest))
            return manifest
        manifest = read_manifest(self.folder)
        for key, value in wanted.items():
            # Through JSON and back, as the stored one went.
            if manifest.get(key) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{self.folder} was begun with {key} {_brief(manifest.get(key))} and this run has {_brief(value)}; "
                    f"give another output folder, or delete this one."
                )
        return manifest

    def _check_finished_layers(self, progress: Callable[[int], None]) -> None:
        """Forget layers whose file does not match; they are made again."""
        damaged = []
        for layer, entry in self.manifest["layers"].items():
            problem = check_layer_file(self.folder, entry, progress)
            if problem:
                logger.warning("%s Layer %s is converted again.", problem, layer)
                damaged.append(layer)
        for layer in damaged:
            del self.manifest["layers"][layer]
        if damaged:
            self.manifest["complete"] = False
            self._write_manifest()
        for path in self.folder.glob("*.part"):
            path.unlink()

    # --- layers ---

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def finished_layers(self) -> set[int]:
        """Layers that are whole on disk and need no work."""
        return {int(layer) for layer in self.manifest["layers"]}

    def begin_layer(self, layer: int, num_experts: int, w13_bytes: int, w2_bytes: int) -> LayerWriter:
        """Open the file of a layer; its place on the disk is reserved at once."""
        sizes = {}
        for expert in range(num_experts):
            sizes[f"experts.{expert}.w13"] = w13_bytes
            sizes[f"experts.{expert}.w2"] = w2_bytes
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "layout": self.manifest["layout"],
            "layer": str(layer),
        }
        return LayerWriter(SafetensorsWriter(self.folder / layer_file_name(layer), sizes, metadata), sizes)

    def finish_layer(self, layer: int, writer: LayerWriter) -> None:
        """Give the layer its final name and list it in the manifest."""
        entry = writer.commit()
        layers = {**self.manifest["layers"], str(layer): entry}
        self.manifest["layers"] = {key: layers[key] for key in sorted(layers, key=int)}
        self._write_manifest()

    def finish(self, source_sha256: dict[str, str], copied_files: dict[str, str]) -> None:
        """Mark the folder complete."""
        self.manifest["source_sha256"] = dict(sorted(source_sha256.items()))
        self.manifest["copied_files"] = dict(sorted(copied_files.items()))
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_atomically(self.folder / MANIFEST, encode_manifest(self.manifest))

    # --- hashes of the source ---

    def load_source_state(self) -> dict[str, dict]:
        """Hashes of source files taken by an earlier run: name -> {bytes, mtime_ns, sha256}."""
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def store_source_state(self, state: dict[str, dict]) -> None:
        """Keep hashes for a run that resumes this one."""
        write_atomically(self.folder / _STATE, json.dumps(state).encode())

    def close(self) -> None:
        """Release the folder; the hashes of the source are only kept for a run that goes on."""
        if self._lock_fd >= 0:
            if self.manifest.get("complete"):
                (self.folder / _STATE).unlink(missing_ok=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


class LayerWriter:
    """The tensors of one layer on their way to the disk; :meth:`write` may be called from any thread."""

    def __init__(self, file: SafetensorsWriter, sizes: dict[str, int]) -> None:
        self._file = file
        self._sizes = sizes
        self._lock = threading.Lock()
        self._entries: dict[str, dict] = {}

    def write(self, name: str, packed: torch.Tensor, error: torch.Tensor) -> None:
        """Write one packed matrix.

        Parameters
        ----------
        name : str
            ``experts.{e}.w13`` or ``experts.{e}.w2``.
        packed : Tensor
            uint8, the bytes announced.
        error : Tensor
            ``[2]``, fp64: sum of squared differences to the source, sum of squares of the source.
        """
        crc32 = self._file.write(name, packed)
        difference, signal = error.tolist()
        entry = {
            "bytes": self._sizes[name],
            "crc32": f"{crc32:08x}",
            "relative_error": math.sqrt(difference / signal) if signal > 0 else 0.0,
        }
        with self._lock:
            self._entries[name] = entry

    def commit(self) -> dict:
        """Finish the file; returns its manifest entry."""
        missing = [name for name in self._sizes if name not in self._entries]
        if missing:
            self.abort()
            raise ValueError(f"layer file {self._file.path.name} lacks {missing[0]}; this is a bug of the converter.")
        self._file.commit()
        return {
            "file": self._file.path.name,
            "bytes": self._file.num_bytes,
            "header_crc32": f"{self._file.header_crc32:08x}",
            "tensors": {name: self._entries[name] for name in self._sizes},
        }

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._file.abort()


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
