"""README.md says what the code says: its generated tables, its paths and its Python example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from test_tree import ROOT, kernel_rows


def test_generated_tables_are_up_to_date() -> None:
    command = [sys.executable, "scripts/generate_readme_tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_table_of_kernels_is_the_registry() -> None:
    from kt_kernel import _ext

    listed = {row["name"] for row in _ext.list_kernels() if row.get("source") != "onednn"}
    assert listed == {name for name in kernel_rows() if name.startswith(("gemm_", "rowwise_"))}


def test_paths_in_the_text_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/design.md").read_text()
    paths = re.findall(r"`((?:csrc|kt_kernel|scripts|tests|docs|requirements)/[\w./-]*)`", text)
    assert len(paths) > 10
    missing = sorted({path for path in paths if not (ROOT / path).exists()})
    assert not missing, f"named in README.md or docs/design.md but not there: {missing}"


def run_example(tmp_path: Path, number: int, more: str, **replaced: str) -> None:
    """Run a Python block of the README, counted from 0, and `more` after it."""
    script = tmp_path / "example.py"
    text = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[number]
    for word, value in replaced.items():
        assert word in text
        text = text.replace(word, value)
    script.write_text(text + more)
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


OUTPUT = "assert output.shape == (3, 256) and output.isfinite().all() and output.abs().max() > 0\n"


def test_python_example_runs(tmp_path: Path) -> None:
    run_example(tmp_path, 0, OUTPUT)


def test_example_of_a_plain_program_runs(tmp_path: Path) -> None:
    run_example(tmp_path, 1, OUTPUT + "assert experts.num_cpu_experts == 14\n")


def test_example_of_transformers_runs(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import kt_kernel.integrations.transformers  # noqa: F401  (repairs a torchvision that does not fit)

    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3MoeConfig(**sizes, **experts, vocab_size=96, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    check = (
        "import torch\n"
        "model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)\n"
        "packed = [module for module in model.modules() if hasattr(module, '_kt_kernel_experts')]\n"
        "assert len(packed) == 2 and model.dtype == torch.bfloat16\n"
    )
    run_example(tmp_path, 2, check, MODEL=str(tmp_path / "model"))
