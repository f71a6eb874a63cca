"""Sources of checkpoints: decoded and repacked bit for bit as format_oracles.py has them, and every refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from format_oracles import KT_ROW_BLOCK, decode
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from test_golden import golden, quantized_cases
from torch import Tensor

import kt_kernel.ops  # noqa: F401 - fake implementations
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import METHODS, method_of, source_kind, weight_dtype_of

OPS = torch.ops.kt_kernel
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BF16_LAYOUT = "bf16_n64k2_v1"


class Random:
    """Random parts; `tame`: scales of ordinary weights, otherwise every finite number of their type."""

    def __init__(self, seed: int, *, tame: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tame = tame

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def bytes(self, *shape: int) -> Tensor:
        return self.integers(0, 256, *shape).to(torch.uint8)

    def words(self, *shape: int) -> Tensor:
        return self.integers(-(2**31), 2**31, *shape).to(torch.int32)

    def floats(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if self.tame:
            return (torch.randn(shape, generator=self.generator) * 0.01).to(dtype)
        integer = torch.int32 if dtype == FP32 else torch.int16
        bits = torch.finfo(dtype).bits
        found = self.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), *shape).to(integer).view(dtype)
        found = torch.where(found.isfinite(), found, torch.finfo(dtype).max)
        special = torch.tensor(
            [0.0, -0.0, torch.finfo(dtype).smallest_normal / 2, -torch.finfo(dtype).max], dtype=dtype
        )
        found.view(-1)[:4] = special[: found.numel()]
        return found

    def e4m3(self, *shape: int) -> Tensor:
        codes = self.bytes(*shape)
        return torch.where(codes % 128 == 127, codes - 1, codes).view(torch.float8_e4m3fn)

    def e8m0(self, *shape: int) -> Tensor:
        return self.integers(*((110, 130) if self.tame else (0, 255)), *shape).to(torch.uint8)


Make = Callable[[int, int, Random], list[Tensor]]


def groups_of(k: int, group: int) -> int:
    return -(-k // group) if group else 1


def weights(dtype: torch.dtype) -> Make:
    return lambda n, k, random: [random.floats(dtype, n, k)]


def fp8_block(rows: int, columns: int, dtype: torch.dtype) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        return [random.e4m3(n, k), random.floats(dtype, groups_of(n, rows), groups_of(k, columns))]

    return make


def fp8_row(dtype: torch.dtype, *, matrix: bool) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        return [random.e4m3(n, k).view(torch.uint8), random.floats(dtype, n, *((1,) if matrix else ()))]

    return make


def mxfp8(dtype: torch.dtype) -> Make:
    return lambda n, k, random: [random.e4m3(n, k), random.e8m0(n, groups_of(k, 32)).view(dtype)]


def pack_quantized(group: int, dtype: torch.dtype, *, words: bool = True) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        codes = random.words(n, -(-k // 8)) if words else random.bytes(n, -(-k // 2))
        return [codes, random.floats(dtype, n, groups_of(k, group))]

    return make


def gptq(group: int, dtype: torch.dtype, *, zeros: tuple[int, int] = (0, 14)) -> Make:
    """`zeros`: the least and the largest stored zero point; 15 is one of the second version only."""

    def make(n: int, k: int, random: Random) -> list[Tensor]:
        groups = groups_of(k, group)
        nibbles = random.integers(zeros[0], zeros[1] + 1, groups, n // 8, 8)
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
        return [random.words(k // 8, n), random.floats(dtype, groups, n), words]

    return make


def awq(group: int, dtype: torch.dtype) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        groups = groups_of(k, group)
        # those of bf16 are numbers of fp16, too
        scales = (
            random.floats(dtype, groups, n)
            if dtype == FP16
            else (random.integers(-128, 128, groups, n) / 512).to(dtype)
        )
        return [random.words(k, n // 8), random.words(groups, n // 8), scales]

    return make


def mxfp4(dtype: torch.dtype, scale_dtype: torch.dtype) -> Make:
    return lambda n, k, random: [random.bytes(n, k // 2).view(dtype), random.e8m0(n, k // 32).view(scale_dtype)]


def nvfp4(*shape: int) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        factor = torch.full(shape, 0.0123 if random.tame else -1.9e-30)
        return [random.bytes(n, k // 2), random.e4m3(n, k // 16), factor]

    return make


# Bytes of fp16 in a block of GGUF; those of MXFP4 have a byte of e8m0, those of floats are floats.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
FLOATS = {"BF16": BF16, "F16": FP16, "F32": FP32}


def gguf_sizes(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def gguf(name: str) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        if name in FLOATS:
            return [random.floats(FLOATS[name], n, k).view(torch.uint8)]
        columns, size = gguf_sizes(name)
        blocks = random.bytes(n * (k // columns), size)
        for at in HALVES[name]:
            blocks[:, at : at + 2] = random.floats(FP16, blocks.shape[0], 1).view(torch.uint8)
        if name == "MXFP4":
            blocks[:, 0] = random.e8m0(blocks.shape[0])
        return [blocks.reshape(n, -1)]

    return make


def kt(bits: int, count: int, *, by_columns: bool) -> Make:
    def make(n: int, k: int, random: Random) -> list[Tensor]:
        rows, columns = (n, k // count) if by_columns else (n // count, k)
        parts = []
        for _ in range(count):
            codes = random.bytes(rows * columns * bits // 8)
            if bits == 8 and not (by_columns and count > 1):  # a scale a row, beside which -128 is damage
                codes[codes == 128] = 129
            parts += [
                codes.view(torch.int8),
                random.floats(FP32, rows) / 64,
            ]
        return parts

    return make


@dataclass(frozen=True)
class Case:
    """A source: its maker, what n and k are multiples of, and the format and group size of its layout."""

    source: str
    make: Make
    n_unit: int = 1
    k_unit: int = 1
    format: str = "bf16"
    group: int | None = 0  # None: no layout has such groups
    step: int = 2
    id: str = ""

    def shapes(self) -> list[tuple[int, int]]:
        sizes = [(1, 1), (70, 328), (130, 576), (33, 1100)]
        return [(-(-n // self.n_unit) * self.n_unit, -(-k // self.k_unit) * self.k_unit) for n, k in sizes]

    def layout(self, k: int) -> str:
        # a group of blocks, bytes and exponents is one of the format's; other groups are found by their number
        is_fixed = self.source.startswith(("gguf", "mx", "nv", "kt"))
        group = self.group if is_fixed or groups_of(k, self.group) > 1 else 0
        return f"{self.format}{f'g{group}' if group else ''}_n64k{self.step}_v1"


def kt_case(bits: int, count: int, *, by_columns: bool) -> Case:
    source = f"kt_int{bits}x{count}_{'columns' if by_columns else 'rows'}"
    step = 512 // bits
    units = (32, step * count) if by_columns else (32 * count, step)
    has_groups = by_columns and count > 1
    name = ("int8f" if has_groups else "int8") if bits == 8 else "int4f"
    return Case(source, kt(bits, count, by_columns=by_columns), *units, name, 0, 32 // bits)


INT4 = partial(Case, step=8)
CASES = [
    Case("bf16", weights(BF16)),
    Case("fp16", weights(FP16)),
    Case("fp32", weights(FP32)),
    Case("fp8_block128x128", fp8_block(128, 128, FP32), format="fp8f", group=128, step=4, id="fp32"),
    Case("fp8_block128x128", fp8_block(128, 128, BF16), format="fp8f", group=128, step=4, id="bf16"),
    Case("fp8_block50x96", fp8_block(50, 96, FP32), format="fp8f", group=96, step=4),
    Case("fp8_block1x32", fp8_block(1, 32, FP32), format="fp8f", group=32, step=4),
    Case("fp8_block64x48", fp8_block(64, 48, FP32), 1, 49, group=None),
    Case("fp8_row", fp8_row(FP32, matrix=False), format="fp8f", step=4, id="vector"),
    Case("fp8_row", fp8_row(BF16, matrix=True), format="fp8f", step=4, id="matrix"),
    Case("mxfp8", mxfp8(torch.uint8), format="fp8", group=32, step=4, id="uint8"),
    Case("mxfp8", mxfp8(torch.float8_e8m0fnu), format="fp8", group=32, step=4, id="e8m0"),
    INT4("pack_quantized", pack_quantized(32, BF16), 1, 32, "int4", 32, id="bf16"),
    INT4("pack_quantized", pack_quantized(128, FP16, words=False), 1, 128, "int4h", 128, id="fp16_bytes"),
    INT4("pack_quantized", pack_quantized(64, FP32), 1, 64, "int4f", 64, id="fp32"),
    INT4("pack_quantized", pack_quantized(0, BF16, words=False), format="int4", id="row"),
    INT4("pack_quantized", pack_quantized(96, FP16), 1, 192, "int4h", 96, id="g96"),
    INT4("gptq", gptq(128, FP16), 8, 128, "int4z", 128),
    INT4("gptq", gptq(128, FP16, zeros=(7, 7)), 8, 128, "int4h", 128, id="symmetric"),
    INT4("gptq", gptq(32, BF16, zeros=(7, 7)), 8, 32, "int4", 32, id="symmetric_bf16"),
    INT4("gptq", gptq(0, FP32, zeros=(7, 7)), 8, 8, "int4f", id="symmetric_row"),
    INT4("gptq_v2", gptq(64, FP16, zeros=(7, 7)), 8, 64, "int4z", 64, id="sevens"),
    INT4("gptq_v2", gptq(64, FP16, zeros=(8, 8)), 8, 64, "int4h", 64, id="symmetric"),
    INT4("gptq_v2", gptq(0, FP16, zeros=(0, 15)), 8, 8, "int4z", id="row"),
    INT4("awq", awq(0, FP16), 8, 1, "int4z", id="row"),
    INT4("awq", awq(128, FP16), 8, 128, "int4z", 128),
    INT4("awq", awq(32, BF16), 8, 32, "int4z", 32, id="bf16"),
    INT4("awq", awq(64, FP32), 8, 64, "int4z", 64, id="fp32"),
    INT4("mxfp4", mxfp4(torch.uint8, torch.uint8), 1, 32, "fp4", 32, id="uint8"),
    INT4("mxfp4", mxfp4(torch.int8, torch.float8_e8m0fnu), 1, 32, "fp4", 32, id="int8"),
    INT4("mxfp4", mxfp4(torch.float4_e2m1fn_x2, torch.uint8), 1, 32, "fp4", 32, id="fp4"),
    INT4("nvfp4", nvfp4(1), 1, 16, "fp4c", 16),
    INT4("nvfp4", nvfp4(), 1, 16, "fp4c", 16, id="scalar"),
    *(Case(f"gguf:{name}", gguf(name)) for name in FLOATS),
    *(
        Case(f"gguf:{name}", gguf(name), 1, gguf_sizes(name)[0], form, group, step)
        for name, form, group, step in (
            ("Q4_0", "int4h", 32, 8),
            ("Q4_1", "int4m", 32, 8),
            ("Q5_0", "int5h", 32, 8),
            ("Q5_1", "int5m", 32, 8),
            ("Q8_0", "int8h", 32, 4),
            ("Q2_K", "int2km", 16, 16),
            ("Q3_K", "int3k", 16, 16),
            ("Q4_K", "int4km", 32, 8),
            ("Q5_K", "int5km", 32, 8),
            ("Q6_K", "int6k", 16, 16),
            ("IQ4_NL", "iq4h", 32, 8),
            ("IQ4_XS", "iq4k", 32, 8),
            ("MXFP4", "fp4", 32, 8),
        )  # fmt: skip
    ),
    *(kt_case(bits, count, by_columns=by) for bits in (8, 4) for count in (1, 2, 3) for by in (False, True)),
]
IDS = [f"{case.source}-{case.id}" if case.id else case.source for case in CASES]
assert len(set(IDS)) == len(IDS)


def expected_layout(case: Case, k: int) -> str:
    match = re.fullmatch(r"kt_int\dx(\d+)_columns", case.source)
    if match and int(match[1]) > 1:
        return f"{case.format}g{k // int(match[1])}_n64k{case.step}_v1"
    return case.layout(k)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_decodes_as_its_format_is_specified(case: Case) -> None:
    for seed, (n, k) in enumerate(case.shapes()):
        parts = case.make(n, k, Random(seed))
        expected = torch.from_numpy(decode(case.source, plain(parts), n, k))
        assert torch.equal(OPS.decode_source(parts, case.source, n, k), expected), (n, k)


def plain(parts: list[Tensor]) -> list[Tensor]:
    """Types that numpy has, for the oracle."""
    return [part.view(torch.uint8) if part.dtype == torch.float4_e2m1fn_x2 else part for part in parts]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.group is not None], ids=lambda case: f"{case.source}{case.id}"
)
def test_its_own_layout_keeps_every_value(case: Case) -> None:
    for seed, (n, k) in enumerate(case.shapes()):
        # bf16 has no number for the largest of fp32
        random = Random(seed, tame=case.format == "bf16")
        gate, up = case.make(n, k, random), case.make(n, k, random)
        layout = OPS.source_layout(gate, case.source, n, k)
        assert layout == expected_layout(case, k), (n, k)
        values = [OPS.decode_source(parts, case.source, n, k) for parts in (gate, up)]
        if layout == BF16_LAYOUT:
            values = [matrix.bfloat16().float() for matrix in values]
        packed = OPS.repack(gate, case.source, layout, n, k)
        assert torch.equal(OPS.dequantize(packed, layout, n, k), values[0]), (n, k)
        merged = OPS.repack_w13(gate, up, case.source, layout, n, k)
        for found, expected in zip(OPS.dequantize_w13(merged, layout, n, k), values, strict=True):
            assert torch.equal(found, expected), (n, k)


def test_methods_name_the_formats_that_their_sources_are_kept_in() -> None:
    kept: dict[str, set[str]] = {}
    for case in CASES:
        method = method_of(source_kind(case.source))
        if method is not None and case.group is not None:
            n, k = case.shapes()[1]
            layout = OPS.source_layout(case.make(n, k, Random(0)), case.source, n, k)
            kept.setdefault(method.name, set()).add(weight_dtype_of(layout))
    assert kept == {name: set(method.formats) for name, method in METHODS.items() if method.sources}


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("layout", [BF16_LAYOUT, "int8_n64k4_r512_v1", "int4g64_n64k8_r64_v1"])
def test_other_layouts_quantize_its_values(case: Case, layout: str) -> None:
    n, k = case.shapes()[1]
    random = Random(7, tame=True)
    gate, up = case.make(n, k, random), case.make(n, k, random)
    values = [OPS.decode_source(parts, case.source, n, k) for parts in (gate, up)]
    assert torch.equal(OPS.repack(gate, case.source, layout, n, k), OPS.quantize_pack(values[0], layout)[0])
    assert torch.equal(OPS.repack_w13(gate, up, case.source, layout, n, k), OPS.quantize_pack_w13(*values, layout)[0])


@pytest.mark.parametrize("name", quantized_cases())
def test_files_of_real_producers(name: str) -> None:
    source, parts, value = golden(name)
    n, k = value.shape
    expected = torch.from_numpy(decode(source, parts, n, k))
    assert torch.equal(OPS.decode_source(parts, source, n, k), expected)
    layout = OPS.source_layout(parts, source, n, k)
    assert torch.equal(OPS.dequantize(OPS.repack(parts, source, layout, n, k), layout, n, k), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("by_columns", [False, True])
def test_kt_parts_of_more_than_one_block_of_columns(bits: int, by_columns: bool) -> None:
    # ragged blocks of rows, and columns behind the last whole block of 3584
    case = kt_case(bits, 2, by_columns=by_columns)
    n = KT_ROW_BLOCK[bits] + 32 if by_columns else 2 * (KT_ROW_BLOCK[bits] + 32)
    k = 2 * (3584 + 128) if by_columns else 3584 + 128
    parts = case.make(n, k, Random(11))
    expected = torch.from_numpy(decode(case.source, parts, n, k))
    assert torch.equal(OPS.decode_source(parts, case.source, n, k), expected)
    layout = OPS.source_layout(parts, case.source, n, k)
    assert torch.equal(OPS.dequantize(OPS.repack(parts, case.source, layout, n, k), layout, n, k), expected)


def test_every_code_of_two_words() -> None:
    """All 65536 halves of words in a row of pack_quantized, all 256 bytes of e4m3 but NaN."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.int32).reshape(1, -1)
    parts = [halves, torch.ones(1, 1)]
    k = halves.shape[1] * 8
    expected = torch.from_numpy(decode("pack_quantized", parts, 1, k))
    assert torch.equal(OPS.decode_source(parts, "pack_quantized", 1, k), expected)
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    values = OPS.decode_source([codes, torch.ones(2)], "fp8_row", 2, 128)
    assert torch.equal(values[:, :127], codes.view(torch.float8_e4m3fn).float()[:, :127])
    assert values[:, 127].isnan().all()


