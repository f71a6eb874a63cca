"""Real servers with experts in formats of the hub against plain SGLang with their dequantized BF16 twins.

The measure is that of test_server.py, whose tolerances are for an expert intermediate size of 128; here it is 256, so
that GGUF's blocks fit, and the experts' part of the output and of its error is sqrt(2) times as large. Beside it the
tokens: where the twin's best token leads by more than two tolerances of a single position (one for each of the two
tokens), the server says the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import server
from format_models import FORMS, MODEL, Form, Pair, write_pair
from test_server import (
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


def best_tokens(running: server.Server, ids: list[int], start: int) -> list[int]:
    """The likeliest token after each of the first ``start + 1 .. len(ids)`` ids: one pass over all of them."""
    answer = running.post("/generate", request(ids, 1) | {"logprob_start_len": 0})["meta_info"]
    after = [*answer["input_top_logprobs"][1:], *answer["output_top_logprobs"]]
    return [top[0][1] for top in after[start - 1 :]]


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


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    """One plain server that is given each twin's weights in turn, the source's first."""
    folder = tmp_path_factory.mktemp("formats")
    source = models.write_model(folder / "source", MODEL)
    pairs = {form.name: write_pair(source, folder / form.name.replace(":", "-"), form.name) for form in FORMS_SERVED}
    logprobs, steps = {}, {}
    with server.serve(source, WITHOUT_CACHE, log_path=folder / "plain.log") as plain:
        assert "kt_kernel loaded" not in plain.log
        logprobs["source"] = teacher_forced(plain)
        for name, pair in pairs.items():
            plain.load_weights_of(pair.twin)
            logprobs[name], steps[name] = teacher_forced(plain), generated(plain)
    yield Twins(folder, pairs, logprobs, steps)


def test_the_measure_tells_the_four_bit_twins_from_the_source(twins: Twins) -> None:
    for form in FORMS_SERVED:
        if form.name not in ("FP8", "AMXINT8:2"):
            assert distance(twins.logprobs[form.name], twins.logprobs["source"]) > 2 * tolerance(form), form.name


@pytest.mark.parametrize("form", FORMS_SERVED, ids=lambda form: form.name)
def test_a_server_says_what_its_twin_says(twins: Twins, form: Form) -> None:
    pair = twins.pairs[form.name]
    flags = ["--kt-weight-path", str(pair.folder), "--kt-method", form.method, *WITHOUT_CACHE]
    log_path = twins.folder / f"{pair.folder.parent.name}.log"
    with server.serve(pair.twin, flags, log_path=log_path) as running:
        check_activation(running.log, MODEL, form.method)
        assert f"{pair.folder} holds" in running.log
        check_same(teacher_forced(running), twins.logprobs[form.name], tolerance(form))
        clear = 0
        for first in range(0, len(PROMPTS) * NUM_TOKENS, NUM_TOKENS):
            steps = twins.steps[form.name][first : first + NUM_TOKENS]
            found = best_tokens(running, [*steps[-1].before], len(steps[0].before))
            assert len(found) == len(steps)
            for step, token in zip(steps, found, strict=True):
                if step.lead > 2 * FAR * tolerance(form):
                    clear += 1
                    assert token == step.token, f"after {len(step.before)} tokens, a lead of {step.lead:.3f}"
        print(f"{clear} of {len(PROMPTS) * NUM_TOKENS} tokens have a clear lead")
        assert clear > len(PROMPTS) * NUM_TOKENS / 4
