"""A tiny model in every format: what the files mean, what is kept of them, and what the layer computes.

The truth is the dequantized twin that scripts/write_formats.py makes from the codes before it packs them, and a numpy
decoder of what the reader finds in the files (format_oracles.py): neither has anything of csrc/.

Bounds on the relative error of a layer (see reference.py), in whose terms u = 2^-8:

bf16 activations   2^-6, as there for BF16: the twin's weights are rounded to bf16 once more, which is u / 2 in a matrix
                   at most, about u / 4 on average, and is covered by the x that is bf16 already and so counts once.
int8 in blocks     the largest of 128 normal values is about 2.7 sigma, so a step is 2.7 / 127 sigma and its error
                   2.7 / 127 / sqrt(12) = 0.006 sigma; x is seen by gate and up, so twice: 0.012. The intermediate, a
                   product of two nearly normal values, has its largest at about 6 sigma: 0.014. With bf16 output
                   sqrt(0.012^2 + 0.014^2) + u = 0.022.
int8 a row         (what kt-kernel converted, where one scale is for the whole row) as there for AMXINT8.
"""

from __future__ import annotations

from pathlib import Path

import format_models
import models
import pytest
import torch
from format_models import FORMS, MODEL, Form, Pair, expert_stacks
from format_oracles import decode
from reference import BOUNDS, moe_reference, relative_error

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint import PROJECTIONS, open_checkpoint
from kt_kernel.methods import get_method, weight_dtype_of

BLOCK_BOUND = 0.022
BOUND_OF = dict.fromkeys(("bf16", "fp8", "fp8f"), BOUNDS["BF16"]) | {"int8": BOUNDS["AMXINT8"]}
IDS = [form.name for form in FORMS]
# All but what kt-kernel converted, which is of one method.
DECODED = [form for form in FORMS if not form.name.startswith("AMX")]
LAYER = 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("source"), MODEL)


@pytest.fixture(scope="module")
def pairs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Each format, written when it is first asked for."""

    class Written(dict):
        def __missing__(self, name: str) -> Pair:
            self[name] = format_models.write_pair(source, tmp_path_factory.mktemp("format"), name)
            return self[name]

    return Written()


def wrapper_of(folder: Path, method: str) -> KTMoEWrapper:
    wrapper = KTMoEWrapper(
        layer_idx=LAYER,
        num_experts=MODEL.num_experts,
        num_experts_per_tok=MODEL.top_k,
        hidden_size=MODEL.hidden_size,
        moe_intermediate_size=MODEL.intermediate_size,
        cpuinfer_threads=2,
        threadpool_count=1,
        weight_path=str(folder),
        method=method,
    )
    wrapper.load_weights()
    return wrapper


def error_of(wrapper: KTMoEWrapper, folder: Path, tokens: int = 24) -> float:
    """Relative error of a forward against the weights of a BF16 folder."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, MODEL.hidden_size, generator=generator).bfloat16()
    ids = torch.rand(tokens, MODEL.num_experts, generator=generator).argsort(dim=1)[:, : MODEL.top_k].contiguous()
    shares = torch.rand(tokens, MODEL.top_k, generator=generator) + 0.1
    found = wrapper.forward(hidden, ids, shares, None)
    return relative_error(found, moe_reference(hidden, ids, shares, *expert_stacks(folder, LAYER)))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_the_files_mean_the_twin(pairs: dict[str, Pair], form: Form) -> None:
    """Reader and numpy decoder: what csrc/ does not touch."""
    pair = pairs[form.name]
    checkpoint = open_checkpoint(pair.folder, form.method)
    for layer in MODEL.moe_layers:
        checkpoint.check_layer(layer)
        for projection, matrices in zip(PROJECTIONS, expert_stacks(pair.twin, layer), strict=True):
            for expert in (0, MODEL.num_experts - 1):
                expected = matrices[expert]
                kind, parts = checkpoint.source(layer, expert, projection)
                found = torch.from_numpy(decode(kind, parts, *expected.shape))
                if form.is_exact:
                    assert torch.equal(found, expected.float())
                # NVFP4 multiplies its two scales first in one of the two: a last bit of fp32, and so of bf16 at times
                torch.testing.assert_close(
                    found.bfloat16(), expected, rtol=2**-7 if form.name == "NVFP4" else 0, atol=0
                )


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_a_layer_computes_what_its_twin_does(pairs: dict[str, Pair], source: Path, form: Form, tokens: int) -> None:
    pair = pairs[form.name]
    wrapper = wrapper_of(pair.folder, form.method)
    kept = tuple(weight_dtype_of(layout) for layout in wrapper.moe.layouts)
    assert kept == form.kept
    bound = BOUND_OF.get(kept[0], BLOCK_BOUND)
    error = error_of(wrapper, pair.twin, tokens)
    print(f"{form.name}: {error:.4f} of {bound:.4f}")
    assert error < bound
    if tokens > 1 and form.name != "LLAMAFILE:BF16":
        # what the format rounded away is seen: these are its own codes
        assert error_of(wrapper, source, tokens) > error


@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
@pytest.mark.parametrize("form", DECODED, ids=[form.name for form in DECODED])
def test_a_method_for_floats_takes_every_checkpoint(pairs: dict[str, Pair], form: Form, method: str) -> None:
    pair = pairs[form.name]
    wrapper = wrapper_of(pair.folder, method)
    assert wrapper.moe.layouts == (get_method(method).layout,) * 2
    assert error_of(wrapper, pair.twin) < BOUNDS[method]
