"""Hugging Face checkpoints: which tensors are experts, under the names of every supported model family.

The only file with model names. Reads headers when a checkpoint is opened and weights only when they are asked for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from kt_kernel.files import OpenFiles

_BASE = r"^(?:model\.language_model\.|language_model\.model\.|model\.)?layers\.(?P<layer>\d+)\."
# One tensor per expert and projection: deepseek/qwen, mixtral, mistral.
_SINGLE = re.compile(
    _BASE
    + r"(?:mlp\.experts\.(?P<expert_a>\d+)\.(?P<long>gate|up|down)_proj"
    + r"|(?:block_sparse_moe\.)?experts\.(?P<expert_b>\d+)\.(?P<short>w1|w2|w3))\.weight$"
)
# One tensor for all experts of a layer.
_FUSED = re.compile(
    _BASE + r"(?:mlp|block_sparse_moe|feed_forward)\.experts\.(?P<projection>gate_up_proj|down_proj)(?:\.weight)?$"
)
# Experts in a form this version does not read; only to say so by name.
_QUANTIZED = re.compile(r"\.experts\.(?:\d+\.)?\w+\.?(?:qweight|weight_packed|weight_scale\w*|\w+_blocks|\w+_scales)$")
_FUSED_BIAS = re.compile(_BASE + r"mlp\.experts\.gate_up_proj_bias$")

_PROJECTION = {"w1": "gate", "w3": "up", "w2": "down"}
_FLOAT_TYPES = ("BF16", "F16", "F32")
_NESTED_CONFIGS = ("text_config", "language_config", "llm_config")
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


class ExpertWeights(NamedTuple):
    """One expert: gate and up ``[intermediate_size, hidden_size]``, down ``[hidden_size, intermediate_size]``, CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class ModelSizes:
    """What config.json says of the routed experts; ``num_hidden_layers`` is None where it does not say."""

    model_type: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int | None


class _Place(NamedTuple):
    """Where a projection of an expert, or of all experts of a layer, lies."""

    file: str
    name: str


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises
    ------
    ValueError
        Missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the file again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object; copy the file again.")
    return config


def _text_config(config: dict) -> dict:
    """The part of a config that describes the language model: a nested one, or all of it."""
    return next((config[key] for key in _NESTED_CONFIGS if isinstance(config.get(key), dict)), config)


def _refuse_quantized(folder: Path) -> None:
    config = read_config(folder)
    quantization = config.get("quantization_config") or _text_config(config).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{folder} is a quantized checkpoint ({method}); kt_kernel reads bf16, fp16 and fp32 checkpoints so far, "
            f"so give the unquantized model."
        )


def model_sizes(folder: Path) -> ModelSizes:
    """Sizes of the routed experts from config.json, a nested text config included.

    Any checkpoint has them, a quantized one that only the GPU reads as well.

    Raises
    ------
    ValueError
        A size that is missing (the message lists the keys looked for).
    """
    config = read_config(folder)
    text = _text_config(config)

    def find(*keys: str) -> int | None:
        for key in keys:
            value = text.get(key, config.get(key))
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def size(*keys: str) -> int:
        value = find(*keys)
        if value is not None:
            return value
        raise ValueError(
            f"{folder / 'config.json'} has no {' or '.join(keys)}; kt_kernel needs the config of a "
            f"mixture-of-experts model."
        )

    return ModelSizes(
        model_type=str(text.get("model_type") or config.get("model_type") or "unknown"),
        num_experts=size(*_NUM_EXPERTS_KEYS),
        top_k=size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("moe_intermediate_size", "intermediate_size"),
        num_hidden_layers=find("num_hidden_layers"),
    )


