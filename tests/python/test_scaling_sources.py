"""The table of scaling factors: the code it was read in, the classes it knows, and what the real code does under it.

Reads the model files of the installed SGLang, and of the releases whose ``site-packages/sglang`` folders
``KT_TEST_SGLANG_FOLDERS`` names (separated by colons).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import server
import torch
from torch import nn

from kt_kernel.integrations.sglang import layers, scaling
from kt_kernel.integrations.sglang.scaling import RULES, Applied

# Classes that give their runner a factor and are not in the table: a model of one of them is refused.
REFUSED = {
    "kimi_k3.KimiK3MoE": "its experts have a clamped activation",
    "nemotron_h.NemotronHMoE": "its experts have no gate",
    "beam.BeamMoE": "it adds routed and shared experts in its own precision",
}
FACTOR_OF_ONE = {"mimo_v2", "minimax_m2"}  # their files pass the constant 1.0


def folders() -> dict[str, Path]:
    """Return the folders of SGLang packages by version."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None, "SGLang is not installed"
    found = {importlib.metadata.version("sglang"): Path(spec.origin).parent}
    for name in filter(None, os.environ.get("KT_TEST_SGLANG_FOLDERS", "").split(":")):
        folder = Path(name)
        (info,) = folder.parent.glob("sglang-*.dist-info")
        found[info.name.removesuffix(".dist-info").split("-")[1]] = folder
    return found


FOLDERS = folders()


def definition(folder: Path, dotted: str) -> str:
    """Return the text of a class or function at the top level of its file."""
    module, _, name = dotted.rpartition(".")
    text = (folder.parent / (module.replace(".", "/") + ".py")).read_text("utf-8-sig")
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])  # type: ignore[attr-defined]
            return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])
    raise AssertionError(f"{dotted} is not in {folder}")


@pytest.mark.parametrize("version", FOLDERS)
def test_code_is_what_the_table_was_read_in(version: str) -> None:
    assert any(version in rule.digests for rule in RULES.values()), f"the table was not read in SGLang {version}"
    for name, rule in RULES.items():
        if version not in rule.digests:
            continue
        text = "".join("".join(definition(FOLDERS[version], part).split()) for part in rule.sources)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        assert digest == rule.digests[version], f"read {name} again: what SGLang {version} does there has changed"


@pytest.mark.parametrize("version", FOLDERS)
def test_every_class_with_a_factor_is_known(version: str) -> None:
    """Each class that gives its experts' runner a factor has a row for this release, or is known to be refused."""
    found = set()
    for path in sorted((FOLDERS[version] / "srt" / "models").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8-sig")).body:
            if isinstance(node, ast.ClassDef) and path.stem not in FACTOR_OF_ONE and _gives_experts_a_factor(node):
                found.add(f"{path.stem}.{node.name}")
    table = {name.removeprefix(scaling.MODELS) for name, rule in RULES.items() if version in rule.digests}
    assert table <= found
    assert found - table <= set(REFUSED), "read these classes and add them to the table"


def _gives_experts_a_factor(block: ast.ClassDef) -> bool:
    words = [{word.arg for word in call.keywords} for call in ast.walk(block) if isinstance(call, ast.Call)]
    return any({"routed_scaling_factor", "intermediate_size"} <= found for found in words)


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    script = Path(__file__).with_name("scaling_paths.py")
    environment = server.server_environment(TORCHDYNAMO_DISABLE="1", SGLANG_PLATFORM="kt_cpu")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300,
        cwd=tmp_path_factory.mktemp("factors"),
    )  # fmt: skip
    match = re.search(r"FOUND(\{.*\})", result.stdout)
    assert match, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(match[1])


def test_factor_is_applied_once_on_every_path(factors: dict[str, list[float]]) -> None:
    """SGLang's own forward code, with a factor of 2.5: once with the plug-in, and the wrong ones without it."""
    assert len(factors) >= 3 * 6, sorted(factors)
    for path, (alone, plugin) in factors.items():
        assert plugin == 2.5, path
        rule = next(rule for name, rule in RULES.items() if path.startswith(name.removeprefix(scaling.MODELS)))
        if rule.applied is Applied.MODEL:
            assert alone == 6.25, f"{path}: the model would scale what the runner has scaled"
        if rule.applied is Applied.LAYER:
            assert alone == 2.5, f"{path}: nobody but the runner scales"
    alone = {path.split(" ", 1)[1]: values[0] for path, values in factors.items() if "Glm4MoeSparse" in path}
    assert alone == {"cpu": 6.25, "cuda": 2.5, "cuda captured": 6.25}


class Block(nn.Module):
    """Has experts and a factor, like a block of a model."""

    def __init__(self, method: object) -> None:
        super().__init__()
        self.routed_scaling_factor = 2.5
        self.experts = nn.Linear(1, 1)
        self.experts.quant_method = method


class Method:
    """A wrapped method that took a factor of 2.5 from its runner."""

    kt_routed_scaling_factor = 2.5


def test_class_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method()
    monkeypatch.setattr(layers, "_methods", [method])
    with pytest.raises(ValueError, match=r"Block are scaled by 2\.5, .* serve it without --kt-\* flags\.$"):
        scaling.settle(nn.ModuleList([Block(method)]))
    method.kt_routed_scaling_factor = 1.0
    scaling.settle(nn.ModuleList([Block(method)]))


def test_class_whose_code_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Block.__module__}.{Block.__qualname__}"
    method = Method()
    monkeypatch.setattr(layers, "_methods", [method])
    digest = scaling.source_digest((name,))
    monkeypatch.setitem(RULES, name, scaling.Rule(Applied.LAYER_ALONE, (name,), {"9.9": digest}))
    block = Block(method)
    scaling.settle(nn.ModuleList([block]))
    assert (block.routed_scaling_factor, method.kt_weight_scale) == (1.0, 2.5)  # type: ignore[attr-defined]
    monkeypatch.setitem(RULES, name, scaling.Rule(Applied.LAYER_ALONE, (name,), {"9.9": "0" * 16}))
    with pytest.raises(ValueError, match=r"not what was checked \(9\.9\); use one of these releases\.$"):
        scaling.settle(nn.ModuleList([Block(method)]))


def test_weights_are_scaled_in_a_copy() -> None:
    class TopK(NamedTuple):
        topk_weights: torch.Tensor
        topk_ids: torch.Tensor

    class Dispatched(NamedTuple):
        hidden_states: torch.Tensor
        topk_output: TopK

    dispatched = Dispatched(torch.zeros(2, 4), TopK(torch.full((2, 2), 0.25), torch.zeros(2, 2, dtype=torch.int32)))
    scaled = scaling.with_scaled_weights(SimpleNamespace(kt_weight_scale=2.5), dispatched)
    assert scaled.topk_output.topk_weights.tolist() == [[0.625] * 2] * 2
    assert dispatched.topk_output.topk_weights.tolist() == [[0.25] * 2] * 2
    assert scaling.with_scaled_weights(SimpleNamespace(), dispatched) is dispatched
