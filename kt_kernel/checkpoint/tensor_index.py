"""Which file of a folder holds which tensor, from the index or from the headers of the files."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from kt_kernel.files import OpenFiles

_INDEX = "model.safetensors.index.json"


def tensor_files(folder: Path, files: OpenFiles) -> dict[str, str]:
    """File name by tensor name.

    Parameters
    ----------
    folder : Path
        Folder of safetensors files.
    files : OpenFiles
        Opens those whose headers are read, where there is no index.

    Raises
    ------
    ValueError
        No files, or an index that is broken, names a missing file, or one outside of the folder.
    """
    index = folder / _INDEX
    if index.exists():
        return _read_index(folder, index)
    single = folder / "model.safetensors"
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} has no *.safetensors file; kt_kernel reads safetensors checkpoints only.")
    names: dict[str, str] = {}
    for path in paths:
        names |= dict.fromkeys(files[path.name].keys(), path.name)
    return names


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no safetensors index ({error!r}); copy the file again.") from error
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has a weight_map that names no files; copy the file again.")
    for file in sorted(set(names.values())):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{index} names {file}, which is not in the folder; do not use a checkpoint that does so.")
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file}, which is not there; finish the download.")
    return names
