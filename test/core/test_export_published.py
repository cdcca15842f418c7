"""Published policies, and the structures of the presets, as graphs: small, with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from test.core import published_openvla, published_smolvla
from test.core.test_presets import hub_checkpoint
from test.core.whole_models import vla_config
from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.errors import VlaError
from vla_core.export.exporter import ExportOptions, export
from vla_core.export.feed import ExportError
from vla_core.export.verify import observations
from vla_core.model.action_head import FlowHeadConfig
from vla_core.model.vla import VLAModel
from vla_core.model.vlm import LLMConfig, VisionEncoderConfig
from vla_core.model.vlm.text_encoder import HubTokenizer
from vla_core.model.vlm.vision_projector import MLPProjectorConfig, PerceiverConfig
from vla_core.pretrained import openvla, smolvla
from vla_core.runtime.policy import CheckpointPolicy

from .exported import check_alike, exported
from .helpers import CONTRACT
from .whole_models import one_thread  # noqa: F401 - a fixture


@pytest.fixture(scope="module", autouse=True)
def backbones() -> Iterator[None]:
    with published_openvla.tiny_backbones():
        yield


def words(place: Path) -> Checkpoint:
    """OpenVLA, which says its action in words."""
    return openvla.load(published_openvla.publish(place / "openvla"), CONTRACT, unnorm_key="arm")


def chunks(place: Path) -> Checkpoint:
    """OpenVLA-OFT: two cameras, a state, three rows."""
    folder = published_openvla.publish(place / "oft", head=True, proprio=2, seed=1)
    seen = {**CONTRACT.observations, "wrist": CONTRACT.observations["camera"]}
    return openvla.load(folder, dataclasses.replace(CONTRACT, observations=seen), unnorm_key="arm",
                        cameras=("camera", "wrist"), state=("arm",), horizon=3)  # fmt: skip


def lerobot(place: Path, steps: int = 2) -> Checkpoint:
    """SmolVLA with its two cameras, in few Euler steps."""
    found = smolvla.load(published_smolvla.publish(place / "smolvla"), published_smolvla.ROBOT,
                         cameras=("front", "wrist"))  # fmt: skip
    config = found.model.config
    found.model._config = dataclasses.replace(config, head=dataclasses.replace(config.head, inference_steps=steps))
    return dataclasses.replace(found, config=dataclasses.replace(found.config, model=found.model.config))


def preset(vision: str, family: dict[str, Any], projector: Any, language: str) -> Checkpoint:
    """A preset's structure: a published vision transformer and a published decoder with adapters, all narrow."""
    made = hub_checkpoint()
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **family}
    decoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "vocab_size": 12, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    model = VLAModel(vla_config(
        cameras=("camera",), state_dim=2, vocab_size=12, history=1, context="all", projector=projector,
        vision=VisionEncoderConfig(model_name=vision, pretrained=None, image_size=(6, 8), architecture=narrow),
        language=LLMConfig(model_name=language, pretrained=None, architecture=decoder),
        head=FlowHeadConfig(denoiser="transformer", hidden_dim=16, layers=1, heads=2, inference_steps=2),
    )).eval()  # fmt: skip
    model.enable_lora(r=2, alpha=4)
    tokenizer = HubTokenizer(made.tokenizer.to_dict()["tokenizer"], pad_id=0, prompt="it {instruction}")
    return dataclasses.replace(made, model=model, tokenizer=tokenizer, config=PolicyConfig(
        model=model.config, observation=made.config.observation, execution=made.config.execution))  # fmt: skip


def edge(place: Path) -> Checkpoint:
    """`edge`: SigLIP, a Perceiver and Qwen2; with the projector aside, `base` and `large`."""
    family = {"intermediate_size": 16, "image_size": 8, "patch_size": 2}
    return preset("siglip-base", family, PerceiverConfig(num_latents=2, num_layers=1, num_heads=2), "qwen2-0.5b")


def dino(place: Path) -> Checkpoint:
    """The cameras and the decoder of `driving`: DINOv2, whose positions are interpolated, and Qwen2."""
    return preset("dinov2-base", {"image_size": 8, "patch_size": 2}, MLPProjectorConfig(), "qwen2-0.5b")


MODELS = {"openvla": words, "openvla oft": chunks, "smolvla": lerobot, "edge": edge, "dino": dino}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_structure_is_a_graph(tmp_path: Path, name: str) -> None:
    made = MODELS[name](tmp_path)
    check_alike(made, exported(tmp_path / "graph", made, "torchscript"), observations(made, 6, seed=5))


def test_a_graph_refuses_what_openvla_refuses(tmp_path: Path) -> None:
    """A question that is missing is never answered."""
    made = words(tmp_path)
    found = exported(tmp_path / "graph", made, "torchscript")
    (seen, *_) = observations(made, 1)
    silent = dataclasses.replace(seen, present={**seen.present, "task": False})
    for policy in (found, CheckpointPolicy(made)):
        with pytest.raises(VlaError, match=r"instruction: missing.*set missing to refuse for it in the contract"):
            policy.predict(silent)


def test_bfloat16_is_a_torchscript_graph_alone(tmp_path: Path) -> None:
    folder = published_openvla.publish(tmp_path / "bf16", dtype=torch.bfloat16)
    made = openvla.load(folder, CONTRACT, unnorm_key="arm")
    found = exported(tmp_path / "graph", made, "torchscript")
    check_alike(made, found, observations(made, 4, seed=5))
    with pytest.raises(ExportError, match=r"onnx: the model 'openvla' has bfloat16 weights.*--format torchscript, or"):
        export(made, tmp_path / "onnx", ExportOptions(kind="onnx"))
    assert not (tmp_path / "onnx").exists()


def test_placeholders_are_refused(tmp_path: Path) -> None:
    made = edge(tmp_path)
    language = dataclasses.replace(made.config.model.language, injected="placeholder", placeholder_id=3)
    config = dataclasses.replace(made.config, model=dataclasses.replace(made.config.model, language=language))
    with pytest.raises(ExportError, match=r"injected: found 'placeholder'.*choices: after_text, before_text"):
        export(dataclasses.replace(made, config=config), tmp_path / "graph", ExportOptions(kind="onnx"))
