"""Records of how often each expert was chosen, over time: ours and those of SGLang's recorder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COUNTS_KEY = "logical_count"  # SGLang's name; ours is the same, so that either reader takes either file
GPU_KEY = "gpu_experts"


@dataclass(frozen=True)
class Halves:
    """A record cut in time.

    Attributes
    ----------
    first, second : Tensor
        ``[num_layers, num_experts]``, float64: (token, expert) pairs of each half, by the model's own expert numbers.
    gpu_experts : Tensor or None
        ``[num_layers, num_experts]``, bool: what the recording server had on the GPU, where the record says so.
    num_snapshots : int
        How finely the record is cut.
    """

    first: Tensor
    second: Tensor
    gpu_experts: Tensor | None
    num_snapshots: int

    @property
    def total(self) -> Tensor:
        """Counts of the whole record."""
        return self.first + self.second


def load_saved(path: Path) -> Any:
    """Read a file of ``torch.save``.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        Another kind of file, or one with objects; a reason for a message.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception:  # foreign bytes taken for a pickle give any type, with advice that does not help here
            raise ValueError("it is no file of torch.save that holds only tensors and plain values") from None


def read_record(path: Path) -> tuple[Tensor, Tensor | None]:
    """Read the counts of a record.

    Parameters
    ----------
    path : Path
        Written by ``torch.save``: what ``KT_EXPERT_COUNTS`` names, or a dump of SGLang's expert distribution recorder
        (mode ``stat``).

    Returns
    -------
    counts : Tensor
        ``[num_snapshots, num_layers, num_experts]``, float64, CPU; snapshots without a count are left out.
    gpu_experts : Tensor or None
        ``[num_layers, num_experts]``, bool.

    Raises
    ------
    ValueError
        No such file, another kind of file, a wrong shape, a count that is negative or not finite, or no count at all.
    """
    try:
        content = load_saved(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; give a file that KT_EXPERT_COUNTS or SGLang's recorder wrote.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{path} cannot be read ({reason}); give a file that KT_EXPERT_COUNTS or SGLang's recorder wrote."
        ) from None
    counts = content.get(COUNTS_KEY) if isinstance(content, dict) else None
    if not isinstance(counts, Tensor):
        raise ValueError(
            f"{path} has no {COUNTS_KEY}; record with KT_EXPERT_COUNTS, or with SGLang's "
            "--expert-distribution-recorder-mode stat."
        )
    if counts.dim() != 3 or counts.shape[1] == 0 or counts.shape[2] == 0 or counts.is_complex():
        raise ValueError(
            f"{COUNTS_KEY} of {path} is a {counts.dtype} tensor of shape {list(counts.shape)}; it must be numbers of "
            "shape [num_snapshots, num_layers, num_experts]."
        )
    counts = counts.to(torch.float64)
    if not counts.isfinite().all() or (counts < 0).any():
        wrong = (~counts.isfinite() | (counts < 0)).nonzero()[0].tolist()
        raise ValueError(f"{COUNTS_KEY}{wrong} of {path} is {counts[tuple(wrong)].item()}; counts are at least 0.")
    counts = counts[counts.flatten(1).any(1)]
    if len(counts) == 0:
        raise ValueError(f"{path} holds no count; send requests to the server while it records.")
    gpu_experts = content.get(GPU_KEY)
    if gpu_experts is not None and (gpu_experts.dtype != torch.bool or gpu_experts.shape != counts.shape[1:]):
        raise ValueError(
            f"{GPU_KEY} of {path} is {gpu_experts.dtype} of shape {list(gpu_experts.shape)}; it must be bool of shape "
            f"{list(counts.shape[1:])}."
        )
    return counts, gpu_experts


def cut_in_time(counts: Tensor) -> int:
    """Return how many snapshots the first half has: as near to half of all counts as whole snapshots allow."""
    reached = counts.flatten(1).sum(1).cumsum(0)
    return int((reached[:-1] - reached[-1] / 2).abs().argmin()) + 1


def read_halves(paths: list[Path]) -> Halves:
    """Read records, cut each in time, and add up the halves.

    Parameters
    ----------
    paths : list of Path
        Several where several processes recorded (data parallelism, pipeline stages).

    Raises
    ------
    ValueError
        As :func:`read_record`; a record of one snapshot, which cannot be cut; or records of different sizes.
    """
    halves: list[Halves] = []
    for path in paths:
        counts, gpu_experts = read_record(path)
        if len(counts) < 2:
            raise ValueError(
                f"{path} holds one snapshot with counts, which cannot be cut into a half to choose from and a half to "
                "check with; record more requests."
            )
        cut = cut_in_time(counts)
        halves.append(Halves(counts[:cut].sum(0), counts[cut:].sum(0), gpu_experts, len(counts)))
    shapes = [list(half.first.shape) for half in halves]
    for path, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(f"{path} has [num_layers, num_experts] = {shape}, but {paths[0]} has {shapes[0]}.")
    masks = [half.gpu_experts for half in halves]
    return Halves(
        first=torch.stack([half.first for half in halves]).sum(0),
        second=torch.stack([half.second for half in halves]).sum(0),
        gpu_experts=masks[0] if len(masks) == 1 else None,
        num_snapshots=sum(half.num_snapshots for half in halves),
    )
