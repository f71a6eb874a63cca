"""``import kt_kernel`` where it cannot work: SGLang imports it under ``except ImportError``, nothing else may come."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tree import ROOT

IMPORT = """
import os, sys
if os.path.exists(sys.path[0] + "/kt_kernel"):
    # The finder of an editable install would find in the clone what this copy does not have.
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
try:
    import kt_kernel
except ImportError as error:
    sys.exit(f"ImportError: {error}")
"""


def import_message(first_on_path: Path) -> str:
    """What the import raises with a folder before everything else on the path; "" if it works."""
    code = f"import sys; sys.path.insert(0, {str(first_on_path)!r})\n{IMPORT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=first_on_path)
    assert result.stdout == "" and "Traceback" not in result.stderr, result.stderr
    assert bool(result.returncode) == bool(result.stderr)
    return result.stderr.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package that is not built."""
    shutil.copytree(ROOT / "kt_kernel", tmp_path / "kt_kernel", ignore=shutil.ignore_patterns("*.so", "_build_info.py"))
    return tmp_path


def plant_distribution(folder: Path, metadata: bytes | None) -> None:
    planted = folder / "kt_kernel-0.7.2.dist-info"
    planted.mkdir()
    if metadata is not None:
        (planted / "METADATA").write_bytes(metadata)


def test_the_other_distribution_is_refused(tmp_path: Path) -> None:
    plant_distribution(tmp_path, b"Metadata-Version: 2.1\nName: kt-kernel\nVersion: 0.7.2\n")
    message = import_message(tmp_path)
    assert message.startswith("ImportError: kt-kernel 0.7.2") and "pip uninstall -y kt-kernel" in message


@pytest.mark.parametrize("metadata", [None, b"", b"Name: kt-kernel\nVersion: 0.7.2\nAuthor: \xff\n"])
def test_what_is_left_of_the_other_distribution_does_no_harm(tmp_path: Path, metadata: bytes | None) -> None:
    plant_distribution(tmp_path, metadata)
    assert import_message(tmp_path) == ""


def test_a_package_that_is_not_built_says_so(package: Path) -> None:
    assert import_message(package).startswith("ImportError: kt_kernel is not built here: run `pip install .`")


def test_another_torch_is_named_beside_the_one_built_for(package: Path) -> None:
    (package / "kt_kernel/_build_info.py").write_text('TORCH_VERSION = "2.0.1+cpu"\n')
    message = import_message(package)
    assert "built for torch 2.0.1+cpu" in message and f"torch {torch.__version__} is installed" in message


@pytest.mark.parametrize("fault", ["raise RuntimeError('no driver')", "raise OSError('libtorch.so is cut off')"])
def test_a_broken_torch_is_an_import_error(package: Path, fault: str) -> None:
    (package / "kt_kernel/_build_info.py").write_text('TORCH_VERSION = "2.0.1"\n')
    (package / "torch.py").write_text(fault + "\n")
    assert "needs torch 2.0.1, which does not import" in import_message(package)


@pytest.mark.parametrize("fault", ["raise RuntimeError('two registrations')", "raise ImportError('undefined symbol')"])
def test_a_broken_extension_is_an_import_error(package: Path, fault: str) -> None:
    (package / "kt_kernel/_build_info.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')
    (package / "kt_kernel/_ext.py").write_text(fault + "\n")
    message = import_message(package)
    assert message.startswith("ImportError: ") and fault.split("'")[1] in message
