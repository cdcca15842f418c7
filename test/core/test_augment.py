"""Augmentation against a loop over pictures and pixels, and its independence of how a batch is shared."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError
from vla_core.data.batches import Batch
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.vlm import WordTokenizer
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.observation.spec import CloudSpec, ImageSize, ObservationSpec
from vla_core.training.augment import Augmentation, ImageAugmentation, SensorLoss, augment, turn_hue, without

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


# --- lost sensors ---

ROBOT = ("front", "wrist", "lidar", "imu", "state", "past")


def sensing(size: int = 64, **place: int) -> Batch:
    """Two cameras, one of them missing in the first sample, a cloud, a sequence, a state and two past ticks."""
    whole = batch(size, 4, 6, ticks=2, **place)
    random = torch.Generator().manual_seed(2)
    rows = {"lidar": (5, 4), "imu": (3, 6)}
    made = {name: Masked(torch.rand(size, *shape, generator=random), torch.ones(size, shape[0], dtype=torch.bool))
            for name, shape in rows.items()}  # fmt: skip
    inputs = dataclasses.replace(whole.inputs, clouds={"lidar": made["lidar"]}, sequences={"imu": made["imu"]})
    return whole._replace(inputs=inputs)


def losing(*groups: tuple[tuple[str, ...], float]) -> Augmentation:
    return Augmentation(dropout=tuple(SensorLoss(streams=names, probability=share) for names, share in groups))


def seen(inputs: ModelInputs, name: str) -> torch.Tensor:
    """Whether a stream is there (B,)."""
    if name in inputs.image_mask:
        return inputs.image_mask[name]
    if name in ("state", "past"):
        found = inputs if name == "state" else inputs.history
        assert found is not None
        return found.state_mask.reshape(len(inputs.tokens), -1).any(dim=1)
    return {**inputs.clouds, **inputs.sequences}[name].mask.any(dim=1)


def test_streams_of_a_group_are_lost_together_and_as_often_as_it_says() -> None:
    whole = sensing(2000)
    done = augment(whole, losing((("front", "wrist"), 0.1), (("lidar",), 0.4), (("past",), 0.5)), 3).inputs
    front, wrist = seen(done, "front"), seen(done, "wrist")
    assert torch.equal(front[1:], wrist[1:]) and torch.equal(seen(done, "imu"), seen(whole.inputs, "imu"))
    for name, share in (("front", 0.1), ("lidar", 0.4), ("past", 0.5)):
        assert abs((~seen(done, name)).float().mean().item() - share) < 0.05, name
    both = ~front & ~seen(done, "lidar")
    assert abs(both.float().mean().item() - 0.04) < 0.02, "groups are drawn by themselves"


def test_what_is_lost_is_0_and_masked_in_the_past_too_and_the_rest_is_as_it_was() -> None:
    whole = sensing()
    done = augment(whole, losing((("front", "lidar", "state"), 0.5)), 1).inputs
    lost = ~seen(done, "front")
    assert lost.any() and not lost.all()
    for inputs, before in ((done, whole.inputs), (done.history, whole.inputs.history)):
        assert inputs is not None and before is not None
        parts = [(inputs.images["front"], before.images["front"]), (inputs.state, before.state),
                 (inputs.intrinsics["front"].values, before.intrinsics["front"].values)]  # fmt: skip
        for values, original in parts:
            assert not values[lost].any() and torch.equal(values[~lost], original[~lost])
        assert not inputs.state_mask[lost].any() and not inputs.intrinsics["front"].mask[lost].any()
        assert torch.equal(inputs.images["wrist"], before.images["wrist"])
    cloud = done.clouds["lidar"]
    assert not cloud.values[lost].any() and torch.equal(cloud.mask, (~lost)[:, None].expand(-1, 5))
    assert torch.equal(done.sequences["imu"].values, whole.inputs.sequences["imu"].values)


def test_the_past_can_be_lost_alone() -> None:
    whole = sensing()
    done = augment(whole, losing((("past",), 0.5)), 0).inputs
    assert torch.equal(done.state, whole.inputs.state) and torch.equal(done.state_mask, whole.inputs.state_mask)
    assert done.history is not None and whole.inputs.history is not None
    lost = ~seen(done, "past") & seen(whole.inputs, "past")
    assert lost.sum() > 10 and not done.history.state[lost].any() and not done.history.images["front"][lost].any()
    kept = seen(done, "past")
    assert torch.equal(done.history.state[kept], whole.inputs.history.state[kept])


def test_a_loss_depends_on_seed_step_and_sample_alone_however_a_batch_is_shared() -> None:
    options = losing((("front", "wrist"), 0.5), (("lidar",), 0.5), (("imu",), 0.3), (("state",), 0.3))
    whole = sensing()
    together = augment(whole, options, 3, ("front", "lidar"))
    for first in range(0, 64, 16):
        piece = augment(part(whole, first, 16), options, 3, ("front", "lidar"))
        assert same(piece.inputs, part(together, first, 16).inputs)
    for other in (augment(whole, options, 4), augment(whole._replace(step=6), options, 3)):
        assert not torch.equal(seen(other.inputs, "lidar"), seen(together.inputs, "lidar"))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(st.sets(st.sampled_from(ROBOT), min_size=1), min_size=1, max_size=4),
    any_of=st.sets(st.sampled_from(["front", "wrist", "lidar", "radar"])), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_of_any_of_is_always_left(groups: list[set[str]], any_of: set[str], seed: int) -> None:
    whole = sensing()
    options = losing(*((tuple(sorted(names)), 0.8) for names in groups))
    done = augment(whole, options, seed, sorted(any_of)).inputs
    free = augment(whole, options, seed).inputs
    needed = sorted(any_of - {"radar"})  # a policy need not see all that the robot has
    if not needed:
        assert same(done, free)
        return
    before = torch.stack([seen(whole.inputs, name) for name in needed]).any(dim=0)
    assert torch.equal(torch.stack([seen(done, name) for name in needed]).any(dim=0), before)
    blind = ~torch.stack([seen(free, name) for name in needed]).any(dim=0)
    for name in ROBOT:  # nothing changes where enough is left anyway
        assert torch.equal(seen(done, name)[~blind], seen(free, name)[~blind])


def test_a_lost_sensor_looks_as_one_that_a_robot_lost() -> None:
    whole = Observation(stamp_ns=0, images={"front": np.full((4, 6, 3), 9, np.uint8)}, state=np.ones(1, np.float32),
                        instruction="go", ages_ns={}, clouds={"lidar": np.ones((5, 4), np.float32)},
                        present={"front": True, "lidar": True, "speed": True})  # fmt: skip
    bare = dataclasses.replace(whole, images={}, clouds={}, state=np.full(1, np.nan, np.float32),
                               present=dict.fromkeys(whole.present, False))  # fmt: skip
    spec = ObservationSpec(images={"front": ImageSize(height=4, width=6)}, state=("speed",),
                           clouds={"lidar": CloudSpec(max_points=9)})  # fmt: skip
    columns = {"lidar": ("x", "y", "z", "intensity")}
    numbers = {"mean": [0.0], "std": [2.0], "min": [0.0], "max": [1.0]}
    normalizer = Normalizer(Normalization(streams={"lidar": {"intensity": (0, 1)}}),
                            {"state": numbers, "action": numbers}, columns)  # fmt: skip
    words = WordTokenizer()
    both = collate([whole, whole], normalizer, words, spec)
    lost = without(both, {name: torch.tensor([False, True]) for name in ("front", "lidar", "state")})
    assert same(lost, collate([whole, bare], normalizer, words, spec))


def test_losses_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"augment.dropout.0.streams: no stream 'radar'; choices: .*front.*past"):
        augment(sensing(), losing((("radar",), 0.5)), 0)
    with pytest.raises(ConfigError, match="no stream 'past'"):
        augment(batch(), losing((("past",), 0.5)), 0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="probability: expected above 0 and below 1"):
            SensorLoss(streams=("imu",), probability=share)
    with pytest.raises(ConfigError, match="streams: expected at least one"):
        SensorLoss(streams=(), probability=0.5)
