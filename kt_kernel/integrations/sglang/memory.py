"""Host memory: what this process may use and what a launch needs. Reads headers and configs, never weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_kernel import _ext
from kt_kernel.files import open_safetensors

GIB = 1 << 30
# SGLang's three processes with torch and its imports: 2.1 GB measured on 0.5.18 with a 10 MB model.
PROCESS_BYTES = int(2.1e9)


def usable_memory() -> tuple[int, int]:
    """Return ``(available, total)`` host memory in bytes, both cut to the limits of this process's cgroups."""
    topology = _ext.topology()
    return int(topology["memory_available_bytes"]), int(topology["memory_limit_bytes"])


def gigabytes(num_bytes: float) -> str:
    """Format bytes as GB (10^9), one digit after the point below 100."""
    value = num_bytes / 1e9
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


@dataclass(frozen=True)
class Needs:
    """Host memory of one launch, in bytes, by what it is for."""

    experts: int
    other_weights: int
    kv_pool: int
    scratch: int
    processes: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.experts + self.other_weights + self.kv_pool + self.scratch + self.processes

    def describe(self) -> str:
        """Return the parts as text, in GB."""
        return (
            f"experts {gigabytes(self.experts)}, other weights {gigabytes(self.other_weights)}, "
            f"KV pool {gigabytes(self.kv_pool)}, scratch {gigabytes(self.scratch)}, "
            f"SGLang's processes {gigabytes(self.processes)}"
        )


def kv_bytes_per_token(model_config: Any) -> int:
    """Return the bytes of keys and values of one token over all layers, in bf16.

    Parameters
    ----------
    model_config : ModelConfig
        SGLang's.
    """
    if str(model_config.attention_arch).endswith("MLA"):
        per_layer = model_config.kv_lora_rank + model_config.qk_rope_head_dim
    else:
        per_layer = 2 * model_config.get_total_num_kv_heads() * model_config.head_dim
    return 2 * per_layer * model_config.num_hidden_layers


def bytes_without_experts(model_path: Path) -> int:
    """Return the bytes of the tensors of a local checkpoint that are not routed experts, from the file headers.

    Returns
    -------
    int
        0 if the folder has no safetensors files (a hub id that is not downloaded yet).

    Raises
    ------
    ValueError
        A file that is cut off or damaged.
    """
    total = 0
    for path in sorted(model_path.glob("*.safetensors")):
        file = open_safetensors(path)
        # Views of the mapped file: nothing but the header is read.
        total += sum(file.get_tensor(name).nbytes for name in list(file.keys()) if ".experts." not in name)
    return total
