"""Which experts live on the GPU."""

from __future__ import annotations

import torch


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
