"""The decoders of format_oracles.py against files of the real producers (tests/data/formats, make_*.py there)."""

from __future__ import annotations

import json
from pathlib import Path

import kt_files
import numpy as np
import pytest
import torch
from format_oracles import decode, e2m1, e4m3, e8m0, nibbles
from safetensors import safe_open

FORMATS = Path(__file__).resolve().parents[1] / "data/formats"
QUANTIZED = FORMATS / "quantized.safetensors"
DIGESTS = json.loads((FORMATS / "kt/digests.json").read_text())


def quantized_cases() -> dict[str, dict]:
    with safe_open(QUANTIZED, "pt") as file:
        return json.loads(file.metadata()["cases"])


def golden(name: str) -> tuple[str, list[torch.Tensor], torch.Tensor]:
    """Source string, parts and the producer's own dequantization."""
    case = quantized_cases()[name]
    with safe_open(QUANTIZED, "pt") as file:
        parts = [file.get_tensor(f"{name}.{i}") for i in range(len(case["names"]))]
        value = file.get_tensor(f"{name}.value")
    if "weight_global_scale" in case["names"]:  # compressed-tensors divides by it
        parts[2] = 1 / parts[2]
    return case["source"], parts, value


# Packages that quantize checkpoints.


@pytest.mark.parametrize("name", quantized_cases())
def test_a_producers_weights_decode_to_its_own_values(name: str) -> None:
    source, parts, value = golden(name)
    found = torch.from_numpy(decode(source, parts, *value.shape))
    # bf16 and fp16: the producer's value is ours rounded to its type. fp32 (ModelOpt): it multiplies the scales first.
    tolerance = 2**-22 if value.dtype == torch.float32 else 0
    torch.testing.assert_close(found.to(value.dtype), value, rtol=tolerance, atol=0)
    assert value.float().abs().max() > 16 and not value[1].any(), "scales of the rows, and the row of zeros"


@pytest.mark.parametrize("name", quantized_cases())
def test_every_part_of_a_source_counts(name: str) -> None:
    source, parts, value = golden(name)
    right = decode(source, parts, *value.shape)
    for i, part in enumerate(parts):
        changed = part.clone()
        flat = changed.view(torch.uint8).view(-1)
        flat[-1] ^= 0x10
        wrong = decode(source, [*parts[:i], changed, *parts[i + 1 :]], *value.shape)
        assert not np.array_equal(wrong, right), f"part {i}"


@pytest.mark.parametrize("group", [32, 64, 128])
def test_all_sixteen_codes_are_in_the_packed_weights(group: int) -> None:
    codes = nibbles(golden(f"pack_quantized_g{group}")[1][0].numpy())
    assert np.array_equal(np.unique(codes), np.arange(16)), "-8 is among them"


# Codes that torch knows.


def test_eight_bit_floats_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for decoded, dtype in ((e4m3, torch.float8_e4m3fn), (e8m0, torch.float8_e8m0fnu)):
        expected = codes.view(dtype).float().numpy()
        np.testing.assert_array_equal(decoded(codes.numpy()).astype(np.float32), expected)


def test_four_bit_floats_are_two_exponent_bits_and_one_mantissa_bit() -> None:
    codes = np.arange(16)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    expected = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    np.testing.assert_array_equal(e2m1(codes), np.where(codes & 8, -expected, expected))


def test_uint8_words_are_those_of_int32() -> None:
    source, parts, value = golden("pack_quantized_g32")
    as_bytes = [parts[0].view(torch.uint8), parts[1]]
    np.testing.assert_array_equal(decode(source, as_bytes, *value.shape), decode(source, parts, *value.shape))


def test_float_sources_are_read_as_they_are() -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for source, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        part = weight.to(dtype)
        np.testing.assert_array_equal(decode(source, [part], 3, 32), part.float().numpy())


@pytest.mark.parametrize(("groups", "k"), [(9, 576), (6, 192), (1, 96), (2, 192)])
def test_groups_are_of_equal_size(groups: int, k: int) -> None:
    scales = torch.arange(1, groups + 1, dtype=torch.float32)[None, :]
    ones = torch.full((1, k // 8), 0x99999999 - 2**32, dtype=torch.int32)
    found = decode("pack_quantized", [ones, scales], 1, k)
    np.testing.assert_array_equal(found[0], np.arange(k) * groups // k + 1)
    with pytest.raises(ValueError, match=f"5 groups do not divide {k}"):
        decode("pack_quantized", [ones, torch.ones(1, 5)], 1, k)


def test_an_unknown_source_or_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="int5 is none of the formats"):
        decode("int5", [], 1, 1)
    with pytest.raises(ValueError, match=r"makes? a matrix \[3, 32\], not \[3, 64\]"):
        decode("fp32", [torch.zeros(3, 32)], 3, 64)


# The incumbent's converted folders.


@pytest.mark.parametrize("case", kt_files.DIGESTED, ids=lambda case: case.name)
def test_every_byte_of_a_conversion_is_what_kt_kernel_writes(case: kt_files.Case) -> None:
    assert kt_files.digests(kt_files.tree_files(case)) == DIGESTS[case.name]


def test_a_wrong_byte_or_name_changes_the_digest() -> None:
    files = kt_files.tree_files(kt_files.DIGESTED[6])
    right = kt_files.digests(files)
    name = next(name for name in files if "down" in name)
    for changed in (
        files | {name: files[name][:-1] + bytes([files[name][-1] ^ 1])},
        {key.replace("INT8_down_0", "INT8_down_1"): value for key, value in files.items()},
    ):
        found = kt_files.digests(changed)
        assert found["down"] != right["down"] and found["up"] == right["up"]


@pytest.mark.parametrize("case", kt_files.KEPT, ids=lambda case: case.name)
def test_the_kept_trees_are_kt_kernels(case: kt_files.Case) -> None:
    folder = FORMATS / "kt" / f"{case.method.lower()}x{case.parts}"
    assert kt_files.read_tree(folder) == kt_files.tree_files(case)


@pytest.mark.parametrize("case", (*kt_files.DIGESTED, *kt_files.KEPT), ids=lambda case: case.name)
def test_a_conversion_decodes_to_its_codes_and_near_its_source(case: kt_files.Case) -> None:
    bits = kt_files.METHODS[case.method]
    arrays = kt_files.merged_arrays(case)
    for projection in kt_files.PROJECTIONS:
        matrix = kt_files.source(case, projection)[-1]
        cut = "columns" if projection == "down" else "rows"
        start = f"blk.{case.layer}.ffn_{projection}_exps.{case.num_experts - 1}.numa"
        parts = [
            torch.from_numpy(arrays[f"{start}.{part}.{kind}"].copy())
            for part in range(case.parts)
            for kind in ("weight", "scale")
        ]
        found = decode(f"kt_int{bits}x{case.parts}_{cut}", parts, *matrix.shape)
        for part in range(case.parts):
            ours = kt_files.part_of(found, projection, part, case.parts)
            source = kt_files.part_of(matrix, projection, part, case.parts)
            codes, scale = kt_files.quantize(source, bits)
            step = scale[:, None] * np.float32(1 if bits == 8 else 16)
            np.testing.assert_array_equal(ours, codes * step)
            # rounded once to a step, or to a sixteenth of one first
            assert (np.abs(ours - source) <= step * (0.5 + (0 if bits == 8 else 1 / 32)) * 1.0001).all()