# Layouts besides a source's own that keep its codes.


@pytest.mark.parametrize(
    ("source", "make", "layout"),
    [
        ("gptq", gptq(128, FP16, zeros=(7, 7)), "int4zg128_n64k8_v1"),
        ("gptq_v2", gptq(64, BF16, zeros=(8, 8)), "int4fg64_n64k8_v1"),
        ("pack_quantized", pack_quantized(64, BF16), "int4fg64_n64k8_v1"),
        ("mxfp8", mxfp8(torch.uint8), "fp8fg32_n64k4_v1"),
        ("fp8_block128x128", fp8_block(128, 128, BF16), "fp8g128_n64k4_v1"),
        ("kt_int8x2_rows", kt(8, 2, by_columns=False), "int8f_n64k4_v1"),
        ("gguf:Q4_0", gguf("Q4_0"), "int4fg32_n64k8_v1"),
        ("fp8_block16x4096", fp8_block(16, 4096, FP32), "fp8fg1024_n64k4_v1"),
    ],
)
def test_a_layout_of_wider_scales_keeps_the_values(source: str, make: Make, layout: str) -> None:
    n, k = 128, 512
    parts = make(n, k, Random(3))
    expected = OPS.decode_source(parts, source, n, k)
    assert torch.equal(OPS.dequantize(OPS.repack(parts, source, layout, n, k), layout, n, k), expected)


