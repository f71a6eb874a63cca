"""Expert ids under ``--init-expert-location``: from the model's experts to the slots that hold their weights.

With a location file SGLang's loaders put expert ``map[slot]`` into each slot, and the ids that the router gives must be
turned into slots as well. Some releases do that on every path, others only with expert parallelism and so compute
another model at ``--ep-size 1``, with and without ``--kt-*`` flags. The releases are told apart by what they do: after
loading, each router of the model is run on a few random logits under a map that shifts every expert by one slot. Where
the ids come back unshifted, the hook on ``TopK.forward`` shifts them; then the routers are run once more, through the
hook, and every id must be shifted exactly once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kt_kernel.integrations.sglang import layers

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
# What a router gives; something else could hold the ids once more, unchanged.
OUTPUT_FIELDS = {"topk_weights", "topk_ids", "router_logits"}
REMAP_ATTRIBUTE = "kt_location_layer"  # on a TopK whose ids we turn into slots: the row of the map


def route(original: Callable, router: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a router (``TopK.forward``) and turn its ids into slots if the release does not."""
    output = original(router, *args, **kwargs)
    layer_id = getattr(router, REMAP_ATTRIBUTE, None)
    if layer_id is None or kwargs.get("expert_location_dispatch_info") is not None:
        return output
    return output._replace(topk_ids=slots_of(output.topk_ids, layer_id))


def slots_of(topk_ids: Tensor, layer_id: int) -> Tensor:
    """Return the slot of each expert.

    ``slots[t, k] = topk_ids[t, k]`` where that is no routed expert (-1, or a fused shared one), else its slot

    Parameters
    ----------
    topk_ids : Tensor
        ``[num_tokens, top_k]``, any integer type and device; not changed.
    layer_id : int
        Row of the location map.
    """
    from sglang.srt.eplb import expert_location_dispatch as dispatch

    info = dispatch.ExpertLocationDispatchInfo.init_new(layer_id)
    num_experts = info.partial_logical_to_all_physical_map.shape[0]
    routed = (topk_ids >= 0) & (topk_ids < num_experts)
    slots = dispatch.topk_ids_logical_to_physical(topk_ids.clamp(0, num_experts - 1), info)
    return torch.where(routed, slots, topk_ids)


