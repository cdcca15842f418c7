"""A small SmolVLA in LeRobot itself: what it answers, written down for the tests.

It runs in an environment of LeRobot's own (``test/benchmarks/lerobot_env.py`` makes one) that has transformers 4.57.6
besides, and imports nothing of this package:

    python test/references/lerobot_smolvla.py make test/core/data/smolvla.safetensors
    python test/references/lerobot_smolvla.py answer FOLDER inputs.safetensors out.safetensors

``make`` builds a policy with random weights that bfloat16 holds exactly, in the published structure (16 layers, the
expert attends to itself in every second one), and writes weights, LeRobot's own files and its answers. ``answer`` opens
a folder in LeRobot's layout, with its processors, and writes the actions for given inputs.

One fault of transformers 4.55 to 4.57 is mended on the way: in float32 they give patch i the position i - 1
(huggingface/transformers, pull request 47133). In bfloat16, in which published policies run and were trained, and in
other versions it is i.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():  # torchvision's packages are built for CUDA, and look for operators of such a torch
    missing = torch.library.Library("torchvision", "DEF")
    missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

RECORD: dict[str, Any] = {
    "model_type": "smolvlm",
    "scale_factor": 2,
    "vision_config": {
        "model_type": "smolvlm_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 260, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 100000.0, "pad_token_id": 256,
    },
}  # fmt: skip
STATE, ACTION, HORIZON = 3, 4, 6
TASKS = ("push it left", "pull it")


class Processor:
    """In place of the pictures' processor, which needs a network: the policy asks it for ids that it does not use."""

    class tokenizer:
        fake_image_token_id = 0
        global_image_token_id = 1

    @classmethod
    def from_pretrained(cls, name: str) -> type[Processor]:
        return cls


def positions(self: SmolVLMVisionEmbeddings, pixel_values: torch.Tensor, patch_attention_mask: Any) -> torch.Tensor:
    """Patches of a whole square picture, each with its own position."""
    patches: torch.Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    return patches + self.position_embedding.weight


def write_vision_language(folder: Path, record: dict[str, Any] = RECORD) -> None:
    """A vision-language model's record and tokenizer: a byte is a token, 256 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(record))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: i for i, letter in enumerate(alphabet)}, "<|im_end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|im_end|>", "model_max_length": 512})
    )


def policy_config(vlm: str, **changes: Any) -> SmolVLAConfig:
    """Two cameras of different sizes and a third that is not there."""
    shapes = {"observation.state": (STATE,), "observation.images.front": (3, 48, 64),
              "observation.images.wrist": (3, 40, 40), "observation.images.third": (3, 64, 64)}  # fmt: skip
    features = {key: PolicyFeature(FeatureType.VISUAL if len(shape) == 3 else FeatureType.STATE, shape)
                for key, shape in shapes.items()}  # fmt: skip
    return SmolVLAConfig(**{
        "input_features": features, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        "vlm_model_name": vlm, "load_vlm_weights": False, "chunk_size": HORIZON, "n_action_steps": HORIZON,
        "resize_imgs_with_padding": (64, 64), "device": "cpu", "push_to_hub": False, **changes,
    })  # fmt: skip


def randomize(policy: torch.nn.Module, seed: int) -> None:
    """Weights by which everything matters, as bfloat16 holds them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                drawn = drawn * weight[0].numel() ** -0.5 * (0.3 if "embed_tokens" in name else 1.0)
            else:
                drawn = 0.1 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            weight.copy_(drawn.to(torch.bfloat16).to(weight.dtype))


def open_folder(folder: Path) -> tuple[SmolVLAPolicy, Any, Any]:
    """A policy and its processors."""
    policy = SmolVLAPolicy.from_pretrained(folder, strict=True)
    before = PolicyProcessorPipeline.from_pretrained(folder, config_filename="policy_preprocessor.json")
    after = PolicyProcessorPipeline.from_pretrained(
        folder, config_filename="policy_postprocessor.json", to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )  # fmt: skip
    return policy, before, after


def answer(folder: Path, given: dict[str, torch.Tensor], tasks: list[str]) -> torch.Tensor:
    """Actions (B, H, A) in the robot's units for inputs in the robot's units."""
    policy, before, after = open_folder(folder)
    batch = before({**{key: value for key, value in given.items() if key != "noise"}, "task": tasks})
    actions: torch.Tensor = after(policy.predict_action_chunk(batch, noise=given["noise"]))
    return actions


def make(out: Path) -> None:
    """Write the reference."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with tempfile.TemporaryDirectory() as place:
        vlm, folder = Path(place) / "vlm", Path(place) / "policy"
        write_vision_language(vlm)
        policy = SmolVLAPolicy(policy_config(str(vlm), empty_cameras=1)).eval()
        randomize(policy, 1)
        statistics = {
            "observation.state": {"mean": draw(STATE), "std": draw(STATE).abs() + 0.5},
            "action": {"mean": draw(ACTION), "std": draw(ACTION).abs() + 0.5},
        }
        before, after = make_smolvla_pre_post_processors(policy.config, statistics)
        for part in (policy, before, after):
            part.save_pretrained(folder)
        given = {
            "observation.state": draw(2, STATE),
            "observation.images.front": torch.rand(2, 3, 48, 64, generator=generator),
            "observation.images.wrist": torch.rand(2, 3, 40, 40, generator=generator),
            "noise": draw(2, HORIZON, 32),
        }
        batch = before({**{key: value for key, value in given.items() if key != "noise"}, "task": list(TASKS)})
        outputs = {"tokens": batch["observation.language.tokens"], "state": batch["observation.state"]}
        for steps in (10, 3):
            policy.config.num_steps = steps
            outputs[f"normalized_{steps}"] = policy.predict_action_chunk(dict(batch), noise=given["noise"])
        outputs["actions"] = after(outputs["normalized_10"])
        given |= {"target": draw(2, HORIZON, ACTION), "loss_noise": draw(2, HORIZON, 32)}
        given["time"] = torch.tensor([0.3, 0.9])
        loss, _ = policy.forward({**batch, "action": given["target"]}, noise=given["loss_noise"], time=given["time"])
        outputs["loss"] = loss.detach()
        texts = {path.name: path.read_text() for path in folder.glob("*.json")}
        texts |= {f"vlm/{path.name}": path.read_text() for path in vlm.iterdir()}
        texts = {name: text.replace(str(vlm), "VLM") for name, text in texts.items()}
        tensors = {f"weights/{k}": v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
        for path in folder.glob("policy_*.safetensors"):
            tensors |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    tensors |= {f"given/{key}": value for key, value in given.items()}
    tensors |= {f"found/{key}": value for key, value in outputs.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata={"files": json.dumps(texts)})


def prepare() -> None:
    """Before a policy is built."""
    smolvlm_with_expert.AutoProcessor = Processor
    SmolVLMVisionEmbeddings.forward = positions


def main(words: list[str]) -> None:
    prepare()
    if words[0] == "make":
        make(Path(words[1]))
    else:
        given = load_file(words[2])
        tasks = json.loads(Path(words[2]).with_suffix(".json").read_text())
        save_file({"actions": answer(Path(words[1]), given, tasks).contiguous()}, words[3])


if __name__ == "__main__":
    main(sys.argv[1:])
