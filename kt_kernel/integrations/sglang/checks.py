"""Refusals and adjustments of the ``--kt-*`` flags, before any weight is read: one sentence each, exit code 1.

A launch by command line passes ``from_cli_args``, one by ``sglang.Engine`` does not; both pass ``before_resolution``,
which fills in what is open, and ``check_server_args``, when SGLang has resolved its own flags.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kt_kernel import _ext
from kt_kernel.checkpoint import ModelSizes, model_sizes, read_config
from kt_kernel.checkpoint.names import parse_name
from kt_kernel.config import MoEConfig, default_num_threads, host_all_experts, usable_cpus
from kt_kernel.environment import wrong_values
from kt_kernel.experts import Layouts, packed_bytes, scratch_bytes
from kt_kernel.integrations.sglang import cuda_flags, flags, memory
from kt_kernel.integrations.sglang.device_methods import RUNNER_BACKENDS
from kt_kernel.loader import open_source
from kt_kernel.methods import METHODS, get_method

logger = logging.getLogger(__name__)

SGLANG_WATCHDOG_SECONDS = 300  # SGLang's default: a forward that takes longer is taken for a hang
WATCHDOG_SECONDS = 3000  # the first forwards of a large model on a slow host take minutes
# flags of SGLang that move tokens or experts to where the experts on the CPU cannot follow, and their plain values
REFUSED_FLAGS = (
    ("moe_a2a_backend", ("none", None)),
    ("moe_dp_size", (1, None)),  # groups of ranks with tokens of their own, and only the first has experts here
    ("dwdp_size", (1, None)),
    ("enable_two_batch_overlap", (False, None)),
    ("enable_pdmux", (False, None)),
    ("enable_eplb", (False, None)),
    ("ep_num_redundant_experts", (0, None)),
    ("enable_paged_experts", (False, None)),
)
FLAG_DEFAULTS = {
    "kt_method": "AMXINT4",
    "kt_cpuinfer": None,
    "kt_threadpool_count": 2,
    "kt_num_gpu_experts": None,
    "kt_max_deferred_experts_per_token": None,
}

_checked = False


@dataclass(frozen=True)
class ExpertSource:
    """What ``--kt-weight-path`` holds, from headers and manifest only."""

    folder: Path
    layouts: tuple[Layouts, ...]  # one of each layer with experts
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return len(self.layouts)

    def bytes_of(self, experts_per_layer: int, layout: str | None = None) -> int:
        """Return the packed bytes of so many experts of every layer, in `layout` or in the source's own."""
        kinds = Counter(self.layouts if layout is None else [(layout, layout)] * self.num_layers)
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        return experts_per_layer * sum(sum(packed_bytes(kind, **sizes)) * count for kind, count in kinds.items())


def from_cli_args(original: Callable, cls: type, args: Any) -> Any:
    """Check and adjust the parsed flags around SGLang's own handling of them.

    Raises
    ------
    SystemExit
        A launch that cannot work; its message is one sentence with the fix.
    """
    global _checked
    if not kt_flags_given(args):
        return original(cls, args)
    from kt_kernel.integrations.sglang.plugin import verify_hooks

    try:
        verify_hooks()
        flags.hand_on(args, expert_source)
        source = check_flags(args)
        adjust(args)
        server_args = original(cls, args)
        check_resolved(server_args, source)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"kt_kernel: {error}") from None
    _checked = True
    return server_args


def before_resolution(server_args: Any) -> None:
    """Fill in what is open in a ``ServerArgs`` that SGLang is about to resolve, also one of ``sglang.Engine``."""
    sealed = any(getattr(server_args, name, False) for name in ("_input_frozen", "_resolution_finished"))
    if server_args.kt_weight_path is not None and not sealed:
        adjust(server_args)


