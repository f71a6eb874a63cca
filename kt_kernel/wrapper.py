"""KTMoEWrapper: what stock SGLang and its fork construct and call, one per MoE layer. Thin over ``experts.py``.

``submit_forward`` copies its inputs, queues the forward and returns; while the CPU computes, the GPU works on its own
experts; ``sync_forward`` waits and returns the CPU's share of the output. With tensors on a GPU both only enqueue on
the stream they are given, and may be captured into a CUDA graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kt_kernel import _ext, device_stream, layer_chain
from kt_kernel import wrapper_checks as checks
from kt_kernel.activations import Activation
from kt_kernel.config import EngineConfig, MoEConfig, host_all_experts
from kt_kernel.deferral import select_deferred_experts
from kt_kernel.expert_export import ExpertBuffers, ExpertWriter
from kt_kernel.experts import CpuExperts, Layouts, check_devices, clear_device_buffers, get_engine
from kt_kernel.methods import get_method


class _Submitted(NamedTuple):
    """A forward that was submitted and not synced."""

    ticket: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    on_device: bool


class KTMoEWrapper:
    """The routed experts of one MoE layer that are computed on the CPU.

    ``output[t] = sum_s topk_weights[t, s] * down_e act(gate_e x_t, up_e x_t)``, ``e = topk_ids[t, s]``, over slots
    whose expert is neither -1 nor marked in ``gpu_experts_mask``

    Stock SGLang passes ``num_gpu_experts``, its fork ``gpu_experts_mask``; the mask wins.

    Parameters
    ----------
    layer_idx : int
        Index of the layer in the model, dense layers counted.
    num_experts : int
        Experts the ids name, those on the GPU included.
    num_experts_per_tok : int
        Experts a token is sent to.
    hidden_size, moe_intermediate_size : int
        gate and up are ``[moe_intermediate_size, hidden_size]``.
    gpu_experts_mask : Tensor, optional
        ``[num_experts]``, bool, CPU: True = on the GPU, skipped here. Copied; the attribute of the same name may be
        changed in place and is read at every forward.
    cpuinfer_threads : int, optional
        Threads over all nodes; None: ``KT_NUM_THREADS``, else the usable physical cores.
    threadpool_count : int, optional
        NUMA nodes; None: all. More than there are: clamped, with a warning.
    weight_path : str, optional
        Folder of a checkpoint or of converted experts, or a GGUF file; needed by :meth:`load_weights` only.
    chunked_prefill_size : int, optional
        A hint: with tensors on a GPU, pinned buffers are made for so many tokens; larger batches make them grow.
    max_deferred_experts_per_token : int, optional
        Experts of a token that may be computed during the next MoE layer and are added to its output: all but the
        ``num_experts_per_tok - max_deferred_experts_per_token`` of the largest weights, unless another token of the
        batch needs the expert now. Above num_experts_per_tok means all; None or 0: none. The last layer of a model
        never defers; :mod:`kt_kernel.layer_chain` says which layers are one model.
    method : str, optional
        Name in :data:`kt_kernel.methods.METHODS`; None: AMXINT4.
    numa_nodes : sequence of int, optional
        Node ids, one per pool.
    num_gpu_experts : int, optional
        Without a mask: experts 0 .. num_gpu_experts - 1 are on the GPU.
    mode : str
        ``"inference"``. The lora_*, max_cache_depth, group_size, zero_point, full_weight_grad and cpu_save parameters
        of fine-tuning are accepted and have no effect.
    swiglu_limit, swiglu_alpha : float
        Of the activation, ``act = Activation("silu", swiglu_limit, swiglu_alpha)``; 0: none.

    Raises
    ------
    TypeError
        A keyword this version does not know.
    ValueError
        A value out of range: one sentence.
    """

    _capture_batch_sizes: list[int] = []

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | None = None,
        chunked_prefill_size: int | None = None,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str | None = "AMXINT4",
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int | None = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        group_size: int = 128,
        zero_point: bool = True,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        **unknown: Any,
    ) -> None:
        if unknown:
            names = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
            raise TypeError(
                f"KTMoEWrapper does not know {names}; this SGLang wants something that kt_kernel cannot do yet, so use "
                f"a newer kt_kernel or leave the option that sets it out."
            )
        if mode != "inference":
            raise ValueError(f"mode {mode!r} is not supported; kt_kernel computes mode 'inference' only.")
        self.config = MoEConfig(
            layer_idx=layer_idx,
            num_experts=num_experts,
            top_k=num_experts_per_tok,
            hidden_size=hidden_size,
            intermediate_size=moe_intermediate_size,
            activation=Activation("silu", swiglu_limit, swiglu_alpha),
        )
        self._method = get_method(method)
        self.method = self._method.name
        self.mode = mode
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.weight_path = weight_path
        self.chunked_prefill_size = chunked_prefill_size
        self.gpu_experts_mask = checks.gpu_experts_mask(gpu_experts_mask, num_gpu_experts, num_experts=num_experts)
        self.num_gpu_experts = int(self.gpu_experts_mask.sum())
        self.max_deferred_experts_per_token = checks.num_deferred(max_deferred_experts_per_token)
        self.cpu_infer = get_engine(EngineConfig.resolve(cpuinfer_threads, threadpool_count, numa_nodes))
        self.cpuinfer_threads = self.cpu_infer.num_threads
        self.threadpool_count = self.cpu_infer.num_nodes
        self.moe: CpuExperts | None = None
        self._tickets: deque[_Submitted] = deque()
        self._hosted = torch.zeros(num_experts, dtype=torch.bool)
        self._order: list[int] | None = None  # what load_weights was given, as long as weight_path can give more
        self._writer = ExpertWriter()
        self._checked_mask_version = -1
        self._devices: set[int] = set()  # those that have met this layer
        self._announced = False
        if weight_path:
            from kt_kernel.loader import announce_layer

            announce_layer()
            self._announced = True
        self._chain = layer_chain.join(self)

    # --- weights ---

    def load_weights(self, physical_to_logical_map: torch.Tensor | None = None) -> None:
        """Load this layer's experts from ``weight_path``; returns when they are packed.

        Experts marked in ``gpu_experts_mask`` at this moment take no memory here until the mask gives them to the CPU
        (:meth:`load_missing_experts`); with ``KT_HOST_ALL_EXPERTS=1`` they are loaded now.

        Parameters
        ----------
        physical_to_logical_map : Tensor, optional
            ``[num_experts]``, int64, CPU: id p computes the model's expert ``map[p]``; None: the identity.

        Raises
        ------
        ValueError
            No weight path, a folder or map that does not fit; one sentence.
        """
        from kt_kernel import loader

        if not self.weight_path:
            raise ValueError(f"layer {self.layer_idx} was made without weight_path; pass the folder of its weights.")
        source = loader.open_source(Path(self.weight_path), self._method)
        source.check(self.config)
        order = checks.expert_order(
            physical_to_logical_map, num_slots=self.num_experts, num_logical=source.sizes.num_experts
        )
        experts = self._new_experts(source.layouts(self.layer_idx), may_grow=True)
        loader.load_layer(experts, source, order)
        self._announced = False
        self._adopt(experts, order)

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Quantize and pack this layer's experts from tensors. Nothing is written to ``weight_path``.

        Parameters
        ----------
        gate_proj, up_proj : Tensor
            ``[E, moe_intermediate_size, hidden_size]``, bf16, fp16 or fp32, CPU.
        down_proj : Tensor
            ``[E, hidden_size, moe_intermediate_size]``.
        physical_to_logical_map_cpu : Tensor, optional
            As in :meth:`load_weights`.

        Raises
        ------
        ValueError
            Wrong shapes, types, devices or map; one sentence.
        """
        num_logical = checks.check_expert_tensors(self.config, gate_proj, up_proj, down_proj)
        order = checks.expert_order(physical_to_logical_map_cpu, num_slots=self.num_experts, num_logical=num_logical)
        if self._announced:
            from kt_kernel.loader import withdraw_layer

            withdraw_layer()
            self._announced = False
        experts = self._new_experts((self._method.layout,) * 2)
        for start in range(0, len(experts.expert_ids), 8):
            slots = experts.expert_ids[start : start + 8]
            experts.load_experts(
                slots,
                [gate_proj[order[slot]] for slot in slots],
                [up_proj[order[slot]] for slot in slots],
                [down_proj[order[slot]] for slot in slots],
            )
        self._adopt(experts)

    def load_missing_experts(self) -> list[int]:
        """Load the experts that ``gpu_experts_mask`` gives to the CPU and that are not here; returns their ids.

        A forward does it by itself when torch has seen the mask change. A replayed CUDA graph runs no Python: call this
        after the change and before the replay. Experts that go to the GPU keep their memory here.

        Raises
        ------
        RuntimeError
            The weights came from tensors, so there is nothing to load from.
        """
        missing = (~(self.gpu_experts_mask | self._hosted)).nonzero().flatten().tolist()
        if missing:
            self._load_late(missing)
        return missing

    def _load_late(self, missing: list[int]) -> None:
        from kt_kernel import loader

        if self.moe is None or self._order is None:
            raise RuntimeError(
                f"expert {missing[0]} of layer {self.layer_idx} is not on the GPU and was not loaded here, because "
                f"gpu_experts_mask named it when the weights were loaded; load the weights again."
            )
        source = loader.open_source(Path(self.weight_path or ""), self._method)
        source.check(self.config)
        loader.load_late(self.moe, source, missing, self._order)
        self._hosted[missing] = True

    def _new_experts(self, layouts: Layouts, *, may_grow: bool = False) -> CpuExperts:
        if self._tickets:
            raise RuntimeError(
                f"layer {self.layer_idx} has {len(self._tickets)} submitted forwards; sync them before loading weights."
            )
        self._writer.sync()
        if self.moe is not None:
            self.moe.close()
            self.moe = None
            self._chain.change()
        here = torch.ones_like(self.gpu_experts_mask) if host_all_experts() else ~self.gpu_experts_mask
        return CpuExperts(
            self.config,
            layouts=layouts,
            engine=self.cpu_infer,
            expert_ids=here.nonzero().flatten().tolist(),
            reserved_ids=(~here).nonzero().flatten().tolist() if may_grow else (),
        )

    @torch.inference_mode(False)  # tensors of that mode cannot be changed outside of it
    def _adopt(self, experts: CpuExperts, order: list[int] | None = None) -> None:
        self.moe = experts
        self._chain.change()
        self._order = order
        self._hosted = torch.zeros(self.num_experts, dtype=torch.bool)
        self._hosted[experts.expert_ids] = True
        self._checked_mask_version = -1

    # --- forward ---

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> None:
        """Queue a forward; the inputs may be changed right after.

        CPU tensors are copied before this returns. Of tensors on a GPU, a snapshot is enqueued on `cuda_stream`,
        ordered behind torch's current stream, and what the current stream does later to them waits for it. Several
        forwards may be submitted before the first is synced; :meth:`sync_forward` returns them in order.

        Parameters
        ----------
        hidden_states : Tensor
            ``[..., hidden_size]``, bf16, fp16 or fp32.
        topk_ids : Tensor
            ``[num_tokens, num_experts_per_tok]``, any integer type, on the same device; -1 = no expert.
        topk_weights : Tensor
            Like topk_ids, a float type.
        cuda_stream : int, optional
            Handle of the stream, 0 for the default one; None: torch's current stream. 0 or None for CPU tensors.

        Raises
        ------
        TypeError
            No tensors.
        ValueError
            A wrong shape, type or device.
        RuntimeError
            No weights, an expert that is neither on the GPU nor loaded, or what went wrong in an earlier forward that a
            stream or a graph asked for.
        """
        hidden, ids, weights = checks.forward_inputs(self.config, hidden_states, topk_ids, topk_weights, cuda_stream)
        experts = self._ready()
        on_device = device_stream.is_on_device(hidden, cuda_stream)
        if on_device:
            stream, current = self._streams(hidden, cuda_stream)
            ticket = experts.submit_on_stream(
                hidden, ids, weights, skip=self.gpu_experts_mask, stream=stream, current_stream=current
            )
        else:
            ticket = experts.submit(hidden, ids, weights, skip=self.gpu_experts_mask)
        self._tickets.append(_Submitted(ticket, hidden.shape, hidden.dtype, on_device))

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: int | None = None) -> torch.Tensor:
        """Wait for the oldest submitted forward; on a GPU, enqueue the wait and return at once.

        Parameters
        ----------
        hidden_states : Tensor
            Of the shape, dtype and device that was submitted; not read.
        cuda_stream : int, optional
            As for :meth:`submit_forward`, the same stream or one ordered behind it.

        Returns
        -------
        Tensor
            ``[num_tokens, hidden_size]`` in hidden_states' dtype, fresh: the caller may keep or change it. Torch's
            current stream may use it.

        Raises
        ------
        RuntimeError
            Nothing was submitted, or what went wrong in the forward.
        """
        if not self._tickets:
            raise RuntimeError(f"sync_forward of layer {self.layer_idx} was called without submit_forward before.")
        checks.check_device("hidden_states", hidden_states, cuda_stream)
        ticket, shape, dtype, on_device = self._tickets[0]
        if hidden_states.dtype != dtype or hidden_states.numel() != shape.numel():
            raise ValueError(
                f"sync_forward of layer {self.layer_idx} was given {hidden_states.dtype} {list(hidden_states.shape)}, "
                f"but {dtype} {list(shape)} was submitted."
            )
        if device_stream.is_on_device(hidden_states, cuda_stream) != on_device:
            raise ValueError(
                f"sync_forward of layer {self.layer_idx} was given {hidden_states.device} and stream {cuda_stream}, "
                f"but {'device' if on_device else 'CPU'} tensors were submitted."
            )
        self._tickets.popleft()
        hidden = hidden_states.reshape(shape)
        if not on_device:
            return CpuExperts.sync(ticket, hidden)
        stream, current = self._streams(hidden, cuda_stream)
        return CpuExperts.sync_on_stream(ticket, hidden, stream=stream, current_stream=current)

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> torch.Tensor:
        """Arguments of :meth:`submit_forward`, result of :meth:`sync_forward`."""
        if isinstance(hidden_states, torch.Tensor) and device_stream.is_on_device(hidden_states, cuda_stream):
            self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
            return self.sync_forward(hidden_states, cuda_stream)
        hidden, ids, weights = checks.forward_inputs(self.config, hidden_states, topk_ids, topk_weights, cuda_stream)
        return self._ready().forward(hidden, ids, weights, skip=self.gpu_experts_mask)

    def _ready(self) -> CpuExperts:
        if self.moe is None:
            raise RuntimeError(f"layer {self.layer_idx} has no weights yet; call load_weights first.")
        # The mask is checked when torch has seen it change; an expert that is used although it was never loaded is
        # found by the library in any case.
        version = self.gpu_experts_mask._version
        if version != self._checked_mask_version:
            self.load_missing_experts()
            self._checked_mask_version = version
        if not self._chain.linked:
            self._chain.link()
        return self.moe

    def _streams(self, tensor: torch.Tensor, cuda_stream: int | None) -> tuple[int, int]:
        """Handles of the stream to enqueue on and of torch's current one."""
        ordinal = tensor.device.index or 0
        if ordinal not in self._devices:
            device_stream.choose_signal(ordinal)
            _ext.expect_batch(max(self.chunked_prefill_size or 0, 0))
            self._devices.add(ordinal)
        current = device_stream.current_stream(tensor, cuda_stream or 0)
        return (current if cuda_stream is None else int(cuda_stream)), current

    # --- what SGLang calls around CUDA graphs ---

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Remember the batch sizes of SGLang's CUDA graphs; the last call wins.

        A hint: pinned buffers for tensors on a GPU are made for the largest; others are prefixes, or make them grow.
        """
        sizes = [int(size) for size in capture_bs]
        if any(size < 1 for size in sizes):
            raise ValueError(f"capture batch sizes are {sizes}; each must be at least 1.")
        KTMoEWrapper._capture_batch_sizes = sizes
        if sizes:
            _ext.expect_batch(max(sizes))

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The sizes last set."""
        return list(KTMoEWrapper._capture_batch_sizes)

    # --- what SGLang's fork calls around a prefill on the GPU alone ---

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None:
        """Queue the writing of expert `expert_id` (an id as the router gives it) as bf16 into host buffers.

        Layouts and errors are those of :class:`kt_kernel.expert_export.ExpertWriter`. Several writes may be under way;
        they run in order, between forwards. The caller copies to the GPU on whatever stream, after
        :meth:`sync_write_weight_scale_to_buffer`. An expert of the GPU that has no copy here is loaded from
        ``weight_path`` first, together with the layer's others.
        """
        if self.moe is None:
            raise RuntimeError(f"layer {self.layer_idx} has no weights yet; call load_weights first.")
        buffers = ExpertBuffers(gpu_tp_count, w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs)
        self._writer.check(self.config, expert_id, buffers)
        if self._order is not None and not self._hosted[expert_id]:
            self._load_late((~self._hosted).nonzero().flatten().tolist())
        self._writer.submit(self.moe, expert_id, buffers)

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait for every write that was submitted; the first error of one is raised here."""
        self._writer.sync()

    select_deferred_experts = staticmethod(select_deferred_experts)

    @staticmethod
    def force_release_loader() -> None:
        """Close the files of every opened weight path; the next use opens them again."""
        from kt_kernel.loader import close_sources

        close_sources()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Does nothing: fine-tuning, whose buffers these would be, is not supported (``mode``)."""

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free pinned buffers that neither a CUDA graph nor a forward under way refers to."""
        clear_device_buffers()

    @staticmethod
    def check_errors() -> None:
        """Raise what went wrong in forwards of launched graphs, which meet no other call: see `check_devices`."""
        check_devices()
