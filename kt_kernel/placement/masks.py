"""Masks of the experts on the GPU: the most used ones, and the fork's placement strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

RANDOM_SEED = 42  # the fork's: every rank draws the same experts


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Put the most used experts of all layers on the GPU.

    ``mask[l, e] = (l, e) is among the num_gpu_experts largest activation_freq``

    Parameters
    ----------
    activation_freq : Tensor
        ``[num_layers, num_experts]``, any number type: how often each expert was chosen.
    num_gpu_experts : int
        Total over all layers; more than there are means all.

    Returns
    -------
    Tensor
        ``[num_layers, num_experts]``, bool, CPU; True = on the GPU. Equal frequencies are taken in ascending
        (layer, expert) order, so the result is the same everywhere.

    Raises
    ------
    ValueError
        Another shape, NaN, or a negative number.
    """
    freq = torch.as_tensor(activation_freq)
    if freq.dim() != 2 or freq.is_complex():
        raise ValueError(
            f"activation_freq is a {freq.dtype} tensor of shape {list(freq.shape)}; it must be numbers of shape "
            f"[num_layers, num_experts]."
        )
    if isinstance(num_gpu_experts, bool) or int(num_gpu_experts) != num_gpu_experts or num_gpu_experts < 0:
        raise ValueError(f"num_gpu_experts is {num_gpu_experts!r}; it must be an integer of at least 0.")
    freq = freq.detach().to("cpu")
    freq = freq.to(torch.float64) if freq.is_floating_point() else freq.to(torch.int64)
    if freq.is_floating_point() and freq.isnan().any():
        layer, expert = freq.isnan().nonzero()[0].tolist()
        raise ValueError(f"activation_freq[{layer}, {expert}] is NaN; count activations again.")
    order = torch.argsort(freq.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(freq.numel(), dtype=torch.bool)
    mask[order[: int(num_gpu_experts)]] = True
    return mask.view(freq.shape)


def _frequency(shape: tuple[int, int], total: int, activation_freq: torch.Tensor | None) -> torch.Tensor:
    if activation_freq is None:
        raise ValueError("strategy 'frequency' needs activation_freq; record how often each expert is chosen.")
    return generate_gpu_experts_masks(activation_freq, total)


def _front_loading(shape: tuple[int, int], total: int, _freq: torch.Tensor | None) -> torch.Tensor:
    return (torch.arange(shape[0] * shape[1]) < total).view(shape)


def _uniform(shape: tuple[int, int], total: int, _freq: torch.Tensor | None) -> torch.Tensor:
    num_layers, num_experts = shape
    each, rest = divmod(total, num_layers)
    counts = each + (torch.arange(num_layers) < rest).long()
    return torch.arange(num_experts) < counts[:, None]


def _random(shape: tuple[int, int], total: int, _freq: torch.Tensor | None) -> torch.Tensor:
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(RANDOM_SEED))
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[order[:total]] = True
    return mask.view(shape)


# Names of --kt-expert-placement-strategy. Each gives the mask of the MoE layers alone, [num_moe_layers, num_experts].
STRATEGIES: dict[str, Callable[[tuple[int, int], int, torch.Tensor | None], torch.Tensor]] = {
    "frequency": _frequency,  # the most used of all layers
    "front-loading": _front_loading,  # all experts of the first MoE layers
    "uniform": _uniform,  # as many in every MoE layer, one more in the first ones
    "random": _random,  # any, the same in every run
}


def strategy_masks(
    strategy: str,
    *,
    is_moe_layer: Sequence[bool],
    num_experts: int,
    num_gpu_experts: int,
    activation_freq: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the experts on the GPU by one of the fork's strategies.

    ``mask[l] = strategy(...)[rank of l among the MoE layers]``, and all True in a layer without experts

    Parameters
    ----------
    strategy : str
        A name of ``STRATEGIES``.
    is_moe_layer : sequence of bool
        One per layer of the model.
    num_experts : int
        Experts of a MoE layer.
    num_gpu_experts : int
        Total over all MoE layers; more than there are means all.
    activation_freq : Tensor, optional
        ``[num_layers, num_experts]``, for ``"frequency"``.

    Returns
    -------
    Tensor
        ``[num_layers, num_experts]``, bool, CPU; True = on the GPU.

    Raises
    ------
    ValueError
        Unknown strategy, a negative total, no frequencies where they are needed, or of another shape.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}.")
    if isinstance(num_gpu_experts, bool) or int(num_gpu_experts) != num_gpu_experts or num_gpu_experts < 0:
        raise ValueError(f"num_gpu_experts is {num_gpu_experts!r}; it must be an integer of at least 0.")
    is_moe = torch.tensor(list(is_moe_layer), dtype=torch.bool)
    if activation_freq is not None:
        if list(activation_freq.shape) != [len(is_moe), num_experts]:
            raise ValueError(
                f"activation_freq has shape {list(activation_freq.shape)}; it must be [{len(is_moe)}, {num_experts}]."
            )
        activation_freq = activation_freq[is_moe]
    masks = torch.ones(len(is_moe), num_experts, dtype=torch.bool)
    num_moe_layers = int(is_moe.sum())
    if num_moe_layers:
        masks[is_moe] = STRATEGIES[strategy]((num_moe_layers, num_experts), int(num_gpu_experts), activation_freq)
    return masks
