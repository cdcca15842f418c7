"""Tiny checkpoints in OpenVLA's published layout, with random weights and everything that the real ones have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vla_core.model.vla.openvla_vision import BACKBONES, BackboneConfig

DINO, SIGLIP = "vit_tiny_reg4_dinov2", "vit_tiny_siglip"
TINY = {
    DINO: BackboneConfig(name=DINO, image_size=28, width=16, depth=3, heads=2, inner=32, registers=4, class_token=True,
                         layer_scale=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    SIGLIP: BackboneConfig(name=SIGLIP, image_size=28, width=12, depth=3, heads=3, inner=20, pooling=True),
}  # fmt: skip
WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 32, 2, 4, 48, 32064
SENTENCES = ("open the drawer", "push the red block")
STATISTICS = {
    "arm": {"action": {"mean": [0.0, 0.1], "std": [0.2, 0.3], "min": [-2.0, -3.0], "max": [2.0, 3.0],
                       "q01": [-1.5, -0.25], "q99": [0.5, 0.75], "mask": [True, False]},
            "proprio": {"mean": [0.0, 0.1], "std": [0.2, 0.3], "min": [-2.0, -3.0], "max": [2.0, 3.0],
                        "q01": [-1.0, -2.0], "q99": [1.0, 3.0]},
            "num_transitions": 10, "num_trajectories": 2},
    "other": {"action": {"mean": [0.0, 0.1], "std": [0.2, 0.3], "min": [-2.0, -3.0], "max": [2.0, 3.0],
                         "q01": [-0.5, 0.0], "q99": [0.25, 1.0], "mask": [True, False]}},
    "bimanual": {"action": {"mean": [0.0] * 3, "std": [1.0] * 3, "min": [-1.0] * 3, "max": [1.0] * 3,
                            "q01": [-1.0] * 3, "q99": [1.0] * 3}},
}  # fmt: skip


@contextmanager
def tiny_backbones() -> Iterator[None]:
    """The tiny vision transformers under names of their own, as a plug-in would add them."""
    BACKBONES.update(TINY)
    try:
        yield
    finally:
        for name in TINY:
            del BACKBONES[name]


def write_tokenizer(folder: Path) -> None:
    """32001 words with Llama's special ids; id 29871 is the empty word, <PAD> the last one."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    text = ["In", ":", "What", "action", "should", "the", "robot", "take", "to", "?", "Out", "move"]
    for word in [*text, *" ".join(SENTENCES).split()]:
        words.setdefault(word, len(words))
    for number in range(len(words), 32000):
        words["▁" if number == 29871 else f"w{number}"] = number
    words["<PAD>"] = 32000
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def vision_tensors(backbone: BackboneConfig, draw: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a timm vision transformer under its published name."""
    d, inner = backbone.width, backbone.inner
    found = {
        "pos_embed": draw(1, backbone.tokens, d), "norm.weight": 1 + draw(d), "norm.bias": draw(d),
        "patch_embed.proj.weight": draw(d, 3, 14, 14), "patch_embed.proj.bias": draw(d),
    }  # fmt: skip
    if backbone.class_token:
        found |= {"cls_token": draw(1, 1, d), "reg_token": draw(1, backbone.registers, d)}
    for i in range(backbone.depth):
        block = {
            "norm1.weight": 1 + draw(d), "norm1.bias": draw(d), "norm2.weight": 1 + draw(d), "norm2.bias": draw(d),
            "attn.qkv.weight": draw(3 * d, d), "attn.qkv.bias": draw(3 * d),
            "attn.proj.weight": draw(d, d), "attn.proj.bias": draw(d),
            "mlp.fc1.weight": draw(inner, d), "mlp.fc1.bias": draw(inner),
            "mlp.fc2.weight": draw(d, inner), "mlp.fc2.bias": draw(d),
        }  # fmt: skip
        if backbone.layer_scale:
            block |= {"ls1.scale_factor": 1 + draw(d), "ls2.scale_factor": 1 + draw(d)}
        found |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    if backbone.pooling:
        pool = {
            "latent": draw(1, 1, d), "q.weight": draw(d, d), "q.bias": draw(d), "kv.weight": draw(2 * d, d),
            "kv.bias": draw(2 * d), "proj.weight": draw(d, d), "proj.bias": draw(d), "norm.weight": 1 + draw(d),
            "norm.bias": draw(d), "mlp.fc1.weight": draw(inner, d), "mlp.fc1.bias": draw(inner),
            "mlp.fc2.weight": draw(d, inner), "mlp.fc2.bias": draw(d),
        }  # fmt: skip
        found |= {f"attn_pool.{name}": tensor for name, tensor in pool.items()}
    return found


def language_tensors(draw: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a LlamaForCausalLM under its published name."""
    found = {
        "model.embed_tokens.weight": 20 * draw(VOCABULARY, WIDTH), "model.norm.weight": 1 + draw(WIDTH),
        "lm_head.weight": 5 * draw(VOCABULARY, WIDTH),
    }  # fmt: skip
    found["lm_head.weight"][:31744] *= 0.01  # the answers are words that mean actions, as those of a trained model
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": 5 * draw(*shape) for name, shape in layer.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = 1 + draw(WIDTH)
    return found


def publish(
    folder: Path, *, fused: bool = True, seed: int = 0, sharded: bool = False, head: bool = False, proprio: int = 0,
    dtype: torch.dtype = torch.float32, statistics: dict[str, Any] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """Write a tiny checkpoint; ``config`` changes keys of its config.json, None takes one out."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    names = (DINO, SIGLIP) if fused else (SIGLIP,)
    width = sum(TINY[name].width for name in names)
    tensors = {}
    for prefix, name in zip(("featurizer", "fused_featurizer"), names, strict=False):
        tensors |= {f"vision_backbone.{prefix}.{k}": v for k, v in vision_tensors(TINY[name], draw).items()}
    inner = 4 * width if fused else WIDTH
    projector = {"fc1": (inner, width), "fc2": (WIDTH, inner)} | ({"fc3": (WIDTH, WIDTH)} if fused else {})
    for name, shape in projector.items():
        tensors |= {f"projector.{name}.weight": 5 * draw(*shape), f"projector.{name}.bias": draw(shape[0])}
    tensors |= {f"language_model.{k}": v for k, v in language_tensors(draw).items()}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if sharded:
        halves = (list(tensors)[::2], list(tensors)[1::2])
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, part in zip(files, halves, strict=True):
            save_file({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    if head:
        actions = 2
        parts = {"layer_norm1.weight": 1 + draw(actions * WIDTH), "layer_norm1.bias": draw(actions * WIDTH),
                 "fc1.weight": draw(WIDTH, actions * WIDTH), "fc1.bias": draw(WIDTH),
                 "layer_norm2.weight": 1 + draw(WIDTH), "layer_norm2.bias": draw(WIDTH),
                 "fc2.weight": draw(actions, WIDTH), "fc2.bias": draw(actions)}  # fmt: skip
        for i in range(2):
            parts |= {f"mlp_resnet_blocks.{i}.ffn.0.weight": 1 + draw(WIDTH),
                      f"mlp_resnet_blocks.{i}.ffn.0.bias": draw(WIDTH),
                      f"mlp_resnet_blocks.{i}.ffn.1.weight": draw(WIDTH, WIDTH),
                      f"mlp_resnet_blocks.{i}.ffn.1.bias": draw(WIDTH)}  # fmt: skip
        torch.save({f"module.model.{k}": v for k, v in parts.items()}, folder / "action_head--150000_checkpoint.pt")
    if proprio:
        torch.save({"module.fc1.weight": draw(WIDTH, proprio), "module.fc1.bias": draw(WIDTH),
                    "module.fc2.weight": draw(WIDTH, WIDTH), "module.fc2.bias": draw(WIDTH)},
                   folder / "proprio_projector--150000_checkpoint.pt")  # fmt: skip
    record = {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "arch_specifier": "fused-gelu-mlp",
        "auto_map": {"AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 2048, "image_resize_strategy": "resize-naive",
        "image_sizes": [28] * len(names), "timm_model_ids": list(names),
        "timm_override_act_layers": [None] * len(names),
        "use_fused_vision_backbone": fused, "output_projector_states": False, "pad_token_id": 32000,
        "pad_to_multiple_of": 64, "n_action_bins": 256, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16",
                        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER,
                        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
        "norm_stats": STATISTICS if statistics is None else statistics,
        **config,
    }  # fmt: skip
    kept = {key: value for key, value in record.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    write_tokenizer(folder)
    return folder


def picture(seed: int, height: int = 28, width: int = 28) -> np.ndarray:
    """Noise (height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
