"""Folders of Hugging Face models: where they are, and what config.json says of the routed experts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.activations import Activation
from kt_kernel.files import read_small_file

_NESTED_CONFIGS = ("text_config", "language_config", "llm_config")
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
# hidden_act of config.json -> a name of kt_kernel.activations
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "swigluoai": "silu",  # its alpha and limit stand beside it
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ALPHAS = {"gpt_oss": 1.702}  # of families whose config does not say


@dataclass(frozen=True)
class ModelSizes:
    """What config.json says of the routed experts; ``num_hidden_layers`` is None where it does not say."""

    model_type: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int | None


def read_json_object(path: Path) -> dict:
    """A JSON object from a file.

    Raises
    ------
    ValueError
        No JSON object, or it cannot be read.
    FileNotFoundError
        Missing.
    """
    try:
        content = json.loads(read_small_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object; copy the file again.")
    return content


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises
    ------
    ValueError
        Missing or no JSON object.
    """
    try:
        return read_json_object(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json; give the folder of a Hugging Face checkpoint, or, of a GGUF model, download "
            f"the GGUF file and give its path."
        ) from None


def text_config(config: dict) -> dict:
    """The part of a config that describes the language model: a nested one, or all of it."""
    return next((config[key] for key in _NESTED_CONFIGS if isinstance(config.get(key), dict)), config)


def model_sizes(folder: Path) -> ModelSizes:
    """Sizes of the routed experts from config.json, a nested text config included.

    Any checkpoint has them, one whose weights cannot be read as well.

    Raises
    ------
    ValueError
        A size that is missing (the message lists the keys looked for).
    """
    config = read_config(folder)
    text = text_config(config)

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

    model_type = text.get("model_type") or config.get("model_type")
    return ModelSizes(
        model_type=model_type if isinstance(model_type, str) and model_type.isprintable() else "unknown",
        num_experts=size(*_NUM_EXPERTS_KEYS),
        top_k=size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("moe_intermediate_size", "intermediate_size"),
        num_hidden_layers=find("num_hidden_layers"),
    )


def model_activation(folder: Path, layer: int) -> Activation:
    """The activation of a layer's routed experts, from config.json.

    Raises
    ------
    ValueError
        One that kt_kernel does not compute, or no number where one must be.
    """
    text = text_config(read_config(folder))
    act = text.get("hidden_act") or text.get("hidden_activation") or "silu"
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise ValueError(
            f"{folder / 'config.json'} has hidden_act {act!r}; kt_kernel computes {', '.join(_ACTIVATIONS)}."
        )
    limits = text.get("swiglu_limits")  # one for each layer; the limit of up and of silu(gate)
    if isinstance(limits, list) and layer < len(limits):
        return Activation("silu_then_limit", limits[layer]) if limits[layer] else Activation()
    model_type = text.get("model_type")
    family = _ALPHAS.get(model_type, 0.0) if isinstance(model_type, str) else 0.0
    alpha = text.get("swiglu_alpha") or text.get("hidden_act_alpha") or family
    return Activation(_ACTIVATIONS[act], text.get("swiglu_limit") or 0.0, alpha)


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
    """A local folder or GGUF file, from a path or a Hugging Face model id (downloaded where it is not cached).

    Raises
    ------
    ValueError
        Neither; the message says what was tried.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or (folder.suffix == ".gguf" and folder.exists()):
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give a GGUF file, or the folder of a checkpoint or of converted experts.")
    # a model id looks like a path of two parts: where the first is a folder here, or the name is a file's, it is a path
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and folder.suffix != ".gguf" and not folder.parent.is_dir()
    if not is_id:
        raise ValueError(
            f"{path} does not exist; give the folder of a checkpoint or of converted experts, a GGUF file, or a "
            f"Hugging Face model id."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.txt"]))
    except Exception as error:  # the hub raises dozens of types, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is no folder, and as a Hugging Face model id it failed ({reason}); correct the path, or download "
            f"the model and give its folder."
        ) from error