def check_server_args(_result: None, server_args: Any) -> None:
    """Check a ``ServerArgs`` that SGLang has resolved, and all of one that no command line made (``sglang.Engine``).

    Raises
    ------
    ValueError
        A launch that cannot work.
    SystemExit
        The same for a command line.
    """
    if not kt_flags_given(server_args, argv=()):
        return
    try:
        if not _checked:
            check_resolved(server_args, check_flags(server_args))
        from sglang.srt.arg_groups.overrides import resolved_view

        view = resolved_view(server_args)
        check_split(view)
        if torch.cuda.is_available():
            cuda_flags.warn_of_prefill_graphs(view.cuda_graph_config)
    except ValueError as error:
        if _checked:
            raise SystemExit(f"kt_kernel: {error}") from None
        raise


def kt_flags_given(args: Any, argv: Any = None) -> bool:
    """Whether a ``--kt-*`` flag is used: one with another value than SGLang's default, or typed at all."""
    if any(word.startswith("--kt-") for word in (sys.argv if argv is None else argv)):
        return True
    if args.kt_weight_path is not None or flags.given(args):
        return True
    return any(getattr(args, name) != default for name, default in FLAG_DEFAULTS.items())


def check_typed_flags(argv: Sequence[str]) -> None:
    """Check what can be checked of the flags as they are typed, before SGLang is imported (20 s on two cores).

    Raises
    ------
    ValueError
        No weight path, an unknown method, or a path that holds no experts for it.
    """
    if any(word.split("=")[0] == "--config" for word in argv) or not any(word.startswith("--kt-") for word in argv):
        return
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--kt-weight-path")
    parser.add_argument("--kt-method", default=FLAG_DEFAULTS["kt_method"])
    try:
        args, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return  # a flag without its value: SGLang's parser says so
    check_weight_path_given(args)
    expert_source(args.kt_weight_path, args.kt_method)


def check_weight_path_given(args: Any) -> None:
    """Refuse flags that would have no effect."""
    if args.kt_weight_path is None:
        raise ValueError(
            "--kt-* flags are given without --kt-weight-path, so no expert would run on the CPU; add "
            "--kt-weight-path PATH (a checkpoint, a GGUF file, or the output of scripts/convert_cpu_weights.py) or "
            "remove them."
        )


def check_flags(args: Any) -> ExpertSource:
    """Check the values of the flags against each other and against the weights' headers.

    Parameters
    ----------
    args : Namespace or ServerArgs
        Not changed.

    Raises
    ------
    ValueError
        Names the flag, its value and what is possible.
    """
    check_weight_path_given(args)
    for name, sentence in wrong_values().items():
        if name != "KT_METHOD":  # --kt-method takes its place
            raise ValueError(sentence)
    # a path, not a hub id: SGLang would end in a traceback of the hub's client
    if args.model_path.startswith(("/", "./", "../", "~")) and not Path(args.model_path).expanduser().exists():
        raise ValueError(f"--model-path {args.model_path} does not exist; give a checkpoint's folder, or a hub id.")
    source = expert_source(args.kt_weight_path, args.kt_method)
    num_gpu_experts = args.kt_num_gpu_experts or 0
    if not 0 <= num_gpu_experts <= source.num_experts:
        raise ValueError(
            f"--kt-num-gpu-experts is {num_gpu_experts} but the model has {source.num_experts} experts in a layer; "
            f"give 0 to {source.num_experts}."
        )
    for name in ("kt_cpuinfer", "kt_threadpool_count"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give at least 1, or leave the flag out.")
    deferred = args.kt_max_deferred_experts_per_token or 0
    if deferred < 0:
        raise ValueError(f"--kt-max-deferred-experts-per-token is {deferred}; give at least 0.")
    share = args.mem_fraction_static
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"--mem-fraction-static is {share:g}; give a share above 0, of at most 1.")
    check_split(args)  # here already, because SGLang fails on some of these with an assertion
    _check_same_model(args.model_path, source)
    if not (torch.cuda.is_available() or "amxbf16" in _ext.cpu_features()["found"]):
        _check_dense_weights(args.model_path)
    sizes = served_sizes(args)
    flags.check_location(args, sizes and sizes.num_hidden_layers, source.num_experts)
    return source


