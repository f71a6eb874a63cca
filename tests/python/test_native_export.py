"""Experts written back as the codes and scales of their files, cut for the ranks of a GPU group, as the fork has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quantized_checkpoints import Matrix, fp8_block, fp8_row, mxfp4, mxfp8, pack_quantized
from torch import Tensor

from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine

E, H, INNER = 2, 256, 512
# Hidden and intermediate sizes that leave a part of a panel over; two ranks cut no group of theirs.
RAGGED = {"FP8": (208, 256), "FP8_PERCHANNEL": (208, 208)}
RAGGED_GROUPS_OF_32 = (224, 320)

SOURCES: dict[str, Callable] = {
    "RAWINT4": pack_quantized(32, torch.uint8, torch.bfloat16),
    "RAWINT4 in words": pack_quantized(32, torch.int32, torch.bfloat16),
    "FP8": fp8_block(torch.float32, "weight_scale_inv"),
    "FP8_PERCHANNEL": fp8_row(lambda n: (n,)),
    "MXFP4": mxfp4("weight", "scale", torch.uint8, torch.uint8),
    "MXFP8": mxfp8("weight_scale_inv", torch.uint8),
}


WRITTEN = ("gate", "down")  # whose layouts a layer has


def scale_in_a_buffer(method: str, scale: Tensor) -> Tensor:
    """A scale as SGLang's fork has it on a GPU: e8m0 beside E2M1 becomes bf16."""
    if method != "MXFP4":
        return scale.view(torch.uint8) if scale.dtype not in (torch.bfloat16, torch.float32) else scale
    return (scale.view(torch.uint8).to(torch.int32) - 127).float().exp2().bfloat16()


