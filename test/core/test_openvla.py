"""OpenVLA's arithmetic against the published description, put together from other libraries' parts.

The vision transformers are transformers' own (Dinov2WithRegisters, Siglip) with the same weights, and numbers recorded
from timm 1.0.31; the language model is driven by transformers' ``generate``; the decoding is the published formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from test.core import published_openvla as published
from test.core.helpers import CONTRACT, with_stream
from test.core.published_openvla import DINO, SENTENCES, SIGLIP, TINY, picture
from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.vla.openvla import OpenVLA, OpenVLAConfig
from vla_core.model.vla.openvla_decode import from_ids, to_ids
from vla_core.model.vla.openvla_vision import BACKBONES, Backbone, BackboneConfig, prepare
from vla_core.model.vlm.lora import LoRAConfig
from vla_core.model.vlm.vision_encoder import normalize
from vla_core.observation.builder import Observation
from vla_core.pretrained.openvla import load
from vla_core.pretrained.openvla_folder import LLAMA
from vla_core.runtime.policy import CheckpointPolicy

TWO = dataclasses.replace(
    CONTRACT, observations={**CONTRACT.observations, "wrist": CONTRACT.observations["camera"]}
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with published.tiny_backbones():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(tmp_path_factory.mktemp("openvla") / "tiny", sharded=True)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load(folder, CONTRACT, unnorm_key="arm")


@pytest.fixture(scope="module")
def oft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(tmp_path_factory.mktemp("openvla") / "oft", head=True, proprio=2, seed=1)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def observed(pictures: dict[str, np.ndarray], text: str, state: tuple[float, ...] = ()) -> Observation:
    return Observation(
        stamp_ns=0, images=pictures, state=np.array(state, dtype=np.float32), instruction=text, ages_ns={},
        present={**dict.fromkeys(pictures, True), "task": True},
    )  # fmt: skip


def act(checkpoint: Checkpoint, pixels: np.ndarray, text: str) -> np.ndarray:
    return CheckpointPolicy(checkpoint).predict(observed({"camera": pixels}, text)).actions


def backbone_tensors(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


# -- the reference ---------------------------------------------------------------------------------------------------


def dino_reference(w: dict[str, Tensor], c: BackboneConfig) -> Any:
    """transformers' DINOv2 with the tensors of timm's; timm adds no position to the class token."""
    record = transformers.Dinov2WithRegistersConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, mlp_ratio=c.inner // c.width,
        image_size=c.image_size, patch_size=14, num_register_tokens=c.registers, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.Dinov2WithRegistersModel(record).eval()
    e, d = "embeddings.", c.width
    theirs = {
        f"{e}cls_token": w["cls_token"], f"{e}register_tokens": w["reg_token"], f"{e}mask_token": torch.zeros(1, d),
        f"{e}position_embeddings": torch.cat([torch.zeros(1, 1, d), w["pos_embed"]], dim=1),
        f"{e}patch_embeddings.projection.weight": w["patch_embed.proj.weight"],
        f"{e}patch_embeddings.projection.bias": w["patch_embed.proj.bias"],
        "layernorm.weight": w["norm.weight"], "layernorm.bias": w["norm.bias"],
    }  # fmt: skip
    for i in range(c.depth):
        mine, its = f"blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for part, third in zip(("query", "key", "value"), w[f"{mine}attn.qkv.{kind}"].split(d), strict=True):
                theirs[f"{its}attention.attention.{part}.{kind}"] = third
                theirs[f"{its}attention.{part[0]}_proj.{kind}"] = third
            for own in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{its}{own}.{kind}"] = w[f"{mine}{own}.{kind}"]
            for other in ("attention.output.dense", "attention.o_proj"):
                theirs[f"{its}{other}.{kind}"] = w[f"{mine}attn.proj.{kind}"]
        for scale in (1, 2):
            theirs[f"{its}layer_scale{scale}.lambda1"] = w[f"{mine}ls{scale}.scale_factor"]
    known = set(model.state_dict())  # the attention's parts were renamed between versions of transformers
    model.load_state_dict({name: value for name, value in theirs.items() if name in known}, strict=True)
    return lambda pixels: model(pixels, output_hidden_states=True).hidden_states[-2][:, 1 + c.registers :]


def siglip_reference(w: dict[str, Tensor], c: BackboneConfig) -> Any:
    record = transformers.SiglipVisionConfig(
        hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=14, hidden_act="gelu", vision_use_head=False,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(record).eval()
    own = next(iter(model.state_dict())).split("embeddings.")[0]
    theirs = {
        "embeddings.patch_embedding.weight": w["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": w["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": w["pos_embed"][0],
        "post_layernorm.weight": w["norm.weight"], "post_layernorm.bias": w["norm.bias"],
    }  # fmt: skip
    for i in range(c.depth):
        mine, its = f"blocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            thirds = w[f"{mine}attn.qkv.{kind}"].split(c.width)
            for part, third in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True):
                theirs[f"{its}self_attn.{part}.{kind}"] = third
            for name, other in {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1",
                                "mlp.fc2": "mlp.fc2", "attn.proj": "self_attn.out_proj"}.items():  # fmt: skip
                theirs[f"{its}{other}.{kind}"] = w[f"{mine}{name}.{kind}"]
    model.load_state_dict({f"{own}{name}": value for name, value in theirs.items()}, strict=True)
    return lambda pixels: model(pixels, output_hidden_states=True).hidden_states[-2]


def llama_reference(weights: dict[str, Tensor]) -> Any:
    record = transformers.LlamaConfig(
        hidden_size=published.WIDTH, intermediate_size=published.INNER, num_hidden_layers=published.LAYERS,
        num_attention_heads=published.HEADS, num_key_value_heads=published.HEADS, vocab_size=published.VOCABULARY,
        rms_norm_eps=1e-6, max_position_embeddings=2048, pad_token_id=32000,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(record).eval()
    model.load_state_dict(backbone_tensors(weights, "language_model."), strict=True)
    return model


def patches_reference(weights: dict[str, Tensor], pixels: np.ndarray) -> Tensor:
    """(1, N, D) of one picture (28, 28, 3) uint8, projected."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    seen = []
    for prefix, name, build in (("featurizer", DINO, dino_reference), ("fused_featurizer", SIGLIP, siglip_reference)):
        c = TINY[name]
        mean, std = (torch.tensor(v, dtype=torch.float64)[None, :, None, None] for v in (c.mean, c.std))
        model = build(backbone_tensors(weights, f"vision_backbone.{prefix}."), c)
        seen.append(model(((image - mean) / std).float()))
    x = torch.cat(seen, dim=2)
    for layer in ("fc1", "fc2", "fc3"):
        x = x @ weights[f"projector.{layer}.weight"].T + weights[f"projector.{layer}.bias"]
        x = x if layer == "fc3" else 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x