def served_sizes(args: Any) -> ModelSizes | None:
    """Return the sizes of the served model, as far as config.json of the model or of the experts tells; None where
    neither does, or where a flag changes what it says.
    """
    if getattr(args, "json_model_override_args", None) not in (None, "", "{}"):
        return None
    for path in (args.model_path, args.kt_weight_path):
        with suppress(ValueError, OSError):
            return model_sizes(Path(path).expanduser())
    return None


def expert_source(weight_path: str, method_name: str) -> ExpertSource:
    """Open what ``--kt-weight-path`` names, reading no weights.

    Raises
    ------
    ValueError
        Unknown method, nothing there that holds experts for it, or kernels that KT_GEMM asks for and this CPU does not
        have.
    """
    try:
        method = get_method(method_name)
    except ValueError as error:
        raise ValueError(f"--kt-method: {error}") from None
    try:
        source = open_source(weight_path, method)
    except ValueError as error:
        raise ValueError(f"--kt-weight-path: {error}") from None
    sizes = source.sizes
    # refuses widths that the kernels cannot compute, before SGLang reads a weight
    MoEConfig(
        layer_idx=0,
        num_experts=sizes.num_experts,
        top_k=1,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
    )
    try:
        layouts = tuple(source.layouts(layer) for layer in source.layers)
    except ValueError as error:
        raise ValueError(f"--kt-weight-path: {error}") from None
    try:
        for layout in sorted({layout for pair in layouts for layout in pair}):
            _ext.explain_kernels(layout)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return ExpertSource(source.folder, layouts, sizes.num_experts, sizes.hidden_size, sizes.intermediate_size)


def _check_same_model(model_path: str, source: ExpertSource) -> None:
    folder = Path(model_path).expanduser()
    if not (folder / "config.json").is_file():
        return  # a hub id: SGLang downloads it, and loading compares the sizes
    config = read_config(folder)
    nested = [value for value in config.values() if isinstance(value, dict)]
    if any("quantization_config" in part for part in (config, *nested)):
        return  # its other weights are SGLang's business; loading compares the sizes
    try:
        served = model_sizes(folder)
    except ValueError as error:
        raise ValueError(f"--kt-weight-path is given, but the model being served has no experts: {error}") from None
    for name in ("num_experts", "hidden_size", "intermediate_size"):
        if getattr(served, name) != getattr(source, name):
            raise ValueError(
                f"--kt-weight-path {source.folder} has {name} {getattr(source, name)} but the model being served has "
                f"{getattr(served, name)}; give the experts of the served model."
            )


def _check_dense_weights(model_path: str) -> None:
    """Refuse a model whose layers beside the experts are fp8, where SGLang has no kernel for them.

    It would find out after all experts were loaded, in Triton: "0 active drivers". Model ids of a hub are not looked
    at.
    """
    folder = Path(model_path).expanduser()
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != "fp8":
        return
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                others = [name for name in list(tensors.keys()) if parse_name(name) is None]
                found = next((name for name in others if tensors.get_slice(name).get_dtype() == "F8_E4M3"), None)
        except SafetensorError as error:
            raise ValueError(f"--model-path: {file} cannot be read ({error}); download it again.") from error
        if found is not None:
            raise ValueError(
                f"--model-path {model_path}: {found} is fp8, which SGLang computes on a GPU or on a CPU with AMX only; "
                f"give a bf16 copy of the model there, and these experts as --kt-weight-path."
            )