def columns(method: str, tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """A rank's columns of down or its scales; one scale a row is every rank's."""
    return tensor if method == "FP8_PERCHANNEL" and tensor.dim() == 1 else tensor.chunk(ranks, dim=1)[rank]


def shapes_of(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


def layer_of(layouts: tuple[str, ...], hidden: int = H, inner: int = INNER) -> CpuExperts:
    config = MoEConfig(layer_idx=3, num_experts=E, top_k=1, hidden_size=hidden, intermediate_size=inner)
    return CpuExperts(config, layouts=layouts, engine=get_engine(EngineConfig.resolve(2)))


def loaded_layer(experts: list[dict[str, Matrix]], hidden: int, inner: int) -> CpuExperts:
    shapes = shapes_of(hidden, inner)
    source = experts[0]["gate"].source
    layer = layer_of(
        tuple(torch.ops.kt_kernel.source_layout(experts[0][name].parts, source, *shapes[name]) for name in WRITTEN),
        hidden,
        inner,
    )
    parts = {name: [part for expert in experts for part in expert[name].parts] for name in shapes}
    layer.load_sources(range(E), source, source, **parts)
    return layer


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", SOURCES)
def test_an_expert_comes_back_as_it_was_loaded(method: str, ranks: int, ragged: bool) -> None:
    hidden, inner = RAGGED.get(method, RAGGED_GROUPS_OF_32) if ragged else (H, INNER)
    shapes = shapes_of(hidden, inner)
    generator = torch.Generator().manual_seed(7)
    experts = [{name: SOURCES[method](*shape, generator) for name, shape in shapes.items()} for _ in range(E)]
    layer = loaded_layer(experts, hidden, inner)

    for e, matrices in enumerate(experts):
        weights, scales = ({name: matrices[name].parts[i].contiguous() for name in shapes} for i in range(2))
        weights = {name: tensor.view(torch.uint8) for name, tensor in weights.items()}
        scales = {name: scale_in_a_buffer(method, tensor) for name, tensor in scales.items()}
        wanted = [
            (
                torch.cat([kind["gate"].chunk(ranks)[r], kind["up"].chunk(ranks)[r]]).contiguous(),
                columns(method, kind["down"], ranks, r).contiguous(),
            )
            for kind in (weights, scales)
            for r in range(ranks)
        ]
        found = [tuple(torch.zeros_like(tensor) for tensor in pair) for pair in wanted]
        addresses = [[pair[i].data_ptr() for pair in found] for i in range(2)]
        w13, w2 = addresses
        layer.wait_written(layer.write_expert(e, w13[:ranks], w2[:ranks], w13[ranks:], w2[ranks:]))
        for have, want in zip(found, wanted, strict=True):
            for a, b in zip(have, want, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def addresses(ranks: int) -> list[list[int]]:
    """Of memory that nothing is written to."""
    return [[4096 * i for i in range(first, first + ranks)] for first in (1 << 20, 1 << 21, 1 << 22, 1 << 23)]


def test_ranks_that_cut_a_block_are_refused() -> None:
    layer = layer_of(("fp8fg128_n64k4_v1",) * 2)
    with pytest.raises(RuntimeError, match="512 in 8 ranks cuts a group or block of 128; use fewer ranks"):
        layer.write_expert(0, *addresses(8))


@pytest.mark.parametrize(
    "layouts",
    [
        ("int4hg32_n64k8_v1",) * 2,  # RAWINT4 with scales of fp16
        ("int4g32_n64k8_r512_v1",) * 2,
        ("int8_n64k4_v1",) * 2,
        ("int4zg128_n64k8_v1",) * 2,
        ("fp4cg16_n64k8_v1",) * 2,
        ("fp8fg64_n64k4_v1",) * 2,
        ("bf16_n64k2_v1",) * 2,
        ("fp8f_n64k4_v1", "fp8fg128_n64k4_v1"),
    ],
    ids=lambda layouts: f"{layouts[0]}-{layouts[1]}",
)
def test_layouts_without_such_a_form_are_refused(layouts: tuple[str, str]) -> None:
    sentence = (
        f"^layer 3 has layouts {layouts[0]} and {layouts[1]}, which are written without scales only; "
        f"give scale addresses of 0\\.$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        layer_of(layouts).write_expert(0, *addresses(1))


def blocks_of_rows(rows: int, n: int, k: int, same: bool, generator: torch.Generator) -> Matrix:
    """fp8 in blocks of so many rows and 128 columns; `same`: of scales that 128 rows share all the same."""
    matrix = fp8_block(torch.float32, "weight_scale_inv")(n, k, generator)
    scale = matrix.parts[1].repeat_interleave(128 // rows, 0)[: -(-n // rows)]
    if not same:
        scale = scale * (1 + torch.rand(scale.shape, generator=generator))
    return Matrix({}, f"fp8_block{rows}x128", [matrix.parts[0], scale.contiguous()], matrix.values)


@pytest.mark.parametrize("rows", [64, 1])
@pytest.mark.parametrize("differing", [None, "gate", "up", "down"])
def test_blocks_of_fewer_rows_are_written_only_if_128_rows_share_a_scale(rows: int, differing: str | None) -> None:
    shapes = shapes_of(208, 256)
    generator = torch.Generator().manual_seed(5)
    experts = [
        {name: blocks_of_rows(rows, *shape, name != differing, generator) for name, shape in shapes.items()}
        for _ in range(E)
    ]
    layer = loaded_layer(experts, 208, 256)
    buffers = [torch.zeros(2 * 256 * 208, dtype=torch.uint8), torch.zeros(256 * 208, dtype=torch.uint8)]
    buffers += [torch.zeros(4, 2), torch.zeros(2, 2)]
    ticket = layer.write_expert(1, *([buffer.data_ptr()] for buffer in buffers))
    if differing is None:
        layer.wait_written(ticket)
        first = [experts[1][name].parts[1][:: 128 // rows] for name in ("gate", "up")]
        assert torch.equal(buffers[2], torch.cat(first))
        return
    sentence = (
        rf"^layer 3: expert 1 has blocks of fewer than 128 rows \(row {rows} of {differing} has a scale of its own\), "
        rf"which are written without scales only; give scale addresses of 0\.$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        layer.wait_written(ticket)
    assert not any(buffer.any() for buffer in buffers)
