"""What sources refuse: parts of wrong types and shapes, values that no layout holds; and tensors as files have them."""

from __future__ import annotations

import pytest
import torch
from format_oracles import decode
from test_sources import (
    BF16,
    CASES,
    FP16,
    FP32,
    IDS,
    OPS,
    Case,
    Random,
    awq,
    fp8_block,
    fp8_row,
    gguf,
    gptq,
    kt,
    mxfp4,
    mxfp8,
    nvfp4,
    pack_quantized,
)
from torch import Tensor

# Every dtype that safetensors has and no part of the source may have.
WRONG = {
    torch.bool: (), torch.int64: (), torch.float64: (), torch.float8_e5m2: (), torch.int16: (),
    torch.uint8: ("fp8", "mx", "nvfp4", "pack_quantized", "gguf", "kt"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parts_of_other_types_and_shapes_are_refused(case: Case) -> None:
    n, k = case.shapes()[2]
    parts = case.make(n, k, Random(0))
    for i, part in enumerate(parts):
        for dtype, takers in WRONG.items():
            if case.source.startswith(takers or "none"):
                continue
            wrong = torch.zeros(part.shape, dtype=dtype)
            with pytest.raises(RuntimeError, match=r"^(a tensor of \S+ weights|\w+ of \S+ weights \[) ?.*is "):
                OPS.decode_source([*parts[:i], wrong, *parts[i + 1 :]], case.source, n, k)
        sizes = {tuple(part.shape) + (1,), (0, *part.shape[1:]), tuple(size + 1 for size in part.shape)}
        sizes |= {(part.numel() + 1,), (2**20, 1)}
        for shape in sizes - ({(n, 1)} if case.source == "fp8_row" and i == 1 else {()}) - {tuple(part.shape), (1,)}:
            wrong = torch.empty(shape, dtype=part.dtype)
            with pytest.raises(RuntimeError, match=r"\w+ of \S+ weights \[\d+, \d+\] has "):
                OPS.decode_source([*parts[:i], wrong, *parts[i + 1 :]], case.source, n, k)
    for count in (len(parts) - 1, len(parts) + 1):
        with pytest.raises(RuntimeError, match=f"have {len(parts)} tensors a matrix, got {count}"):
            OPS.decode_source((parts * 2)[:count], case.source, n, k)
    for sizes in ((0, k), (n, 0), (-8, k), (n, -256), (2**30 + 1, k), (n, 2**62)):
        with pytest.raises(RuntimeError, match=r"weights cannot be \[|cannot be: [nk] must be"):
            OPS.decode_source(parts, case.source, *sizes)


@pytest.mark.parametrize(
    ("source", "make", "n", "k", "message"),
    [
        ("gptq", gptq(32, FP16), 12, 64, r"gptq weights \[12, 64\] cannot be: n must be a multiple of 8"),
        ("gptq", gptq(32, FP16), 16, 60, "k must be a multiple of 8"),
        ("awq", awq(32, FP16), 12, 64, "n must be a multiple of 8"),
        ("mxfp4", mxfp4(torch.uint8, torch.uint8), 4, 48, "k must be a multiple of 32"),
        ("nvfp4", nvfp4(1), 4, 24, "k must be a multiple of 16"),
        ("gguf:Q4_K", gguf("Q4_K"), 4, 384, "k must be a multiple of 256"),
        ("gguf:Q8_0", gguf("Q8_0"), 4, 48, "k must be a multiple of 32"),
        ("kt_int8x2_rows", kt(8, 2, by_columns=False), 96, 64, "n must be a multiple of 64"),
        ("kt_int8x2_rows", kt(8, 2, by_columns=False), 64, 96, "k must be a multiple of 64"),
        ("kt_int4x2_columns", kt(4, 2, by_columns=True), 64, 128, "k must be a multiple of 256"),
        ("kt_int4x2_columns", kt(4, 2, by_columns=True), 48, 256, "n must be a multiple of 32"),
    ],
)
def test_sizes_that_the_format_cannot_have(source: str, make, n: int, k: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.decode_source(make(n, k, Random(0)), source, n, k)


@pytest.mark.parametrize(("groups", "k"), [(100, 128), (2**20, 128), (3, 320), (5, 576)])
def test_groups_that_do_not_divide_k(groups: int, k: int) -> None:
    parts = [torch.zeros(4, k // 8, dtype=torch.int32), torch.ones(1, 1).expand(4, groups)]
    sentence = rf"pack_quantized weights \[4, {k}\] has {groups} groups, whose number does not divide k; quantize in"
    with pytest.raises(RuntimeError, match=sentence):
        OPS.decode_source(parts, "pack_quantized", 4, k)


@pytest.mark.parametrize(
    "source",
    [
        "", "int5", "BF16", "fp8_block", "fp8_block128", "fp8_block0x128", "fp8_block128x-1", "fp8_block128x0128",
        "fp8_block128x128x1", "fp8_block99999999999x128", "gptq_v3", "kt_int8", "kt_int8x_rows", "kt_int8x0_rows",
        "kt_int8x65_rows", "kt_int8x2", "kt_int8x2_row", "kt_int16x2_rows", "mxfp4 ", "gguf", "gguf:", "gguf:Q4_2",
        "gguf:IQ2_XXS", "gguf:q4_0",
    ],
)  # fmt: skip
def test_unknown_sources_are_refused_with_the_known_ones(source: str) -> None:
    with pytest.raises(RuntimeError, match=r"unknown source .* known: bf16, fp16|GGUF type .* known: Q4_0, Q4_1"):
        OPS.source_layout([torch.zeros(1)], source, 32, 256)


NAN, INF = float("nan"), float("inf")


def filled(parts: list[Tensor], index: int, at: tuple[int, ...], value: float | int) -> list[Tensor]:
    parts[index][at] = value
    return parts


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("source", "make", "index", "at", "message"),
    [
        ("fp8_block128x128", fp8_block(128, 128, FP32), 1, (1, 1), "at row 128, group 1"),
        ("fp8_row", fp8_row(BF16, matrix=False), 1, (70,), "at row 70, group 0"),
        ("pack_quantized", pack_quantized(32, FP16), 1, (70, 3), "at row 70, group 3"),
        ("gptq", gptq(32, FP16), 1, (3, 70), "at row 70, group 3"),
        ("awq", awq(32, FP16), 2, (3, 70), "at row 70, group 3"),
        ("nvfp4", nvfp4(1), 2, (0,), "scale of a row .* at row 0, group 0"),
        ("kt_int8x2_columns", kt(8, 2, by_columns=True), 3, (70,), "at row 70, group 1"),
    ],
)
def test_scales_that_are_not_finite_are_refused(source: str, make, index: int, at, message: str, value: float) -> None:
    n, k = 160, 256
    parts = filled(make(n, k, Random(2, tame=True)), index, at, value)
    layout = OPS.source_layout(make(n, k, Random(2, tame=True)), source, n, k)
    with pytest.raises(RuntimeError, match=f"{message} of the matrix must be finite; repair the checkpoint$"):
        OPS.repack(parts, source, layout, n, k)
    with pytest.raises(RuntimeError, match="cannot be packed: it must be finite"):
        OPS.repack(parts, source, "bf16_n64k2_v1", n, k)


@pytest.mark.parametrize(
    ("source", "make", "index", "at", "message"),
    [
        ("fp8_row", fp8_row(FP32, matrix=False), 0, (70, 5), "the weight at row 70, column 5"),
        ("mxfp8", mxfp8(torch.uint8), 1, (70, 3), "scale nan at row 70, group 3"),
        ("mxfp4", mxfp4(torch.uint8, torch.uint8), 1, (70, 3), "scale nan at row 70, group 3"),
        ("nvfp4", nvfp4(1), 1, (70, 3), "scale -?nan at row 70, group 3"),
        ("gguf:MXFP4", gguf("MXFP4"), 0, (70, 17), "scale nan at row 70, group 1"),
        ("gguf:Q6_K", gguf("Q6_K"), 0, (70, slice(208, 210)), "scale of 256 weights -?nan at row 70, group 0"),
        ("gguf:Q2_K", gguf("Q2_K"), 0, (70, slice(82, 84)), "minimum of 256 weights -?nan at row 70, group 0"),
        ("gguf:Q5_1", gguf("Q5_1"), 0, (70, slice(2, 4)), "minimum -?nan at row 70, group 0"),
    ],
)
def test_bytes_that_stand_for_no_number_are_refused(source: str, make, index: int, at, message: str) -> None:
    n, k = 96, 256
    parts = make(n, k, Random(2, tame=True))
    layout = OPS.source_layout(parts, source, n, k)
    parts[index].view(torch.uint8)[at] = 255
    with pytest.raises(RuntimeError, match=f"{message} of the matrix (must be finite|is NaN); repair the checkpoint$"):
        OPS.repack(parts, source, layout, n, k)
    assert OPS.decode_source(parts, source, n, k)[70].isnan().any()


def test_minus_128_is_kept_in_groups_and_refused_beside_a_scale_a_row() -> None:
    source = "kt_int8x1_rows"
    parts = kt(8, 1, by_columns=False)(96, 256, Random(3, tame=True))
    layout = OPS.source_layout(parts, source, 96, 256)
    parts[0].view(torch.uint8)[0] = 128
    with pytest.raises(RuntimeError, match=r"code -128 at row 0, column 0 of the matrix is outside -127..127"):
        OPS.repack(parts, source, layout, 96, 256)
    OPS.repack(parts, source, "int8_n64k4_r512_v1", 96, 256)

    for source, make, at in (
        ("gguf:Q8_0", gguf("Q8_0"), (70, 2)),
        ("kt_int8x2_columns", kt(8, 2, by_columns=True), (0,)),
    ):
        parts = make(96, 256, Random(3, tame=True))
        parts[0].view(torch.uint8)[at] = 128
        layout = OPS.source_layout(parts, source, 96, 256)
        values = OPS.decode_source(parts, source, 96, 256)
        assert torch.equal(OPS.dequantize(OPS.repack(parts, source, layout, 96, 256), layout, 96, 256), values)


def test_zero_points_with_scales_that_fp16_has_not_are_refused_before_anything_is_packed() -> None:
    parts = awq(32, BF16)(64, 64, Random(0))
    assert OPS.source_layout(parts, "awq", 64, 64) == "int4zg32_n64k8_v1"
    parts[2][1, 37] = 1e-6
    sentence = r"keep fp16 scales, and the bf16 scale 9.98\S+ of row 37 is no number of fp16; choose a method"
    with pytest.raises(RuntimeError, match=sentence):
        OPS.source_layout(parts, "awq", 64, 64)
    OPS.repack(parts, "awq", "int8_n64k4_r512_v1", 64, 64)


def test_a_stored_zero_point_of_15_is_refused_in_the_first_version_of_gptq() -> None:
    parts = gptq(32, FP16)(64, 96, Random(0))
    assert OPS.source_layout(parts, "gptq", 64, 96) == "int4zg32_n64k8_v1"
    zeros = parts[2]
    for group, row in ((0, 0), (1, 7), (2, 37)):
        word = int(zeros[group, row // 8])
        zeros[group, row // 8] = torch.tensor(word | 15 << row % 8 * 4).to(torch.int32)
        sentence = (
            rf"gptq weights \[64, 96\] store zero point 15 for row {row}, group {group}, which readers of the format "
            "take for 0 or for 16; quantize the model again with checkpoint_format gptq_v2"
        )
        for call in (OPS.source_layout, OPS.decode_source):
            with pytest.raises(RuntimeError, match=sentence):
                call(parts, "gptq", 64, 96)
            call(parts, "gptq_v2", 64, 96)
        with pytest.raises(ValueError, match="stored zero of 15"):
            decode("gptq", parts, 64, 96)
        zeros[group, row // 8] = word


def test_a_factor_without_an_exact_half_is_refused() -> None:
    parts = nvfp4(1)(64, 64, Random(0))
    parts[2][0] = 2.0**-149
    with pytest.raises(RuntimeError, match="has no exact half"):
        OPS.decode_source(parts, "nvfp4", 64, 64)
    parts[2][0] = 2.0**-148
    OPS.decode_source(parts, "nvfp4", 64, 64)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_tensors_with_strides_or_at_any_byte_are_read_right(case: Case) -> None:
    n, k = case.shapes()[1]
    parts = case.make(n, k, Random(4))
    expected = OPS.decode_source(parts, case.source, n, k)
    strided = []
    for part in parts:
        whole = part.view(torch.uint8) if part.element_size() == 1 else part
        strided.append(torch.stack((whole, whole), -1)[..., 0].view(part.dtype))
    assert any(not part.is_contiguous() for part in strided if part.numel() > 1)
    assert torch.equal(OPS.decode_source(strided, case.source, n, k), expected)
    shifted = []
    for part in parts:
        memory = torch.empty(part.numel() * part.element_size() + 1, dtype=torch.uint8)[1:]
        memory.copy_(part.contiguous().view(-1).view(torch.uint8))
        shifted.append(torch.frombuffer(memory.numpy(), dtype=part.dtype).view(part.shape))
    assert all(part.data_ptr() % 2 for part in shifted)
    assert torch.equal(OPS.decode_source(shifted, case.source, n, k), expected)


def test_tensors_of_another_device_are_refused() -> None:
    parts = [torch.zeros(4, 4, device="meta", dtype=BF16)]
    with pytest.raises(RuntimeError, match="a tensor of weights is on meta; it must be on the CPU"):
        OPS.source_layout(parts, "bf16", 4, 4)


def test_opcheck_of_the_operators() -> None:
    parts = pack_quantized(32, BF16)(70, 96, Random(0))
    layout = "int4g32_n64k8_v1"
    torch.library.opcheck(OPS.repack.default, (parts, "pack_quantized", layout, 70, 96))
    torch.library.opcheck(OPS.repack_w13.default, (parts, parts, "pack_quantized", layout, 70, 96))
    torch.library.opcheck(OPS.decode_source.default, (parts, "pack_quantized", 70, 96))