@pytest.mark.parametrize(
    ("source", "make", "layout", "message"),
    [
        ("gptq", gptq(128, FP16), "int4hg128_n64k8_v1", "cannot become int4hg128_n64k8_v1; they are kept as int4zg128"),
        ("pack_quantized", pack_quantized(32, BF16), "int4g64_n64k8_v1", "they are kept as int4g32_n64k8_v1"),
        ("fp8_row", fp8_row(FP32, matrix=False), "int8_n64k4_v1", "they are kept as fp8f_n64k4_v1"),
        ("bf16", weights(BF16), "int4hg32_n64k8_v1", "they are kept as bf16_n64k2_v1"),
        ("fp8_block64x48", fp8_block(64, 48, FP32), "fp8fg32_n64k4_v1", "have no layout that keeps them"),
        ("pack_quantized", pack_quantized(64, FP32), "int4hg64_n64k8_v1", "is no number of fp16"),
        ("fp8_row", fp8_row(FP32, matrix=False), "fp8_n64k4_v1", "is no number of bf16"),
    ],
)
def test_a_layout_that_cannot_keep_it_is_refused(source: str, make: Make, layout: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.repack(make(64, 256, Random(5)), source, layout, 64, 256)


# What layers load.

HIDDEN, INNER, EXPERTS = 512, 768, 3


def layer_of(layouts: tuple[str, str]) -> CpuExperts:
    config = MoEConfig(layer_idx=2, num_experts=EXPERTS, top_k=1, hidden_size=HIDDEN, intermediate_size=INNER)
    return CpuExperts(config, layouts=layouts, engine=get_engine(EngineConfig(num_threads=2)))


LOADED = [case for case in CASES if "columns" not in case.source and case.id != "g96"]


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.source + case.id)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_holds_what_repack_makes(case: Case, quantized: bool) -> None:
    # a single part, or parts of columns for down as they are of rows for gate and up
    down_source = case.source.replace("rows", "columns")
    down_case = next(other for other in CASES if other.source == down_source and other.id == case.id)
    random = Random(9, tame=True)
    gate, up = ([case.make(INNER, HIDDEN, random) for _ in range(EXPERTS)] for _ in range(2))
    down = [down_case.make(HIDDEN, INNER, random) for _ in range(EXPERTS)]
    if quantized or case.group is None:
        layouts = ("int8_n64k4_r512_v1", BF16_LAYOUT)
    else:
        layouts = (
            OPS.source_layout(gate[0], case.source, INNER, HIDDEN),
            OPS.source_layout(down[0], down_source, HIDDEN, INNER),
        )
    layer = layer_of(layouts)
    order = [2, 0, 1]
    flat = [[part for expert in parts for part in expert] for parts in (gate, up, down)]
    layer.load_sources(order, case.source, down_source, *flat)
    for i, expert in enumerate(order):
        w13, w2 = OPS.export_packed(layer.layer.handle, expert)
        assert torch.equal(w13, OPS.repack_w13(gate[i], up[i], case.source, layouts[0], INNER, HIDDEN))
        assert torch.equal(w2, OPS.repack(down[i], down_source, layouts[1], HIDDEN, INNER))


