"""The whole model: its size, its masks, its determinism, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.vision_encoder import TinyCNNConfig

SEED_HEAD = DiffusionHeadConfig(
    schedule="mini_vla_seed",
    sampler="mini_vla_seed",
    train_steps=16,
    inference_steps=16,
    clip_sample=None,
)


def config(**changes: Any) -> MiniVLAConfig:
    values: dict[str, Any] = {
        "cameras": ("front",),
        "state_dim": 4,
        "action_dim": 2,
        "horizon": 3,
        "vocab_size": 8,
        "d_model": 32,
        "vision": TinyCNNConfig(d_model=32, channels=(8, 16)),
    }
    return MiniVLAConfig(**{**values, **changes})


def inputs(batch: int, cameras: tuple[str, ...] = ("front",)) -> ModelInputs:
    generator = torch.Generator().manual_seed(3)
    present = torch.ones(batch, dtype=torch.bool)
    return ModelInputs(
        images={name: torch.rand(batch, 3, 32, 32, generator=generator) for name in cameras},
        state=torch.randn(batch, 4, generator=generator),
        tokens=torch.tensor([[2, 3, 0]]).expand(batch, -1),
        image_mask=dict.fromkeys(cameras, present),
        state_mask=present,
    )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_the_published_model_has_its_published_size() -> None:
    model = MiniVLA(
        MiniVLAConfig(
            cameras=("front",),
            state_dim=39,
            action_dim=4,
            horizon=1,
            vocab_size=8,
            head=SEED_HEAD,
        )
    )
    norm = 2 * 128
    vision = (3 * 25 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 128 + (128 + 1) * 128 + norm
    text = 8 * 64 + 3 * 128 * (64 + 128 + 2) + norm
    state = (39 + 1) * 64 + (64 + 1) * 128 + norm
    fusion = (3 * 128 + 1) * 128 + (128 + 1) * 128 + norm
    head = (4 + 32 + 128 + 1) * 128 + (128 + 1) * 128 + (128 + 1) * 4
    published = vision + text + state + fusion + head
    absent = 3 * 128  # what stands for a missing token is this package's addition
    assert published == 302_148
    assert sum(p.numel() for p in model.parameters()) == published + absent


@pytest.mark.parametrize("head", [DiffusionHeadConfig(), SEED_HEAD, MLPHeadConfig()], ids=lambda head: head.type)
def test_predict_has_the_shape_of_a_chunk_and_follows_the_generator(head: Any) -> None:
    model = MiniVLA(config(head=head))
    first = model.predict(inputs(5), seeded())
    assert first.shape == (5, 3, 2)
    assert not first.requires_grad
    assert torch.equal(first, model.predict(inputs(5), seeded()))


def test_several_cameras_have_weights_of_their_own() -> None:
    model = MiniVLA(config(cameras=("front", "wrist")))
    batch = inputs(2, ("front", "wrist"))
    swapped = ModelInputs(
        images={"front": batch.images["wrist"], "wrist": batch.images["front"]},
        state=batch.state,
        tokens=batch.tokens,
        image_mask=batch.image_mask,
        state_mask=batch.state_mask,
    )
    assert not torch.allclose(model.encode(batch), model.encode(swapped))


@pytest.mark.parametrize("absent", ["image", "state"])
def test_content_behind_a_mask_changes_nothing(absent: str) -> None:
    model = MiniVLA(config())
    batch, none = inputs(2), torch.zeros(2, dtype=torch.bool)

    def masked(filler: float) -> ModelInputs:
        hide_image = absent == "image"
        image = torch.full((2, 3, 32, 32), filler) if hide_image else batch.images["front"]
        state = batch.state if hide_image else torch.full((2, 4), filler)
        return ModelInputs(
            images={"front": image},
            state=state,
            tokens=batch.tokens,
            image_mask={"front": none} if hide_image else batch.image_mask,
            state_mask=batch.state_mask if hide_image else none,
        )

    assert torch.equal(model.encode(masked(0.0)), model.encode(masked(0.7)))
    assert not torch.allclose(model.encode(masked(0.0)), model.encode(batch))


def test_every_input_matters() -> None:
    model = MiniVLA(config(vision=TinyCNNConfig(d_model=32, pooling="spatial_softmax")))
    batch = inputs(2)
    images = {"front": batch.images["front"].clone().requires_grad_()}
    state = batch.state.clone().requires_grad_()
    context = model.encode(
        ModelInputs(
            images=images,
            state=state,
            tokens=batch.tokens,
            image_mask=batch.image_mask,
            state_mask=batch.state_mask,
        )
    )
    for gradient in torch.autograd.grad(context[:, 0].sum(), [images["front"], state]):
        assert gradient.abs().sum() > 0
    other = ModelInputs(
        images=batch.images,
        state=batch.state,
        tokens=torch.tensor([[2, 4, 0]]).expand(2, -1),
        image_mask=batch.image_mask,
        state_mask=batch.state_mask,
    )
    assert not torch.allclose(model.encode(batch), model.encode(other))


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = MiniVLA(config(head=DiffusionHeadConfig(prediction="sample", inference_steps=5)))
    generator = seeded()
    batch = inputs(8)
    actions = torch.rand(8, 3, 2, generator=generator) * 1.6 - 0.8
    mask = torch.ones(8, 3, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(400):
        loss = model.loss(batch, actions, mask, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (model.predict(batch, generator) - actions).abs().mean() < 0.1


def test_config_survives_its_plain_form() -> None:
    for head in (SEED_HEAD, MLPHeadConfig(layers=1)):
        original = config(head=head, cameras=("front", "wrist"))
        assert from_dict(MiniVLAConfig, to_dict(original)) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon: expected at least 1, found 0"),
        ({"vocab_size": 1}, "vocab_size: expected at least 2"),
        ({"cameras": ("front", "front")}, "cameras: expected distinct names"),
        ({"d_model": 64}, r"vision.d_model: expected d_model \(64\), found 32"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_missing_camera_is_named_with_those_given() -> None:
    with pytest.raises(VlaError, match="lack the camera 'front' or its mask; cameras given: wrist"):
        MiniVLA(config()).encode(inputs(2, ("wrist",)))


def test_inputs_move_whole() -> None:
    moved = inputs(2).to("meta")
    tensors = [moved.state, moved.tokens, moved.state_mask]
    tensors += [*moved.images.values(), *moved.image_mask.values()]
    assert {t.device.type for t in tensors} == {"meta"}