def check_location_is_used(model: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Refuse ``--init-expert-location`` with CPU experts for a model class that ignores it; no weight is read yet.

    Raises
    ------
    RuntimeError
        Names the model class.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_server_args

    args = get_server_args()
    if args.kt_weight_path is None or args.init_expert_location == "trivial":
        return
    if get_global_expert_location_metadata() is None:
        raise RuntimeError(
            f"kt_kernel: --init-expert-location has no effect on {type(model).__name__}, which publishes no expert "
            "locations in this release of SGLang; remove it."
        )


def after_load_model(_result: None, model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Find out which routers leave ids as they are under a location map, and check that all are right then.

    Raises
    ------
    RuntimeError
        With CPU experts: a layer whose ids cannot be checked. Without them SGLang is left alone, with a warning.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None or is_trivial(metadata):
        return
    try:
        num_remapped = install(model_runner.model, metadata)
    except LocationError as error:
        if layers.wrapped_methods():
            raise RuntimeError(f"kt_kernel: {error}; remove --init-expert-location.") from error
        logger.warning("kt_kernel: %s; the experts of --init-expert-location may be the wrong ones", error)
        return
    if num_remapped:
        logger.info(
            "kt_kernel: this release of SGLang leaves the ids of %d routers as they are under --init-expert-location; "
            "they are turned into slots here",
            num_remapped,
        )


class LocationError(RuntimeError):
    """What a router does under a location map cannot be told, or is wrong."""


def is_trivial(metadata: Any) -> bool:
    """Whether every slot of every layer holds the expert of its own number."""
    location = metadata.physical_to_logical_map_cpu
    return bool((location == torch.arange(location.shape[1])).all())


def install(model: nn.Module, metadata: Any) -> int:
    """Mark the routers whose ids :func:`route` must turn into slots; returns how many there are.

    Parameters
    ----------
    model : Module
        With its weights.
    metadata : ExpertLocationMetadata
        In force; other ones take its place while routers are tried.

    Raises
    ------
    LocationError
        A layer without a router beside it, or whose router does something else under a map.
    """
    routers = list(routers_of(model, metadata.num_layers))
    for router, layer_id in routers:
        if not _shifts(router, layer_id, metadata):
            setattr(router, REMAP_ATTRIBUTE, layer_id)
    for router, layer_id in routers:
        if not _shifts(router, layer_id, metadata):
            raise LocationError(f"the ids of layer {layer_id} do not become slots")
    return sum(hasattr(router, REMAP_ATTRIBUTE) for router, _ in routers)


def routers_of(model: nn.Module, num_layers: int) -> Iterator[tuple[nn.Module, int]]:
    """Yield the router and the map's row of each MoE layer whose weights are loaded by slots.

    Raises
    ------
    LocationError
        A layer has no ``TopK`` beside its experts.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    for name, module in model.named_modules():
        children = list(module.children())
        for experts in (child for child in children if isinstance(child, FusedMoE)):
            # draft layers, which releases that know them load by the model's own numbers, and rows that are not there
            if not getattr(experts, "uses_expert_location", True) or experts.layer_id >= num_layers:
                continue
            routers = [child for child in children if isinstance(child, TopK)]
            if len(routers) != 1:
                raise LocationError(f"{name} has {len(routers)} routers of SGLang's class TopK beside its experts")
            yield routers[0], experts.layer_id


def _shifts(router: nn.Module, layer_id: int, metadata: Any) -> bool:
    """Whether the ids of a router follow a map that shifts every expert by one slot.

    Raises
    ------
    LocationError
        They neither follow it nor stay what they are, so something else happens (e.g. they are shifted twice).
    """
    num_experts = metadata.num_logical_experts
    plain, _ = _chosen(router, layer_id, metadata, shift=0)
    shifted, fields = _chosen(router, layer_id, metadata, shift=1)
    if torch.equal(shifted, ((plain + 1) % num_experts).sort(1).values):
        return True
    if torch.equal(shifted, plain):
        if more := fields - OUTPUT_FIELDS:
            raise LocationError(f"the router of layer {layer_id} also gives {', '.join(sorted(more))}")
        return False
    raise LocationError(
        f"the router of layer {layer_id} gives {shifted[0].tolist()} for experts {plain[0].tolist()} under a map that "
        "shifts each by one slot"
    )


@torch.no_grad()
def _chosen(router: nn.Module, layer_id: int, metadata: Any, *, shift: int) -> tuple[Tensor, set[str]]:
    """Ids that a router gives for random logits while expert e is in slot ``(e + shift) % E``, ascending in each row,
    and the names of all that it gives.
    """
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    device = metadata.physical_to_logical_map.device
    num_experts = metadata.num_logical_experts
    generator = torch.Generator().manual_seed(layer_id)
    ranks = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(PROBE_TOKENS)])
    logits = ranks * (8 / num_experts) - 4  # distinct, also after a sigmoid
    hidden = torch.zeros(PROBE_TOKENS, 64, dtype=torch.get_default_dtype(), device=device)
    recorder = get_global_expert_distribution_recorder()
    # a recorder that records from the start must not count these tokens, whose layer it is not told either
    with location_in_force(shifted_metadata(metadata, shift)), recorder.disable_this_region():
        try:
            output = router(hidden, logits.to(device))
        except Exception as error:
            raise LocationError(f"the router of layer {layer_id} cannot be tried ({error})") from error
    ids = getattr(output, "topk_ids", None)
    if not isinstance(ids, Tensor):
        raise LocationError(f"the router of layer {layer_id} gives {type(output).__name__}, which has no ids")
    return ids.detach().to("cpu", torch.int64).sort(1).values, set(getattr(output, "_fields", ()))


def shifted_metadata(metadata: Any, shift: int) -> Any:
    """Return expert locations with expert e of every layer in slot ``(e + shift) % E``, once."""
    num_layers, num_experts = metadata.num_layers, metadata.num_logical_experts
    slots = (torch.arange(num_experts) + shift) % num_experts
    to_slots = torch.full_like(metadata.logical_to_all_physical_map_cpu, -1)
    to_slots[:, :, 0] = slots
    to_experts = slots.argsort().expand(num_layers, -1)
    if metadata.num_physical_experts > num_experts:
        # copies of experts: the first ones are used
        to_experts = torch.cat([to_experts, metadata.physical_to_logical_map_cpu[:, num_experts:]], dim=1)
    device = metadata.physical_to_logical_map.device
    dispatch_map = metadata.logical_to_rank_dispatch_physical_map
    return dataclasses.replace(
        metadata,
        physical_to_logical_map=to_experts.to(device),
        physical_to_logical_map_cpu=to_experts,
        logical_to_all_physical_map=to_slots.to(device),
        logical_to_all_physical_map_cpu=to_slots,
        logical_to_all_physical_map_num_valid=torch.ones_like(metadata.logical_to_all_physical_map_num_valid),
        logical_to_rank_dispatch_physical_map=(
            None if dispatch_map is None else slots.to(dispatch_map).expand(num_layers, -1).contiguous()
        ),
    )


@contextmanager
def location_in_force(metadata: Any) -> Iterator[None]:
    """Let SGLang use other expert locations for the duration of the block."""
    from sglang.srt.eplb import expert_location

    before = expert_location.get_global_expert_location_metadata()
    expert_location.set_global_expert_location_metadata(metadata, allow_overwrite=True)
    try:
        yield
    finally:
        expert_location.set_global_expert_location_metadata(before, allow_overwrite=True)