def adjust(args: Any) -> None:
    """Change flags of SGLang that do not fit experts on the CPU, each with a line in the log.

    Parameters
    ----------
    args : Namespace or ServerArgs
        Changed in place, before SGLang resolves it; what was changed once is left alone.
    """
    if args.kt_num_gpu_experts is None:
        args.kt_num_gpu_experts = 0
    deferred, sizes = args.kt_max_deferred_experts_per_token or 0, served_sizes(args)
    # a model that defers all experts of a token answers with noise: KL 8.2 on the demo model (docs/measurements.md)
    if sizes is not None and deferred >= sizes.top_k:
        args.kt_max_deferred_experts_per_token = sizes.top_k - 1
        logger.warning(
            "kt_kernel: --kt-max-deferred-experts-per-token %d set to %d: a token of this model has %d experts, and "
            "one must be on time",
            deferred,
            sizes.top_k - 1,
            sizes.top_k,
        )
    if args.watchdog_timeout == SGLANG_WATCHDOG_SECONDS:
        args.watchdog_timeout = WATCHDOG_SECONDS
        logger.info("kt_kernel: --watchdog-timeout raised from %d to %d s", SGLANG_WATCHDOG_SECONDS, WATCHDOG_SECONDS)
    if not args.sleep_on_idle:
        # SGLang's scheduler polls: on a CPU host an idle server would keep one of the cores the experts need
        args.sleep_on_idle = True
    if not args.disable_shared_experts_fusion:
        args.disable_shared_experts_fusion = True
        if _has_shared_experts(Path(args.kt_weight_path).expanduser()):
            logger.warning(
                "kt_kernel: --disable-shared-experts-fusion is set: the shared expert is not one of the experts on "
                "the CPU"
            )
    if torch.cuda.is_available():
        cuda_flags.adjust(args)


def _has_shared_experts(folder: Path) -> bool:
    config = read_config(folder) if (folder / "config.json").exists() else {}
    return any(config.get(key) for key in ("n_shared_experts", "shared_expert_intermediate_size"))


def check_resolved(server_args: Any, source: ExpertSource) -> None:
    """Check what only SGLang's own handling of the flags decides.

    Raises
    ------
    ValueError
        A launch that is split in a way the experts cannot follow, or that does not fit in memory.
    """
    check_split(server_args)
    check_memory(memory_needs(server_args, source))


def check_split(server_args: Any) -> None:
    """Check how the launch divides tokens, experts and layers between ranks and processes.

    Parameters
    ----------
    server_args : ServerArgs or a view of it

    Raises
    ------
    ValueError
        An expert-parallel launch, several processes with experts on one host, a runner without expert ids.
    """
    if server_args.ep_size > 1:
        raise ValueError(
            f"--ep-size is {server_args.ep_size} but experts on the CPU are computed by one rank for all; use "
            "--ep-size 1 with --kt-weight-path."
        )
    for name, plain in REFUSED_FLAGS:
        value = getattr(server_args, name, None)
        if value not in plain:
            given = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise ValueError(f"{given} does not work with experts on the CPU; remove it or the --kt-* flags.")
    check_one_process(server_args)
    if server_args.moe_runner_backend not in RUNNER_BACKENDS:
        possible = " or ".join(RUNNER_BACKENDS[1:])  # not auto, which may have become this one
        raise ValueError(
            f"--moe-runner-backend {server_args.moe_runner_backend} keeps to itself which experts a token goes to, or "
            f"does not skip those on the CPU; give {possible}."
        )


