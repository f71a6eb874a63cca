"""Writing a folder of converted experts: layer by layer, atomically, resumed by itself after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from kt_kernel.files import atomic_file, remove_unfinished, write_atomically
from kt_kernel.packed_folder import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PackedDescription,
    check_file,
    encode_manifest,
    manifest_tensors,
    read_manifest,
    shard_file_name,
    shard_metadata,
)
from kt_kernel.progress import Progress

logger = logging.getLogger("kt_kernel.converter")

_LOCK = ".kt-convert.lock"
# Key of the manifest, which has the sizes, too.
_SOURCE_TIMES = "source_mtime_ns"
# Sizes, times and hashes of source files already read: spares a resumed run from hashing terabytes again. Removed at
# the end, so the result depends on the source's contents only.
_STATE = ".kt-source-state.json"


class PackedWriter:
    """Owner of a folder that is being written.

    States of a file on disk: in a hidden folder (being written) -> final name (whole, on disk) -> listed in the
    manifest, with all files of its layer (checked when resumed). A kill costs at most the layer being written.
    Finished layers are read again and checked when the writer is made, which shows progress.

    Parameters
    ----------
    folder : Path
        Created where missing. Must be empty or an unfinished (or finished) conversion of the same description.
    description : PackedDescription
        What is being made.

    Raises
    ------
    ValueError
        The folder holds something else, or another conversion is writing to it.
    OSError
        The disk is full or fails (one sentence).
    """

    def __init__(self, folder: Path, description: PackedDescription) -> None:
        self.folder = folder
        self.manifest: dict = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            remove_unfinished(folder)
            self.manifest = self._begin(description)
            self._check_finished_layers()
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        path = self.folder / _LOCK
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its owner removes the file before the lock is free: a file opened before that locks nobody out.
                held = _is_file_at(descriptor, path)
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    raise ValueError(
                        f"another conversion is writing to {self.folder}; wait for it or stop it."
                    ) from None
                raise
            if held:
                self._lock_fd = descriptor
                return
            os.close(descriptor)

    def _begin(self, description: PackedDescription) -> dict:
        if not (self.folder / MANIFEST).exists():
            foreign = [path.name for path in self.folder.iterdir() if not path.name.startswith(".kt-")]
            if foreign:
                raise ValueError(
                    f"output folder {self.folder} is not empty (it holds {sorted(foreign)[0]}) and is no conversion "
                    f"of kt_kernel; give an empty folder."
                )
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False}
            manifest |= {**description.to_json(), "layers": {}}
            write_atomically(self.folder / MANIFEST, encode_manifest(manifest))
            return manifest
        manifest = read_manifest(self.folder)
        for key, value in description.identity().items():
            # Through JSON and back, as the stored one went.
            if manifest.get(key) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{self.folder} was begun with {key} {_brief(manifest.get(key))} and this run has {_brief(value)}; "
                    f"give another output folder, or delete this one."
                )
        return manifest

    def _check_finished_layers(self) -> None:
        """Forget layers with a file that does not match; they are made again."""
        layers = self.manifest["layers"]
        if not layers:
            return
        progress = Progress(
            "checking finished layers",
            total_bytes=sum(tensor["bytes"] for _, _, tensor in manifest_tensors(self.manifest)),
            total_layers=len(layers),
            logger=logger,
        )
        damaged = []
        try:
            for layer, entries in layers.items():
                for name, entry in entries.items():
                    problem = check_file(self.folder / name, entry, self.manifest["layout"], progress.add)
                    if problem:
                        logger.warning("%s Layer %s is converted again.", problem, layer)
                        damaged.append(layer)
                        break
                progress.finish_layer(layer)
        finally:
            progress.close()
        for layer in damaged:
            del self.manifest["layers"][layer]
        if damaged:
            self.manifest["complete"] = False
            self._write_manifest()

    # --- layers ---

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def finished_layers(self) -> set[int]:
        """Layers that are whole on disk and need no work."""
        return {int(layer) for layer in self.manifest["layers"]}

    def write_shard(self, layer: int, shard: int, matrices: dict[str, PackedMatrix]) -> dict[str, dict]:
        """Write one file of a layer.

        Parameters
        ----------
        layer, shard : int
            Layer, and number of the file in it.
        matrices : dict
            ``experts.{e}.w13`` and ``experts.{e}.w2`` of the experts in the file.

        Returns
        -------
        dict
            The file's name and manifest entry, for :meth:`finish_layer`.

        Raises
        ------
        OSError
            The disk is full or fails (one sentence); nothing is left behind.
        """
        path = self.folder / shard_file_name(layer, shard)
        entries = {name: matrix.entry for name, matrix in matrices.items()}
        with atomic_file(path, sum(entry["bytes"] for entry in entries.values())) as part:
            tensors = {name: matrix.packed for name, matrix in matrices.items()}
            save_file(tensors, part, metadata=shard_metadata(self.manifest["layout"]))
        return {path.name: {"bytes": path.stat().st_size, "tensors": entries}}

    def finish_layer(self, layer: int, files: dict[str, dict]) -> None:
        """List the files of a layer in the manifest."""
        layers = {**self.manifest["layers"], str(layer): files}
        self.manifest["layers"] = {key: layers[key] for key in sorted(layers, key=int)}
        self._write_manifest()

    def finish(self, source_sha256: dict[str, str], copied_files: dict[str, str]) -> None:
        """Mark the folder complete."""
        self.manifest["source_sha256"] = dict(sorted(source_sha256.items()))
        self.manifest["copied_files"] = dict(sorted(copied_files.items()))
        self.manifest["complete"] = True
        self.manifest.pop(_SOURCE_TIMES, None)
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_atomically(self.folder / MANIFEST, encode_manifest(self.manifest))

    # --- the source ---

    @property
    def source_mtime_ns(self) -> dict[str, int]:
        """Time of every source file, by name, as recorded before the first layer; empty once complete."""
        return dict(self.manifest.get(_SOURCE_TIMES, {}))

    def record_source_times(self, mtime_ns: dict[str, int]) -> None:
        """Keep the times of the source files in the manifest until the conversion is complete."""
        if not self.complete and self.source_mtime_ns != mtime_ns:
            self.manifest[_SOURCE_TIMES] = mtime_ns
            self._write_manifest()

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


class PackedMatrix(NamedTuple):
    """Packed bytes of a matrix (uint8) and its manifest entry."""

    packed: torch.Tensor
    entry: dict

    @classmethod
    def of(cls, packed: torch.Tensor, error: torch.Tensor) -> PackedMatrix:
        """Make the entry: size, checksum, ``relative_error = sqrt(sum (q - w)^2 / sum w^2)``.

        Parameters
        ----------
        packed : Tensor
            uint8.
        error : Tensor
            ``[2]``, fp64: sum of squared differences to the source, sum of squares of the source.
        """
        difference, signal = error.tolist()
        entry = {
            "bytes": packed.numel(),
            "crc32": f"{zlib.crc32(packed.numpy()):08x}",
            "relative_error": math.sqrt(difference / signal) if signal > 0 else 0.0,
        }
        return cls(packed, entry)


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of a name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
