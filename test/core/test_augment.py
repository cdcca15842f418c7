"""Augmentation against a loop over pictures and pixels, and its independence of how a batch is shared."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
import pytest
import torch

from vla_core.config import ConfigError
from vla_core.data.batches import Batch
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.training.augment import Augmentation, ImageAugmentation, augment, turn_hue

ALL = ImageAugmentation(shift=3, crop=0.7, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.2, erase=0.5)


def batch(size: int = 8, height: int = 12, width: int = 16, ticks: int = 0, **place: int) -> Batch:
    """Noise in [0, 1] by two cameras, of which ``wrist`` is missing in the first sample."""
    random = torch.Generator().manual_seed(1)

    def inputs(*lead: int) -> ModelInputs:
        masks = {name: torch.ones(lead, dtype=torch.bool) for name in ("front", "wrist")}
        masks["wrist"][0] = False
        images = {name: torch.rand(*lead, 3, height, width, generator=random) for name in masks}
        images["wrist"][0] = 0
        kept = (torch.arange(size) != 2).view(size, *(1 for _ in lead[1:])).expand(lead)
        matrix = torch.tensor([[20.0, 0, 7], [0, 21, 5], [0, 0, 1]]).expand(*lead, 3, 3)
        return ModelInputs(
            images=images, image_mask=masks, state=torch.rand(*lead, 4, generator=random), state_mask=kept,
            tokens=torch.zeros(*lead, 1, dtype=torch.int64),
            intrinsics={"front": Masked(matrix.clone(), torch.ones(lead, dtype=torch.bool))},
        )  # fmt: skip

    past = inputs(size, ticks) if ticks else None
    whole = dataclasses.replace(inputs(size), history=past)
    return Batch(whole, torch.zeros(size, 2, 1), torch.ones(size, 2, dtype=torch.bool), np.zeros((size, 2), np.int64),
                 **{"total": size, **place})  # fmt: skip


def only(**options: float) -> Augmentation:
    return Augmentation(images=ImageAugmentation(**options))  # type: ignore[arg-type]


def part(whole: Batch, first: int, size: int) -> Batch:
    cut = whole.inputs.map(lambda tensor: tensor[first : first + size])
    return whole._replace(inputs=cut, actions=whole.actions[first : first + size], first=whole.first + first)


def tensors(inputs: ModelInputs) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    inputs.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def same(a: ModelInputs, b: ModelInputs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("ticks", [0, 2])
def test_a_shared_batch_is_augmented_as_the_whole_one(ticks: int) -> None:
    options = Augmentation(images=ALL, state_noise=0.1)
    whole = batch(ticks=ticks, step=5)
    together = augment(whole, options, seed=3)
    for first in (0, 2, 6):
        piece = augment(part(whole, first, 2), options, seed=3)
        assert same(piece.inputs, part(together, first, 2).inputs)
    assert same(together.inputs, augment(whole, options, seed=3).inputs)
    for other in (augment(whole, options, seed=4), augment(whole._replace(step=6), options, seed=3)):
        assert not torch.equal(other.inputs.images["front"], together.inputs.images["front"])
        assert not torch.equal(other.inputs.state, together.inputs.state)


def test_an_option_does_not_move_the_others() -> None:
    whole = batch(step=2)
    shifted = augment(whole, only(shift=3), 0).inputs.images["front"]
    both = augment(whole, Augmentation(images=ImageAugmentation(shift=3), state_noise=1.0), 0).inputs.images["front"]
    assert torch.equal(shifted, both)


def test_nothing_asked_for_changes_nothing() -> None:
    whole = batch(ticks=2)
    assert same(augment(whole, Augmentation(), 0).inputs, whole.inputs)


def test_what_is_missing_stays_black_and_cameras_have_options_of_their_own() -> None:
    whole = batch(ticks=2)
    done = augment(whole, Augmentation(images=ALL), 0).inputs
    assert done.history is not None and whole.inputs.history is not None
    assert not done.images["wrist"][0].any() and not done.history.images["wrist"][0].any()
    quiet = augment(whole, Augmentation(images=ALL, cameras={"wrist": ImageAugmentation()}), 0).inputs
    assert torch.equal(quiet.images["wrist"], whole.inputs.images["wrist"])
    assert torch.equal(quiet.images["front"], done.images["front"])
    assert quiet.history is not None
    assert torch.equal(quiet.history.images["wrist"], whole.inputs.history.images["wrist"])
    with pytest.raises(ConfigError, match="no camera 'rear'; choices: front, wrist"):
        augment(whole, Augmentation(cameras={"rear": ALL}), 0)


def test_a_shift_moves_a_picture_and_repeats_its_edge() -> None:
    """Each picture is one of the 7 x 7 shifts made with numpy, every one of which occurs."""
    whole = batch(size=400, height=6, width=7)
    done = augment(whole, only(shift=3), 0).inputs
    seen = set()
    for i in range(400):
        picture = whole.inputs.images["front"][i].numpy()
        padded = np.pad(picture, ((0, 0), (3, 3), (3, 3)), mode="edge")
        moved = done.images["front"][i].numpy()
        fits = [(r, c) for r in range(7) for c in range(7) if np.array_equal(padded[:, r : r + 6, c : c + 7], moved)]
        assert len(fits) == 1
        seen.add(fits[0])
        values = done.intrinsics["front"].values[i]
        assert (5 - values[1, 2].item() + 3, 7 - values[0, 2].item() + 3) == fits[0]
    assert len(seen) == 49


def test_a_crop_is_enlarged_bilinearly_and_the_intrinsics_follow() -> None:
    """Recompute pixels from the intrinsics: where a new pixel looks, the old picture is interpolated."""
    whole = batch(size=20)
    done = augment(whole, only(crop=0.5), 0).inputs
    old, new = (i.intrinsics["front"].values.double().numpy() for i in (whole.inputs, done))
    shares = old[:, 0, 0] / new[:, 0, 0]
    assert shares.min() >= 0.5 and shares.max() <= 1 and np.ptp(shares) > 0.3
    for i in range(20):
        np.testing.assert_allclose(old[i, 1, 1] / new[i, 1, 1], shares[i], rtol=1e-6)
        picture = whole.inputs.images["front"][i].double().numpy()
        for row in range(12):
            for column in range(16):
                ray = np.linalg.inv(new[i]) @ (column, row, 1)
                x, y, _ = old[i] @ ray
                x, y = np.clip(x, 0, 15), np.clip(y, 0, 11)
                left, top = min(int(x), 14), min(int(y), 10)
                u, v = x - left, y - top
                corners = picture[:, top : top + 2, left : left + 2]
                expected = np.einsum("cij,i,j->c", corners, (1 - v, v), (1 - u, u))
                np.testing.assert_allclose(done.images["front"][i, :, row, column], expected, atol=2e-4)


def test_brightness_contrast_and_saturation_against_their_definitions() -> None:
    """One factor explains all pixels of a picture that were not cut off at 0 or 1, and is within its limits."""
    whole = batch(size=50)
    old = whole.inputs.images["front"].double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    shade = torch.einsum("bchw,c->bhw", old, luma)[:, None].expand_as(old)
    for name, centre in (("brightness", torch.zeros_like(old)), ("saturation", shade),
                         ("contrast", shade.mean(dim=(-2, -1), keepdim=True).expand_as(old))):  # fmt: skip
        new = augment(whole, only(**{name: 0.4}), 0).inputs.images["front"].double()
        factors = []
        for i in range(50):
            use = (new[i] > 0) & (new[i] < 1) & ((old[i] - centre[i]).abs() > 0.05)
            factor = ((new[i] - centre[i]) / (old[i] - centre[i]))[use]
            torch.testing.assert_close(factor, factor.mean().expand_as(factor), atol=1e-4, rtol=1e-4)
            factors.append(factor.mean().item())
            expected = (centre[i] + factors[-1] * (old[i] - centre[i])).clamp(0, 1)
            torch.testing.assert_close(new[i], expected, atol=1e-4, rtol=1e-4)
        assert 0.6 <= min(factors) < 0.7 and 1.3 < max(factors) <= 1.4


def test_hue_against_colorsys() -> None:
    pixels = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    pixels[0, :, 0] = torch.tensor([[0.0, 0.3, 1.0, 1.0], [0.0, 0.3, 1.0, 0.0], [0.0, 0.3, 1.0, 0.0]])
    turns = torch.tensor([0.3, -0.45, 0.0])
    turned = turn_hue(pixels, turns)
    for i, r, c in np.ndindex(3, 5, 4):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[i, :, r, c].tolist())
        expected = colorsys.hsv_to_rgb((hue + turns[i].item()) % 1, saturation, value)
        assert turned[i, :, r, c].tolist() == pytest.approx(expected, abs=1e-5)
    whole = batch(size=64)
    done = augment(whole, only(hue=0.1), 0).inputs.images["front"]
    assert done.min() >= 0 and done.max() <= 1
    assert torch.allclose(done.amax(dim=1), whole.inputs.images["front"].amax(dim=1)), "the value of HSV stays"


def test_erasing_leaves_one_grey_rectangle_as_often_as_asked() -> None:
    whole = batch(size=600, height=20, width=30)
    done = augment(whole, only(erase=0.3), 0).inputs.images["front"]
    count = 0
    for new, old in zip(done, whole.inputs.images["front"], strict=True):
        changed = (new != old).any(dim=0)
        if not changed.any():
            continue
        count += 1
        rows, columns = (torch.nonzero(changed.any(dim=axis)).flatten() for axis in (1, 0))
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert (new[:, changed] == 0.5).all()
        assert 1 <= len(rows) <= 9 and 2 <= len(columns) <= 13
    assert abs(count - 180) < 4 * np.sqrt(600 * 0.3 * 0.7)


def test_state_noise_has_its_deviation_and_spares_what_is_missing() -> None:
    whole = batch(size=2000, ticks=3)
    done = augment(whole, Augmentation(state_noise=0.2), 0).inputs
    noise = (done.state - whole.inputs.state).numpy()
    assert not noise[2].any()
    assert abs(noise.mean()) < 4 * 0.2 / np.sqrt(8000) and noise.std() == pytest.approx(0.2, rel=0.05)
    assert done.history is not None and whole.inputs.history is not None
    past = (done.history.state - whole.inputs.history.state).numpy()
    assert past.std() == pytest.approx(0.2, rel=0.05) and not np.allclose(past[:, 0], noise)


@pytest.mark.parametrize("options", [{"shift": -1}, {"crop": 0.0}, {"crop": 1.2}, {"hue": 0.6}, {"erase": 2.0},
                                     {"contrast": -0.1}])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
        ImageAugmentation(**options)  # type: ignore[arg-type]
