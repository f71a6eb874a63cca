"""SGLang's expert-location map with the most used experts first, and how much of the traffic it catches.

Stock SGLang keeps the experts in the slots ``0 .. N-1`` of every layer on the GPU. A map that puts the most used
experts of each layer into the first slots therefore places them, for any N.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from kt_kernel.files import write_atomically

MAP_KEY = "physical_to_logical_map"


def hottest_first(counts: Tensor) -> Tensor:
    """Order the experts of each layer by how often they were chosen.

    ``counts[l, map[l, 0]] >= counts[l, map[l, 1]] >= ...``

    Parameters
    ----------
    counts : Tensor
        ``[num_layers, num_experts]``.

    Returns
    -------
    Tensor
        ``[num_layers, num_experts]``, int64: expert of the model in each slot; a permutation in each row. Equal counts
        keep their order, so a layer without counts (a dense one) has the identity.
    """
    return torch.argsort(counts, dim=1, descending=True, stable=True)


def hit_rate(location: Tensor, counts: Tensor, num_gpu_experts: int) -> float:
    """Return the share of (token, expert) pairs whose expert is in one of the first slots of its layer.

    ``sum_l sum_{s < num_gpu_experts} counts[l, location[l, s]] / sum counts``

    Parameters
    ----------
    location : Tensor
        ``[num_layers, num_experts]``, int64.
    counts : Tensor
        ``[num_layers, num_experts]``, not all 0.
    num_gpu_experts : int
        Per layer.
    """
    return float(counts.gather(1, location[:, :num_gpu_experts]).sum() / counts.sum())


def check_location(location: Tensor, num_experts: int, num_layers: int | None = None) -> None:
    """Check that a map is a permutation in each row.

    Parameters
    ----------
    location : Tensor
    num_experts : int
        Experts of a layer.
    num_layers : int, optional
        Layers of the model, dense ones counted; None: not known.

    Raises
    ------
    ValueError
        Another shape or type, or an expert that is missing from a layer.
    """
    rows = location.shape[0] if num_layers is None and location.dim() == 2 else num_layers
    if location.dtype.is_floating_point or list(location.shape) != [rows, num_experts]:
        raise ValueError(
            f"{MAP_KEY} is {location.dtype} of shape {list(location.shape)}; it must be integers of shape "
            f"[{num_layers or 'num_hidden_layers'}, {num_experts}], so make it from a record of this model."
        )
    wrong = (location.sort(dim=1).values != torch.arange(num_experts)).any(1).nonzero()
    if len(wrong):
        layer = int(wrong[0])
        missing = sorted(set(range(num_experts)) - set(location[layer].tolist()))
        raise ValueError(
            f"{MAP_KEY}[{layer}] is no permutation of 0-{num_experts - 1}: expert {missing[0]} is in no slot."
        )


def write_location(path: Path, location: Tensor) -> None:
    """Write the file that ``--init-expert-location`` takes, whole or not at all.

    Parameters
    ----------
    path : Path
        Ends in ``.pt`` or ``.json``; SGLang tells the kind from that.
    location : Tensor
        ``[num_hidden_layers, num_experts]``, int64.

    Raises
    ------
    ValueError
        Another ending.
    OSError
        It cannot be written; one sentence.
    """
    if path.suffix == ".json":
        data = json.dumps({MAP_KEY: location.tolist()}).encode()
    elif path.suffix == ".pt":
        buffer = io.BytesIO()
        # nothing else beside it: SGLang passes every key on as an argument
        torch.save({MAP_KEY: location}, buffer)
        data = buffer.getvalue()
    else:
        raise ValueError(f"--output {path} must end in .pt or .json, by which SGLang tells the kind of file.")
    write_atomically(path, data)