def question_reference(folder: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(f"In: What action should the robot take to {text.lower()}?\nOut:").ids
    return [*ids, 29871]


@torch.no_grad()
def actions_reference(folder: Path, pixels: np.ndarray, text: str, count: int = 2) -> tuple[np.ndarray, list[int]]:
    """Normalized actions and their words, by the published description."""
    weights = tensors(folder)
    llama = llama_reference(weights)
    embedded = llama.get_input_embeddings()(torch.tensor([question_reference(folder, text)]))
    sequence = torch.cat([embedded[:, :1], patches_reference(weights, pixels), embedded[:, 1:]], dim=1)
    ids = llama.generate(
        inputs_embeds=sequence, attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long),
        max_new_tokens=count, min_new_tokens=count, do_sample=False,
    )[0].numpy()  # fmt: skip
    bins = np.linspace(-1, 1, 256)
    centres = (bins[:-1] + bins[1:]) / 2
    return centres[np.clip(32000 - ids - 1, 0, 254)], ids.tolist()


def unnormalized(normalized: np.ndarray, key: str = "arm") -> np.ndarray:
    stats = published.STATISTICS[key]["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    return np.where(stats["mask"], 0.5 * (normalized + 1) * (high - low) + low, normalized)


# -- vision ----------------------------------------------------------------------------------------------------------

# Features of timm 1.0.31's VisionTransformer.get_intermediate_layers, last patch, first four channels.
RECORDED = {DINO: [3.363983, 2.944193, -2.80122, -3.563529], SIGLIP: [1.955618, 1.820101, -0.633473, -1.553833]}


@pytest.mark.parametrize("name", [DINO, SIGLIP])
def test_a_backbone_gives_the_numbers_of_timm_and_of_transformers(name: str) -> None:
    config = TINY[name]
    generator = torch.Generator().manual_seed(3)
    weights = published.vision_tensors(config, lambda *shape: 0.1 * torch.randn(*shape, generator=generator))
    backbone = Backbone(config)
    backbone.load_state_dict(weights, strict=True)
    pixels = torch.from_numpy(picture(0)).permute(2, 0, 1)[None].float() / 255
    pixels = normalize(pixels, config.mean, config.std)
    with torch.no_grad():
        found = backbone(pixels)
        other = (dino_reference if name == DINO else siglip_reference)(weights, config)(pixels)
    np.testing.assert_allclose(found[0, -1, :4], RECORDED[name], atol=2e-6)
    torch.testing.assert_close(found, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "count", "parameters"),  # of timm.create_model(name, num_classes=0, img_size=...)
    [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 343, 303_230_976),
        ("vit_so400m_patch14_siglip_224", 342, 427_680_704),
        ("vit_so400m_patch14_siglip_384", 342, 428_225_600),
        ("vit_base_patch16_siglip_224", 162, 92_884_224),
    ],
)
def test_the_real_backbones_have_as_many_tensors_and_numbers_as_timms(name: str, count: int, parameters: int) -> None:
    with torch.device("meta"):
        weights = Backbone(BACKBONES[name]).state_dict()
    assert (len(weights), sum(tensor.numel() for tensor in weights.values())) == (count, parameters)


