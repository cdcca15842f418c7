"""Each encoder does what its docstring says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.fusion.sensor_fusion import FusionMLP
from vla_core.model.sensor.state_encoder import StateEncoderMLP
from vla_core.model.vlm.text_encoder import TextEncoderTinyGRU, WordTokenizer
from vla_core.model.vlm.vision_encoder import (
    ImageEncoderTinyCNN,
    TinyCNNConfig,
    spatial_softmax,
)


def test_spatial_softmax_of_a_blob_is_its_place() -> None:
    features = torch.zeros(2, 2, 5, 9)
    features[0, 0, 4, 0] = 50.0  # left, bottom
    features[0, 1, 0, 8] = 50.0  # right, top
    features[1, 0, 2, 4] = 50.0  # the centre
    features[1, 1, 1, 6] = 50.0  # a quarter from the top, three quarters from the left
    expected = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [0.0, 0.5, 0.0, -0.5]])
    torch.testing.assert_close(spatial_softmax(features), expected)


def test_spatial_softmax_of_nothing_is_the_centre() -> None:
    torch.testing.assert_close(spatial_softmax(torch.zeros(1, 3, 6, 6)), torch.zeros(1, 6))


@pytest.mark.parametrize("pooling", ["average", "spatial_softmax"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (33, 47)])
def test_vision_takes_any_size(pooling: str, size: tuple[int, int]) -> None:
    encoder = ImageEncoderTinyCNN(TinyCNNConfig(pooling=pooling, d_model=16))  # type: ignore[arg-type]
    assert encoder(torch.rand(2, 3, *size)).shape == (2, 16)


def test_average_pooling_is_blind_to_place_and_spatial_softmax_is_not() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:24, 16:24] = 1.0
    moved = image.roll(shifts=(16, 24), dims=(2, 3))  # by whole strides, far from the border
    average = ImageEncoderTinyCNN(TinyCNNConfig(pooling="average"))
    spatial = ImageEncoderTinyCNN(TinyCNNConfig(pooling="spatial_softmax"))
    torch.testing.assert_close(average(image), average(moved), atol=1e-5, rtol=1e-4)
    assert (spatial(image) - spatial(moved)).abs().max() > 1e-3


SHARP = TinyCNNConfig(
    pooling="spatial_softmax", channels=(8, 16), strides=(2, 1), norm="group", sharpness=8.0, d_model=16
)


def dots(places: int) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) of noise with one bright dot each, at N places."""
    generator = torch.Generator().manual_seed(1)
    pictures = 0.3 * torch.rand(places, 3, 32, 32, generator=generator)
    for i, place in enumerate(torch.linspace(2, 27, places).long().tolist()):
        pictures[i, :, place : place + 3, place : place + 3] = 1.0
    return pictures


def test_a_group_normalized_encoder_sees_places_from_the_start() -> None:
    torch.manual_seed(0)
    flat = ImageEncoderTinyCNN(dataclasses.replace(SHARP, norm="none", sharpness=1.0))
    sharp = ImageEncoderTinyCNN(SHARP)
    sharp.convolutions[0].load_state_dict(flat.convolutions[0].state_dict())
    seen = {name: encoder.pool(encoder.convolutions(dots(8))) for name, encoder in (("flat", flat), ("sharp", sharp))}
    spread = {name: float(keypoints.detach().std(dim=0).mean()) for name, keypoints in seen.items()}
    assert spread["flat"] < 0.02, "every channel looks at the middle, wherever the dot is"
    assert spread["sharp"] > 0.1


def test_a_group_normalized_encoder_ignores_the_gain_of_its_features() -> None:
    encoder = ImageEncoderTinyCNN(SHARP)
    expected = encoder(dots(4))
    last = encoder.convolutions[3]
    assert isinstance(last, torch.nn.Conv2d)
    with torch.no_grad():
        last.weight.mul_(7.0)
        last.bias.mul_(7.0)
    torch.testing.assert_close(encoder(dots(4)), expected, atol=1e-4, rtol=1e-4)


