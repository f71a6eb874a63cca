"""Which file of a folder holds which tensor, from the index or from the headers of the files."""

from __future__ import annotations

from pathlib import Path

from kt_kernel.checkpoint.model_folder import read_json_object
from kt_kernel.files import OpenFiles, is_file_name

_INDEX = "model.safetensors.index.json"
_NAME_LENGTH = 255


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
    names = _read_index(folder, index) if index.exists() else _read_headers(folder, files)
    odd = next((name for name in names if not name.isprintable() or len(name) > _NAME_LENGTH), None)
    if odd is not None:
        raise ValueError(f"{folder} has a tensor {odd[:80]!a}, which no model has; download the checkpoint again.")
    return names


def _read_headers(folder: Path, files: OpenFiles) -> dict[str, str]:
    single = folder / "model.safetensors"
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} has no *.safetensors and no *.gguf file (folders in it are not looked at); give the folder of a "
            f"checkpoint, or, of a GGUF model, download the GGUF file and give its path."
        )
    names: dict[str, str] = {}
    for path in paths:
        names |= dict.fromkeys(files[path.name].keys(), path.name)
    return names


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    try:
        names = read_json_object(index)["weight_map"]
    except KeyError:
        raise ValueError(f"{index} is no safetensors index: it has no weight_map; copy the file again.") from None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has a weight_map that names no files; copy the file again.")
    for file in sorted(set(names.values())):
        if not is_file_name(file):
            raise ValueError(
                f"{index} names {file[:80]!a}, which is not in the folder; do not use a checkpoint that does so."
            )
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file}, which is not there; finish the download.")
    return names
