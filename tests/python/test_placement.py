"""Masks of experts on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel import generate_gpu_experts_masks


def test_the_most_used_experts_of_all_layers_are_chosen() -> None:
    freq = torch.tensor([[1.0, 9.0, 2.0], [8.0, 7.0, 0.5]])
    mask = generate_gpu_experts_masks(freq, 3)
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.tolist() == [[False, True, False], [True, True, False]]


def test_ties_go_to_the_lower_layer_and_expert() -> None:
    mask = generate_gpu_experts_masks(torch.ones(3, 4, dtype=torch.int32), 6)
    assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_large_counts_are_not_rounded() -> None:
    freq = torch.tensor([[2**60, 2**60 + 1]])
    assert generate_gpu_experts_masks(freq, 1).tolist() == [[False, True]]


@given(
    layers=st.integers(1, 5),
    experts=st.integers(1, 9),
    total=st.integers(0, 60),
    seed=st.integers(0, 100),
)
def test_the_chosen_are_never_less_used_than_the_others(layers: int, experts: int, total: int, seed: int) -> None:
    freq = torch.randint(0, 6, (layers, experts), generator=torch.Generator().manual_seed(seed))
    mask = generate_gpu_experts_masks(freq, total)
    assert mask.shape == freq.shape and mask.sum() == min(total, freq.numel())
    if mask.any() and not mask.all():
        assert freq[mask].min() >= freq[~mask].max()


@pytest.mark.parametrize(
    ("freq", "number", "words"),
    [
        (torch.ones(4), 1, r"shape \[4\].*num_layers, num_experts"),
        (torch.tensor([[0.5, float("nan")]]), 1, r"activation_freq\[0, 1\] is NaN"),
        (torch.ones(2, 2), -1, "num_gpu_experts is -1"),
        (torch.ones(2, 2), 1.5, "num_gpu_experts is 1.5"),
    ],
)
def test_bad_arguments_are_named(freq: torch.Tensor, number, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate_gpu_experts_masks(freq, number)
