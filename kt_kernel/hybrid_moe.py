"""HybridMoE: routed experts for any PyTorch program, some of them on a torch device and the rest on the CPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kt_kernel import loader
from kt_kernel.activations import SILU, Activation
from kt_kernel.checkpoint import model_activation, resolve_folder
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.device_experts import device_experts
from kt_kernel.experts import CpuExperts, Layouts
from kt_kernel.methods import get_method
from kt_kernel.packed_folder import is_packed_folder, read_manifest
from kt_kernel.wrapper import KTMoEWrapper


class _InferenceOnly(torch.autograd.Function):
    """The layer for inputs that require a gradient: forward as ever, backward raises instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, module: HybridMoE, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return module._compute(hidden_states, topk_ids, topk_weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError("kt_kernel's experts have no gradient; run the model under torch.no_grad().")


class HybridMoE(nn.Module):
    """The routed experts of one MoE layer: experts of the mask in torch on a device, the others on the CPU.

    ``output[t] = sum_s topk_weights[t, s] * (down_e act(gate_e x_t + b, up_e x_t + b) + b)``, ``e = topk_ids[t, s]``,
    over slots whose id is not -1, act the activation of the config, b the biases of experts that have some

    A forward submits the CPU's experts to the library, computes the device's while the CPU works, waits, and adds. On a
    host without a GPU the device is the CPU as well. Make one with :meth:`from_tensors` or :meth:`from_path`; the
    constructor makes an empty one for :meth:`load_state_dict`.

    The state dict holds ``gate_up_proj`` ``[G, 2 * I, H]`` and ``down_proj`` ``[G, H, I]`` of the G experts on the
    device in ascending order, ``gpu_experts_mask``, and the packed bytes of the others as ``cpu_experts.{layout}.w13``
    and ``.w2``, uint8 ``[E - G, bytes]``: they take as much memory again while it is held. With biases also
    ``gate_up_bias`` ``[E, 2 * I]`` and ``down_bias`` ``[E, H]``, fp32. A dict of another method or mask is refused. The
    module can be neither copied nor pickled.

    Inference only: in training mode a forward is refused, and a backward through the layer raises.

    Parameters
    ----------
    config : MoEConfig
        Sizes and activation of the layer.
    method : str
        How experts on the CPU are stored and computed: BF16, AMXINT8 or AMXINT4; for weights from files or from a state
        dict any of :data:`kt_kernel.methods.METHODS`.
    gpu_experts_mask : Tensor, optional
        ``[num_experts]``, bool: True = on the device. Fixed for the life of the module.
    num_gpu_experts : int
        Without a mask: experts 0 .. num_gpu_experts - 1 are on the device.
    device : torch.device or str
        Of the experts of the mask; ``module.to(...)`` moves them.
    dtype : torch.dtype
        Of their weights, and of the matrix products with them.
    has_biases : bool
        Whether experts have biases beside gate, up and down.
    engine : EngineConfig, optional
        Threads and NUMA nodes; None: from the environment, else all usable cores.

    Raises
    ------
    ValueError
        A value out of range: one sentence.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        method: str = "BF16",
        gpu_experts_mask: Tensor | None = None,
        num_gpu_experts: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        has_biases: bool = False,
        engine: EngineConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        engine = engine or EngineConfig.resolve()
        self.wrapper = KTMoEWrapper(
            layer_idx=config.layer_idx,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.intermediate_size,
            gpu_experts_mask=None if gpu_experts_mask is None else gpu_experts_mask.cpu(),
            num_gpu_experts=num_gpu_experts,
            cpuinfer_threads=engine.num_threads or None,
            threadpool_count=engine.num_nodes or None,
            numa_nodes=engine.node_ids or None,
            method=method,
        )
        self.wrapper.config = config  # its own arguments do not name every activation
        mask = self.wrapper.gpu_experts_mask
        self.num_device_experts = int(mask.sum())
        self.num_cpu_experts = config.num_experts - self.num_device_experts
        shape = (self.num_device_experts, config.hidden_size, config.intermediate_size)
        self.gate_up_proj = nn.Parameter(
            torch.empty(shape[0], 2 * shape[2], shape[1], device=device, dtype=dtype), requires_grad=False
        )
        self.down_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        # expert -> its row in gate_up_proj, -1: on the CPU
        rows = torch.where(mask, mask.cumsum(0) - 1, -1)
        self.register_buffer("device_rows", rows.to(device), persistent=False)
        self.register_buffer("device_ids", mask.nonzero().flatten().to(device), persistent=False)
        biases = (2 * shape[2], shape[1]) if has_biases else ()
        for name, size in zip(("gate_up_bias", "down_bias"), biases, strict=False):
            self.register_buffer(name, torch.zeros(config.num_experts, size, device=device))
        self.has_biases = has_biases
        self.eval()

    # --- making ---

    @classmethod
    def from_tensors(
        cls,
        gate_up: Tensor | tuple[Tensor, Tensor],
        down: Tensor,
        *,
        top_k: int,
        biases: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> HybridMoE:
        """Make a layer from weights in memory, which are copied and may be freed afterwards.

        Parameters
        ----------
        gate_up : Tensor or tuple of Tensor
            ``[E, 2 * I, H]``, gate rows before up rows, or the pair (gate, up), each ``[E, I, H]``; bf16, fp16 or fp32,
            any device.
        down : Tensor
            ``[E, H, I]``, of the same dtype.
        top_k : int
            Experts a token is sent to.
        biases : tuple of Tensor, optional
            Of gate and up ``[E, 2 * I]``, gate before up, and of down ``[E, H]``.
        **options
            Those of the constructor, ``layer_idx`` for messages, and ``activation``
            (:class:`kt_kernel.activations.Activation`), silu where it is not given.

        Raises
        ------
        ValueError
            Shapes that do not fit each other, a dtype that cannot be packed; one sentence.
        """
        gate, up = _halves(gate_up) if isinstance(gate_up, Tensor) else gate_up
        if gate.dim() != 3:
            raise ValueError(f"gate has shape {list(gate.shape)}; it must be [num_experts, intermediate, hidden].")
        num_experts, intermediate_size, hidden_size = gate.shape
        layer_idx, activation = options.pop("layer_idx", 0), options.pop("activation", SILU)
        config = MoEConfig(layer_idx, num_experts, top_k, hidden_size, intermediate_size, activation)
        options.setdefault("dtype", gate.dtype)
        module = cls(config, has_biases=biases is not None, **options)
        if biases is not None:
            module._set_biases(*biases)
        module.wrapper.load_weights_from_tensors(gate.cpu(), up.cpu(), down.cpu())
        for row, expert in enumerate(module._device_ids()):
            module._set_device_expert(row, gate[expert], up[expert], down[expert])
        module._load_cpu_biases()
        return module

    @classmethod
    def from_path(
        cls,
        weight_path: str | Path,
        layer_idx: int,
        *,
        top_k: int | None = None,
        activation: Activation | None = None,
        **options: Any,
    ) -> HybridMoE:
        """Make a layer from a checkpoint, or from a folder of converted experts, whose method is the default.

        Parameters
        ----------
        weight_path : str or Path
            Folder or Hugging Face model id, or a GGUF file. Experts on the device are what the codes of the files stand
            for.
        layer_idx : int
            MoE layer of the model, dense layers counted.
        top_k : int, optional
            Experts a token is sent to; None: what the files say, which ``.kt`` files do not.
        activation : Activation, optional
            None: that of config.json. Must be given where there is none, as beside GGUF files.
        **options
            Those of the constructor.

        Raises
        ------
        ValueError
            A folder or layer that does not fit, or one that does not say what the model is; one sentence.
        """
        folder = resolve_folder(weight_path)
        if is_packed_folder(folder):
            found = read_manifest(folder)["method"]
            method = options.setdefault("method", found)
            if get_method(method).name != found:
                raise ValueError(
                    f"{folder} was converted for method {found}, but method {method} was asked for; pass "
                    f'method="{found}" or convert again.'
                )
        source = loader.open_source(weight_path, get_method(options.setdefault("method", "BF16")))
        sizes = source.sizes
        top_k = sizes.top_k if top_k is None else top_k
        if not top_k:
            raise ValueError(f"{folder} does not say how many experts a token is sent to; pass top_k.")
        if activation is None:
            activation = _activation_of(folder, layer_idx)
        config = MoEConfig(layer_idx, sizes.num_experts, top_k, sizes.hidden_size, sizes.intermediate_size, activation)
        source.check(config)
        biases = [source.biases(layer_idx, expert) for expert in range(sizes.num_experts)]
        module = cls(config, has_biases=any(biases), **options)
        if module.has_biases:
            none = [torch.zeros(size) for size in (*(sizes.intermediate_size,) * 2, sizes.hidden_size)]
            stacks = zip(*(found or none for found in biases), strict=True)
            gate, up, down = (torch.stack([bias.float() for bias in stack]) for stack in stacks)
            module._set_biases(torch.cat((gate, up), dim=1), down)
        module.wrapper.weight_path = str(weight_path)
        module.wrapper.load_weights()
        for row, expert in enumerate(module._device_ids()):
            module._set_device_expert(row, *source.weights(layer_idx, expert))
        source.close()
        return module

    def _device_ids(self) -> list[int]:
        return self.wrapper.gpu_experts_mask.nonzero().flatten().tolist()

    def _set_device_expert(self, row: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        inter = self.config.intermediate_size
        with torch.no_grad():
            self.gate_up_proj[row, :inter].copy_(gate)
            self.gate_up_proj[row, inter:].copy_(up)
            self.down_proj[row].copy_(down)

    def _set_biases(self, gate_up: Tensor, down: Tensor) -> None:
        for name, given in (("gate_up_bias", gate_up), ("down_bias", down)):
            buffer = getattr(self, name)
            if given.shape != buffer.shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; it must be {list(buffer.shape)}.")
            buffer.copy_(given)

    def _load_cpu_biases(self) -> None:
        if not self.has_biases:
            return
        experts = self._cpu_experts()
        gate, up = self.gate_up_bias.cpu().chunk(2, dim=1)
        down = self.down_bias.cpu()
        ids = experts.expert_ids
        experts.load_biases(ids, [gate[e] for e in ids], [up[e] for e in ids], [down[e] for e in ids])

    # --- computing ---

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute the layer.

        Parameters
        ----------
        hidden_states : Tensor
            ``[..., H]``, bf16, fp16 or fp32, on the device of the module's parameters; any device if it has none.
        topk_ids : Tensor
            ``[num_tokens, top_k]``, any integer type; -1 = no expert.
        topk_weights : Tensor
            Like topk_ids, a float type.

        Returns
        -------
        Tensor
            Of hidden_states' shape, dtype and device. The two parts are added in fp32.

        Raises
        ------
        RuntimeError
            Training mode, no weights, or what went wrong in the library.
        ValueError
            Wrong shapes, types or devices, an id out of range.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("kt_kernel's experts cannot be trained; call eval() on the model.")
        if torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad):
            return _InferenceOnly.apply(self, hidden_states, topk_ids, topk_weights)
        return self._compute(hidden_states, topk_ids, topk_weights)

    def _compute(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if self.num_device_experts and hidden_states.device != self.gate_up_proj.device:
            raise ValueError(
                f"hidden_states is on {hidden_states.device} and the module's device experts are on "
                f"{self.gate_up_proj.device}; move one to the other."
            )
        hidden, ids, weights = self._flat(hidden_states, topk_ids, topk_weights)
        if hidden.device.type == "cuda":
            output = self._compute_on_stream(hidden, ids, weights)
        elif hidden.device.type == "cpu":
            output = self._compute_on_cpu(hidden, ids, weights)
        else:
            output = self._compute_on_device(hidden, ids, weights)
        return output.view(hidden_states.shape)

    def _flat(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, top_k = self.config.hidden_size, self.config.top_k
        if hidden.dim() < 1 or hidden.shape[-1] != size:
            raise ValueError(f"hidden_states has shape {list(hidden.shape)}; its last dimension must be {size}.")
        hidden = hidden.reshape(-1, size)
        for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
            if tensor.dim() < 1 or tensor.shape[-1] != top_k or tensor.numel() != hidden.shape[0] * top_k:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{hidden.shape[0]}, {top_k}].")
        return hidden, ids.reshape(-1, top_k), weights.reshape(-1, top_k).float()

    def _compute_on_cpu(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # operators only, so that torch.compile can trace it
        experts = self._cpu_experts()
        if not self.num_device_experts:
            return experts.forward(hidden, ids, weights)
        ticket = experts.submit(hidden, ids, weights, skip=self.wrapper.gpu_experts_mask)
        try:
            own = self._device_part(hidden, ids, weights)
        except Exception:
            # the library refuses the same inputs in better words; else its result is of no use
            CpuExperts.sync(ticket, hidden)
            raise
        return _sum(own, CpuExperts.sync(ticket, hidden))

    def _compute_on_stream(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._cpu_experts()
        stream = torch.cuda.current_stream(hidden.device).cuda_stream
        self.wrapper.submit_forward(hidden, ids, weights, stream)
        try:
            own = self._device_part(hidden, ids, weights) if self.num_device_experts else None
        except Exception:
            # a program may go on after e.g. a full device: what was submitted is not the next forward's
            with suppress(RuntimeError):
                self.wrapper.sync_forward(hidden, stream)
            raise
        return _sum(own, self.wrapper.sync_forward(hidden, stream))

    def _compute_on_device(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # a device whose streams the library does not know: the copies to the CPU wait for it
        on_cpu = hidden.cpu()
        ticket = self._cpu_experts().submit(on_cpu, ids.cpu(), weights.cpu(), skip=self.wrapper.gpu_experts_mask)
        try:
            own = self._device_part(hidden, ids, weights) if self.num_device_experts else None
        except Exception:
            with suppress(RuntimeError):
                CpuExperts.sync(ticket, on_cpu)
            raise
        return _sum(own, CpuExperts.sync(ticket, on_cpu).to(hidden.device))

    def _device_part(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts = (self.gate_up_proj, self.down_proj, self.device_rows)
        biases = (self.gate_up_bias, self.down_bias) if self.has_biases else ()
        of_device = [bias[self.device_ids] for bias in biases] or [None, None]
        act = self.config.activation
        return device_experts(hidden, ids, weights, *experts, *of_device, act.name, act.limit, act.alpha)

    def _cpu_experts(self) -> CpuExperts:
        experts = self.wrapper.moe
        if experts is None:
            raise RuntimeError(
                f"layer {self.config.layer_idx} has no weights yet; make it with from_tensors or from_path, or call "
                f"load_state_dict."
            )
        return experts

    # --- state ---

    def _keys(self, prefix: str, layouts: tuple[str, str]) -> tuple[str, str, str]:
        w13, w2 = layouts
        return prefix + "gpu_experts_mask", f"{prefix}cpu_experts.{w13}.w13", f"{prefix}cpu_experts.{w2}.w2"

    def _saved_layouts(self, state_dict: dict[str, Any], prefix: str) -> Layouts:
        """Those that the keys of a saved module name, where they are of this module's method; else what it packs."""
        method = get_method(self.wrapper.method)
        found = []
        for part in ("w13", "w2"):
            begin, end = f"{prefix}cpu_experts.", f".{part}"
            names = [key[len(begin) : -len(end)] for key in state_dict if key.startswith(begin) and key.endswith(end)]
            found.append(next(filter(method.can_have, names), method.packed or " or ".join(method.formats)))
        return found[0], found[1]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        experts = self._cpu_experts()
        mask, w13, w2 = self._keys(prefix, experts.layouts)
        pairs = [experts.export_packed(expert) for expert in experts.expert_ids if not self._on_device(expert)]
        destination[mask] = self.wrapper.gpu_experts_mask.clone()
        for name, tensors in ((w13, [pair[0] for pair in pairs]), (w2, [pair[1] for pair in pairs])):
            destination[name] = torch.stack(tensors) if tensors else torch.empty(0, 0, dtype=torch.uint8)

    def _on_device(self, expert: int) -> bool:
        return bool(self.wrapper.gpu_experts_mask[expert])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        layouts = self._saved_layouts(state_dict, prefix)
        keys = self._keys(prefix, layouts)
        found = [state_dict.pop(key, None) for key in keys]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing = [key for key, value in zip(keys, found, strict=True) if value is None]
        if missing:
            missing_keys += missing
            return
        mask, w13, w2 = found
        if not torch.equal(mask.cpu(), self.wrapper.gpu_experts_mask):
            error_msgs.append(f"{keys[0]} differs from the module's; make the module with the mask that was saved.")
            return
        ids = [expert for expert in range(self.config.num_experts) if not self._on_device(expert)]
        try:
            experts = self.wrapper._new_experts(layouts)
            experts.load_packed(ids, list(w13.cpu()), list(w2.cpu()))
            self.wrapper._adopt(experts)
            self._load_cpu_biases()
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{keys[1]} cannot be loaded: {error}")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("HybridMoE cannot be copied: its experts live in the library; make another from the weights.")

    def __reduce__(self) -> NoReturn:
        raise TypeError("HybridMoE cannot be pickled: its experts live in the library; save its state_dict().")

    def extra_repr(self) -> str:
        """Sizes, placement and method, for print(module)."""
        sizes = self.config
        return (
            f"num_experts={sizes.num_experts}, top_k={sizes.top_k}, hidden_size={sizes.hidden_size}, "
            f"intermediate_size={sizes.intermediate_size}, device_experts={self.num_device_experts}, "
            f"cpu_method={self.wrapper.method}"
        )


def _activation_of(folder: Path, layer: int) -> Activation:
    """That of config.json; silu is no guess to make for what does not say it."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, which would name the activation of its experts; pass activation, for silu "
            f"kt_kernel.activations.Activation()."
        )
    return model_activation(folder, layer)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.dim() != 3 or gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up has shape {list(gate_up.shape)}; it must be [num_experts, 2 * intermediate, hidden]."
        )
    half = gate_up.shape[1] // 2
    return gate_up[:, :half], gate_up[:, half:]


def _sum(own: Tensor | None, from_cpu: Tensor) -> Tensor:
    return from_cpu if own is None else (own + from_cpu).to(from_cpu.dtype)
