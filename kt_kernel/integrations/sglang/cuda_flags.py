"""Flags of SGLang that do not fit experts on the CPU of a host with a GPU: changed, with a line in the log."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from kt_kernel.checkpoint import read_config

logger = logging.getLogger(__name__)

DISABLED = "disabled"
TRITON_QUANTIZATIONS = (None, "fp8")  # methods that take the runner from the flag, where auto may become another one
EAGER_RUNS_PER_GRAPH = 2  # SGLang runs each bucket twice before it captures it


def adjust(args: Any) -> None:
    """Fill in what the user left open.

    Parameters
    ----------
    args : Namespace or ServerArgs
        Changed in place, before SGLang resolves it.
    """
    if getattr(args, "moe_runner_backend", None) == "auto" and quantization(args) in TRITON_QUANTIZATIONS:
        args.moe_runner_backend = "triton"
        logger.info("kt_kernel: --moe-runner-backend auto set to triton, whose kernels skip the experts on the CPU")
    if chooses_prefill_graphs(args) is False:
        args.cuda_graph_backend_prefill = DISABLED
        logger.info(
            "kt_kernel: --cuda-graph-backend-prefill set to disabled: capturing prefill would run every bucket through "
            "the experts on the CPU at start-up; give the flag to have it"
        )


def quantization(args: Any) -> str | None:
    """Return the quantization of the served model's weights by name, or None for none; ``"?"`` if it is not known yet.

    Parameters
    ----------
    args : Namespace or ServerArgs
    """
    if getattr(args, "quantization", None) is not None:
        return str(args.quantization)
    folder = Path(args.model_path).expanduser()
    if not (folder / "config.json").is_file():
        found = hub_folder(args.model_path, getattr(args, "revision", None))
        if found is None:
            return "?"
        folder = found
    config = read_config(folder)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "quantization_config" in part:
            return str(part["quantization_config"].get("quant_method"))
    return None


@cache
def hub_folder(model_id: str, revision: str | None) -> Path | None:
    """Return a folder with config.json of a model of the hub, which SGLang is about to read as well; None, with a line
    in the log, if it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model_id, "config.json", revision=revision)).parent
    except Exception as error:  # of dozens of types, all of which mean the same here
        logger.warning(
            "kt_kernel: --moe-runner-backend stays auto: config.json of %s cannot be read (%s); give triton if the "
            "model is unquantized or FP8",
            model_id,
            (str(error).strip() or type(error).__name__).splitlines()[0],
        )
        return None


def chooses_prefill_graphs(args: Any) -> bool | None:
    """Whether the user said how prefill is captured; None where this SGLang has no such flag."""
    if not hasattr(args, "cuda_graph_backend_prefill"):
        return None
    config = getattr(args, "cuda_graph_config", None)
    prefill = config.get("prefill") if isinstance(config, dict) else None
    chosen = args.cuda_graph_backend_prefill is not None or (isinstance(prefill, dict) and "backend" in prefill)
    off = getattr(args, "disable_cuda_graph", False) or getattr(args, "disable_prefill_cuda_graph", False)
    return bool(chosen or off)


def warn_of_prefill_graphs(config: Any) -> None:
    """Say what capturing prefill costs at start-up, if it is on.

    Parameters
    ----------
    config : CudaGraphConfig or None
        SGLang's, resolved.
    """
    prefill = getattr(config, "prefill", None)
    if prefill is None or prefill.backend == DISABLED or not prefill.bs:
        return
    tokens = EAGER_RUNS_PER_GRAPH * sum(prefill.bs)
    logger.warning(
        "kt_kernel: --cuda-graph-backend-prefill %s captures %d buckets of up to %d tokens, so %d tokens go through "
        "the experts on the CPU before the server is up: %d s at 500 tokens/s; --cuda-graph-backend-prefill disabled "
        "does without",
        prefill.backend,
        len(prefill.bs),
        max(prefill.bs),
        tokens,
        tokens // 500,
    )
