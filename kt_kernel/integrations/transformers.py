"""Reading models with Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kt_kernel.integrations.torchvision_repair import repair_torchvision

repair_torchvision()  # transformers imports torchvision for any model


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Return model (fp32) and tokenizer of a GGUF file, both dequantized by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), tokenizer