def test_a_load_that_fails_says_where_and_leaves_the_expert_unloaded() -> None:
    make = fp8_row(FP32, matrix=False)
    gate, up, down = make(INNER, HIDDEN, Random(1)), make(INNER, HIDDEN, Random(2)), make(HIDDEN, INNER, Random(3))
    layer = layer_of(("fp8f_n64k4_v1",) * 2)
    layer.load_sources([1], "fp8_row", "fp8_row", gate, up, down)
    up[0][70, 5] = 0x7F
    sentence = "layer 2, expert 1: the weight at row 70, column 5 of up is NaN; repair the checkpoint$"
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_sources([1], "fp8_row", "fp8_row", gate, up, down)
    up[0][70, 5], gate[1][767] = 0, float("inf")
    with pytest.raises(RuntimeError, match="expert 1: scale inf at row 767, group 0 of gate must be finite; repair"):
        layer.load_sources([1], "fp8_row", "fp8_row", gate, up, down)
    gate[1][767], down[1][511] = 1, float("nan")
    with pytest.raises(RuntimeError, match="expert 1: scale nan at row 511, group 0 of down must be finite; repair"):
        layer.load_sources([1], "fp8_row", "fp8_row", gate, up, down)
    with pytest.raises(RuntimeError, match="has not been loaded"):
        OPS.export_packed(layer.layer.handle, 1)


