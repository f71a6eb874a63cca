"""Real servers with experts in formats of the hub against plain SGLang with their dequantized BF16 twins.

The measure is that of test_server.py, whose tolerances are for an expert intermediate size of 128; here it is 256, so
that GGUF's blocks fit, and the experts' part of the output and of its error is sqrt(2) times as large. Beside it the
tokens: where the twin's best token leads by more than what two positions may be apart, the server says the same one,
but for as many as that measure lets be far apart (near ties of the router).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import server
from format_models import FORMS, MODEL, Form, Pair, write_pair
from test_server import (
    FAR_SHARE,
    SENSITIVITY,
    TEXTS,
    TOLERANCE,
    WITHOUT_CACHE,
    check_activation,
    check_same,
    distance,
    teacher_forced,
)

pytestmark = pytest.mark.server

SERVED = ("FP8", "RAWINT4", "LLAMAFILE:Q4_K_M", "MXFP4", "AMXINT8:2")
FORMS_SERVED = [form for form in FORMS if form.name in SERVED]
BY_SGLANGS_LAUNCHER = "LLAMAFILE:Q4_K_M"  # all others by ours
NUM_TOKENS = 24
PROMPTS = [list(text[:40]) for text in TEXTS]
FAR = 3  # tolerances that a single position may be apart, as in test_server.py


def tolerance(form: Form) -> float:
    """Nats that server and twin may be apart on average."""
    method = "BF16" if form.kept[0].startswith("fp8") else "AMXINT8"
    return TOLERANCE[method] * math.sqrt(2)


@dataclass(frozen=True)
class Step:
    """A generated token: the tokens before it, and by how much it led the second in nats."""

    before: list[int]
    token: int
    lead: float


def generated(running: server.Server) -> list[Step]:
    """Greedy continuations of the prompts."""
    steps = []
    for prompt in PROMPTS:
        answer = running.post("/generate", request(prompt, NUM_TOKENS))["meta_info"]
        ids = [entry[1] for entry in answer["output_token_logprobs"]]
        for i, (first, second) in enumerate(answer["output_top_logprobs"]):
            steps.append(Step([*prompt, *ids[:i]], ids[i], first[0] - second[0]))
    return steps


def best_tokens(running: server.Server, steps: list[Step]) -> list[int]:
    """The likeliest token after what stands before each step."""
    found = []
    for last in range(NUM_TOKENS - 1, len(steps), NUM_TOKENS):
        # one pass over the prompt and all generated tokens but the last
        answer = running.post("/generate", request(steps[last].before, 1) | {"logprob_start_len": 0})["meta_info"]
        after = [*answer["input_top_logprobs"][1:], *answer["output_top_logprobs"]]
        found += [top[0][1] for top in after[-NUM_TOKENS:]]
    return found


def share_of_others(steps: list[Step], tokens: list[int], allowed: float) -> float:
    """Share of tokens that are others, of those with a clear lead."""
    clear = [step.lead > 2 * FAR * allowed for step in steps]
    print(f"{sum(clear)} of {len(steps)} tokens have a clear lead")
    assert sum(clear) > len(steps) / 4
    return sum(c and s.token != t for c, s, t in zip(clear, steps, tokens, strict=True)) / sum(clear)


def request(ids: list[int], num_tokens: int) -> dict:
    """A greedy request that asks for the two likeliest tokens of every position."""
    return {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


@dataclass(frozen=True)
class Twins:
    """What plain SGLang says with each twin: log-probabilities of the texts and generated tokens."""

    folder: Path
    pairs: dict[str, Pair]
    logprobs: dict[str, list[float]]
    steps: dict[str, list[Step]]
    tokens_without_an_expert: list[int]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    """One plain server that is given each twin's weights in turn, the source's first."""
    folder = tmp_path_factory.mktemp("formats")
    source = models.write_model(folder / "source", MODEL)
    pairs = {form.name: write_pair(source, folder / form.name.replace(":", "-"), form.name) for form in FORMS_SERVED}
    faulty = models.drop_expert(MODEL, models.random_tensors(MODEL), 1)
    models.write_model(folder / "dropped", MODEL, tensors=faulty)
    variants = {name: pair.twin for name, pair in pairs.items()} | {"dropped": folder / "dropped"}
    logprobs, steps = {}, {}
    with server.serve(source, WITHOUT_CACHE, log_path=folder / "plain.log") as plain:
        assert "kt_kernel loaded" not in plain.log
        logprobs["source"], steps["source"] = teacher_forced(plain), generated(plain)
        for name, model in variants.items():
            plain.load_weights_of(model)
            logprobs[name], steps[name] = teacher_forced(plain), generated(plain)
        # the last variant's weights are still there
        tokens = best_tokens(plain, steps["source"])
    yield Twins(folder, pairs, logprobs, steps, tokens)


def test_the_measures_see_other_weights(twins: Twins) -> None:
    for form in FORMS_SERVED:
        allowed, source = tolerance(form), twins.logprobs["source"]
        assert distance(twins.logprobs["dropped"], source) > SENSITIVITY * allowed
        assert share_of_others(twins.steps["source"], twins.tokens_without_an_expert, allowed) > 2 * FAR_SHARE
        if form.name not in ("FP8", "AMXINT8:2"):
            assert distance(twins.logprobs[form.name], source) > 2 * allowed, f"{form.name} is told from its source"


def with_a_fitting_torchvision(folder: Path) -> dict[str, str]:
    """The environment of a host where SGLang imports by itself, which it does not beside a CPU build of torch."""
    folder.mkdir()
    repair = "from kt_kernel.integrations.torchvision_repair import repair_torchvision\n\nrepair_torchvision()\n"
    (folder / "sitecustomize.py").write_text(repair)
    inherited = os.environ.get("PYTHONPATH")
    return server.server_environment(PYTHONPATH=f"{folder}{os.pathsep}{inherited}" if inherited else str(folder))


@pytest.mark.parametrize("form", FORMS_SERVED, ids=lambda form: form.name)
def test_a_server_says_what_its_twin_says(twins: Twins, form: Form) -> None:
    pair = twins.pairs[form.name]
    flags = ["--kt-weight-path", str(pair.folder), "--kt-method", form.method, *WITHOUT_CACHE]
    log_path = twins.folder / f"{pair.folder.parent.name}.log"
    launcher, environment = server.LAUNCHER, None
    if form.name == BY_SGLANGS_LAUNCHER:
        launcher, environment = ("-m", "sglang.launch_server"), with_a_fitting_torchvision(twins.folder / "site")
    with server.serve(pair.twin, flags, log_path=log_path, environment=environment, module=launcher) as running:
        check_activation(running.log, MODEL, form.method)
        assert f"{pair.folder} holds" in running.log
        check_same(teacher_forced(running), twins.logprobs[form.name], tolerance(form))
        tokens = best_tokens(running, twins.steps[form.name])
        assert share_of_others(twins.steps[form.name], tokens, tolerance(form)) < FAR_SHARE
