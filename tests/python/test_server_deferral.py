"""A server that defers, against the same model in transformers with deferring wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deferring_model
import models
import pytest
import server
from test_server import SENSITIVITY, TEXTS, TOLERANCE, WITHOUT_CACHE, check_same, distance, teacher_forced
from torch import nn

pytestmark = pytest.mark.server

MODEL = models.QWEN3_MOE_40
ON_GPU = 8
DEFERRED = 2
NUM_DECODED = 40


@dataclass(frozen=True)
class Served:
    """What a server with deferral said."""

    folder: Path
    prefilled: list[float]
    decoded: list[dict]
    log: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = models.write_model(tmp_path_factory.mktemp("deferral") / "model", MODEL)
    flags = [
        *WITHOUT_CACHE,
        *("--kt-weight-path", str(folder), "--kt-method", "AMXINT8", "--kt-num-gpu-experts", str(ON_GPU)),
        *("--kt-max-deferred-experts-per-token", str(DEFERRED)),
    ]
    with server.serve(folder, flags, log_path=folder.parent / "server.log") as running:
        prefilled = teacher_forced(running)
        decoded = [running.generate(list(text[:20]), NUM_DECODED) for text in TEXTS]
        yield Served(folder, prefilled, decoded, running.log)


def decoded_by(model: nn.Module, served: Served) -> list[float]:
    return [
        value
        for text, answer in zip(TEXTS, served.decoded, strict=True)
        for value in deferring_model.decoded_logprobs(model, list(text[:20]), answer["ids"])
    ]


def test_a_deferring_server_says_what_deferring_layers_say(served: Served) -> None:
    with_deferral = deferring_model.load(served.folder, method="AMXINT8", on_gpu=ON_GPU, deferred=DEFERRED)
    without = deferring_model.load(served.folder, method="AMXINT8", on_gpu=ON_GPU)
    found = [value for answer in served.decoded for value in answer["logprobs"]]
    wanted, plain = decoded_by(with_deferral, served), decoded_by(without, served)
    print(f"decoded: {distance(found, wanted):.4f} from the same, {distance(found, plain):.4f} from no deferral")
    check_same(found, wanted, TOLERANCE["AMXINT8"])
    assert distance(found, plain) > SENSITIVITY * distance(found, wanted)
    wanted = [value for text in TEXTS for value in deferring_model.logprobs(with_deferral, text)]
    check_same(served.prefilled, wanted, TOLERANCE["AMXINT8"])


def test_the_log_says_that_it_saves_no_time_here(served: Served) -> None:
    assert len(re.findall(r"deferral: of 4 experts a token, up to 2 .* saves no time", served.log)) == 1