def test_a_refused_load_touches_nothing() -> None:
    make = fp8_row(FP32, matrix=False)
    parts = [make(INNER, HIDDEN, Random(1)), make(INNER, HIDDEN, Random(2)), make(HIDDEN, INNER, Random(3))]
    layer = layer_of(("fp8f_n64k4_v1",) * 2)
    layer.load_sources([1], "fp8_row", "fp8_row", *parts)
    before = OPS.export_packed(layer.layer.handle, 1)
    four = pack_quantized(32, BF16)
    for w2_source, down, message in (
        ("pack_quantized", four(HIDDEN, INNER, Random(4)), "pack_quantized weights cannot become fp8f_n64k4_v1"),
        ("fp8_row", parts[0], r"weight of fp8_row weights \[512, 768\] has shape \[768, 512\]"),
        ("fp8_row", parts[2][:1], "down has 1 tensors; 1 experts of fp8_row have 2 each"),
        ("fp9", parts[2], 'unknown source "fp9"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_sources([1], "fp8_row", w2_source, parts[0], parts[1], down)
    with pytest.raises(RuntimeError, match="expert -1 is no expert id"):
        layer.load_sources([-1], "fp8_row", "fp8_row", *parts)
    for found, expected in zip(OPS.export_packed(layer.layer.handle, 1), before, strict=True):
        assert torch.equal(found, expected)