def test_the_real_model_has_as_many_numbers_as_the_published_one() -> None:
    """7,541,237,184 in openvla/openvla-7b; the published adapters of rank 32 have 110,828,288.

    Of these, what is not read here has 1,701,888, and two convolutions, which are no linear layers, 3352 times 32.
    """
    llama = {**LLAMA, "vocab_size": 32064, "pad_token_id": 32000, "num_key_value_heads": 32}
    text = {key: value for key, value in llama.items() if not key.startswith("rope")}
    config = OpenVLAConfig(
        pretrained=None, vision=(BACKBONES["vit_large_patch14_reg4_dinov2.lvd142m"],
                                 BACKBONES["vit_so400m_patch14_siglip_224"]), text=text, dtype="bfloat16",
        cameras=("camera",), state_dim=0, action_dim=7, vocab_size=32001, lora=LoRAConfig(r=32, alpha=16),
    )  # fmt: skip
    model = OpenVLA.without_weights(config)
    numbers = {name: weight.numel() for name, weight in model.named_parameters()}
    adapters = sum(count for name, count in numbers.items() if ".lora_" in name)
    assert sum(numbers.values()) - adapters == 7_541_237_184
    assert adapters == 110_828_288 - 1_701_888 - 32 * 3352
    assert model.language_model.model.rotary_emb.inv_freq.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (60, 60), (45, 80)])
