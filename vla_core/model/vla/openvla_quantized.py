"""A language model whose frozen weights are held in 4 or 8 bits (bitsandbytes, through transformers), on CUDA alone.

Dettmers et al. 2023, "QLoRA". It is a way of holding weights while adapters are trained, or while it answers: what is
written to a checkpoint are plain weights, those that the model has computed with.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.vlm.pretrained import library

Quantization = Literal["nf4", "int8"]


def cuda_device() -> torch.device:
    """Where quantized weights go; raises :class:`VlaError` for what is missing here."""
    if not torch.cuda.is_available():
        raise VlaError("quantization: bitsandbytes' 4 and 8 bits need a GPU with CUDA, and there is none here; take "
                       "dtype bfloat16 and no quantization")  # fmt: skip
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise VlaError(f"quantization: needs bitsandbytes ({error}): pip install 'vla_ros[gpu]'") from None
    return torch.device("cuda", torch.cuda.current_device())


def quantized(llm: Any, kind: Quantization, device: torch.device) -> Any:
    """The same causal language model on ``device``, its linear layers but the output layer in 4 or 8 bits."""
    transformers = library("transformers")
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return type(llm).from_pretrained(
        None, config=llm.config, state_dict=llm.state_dict(), device_map={"": str(device)},
        quantization_config=transformers.BitsAndBytesConfig(**options), dtype=llm.lm_head.weight.dtype,
    ).eval()  # fmt: skip


def plain_weights(model: nn.Module, found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state ``found`` of a model with quantized layers, as that of a plain one."""
    bitsandbytes = importlib.import_module("transformers.integrations.bitsandbytes")
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "weight") and _is_held(part)}
    plain: dict[str, Tensor] = {}
    for name, tensor in found.items():
        layer, _, rest = name.partition(".weight.")
        owner = layer if rest else name.rpartition(".")[0]
        if owner not in layers or name == f"{owner}.bias":
            plain[name] = tensor
        elif name == f"{owner}.weight":
            part = layers[owner]
            plain[name] = bitsandbytes.dequantize_bnb_weight(part.weight, getattr(part, "state", None)).to(dtype)
    return plain


def _is_held(part: nn.Module) -> bool:
    return type(getattr(part, "weight", None)).__name__ in ("Params4bit", "Int8Params")
