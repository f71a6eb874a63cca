"""README.md says what the code says: its generated tables, its paths and its Python example."""

from __future__ import annotations

import re
import subprocess
import sys

from test_tree import ROOT, kernel_rows


def test_generated_tables_are_up_to_date() -> None:
    command = [sys.executable, "scripts/generate_readme_tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_table_of_kernels_is_the_registry() -> None:
    from kt_kernel import _ext

    listed = {row["name"] for row in _ext.list_kernels()}
    assert listed == {name for name in kernel_rows() if name.startswith(("gemm_", "rowwise_"))}


def test_paths_in_the_text_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/design.md").read_text()
    paths = re.findall(r"`((?:csrc|kt_kernel|scripts|tests|docs|requirements)/[\w./-]*)`", text)
    assert len(paths) > 10
    missing = sorted({path for path in paths if not (ROOT / path).exists()})
    assert not missing, f"named in README.md or docs/design.md but not there: {missing}"


def test_python_example_runs(tmp_path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    script = tmp_path / "example.py"
    script.write_text(
        example.group(1) + "assert output.shape == (3, 256) and output.isfinite().all() and output.abs().max() > 0\n"
    )
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