def test_strides_decide_how_fine_the_last_map_is() -> None:
    for strides, side in (((2, 2), 8), ((2, 1), 16), ((1, 1), 32), ((), 8)):
        encoder = ImageEncoderTinyCNN(dataclasses.replace(SHARP, strides=strides))
        assert encoder.convolutions(torch.rand(1, 3, 32, 32)).shape == (1, 16, side, side)


def test_weights_of_the_published_encoder_keep_their_names() -> None:
    names = set(ImageEncoderTinyCNN(TinyCNNConfig()).state_dict())
    assert {name for name in names if name.startswith("convolutions")} == {
        f"convolutions.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": ()}, "channels: expected at least one layer"),
        ({"strides": (2,)}, r"strides: expected one a layer \(2\), found \[2\]"),
        ({"strides": (2, 0)}, "strides: expected at least 1"),
        ({"channels": (8, 12)}, "channels: norm group needs multiples of 8"),
        ({"norm": "none"}, "sharpness: belongs to norm group, found 8.0"),
        ({"sharpness": 0.0}, "sharpness: expected a positive number"),
    ],
)
def test_wrong_sizes_of_the_small_encoder_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SHARP, **{"strides": (), **wrong})


def test_tokenizer() -> None:
    tokenizer = WordTokenizer()
    tokenizer.fit(["Push the puck", "push  THE drawer"])
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("Drawer push unheard") == [5, 2, 1]
    assert tokenizer.encode("  ") == [1]
    assert tokenizer.batch(["push", "push the puck", ""]).tolist() == [
        [2, 0, 0],
        [2, 3, 4],
        [1, 0, 0],
    ]
    assert WordTokenizer.from_dict(tokenizer.to_dict()).encode("the puck") == [3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "bpe", "words": []}, "expected type 'word'"),
        ({"type": "word"}, "expected type 'word' and a list of words"),
        ({"type": "word", "words": ["push", "the"]}, "that start with"),
        ({"type": "word", "words": ["<pad>", "<unk>", "a", "a"]}, "distinct words"),
    ],
)
def test_tokenizer_refuses_what_it_did_not_write(data: dict[str, object], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        WordTokenizer.from_dict(data)


@pytest.mark.parametrize("padding", [1, 5, 20])
def test_text_is_read_at_its_last_real_token(padding: int) -> None:
    torch.manual_seed(0)
    encoder = TextEncoderTinyGRU(vocab_size=10, d_model=32)
    tokens = torch.tensor([[2, 5, 7], [3, 4, 2]])
    padded = torch.nn.functional.pad(tokens, (0, padding))
    torch.testing.assert_close(encoder(tokens), encoder(padded))


def test_text_in_a_mixed_batch_is_text_alone() -> None:
    torch.manual_seed(0)
    encoder = TextEncoderTinyGRU(vocab_size=10, d_model=32)
    alone = torch.cat([encoder(torch.tensor([[2, 5]])), encoder(torch.tensor([[3, 4, 6, 8]]))])
    together = encoder(torch.tensor([[2, 5, 0, 0], [3, 4, 6, 8]]))
    torch.testing.assert_close(alone, together)


def test_state_encoder() -> None:
    assert StateEncoderMLP(state_dim=39, d_model=16)(torch.zeros(3, 39)).shape == (3, 16)


def test_content_behind_a_mask_changes_nothing() -> None:
    torch.manual_seed(0)
    fusion = FusionMLP(num_tokens=3, d_model=8)
    tokens = torch.randn(2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    other = tokens.clone()
    other[~mask] = torch.tensor([float("nan")] * 8)
    assert torch.equal(fusion(tokens, mask), fusion(other, mask))
    assert not torch.equal(fusion(tokens, mask), fusion(tokens, torch.ones_like(mask)))


def test_the_absent_embedding_is_learned() -> None:
    fusion = FusionMLP(num_tokens=2, d_model=4)
    tokens = torch.randn(1, 2, 4, requires_grad=True)
    fusion(tokens, torch.tensor([[True, False]]))[0, 0].backward()
    assert fusion.absent.grad is not None
    assert fusion.absent.grad[1].abs().sum() > 0
    assert fusion.absent.grad[0].abs().sum() == 0
    assert tokens.grad is not None
    assert tokens.grad[0, 1].abs().sum() == 0