def test_stretching_is_what_pillow_does_to_bytes(height: int, width: int) -> None:
    smooth = np.asarray(Image.fromarray(picture(0, 7, 9)).resize((width, height), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.fromarray(smooth).resize((28, 28), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None].float() / 255
    found = prepare(pixels, 28, "resize-naive", False, (0.5, 0.5, 0.5))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() <= 1.01
    assert np.abs(found - expected).mean() < 0.02


def test_a_letterbox_has_the_mean_colour_around_the_picture() -> None:
    pixels = torch.rand(1, 3, 10, 20, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    found = prepare(pixels, 20, "letterbox", False, (0.5, 0.25, 1.0))
    assert torch.equal(found[:, :, 5:15], pixels)
    expected = torch.tensor([127, 63, 255]) / 255
    torch.testing.assert_close(found[0, :, 0, 0], expected)
    torch.testing.assert_close(found[0, :, 19, 19], expected)


def test_the_centre_crop_is_the_middle_90_percent_of_the_area() -> None:
    ramp = torch.linspace(0, 1, 41)[None, None, None, :].expand(1, 3, 41, 41).contiguous()
    found = prepare(ramp, 41, "resize-naive", True, (0.5, 0.5, 0.5))[0, 0, 7]
    side = 0.9**0.5
    expected = np.linspace(0.5 - side / 2, 0.5 + side / 2, 41)  # crop_and_resize samples from corner to corner
    np.testing.assert_allclose(found, np.floor(expected * 255.5) / 255, atol=1.01 / 255)
    np.testing.assert_allclose(found, expected, atol=2 / 255)


# -- words -----------------------------------------------------------------------------------------------------------


def test_actions_become_the_published_words_and_come_back() -> None:
    actions = torch.tensor(np.random.default_rng(0).uniform(-1.2, 1.2, (500, 3)))
    ids = to_ids(actions, 256, 32000)
    bins = np.linspace(-1, 1, 256)
    expected = 32000 - np.digitize(np.clip(actions.numpy(), -1, 1), bins)
    np.testing.assert_array_equal(ids, expected)
    centres = (bins[:-1] + bins[1:]) / 2
    every = torch.arange(32064)
    np.testing.assert_allclose(
        from_ids(every, 256, 32000), centres[np.clip(32000 - every.numpy() - 1, 0, 254)], atol=1e-7
    )


@pytest.mark.parametrize("text", [SENTENCES[0], SENTENCES[1].upper()])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_actions_are_those_of_the_published_description(
    checkpoint: Checkpoint, folder: Path, seed: int, text: str
) -> None:
    expected, ids = actions_reference(folder, picture(seed), text)
    assert all(31744 <= word < 32000 for word in ids)  # else the decoding would be tested at its ends alone
    found = act(checkpoint, picture(seed), text)
    np.testing.assert_allclose(found, unnormalized(expected)[None], atol=1e-6)


def test_rows_of_a_batch_answer_as_they_do_alone(checkpoint: Checkpoint) -> None:
    """Instructions of different lengths are padded; published code takes one row only."""
    texts = ["open", *SENTENCES, "push the red block to the drawer"]
    rows = [observed({"camera": picture(seed)}, text) for seed, text in enumerate(texts)]
    policy = CheckpointPolicy(checkpoint)
    together = checkpoint.model.predict(policy.inputs(rows))
    alone = torch.cat([checkpoint.model.predict(policy.inputs([row])) for row in rows])
    torch.testing.assert_close(together, alone)


def test_pictures_and_words_matter(checkpoint: Checkpoint) -> None:
    """With transformers from 4.50 on, the published code answers every picture alike."""
    black, white = np.zeros((28, 28, 3), np.uint8), np.full((28, 28, 3), 255, np.uint8)
    answers = [act(checkpoint, pixels, text) for pixels in (black, white) for text in SENTENCES]
    for i, one in enumerate(answers):
        for other in answers[i + 1 :]:
            assert not np.array_equal(one, other)


def test_one_backbone_alone(tmp_path: Path) -> None:
    folder = published.publish(tmp_path / "siglip", fused=False)
    checkpoint = load(folder, CONTRACT, unnorm_key="arm")
    weights = tensors(folder)
    c = TINY[SIGLIP]
    reference = siglip_reference(backbone_tensors(weights, "vision_backbone.featurizer."), c)
    pixels = torch.from_numpy(picture(4)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        x = reference(2 * pixels - 1)
        x = torch.nn.functional.gelu(x @ weights["projector.fc1.weight"].T + weights["projector.fc1.bias"])
        x = x @ weights["projector.fc2.weight"].T + weights["projector.fc2.bias"]
        model = checkpoint.model
        torch.testing.assert_close(model.projector(model.vision_backbone(pixels)), x, atol=1e-4, rtol=1e-4)
    assert not np.array_equal(act(checkpoint, picture(1), SENTENCES[0]), act(checkpoint, picture(2), SENTENCES[0]))


# -- OpenVLA-OFT -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def chunk_reference(folder: Path, pictures: list[np.ndarray], text: str, state: Tensor, rows: int) -> Tensor:
    """(H, A): placeholders of zeros, every token sees every other, features one before each placeholder."""
    weights = tensors(folder)
    llama = llama_reference(weights)
    head, proprio = (torch.load(folder / f"{name}--150000_checkpoint.pt", weights_only=True)
                     for name in ("action_head", "proprio_projector"))  # fmt: skip
    head = {name.removeprefix("module.model."): value for name, value in head.items()}
    proprio = {name.removeprefix("module."): value for name, value in proprio.items()}
    gelu, norm = torch.nn.functional.gelu, torch.nn.functional.layer_norm
    own = gelu(state @ proprio["fc1.weight"].T + proprio["fc1.bias"]) @ proprio["fc2.weight"].T + proprio["fc2.bias"]
    words = llama.get_input_embeddings()(torch.tensor([question_reference(folder, text)]))
    seen = [patches_reference(weights, pixels) for pixels in pictures]
    count = rows * 2
    sequence = torch.cat([
        words[:, :1], *seen, own[None, None], words[:, 1:], torch.zeros(1, count, published.WIDTH),
        llama.get_input_embeddings()(torch.tensor([[2]])),
    ], dim=1)  # fmt: skip
    everything = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1])  # added to the attention: nothing is hidden
    features = llama.model(inputs_embeds=sequence, attention_mask=everything).last_hidden_state
    prompt = words.shape[1] - 1  # without the start
    before = sum(part.shape[1] for part in seen) + 1
    x = features[:, before + prompt : before + prompt + count].reshape(1, rows, -1)
    x = norm(x, x.shape[-1:], head["layer_norm1.weight"], head["layer_norm1.bias"])
    x = (x @ head["fc1.weight"].T + head["fc1.bias"]).relu()
    for i in range(2):
        block = f"mlp_resnet_blocks.{i}.ffn."
        y = norm(x, x.shape[-1:], head[f"{block}0.weight"], head[f"{block}0.bias"])
        x = x + (y @ head[f"{block}1.weight"].T + head[f"{block}1.bias"]).relu()
    x = norm(x, x.shape[-1:], head["layer_norm2.weight"], head["layer_norm2.bias"])
    return (x @ head["fc2.weight"].T + head["fc2.bias"])[0]


def load_oft(folder: Path, contract: RobotContract = TWO, **changes: Any) -> Checkpoint:
    options: dict[str, Any] = {"unnorm_key": "arm", "cameras": ("camera", "wrist"), "state": ("arm",), "horizon": 3}
    return load(folder, contract, **{**options, **changes})


def test_an_oft_chunk_is_that_of_the_published_description(oft: Path) -> None:
    checkpoint = load_oft(oft)
    pictures = {"camera": picture(0), "wrist": picture(1)}
    state = (0.25, -1.0)
    chunk = CheckpointPolicy(checkpoint).predict(observed(pictures, SENTENCES[0], state))
    # Bounds of proprio: q01 (-1, -2), q99 (1, 3).
    normalized = torch.tensor([0.25, 2 * (-1.0 + 2) / 5 - 1])
    expected = chunk_reference(oft, list(pictures.values()), SENTENCES[0], normalized, 3).numpy()
    np.testing.assert_allclose(chunk.actions, unnormalized(expected), atol=1e-4)
    assert chunk.actions.shape == (3, 2)


def test_a_state_beyond_its_bounds_is_cut_off_as_in_training(oft: Path) -> None:
    policy = CheckpointPolicy(load_oft(oft))
    pictures = {"camera": picture(0), "wrist": picture(1)}
    far, further = (policy.predict(observed(pictures, "open", (x, 0.0))).actions for x in (2.0, 5.0))
    np.testing.assert_array_equal(far, further)
    near = policy.predict(observed(pictures, "open", (0.5, 0.0))).actions
    assert not np.array_equal(far, near)


def test_rows_of_an_oft_batch_answer_as_they_do_alone(oft: Path) -> None:
    checkpoint = load_oft(oft)
    texts = ["open", *SENTENCES]
    rows = [
        observed({"camera": picture(seed), "wrist": picture(9 - seed)}, text, (0.1 * seed, 0.0))
        for seed, text in enumerate(texts)
    ]
    policy = CheckpointPolicy(checkpoint)
    together = checkpoint.model.predict(policy.inputs(rows))
    alone = torch.cat([checkpoint.model.predict(policy.inputs([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_what_a_missing_camera_held_is_seen_by_nothing(oft: Path) -> None:
    contract = dataclasses.replace(
        TWO, observations={**TWO.observations, "wrist": with_stream("camera", missing="mask").observations["camera"]}
    )
    checkpoint = load_oft(oft, contract)
    policy = CheckpointPolicy(checkpoint)
    both = policy.inputs([observed({"camera": picture(0), "wrist": picture(1)}, "open", (0.0, 0.0))])
    gone = dataclasses.replace(both, image_mask={**both.image_mask, "wrist": torch.tensor([False])})
    nan = dataclasses.replace(gone, images={**gone.images, "wrist": torch.full_like(gone.images["wrist"], torch.nan)})
    torch.testing.assert_close(checkpoint.model.predict(gone), checkpoint.model.predict(nan), atol=0, rtol=0)
    assert not torch.equal(checkpoint.model.predict(gone), checkpoint.model.predict(both))


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 2}, "action_tokens say one row, found 2"),
        ({"state_dim": 3}, "no state is read"),
        ({"cameras": ()}, "expected at least one"),
        ({"frozen": ("eyes",)}, "no part 'eyes'; choices: language_model"),
        ({"feature_cache_mb": 5}, "vision_backbone among frozen"),
        ({"vision": ()}, "give both exactly where pretrained is null"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(checkpoint.config.model, **changes)


def test_a_missing_instruction_is_refused(checkpoint: Checkpoint) -> None:
    policy = CheckpointPolicy(checkpoint)
    inputs = policy.inputs([observed({"camera": picture(0)}, "open")])
    with pytest.raises(VlaError, match="instruction: missing"):
        checkpoint.model.predict(dataclasses.replace(inputs, token_mask=torch.zeros_like(inputs.tokens).bool()))


def test_a_checkpoint_of_ours_answers_alike(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ours")
    again = Checkpoint.load(tmp_path / "ours")
    assert isinstance(again.config.model, OpenVLAConfig)
    assert again.config.model.pretrained is None
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    np.testing.assert_array_equal(
        act(checkpoint, picture(5), SENTENCES[0]), act(again, picture(5), SENTENCES[0])
    )  # fmt: skip