def check_one_process(server_args: Any) -> None:
    """Refuse a launch with several schedulers on this host that each hold experts: they would share the same cores.

    ``replicas * stages > 1``: data-parallel replicas (with DP attention there is one), pipeline stages of this node.

    Raises
    ------
    ValueError
        Names the flag that makes them.
    """
    stages = max(server_args.pp_size // max(server_args.nnodes, 1), 1)
    replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
    for flag, count, other in (
        ("--dp-size", replicas, "--enable-dp-attention, or one server"),
        ("--pp-size", stages, "--tp-size, or a node per stage"),
    ):
        if count > 1:
            raise ValueError(
                f"{flag} makes {count} processes on this host that each compute experts on the same cores; use {other} "
                "instead."
            )


def memory_needs(server_args: Any, source: ExpertSource) -> memory.Needs:
    """Return the host memory the launch needs at least."""
    from sglang.srt.configs.model_config import ModelConfig

    num_gpu_experts = server_args.kt_num_gpu_experts or 0
    on_gpu = torch.cuda.is_available()  # what is not an expert of the CPU is there
    # not ServerArgs.get_model_config: 0.5.23 has none
    model_config = ModelConfig.from_server_args(server_args)
    num_tokens = batch_tokens(server_args)
    top_k = getattr(model_config.hf_text_config, "num_experts_per_tok", 8) or 8
    pool_tokens = server_args.max_total_tokens or min(model_config.context_len, num_tokens)
    return memory.Needs(
        experts=expert_bytes(source, num_gpu_experts, on_gpu=on_gpu),
        other_weights=0 if on_gpu else memory.bytes_without_experts(Path(server_args.model_path)),
        kv_pool=0 if on_gpu else pool_tokens * memory.kv_bytes_per_token(model_config),
        scratch=forward_bytes(server_args, source, num_tokens=num_tokens, top_k=top_k),
    )


def expert_bytes(source: ExpertSource, num_gpu_experts: int, *, on_gpu: bool) -> int:
    """Return the bytes of all experts on the host: the CPU's, the GPU's as well where ``KT_HOST_ALL_EXPERTS`` is set,
    and those that take the place of the GPU's in bf16 where there is none.
    """
    here = source.num_experts if host_all_experts() else source.num_experts - num_gpu_experts
    in_its_place = 0 if on_gpu else source.bytes_of(num_gpu_experts, METHODS["BF16"].layout)
    return source.bytes_of(here) + in_its_place


def batch_tokens(server_args: Any) -> int:
    """Return the tokens of the largest forward; at least 1024, which decoding many requests may reach."""
    chunk = server_args.chunked_prefill_size or 0
    tokens = max(chunk if chunk > 0 else server_args.max_prefill_tokens, 1024)
    # with DP attention the layer sees the rows of all ranks, and SGLang has divided the chunk by their number
    return tokens * (server_args.dp_size if server_args.enable_dp_attention else 1)


def forward_bytes(server_args: Any, source: ExpertSource, *, num_tokens: int, top_k: int) -> int:
    """Return the bytes of a forward of `num_tokens`: the engine's buffers, its copy of the input, and the output."""
    layouts = list(set(source.layouts))
    if server_args.kt_num_gpu_experts and not torch.cuda.is_available():
        layouts.append((METHODS["BF16"].layout,) * 2)
    buffers = scratch_bytes(
        layouts,
        num_experts=source.num_experts,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_tokens=num_tokens,
        top_k=top_k,
        num_threads=min(server_args.kt_cpuinfer or default_num_threads() or usable_cpus(), usable_cpus()),
    )
    return buffers + 2 * num_tokens * source.hidden_size * torch.bfloat16.itemsize


def check_memory(needs: memory.Needs) -> None:
    """Compare needs with what is usable.

    Raises
    ------
    ValueError
        GB needed, by purpose, and GB had.
    """
    available, total = memory.usable_memory()
    if needs.total > available:
        if needs.kv_pool > needs.experts:
            remedy = "lower --max-total-tokens, --max-running-requests or --context-length"
        else:
            remedy = "unset KT_HOST_ALL_EXPERTS, " if host_all_experts() else ""
            remedy += "use a method with fewer bits (AMXINT4)"
        raise ValueError(
            f"this launch needs {memory.gigabytes(needs.total)} GB of host memory ({needs.describe()}) but "
            f"{memory.gigabytes(available)} GB of {memory.gigabytes(total)} GB are usable; {remedy}, free "
            "memory, or raise the container's limit."
        )