class Checkpoint:
    """A folder of safetensors files, indexed by layer, expert and projection.

    Layers from ``num_hidden_layers`` on are left out: they draft tokens (multi-token prediction), and the model that
    is served does not have them. Reading is thread-safe. Weights are views of mapped files; :meth:`close` after a
    layer lets the files go, so that no more than a layer is mapped at a time.

    Raises
    ------
    ValueError
        No such model, quantized, incomplete or of other shapes than config.json says: one sentence each.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        _refuse_quantized(self.folder)
        self.sizes = model_sizes(self.folder)
        self._files = OpenFiles(self.folder)
        self._single: dict[int, dict[tuple[int, str], _Place]] = {}
        self._fused: dict[int, dict[str, _Place]] = {}
        names = self._tensor_names()
        self._index(names)
        if not self._single and not self._fused:
            self._refuse_without_experts(names)
        for layer in self._single:
            self._check_complete(layer)
        for layer, places in self._fused.items():
            if set(places) != {"gate_up_proj", "down_proj"}:
                raise ValueError(f"{self.folder} holds only {next(iter(places))} of the experts of layer {layer}.")

    # --- index ---

    def _tensor_names(self) -> dict[str, str]:
        """Tensor name -> file name, from the index where there is one, else from all headers."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no safetensors index ({error!r}); copy the file again.") from error
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise ValueError(f"{index} has a weight_map that names no files; copy the file again.")
            for file in sorted(set(names.values())):
                if not (self.folder / file).exists():
                    raise ValueError(f"{index} names {file}, which is not there; finish the download.")
            return names
        single = self.folder / "model.safetensors"
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.folder} has no *.safetensors file; kt_kernel reads safetensors checkpoints only.")
        names: dict[str, str] = {}
        for path in files:
            names |= dict.fromkeys(self._files[path.name].keys(), path.name)
        return names

    def _index(self, names: dict[str, str]) -> None:
        for name, file in names.items():
            match = _SINGLE.match(name)
            if match:
                if self._is_beyond(match):
                    continue
                projection = match["long"] or _PROJECTION[match["short"]]
                expert = int(match["expert_a"] or match["expert_b"])
                self._single.setdefault(int(match["layer"]), {})[expert, projection] = _Place(file, name)
                continue
            match = _FUSED.match(name)
            if match:
                if self._is_beyond(match):
                    continue
                self._fused.setdefault(int(match["layer"]), {})[match["projection"]] = _Place(file, name)
            elif _FUSED_BIAS.match(name):
                raise ValueError(
                    f"{self.folder} has experts with biases and interleaved gate and up ({self.sizes.model_type}); "
                    f"kt_kernel supports experts without bias so far."
                )

    def _is_beyond(self, match: re.Match[str]) -> bool:
        """Whether a tensor belongs to a layer that the served model does not have."""
        num_layers = self.sizes.num_hidden_layers
        return num_layers is not None and int(match["layer"]) >= num_layers

    def _refuse_without_experts(self, names: dict[str, str]) -> None:
        for name in names:
            if _SINGLE.match(name) or _FUSED.match(name):
                raise ValueError(
                    f"{self.folder} has experts only beyond the {self.sizes.num_hidden_layers} layers that config.json "
                    f"promises (first: {name}); copy config.json again."
                )
            if _QUANTIZED.search(name):
                raise ValueError(
                    f"{self.folder} holds quantized experts (tensor {name}); kt_kernel reads bf16, fp16 and fp32 "
                    f"checkpoints so far, so give the unquantized model."
                )
            if name.startswith("blk.") and "_exps." in name:
                raise ValueError(
                    f"{self.folder} holds experts converted by another program (tensor {name}); convert the "
                    f"original checkpoint with scripts/convert_cpu_weights.py."
                )
        example = next(iter(names), "none")
        raise ValueError(
            f"{self.folder} holds no expert tensors that kt_kernel knows (first of {len(names)} tensors: {example}); "
            f"known are ...mlp.experts.N.gate_proj.weight, ...experts.N.w1.weight and ...mlp.experts.gate_up_proj."
        )

    def _check_complete(self, layer: int) -> None:
        places = self._single[layer]
        for expert in range(self.sizes.num_experts):
            for projection in ("gate", "up", "down"):
                if (expert, projection) not in places:
                    raise ValueError(
                        f"{self.folder} lacks {projection} of expert {expert} in layer {layer}; config.json promises "
                        f"{self.sizes.num_experts} experts, so the checkpoint is incomplete."
                    )
        if len(places) != 3 * self.sizes.num_experts:
            highest = max(expert for expert, _ in places)
            raise ValueError(
                f"{self.folder} has an expert {highest} in layer {layer}, but config.json says there are "
                f"{self.sizes.num_experts} experts."
            )

    # --- what is there ---

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with experts, ascending."""
        return sorted(set(self._single) | set(self._fused))

    def files(self, layer: int) -> list[str]:
        """Names of the files that hold experts of a layer, ascending."""
        places = self._fused[layer] if layer in self._fused else self._single[layer]
        return sorted({place.file for place in places.values()})

    def dtypes(self) -> set[str]:
        """Types of the expert tensors of the first layer, as safetensors writes them: ``BF16``, ``F16``, ``F32``."""
        layer = self.layers[0]
        places = self._fused[layer] if layer in self._fused else self._single[layer]
        return {self._slice(place).get_dtype() for place in places.values()}

    def expert_bytes(self, layer: int) -> int:
        """Bytes one expert of a layer takes in the checkpoint."""
        if layer in self._fused:
            places, share = list(self._fused[layer].values()), self.sizes.num_experts
        else:
            places, share = [self._single[layer][0, projection] for projection in ("gate", "up", "down")], 1
        return sum(self._files[place.file].get_tensor(place.name).nbytes for place in places) // share

    def check_layer(self, layer: int) -> None:
        """Check that a layer has experts, of the shapes and types that can be read.

        Raises
        ------
        ValueError
            It has not; the message names the tensor.
        """
        if layer in self._fused:
            for projection in ("gate_up_proj", "down_proj"):
                self._orientation(layer, projection)
        elif layer in self._single:
            inter, hidden = self.sizes.intermediate_size, self.sizes.hidden_size
            for (_, projection), place in self._single[layer].items():
                shape = (hidden, inter) if projection == "down" else (inter, hidden)
                found = self._shape(place)
                if found != shape:
                    raise ValueError(
                        f"tensor {place.name} has shape {list(found)}, but config.json (hidden size {hidden}, expert "
                        f"intermediate size {inter}) means {list(shape)}."
                    )
        else:
            raise ValueError(
                f"{self.folder} has no experts in layer {layer}; layers with experts are "
                f"{describe_layers(self.layers)}."
            )

    def _slice(self, place: _Place):
        try:
            return self._files[place.file].get_slice(place.name)
        except SafetensorError:
            raise ValueError(
                f"{place.file} lacks tensor {place.name}, which the index places there; download it again."
            ) from None

    def _shape(self, place: _Place) -> tuple[int, ...]:
        tensor = self._slice(place)
        if tensor.get_dtype() not in _FLOAT_TYPES:
            raise ValueError(
                f"tensor {place.name} has type {tensor.get_dtype()}; kt_kernel reads BF16, F16 and F32 experts so far, "
                f"so give the unquantized model."
            )
        return tuple(tensor.get_shape())

    def _orientation(self, layer: int, projection: str) -> bool:
        """Whether a fused tensor is stored transposed, ``[E, in, out]``.

        A square tensor follows its sibling: 2 I = H and I = H cannot both hold, so one of the two always decides.
        """
        experts, hidden, inter = self.sizes.num_experts, self.sizes.hidden_size, self.sizes.intermediate_size
        shapes = {"gate_up_proj": (experts, 2 * inter, hidden), "down_proj": (experts, hidden, inter)}
        verdicts = {}
        for key, shape in shapes.items():
            place = self._fused[layer][key]
            found = self._shape(place)
            swapped = (shape[0], shape[2], shape[1])
            if found not in (shape, swapped):
                raise ValueError(
                    f"tensor {place.name} has shape {list(found)}, but config.json ({experts} experts, hidden size "
                    f"{hidden}, expert intermediate size {inter}) means {list(shape)} or {list(swapped)}."
                )
            verdicts[key] = None if shape == swapped else found == swapped
        verdict = verdicts[projection]
        if verdict is not None:
            return verdict
        return bool(next(other for other in verdicts.values() if other is not None))

    # --- weights ---

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Weights of one expert, views of the mapped file where the layout allows.

        Shapes and types are those of :meth:`check_layer`, which must have been called.
        """
        if layer in self._single:
            gate, up, down = (
                self._files[place.file].get_tensor(place.name)
                for place in (self._single[layer][expert, projection] for projection in ("gate", "up", "down"))
            )
            return ExpertWeights(gate, up, down)
        pair = []
        for projection in ("gate_up_proj", "down_proj"):
            place = self._fused[layer][projection]
            matrix = self._slice(place)[expert]
            pair.append(matrix.t().contiguous() if self._orientation(layer, projection) else matrix)
        inter = self.sizes.intermediate_size
        return ExpertWeights(pair[0][:inter], pair[0][inter:], pair[1])

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use opens them again."""
        self._files.close()

    def tensor_name(self, layer: int, expert: int, projection: str) -> str:
        """Name in the checkpoint of ``gate``, ``up`` or ``down`` of an expert, for messages."""
        if layer in self._single:
            return self._single[layer][expert, projection].name
        key = "down_proj" if projection == "down" else "gate_up_proj"
        return f"{self._fused[layer][key].name}[{expert}]"


def describe_layers(layers: list[int]) -> str:
    """Layer indices in few words: ``"1-47"``, ``"0, 2, 4"``."""
    if not layers:
        return "none"
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    if len(layers) > 12:
        return f"{', '.join(map(str, layers[:12]))}, ... ({len(layers)} in all)"
    return ", ".join(map(str, layers))


def resolve_folder(path: str | Path) -> Path:
    """A local folder, from a path or a Hugging Face model id (downloaded where it is not cached).

    Raises
    ------
    ValueError
        Neither; the message says what was tried.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder of a checkpoint or of converted experts.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"{path} does not exist; give the folder of a checkpoint or of converted experts.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.txt"]))
    except Exception as error:  # the hub raises dozens of types, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no folder, and as a Hugging Face model id it failed: {reason}") from error
