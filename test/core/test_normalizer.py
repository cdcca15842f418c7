"""Normalization, its inverse, and the statistics it refuses to do without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.discrete_action_head import DiscreteHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.action_head.transformer_action_head import TransformerHeadConfig
from vla_core.observation.normalizer import (
    Mode,
    Normalization,
    Normalizer,
    Statistics,
    StatisticsError,
    check_modes,
    compute_statistics,
    entry_names,
)

from .helpers import CONTRACT, SPEC

NAMES = {"state": ("arm.shoulder", "arm.elbow", "tool.elbow"), "action": ("linear.x", "linear.y", "gripper")}
tables = arrays(np.float64, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-1e3, 1e3, width=32))
modes = st.sampled_from(["mean_std", "min_max", "quantile", "none"])


def fitted(data: np.ndarray, state: Mode = "mean_std", action: Mode = "min_max", floor: float = 0.01) -> Normalizer:
    statistics = compute_statistics(data)
    modes = Normalization(state=state, action=action, floor=floor)
    return Normalizer(modes, {"state": statistics, "action": statistics})


@given(tables, modes, st.floats(1e-3, 10))
def test_unnormalize_undoes_normalize(data: np.ndarray, mode: Mode, floor: float) -> None:
    normalizer = fitted(data, state=mode, action=mode, floor=floor)
    for name in ("state", "action"):
        back = normalizer.unnormalize(name, normalizer.normalize(name, data))
        np.testing.assert_allclose(back, data, atol=1e-3, rtol=1e-6)


@given(tables)
def test_statistics_are_those_of_numpy(data: np.ndarray) -> None:
    found = compute_statistics(data)
    for i in range(3):
        column = sorted(data[:, i].tolist())
        mean = sum(column) / len(column)
        assert found["mean"][i] == pytest.approx(mean, abs=1e-9)
        assert found["std"][i] == pytest.approx((sum((x - mean) ** 2 for x in column) / len(column)) ** 0.5, abs=1e-9)
        assert (found["min"][i], found["max"][i]) == (column[0], column[-1])
        assert found["q01"][i] == pytest.approx(np.percentile(column, 1), abs=1e-9)
        for share in (10, 50, 90, 99):
            assert found[f"q{share}"][i] == pytest.approx(np.percentile(column, share), abs=1e-9)
    assert found["count"] == [len(data)]


def test_the_modes_mean_what_they_say() -> None:
    data = np.random.default_rng(0).normal([1, -20, 300], [2, 5, 40], (500, 3))
    normalizer = fitted(data)
    state, action = normalizer.normalize("state", data), normalizer.normalize("action", data)
    assert state.dtype == action.dtype == np.float32
    np.testing.assert_allclose(state.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(state.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(action.min(0), -1, atol=1e-6)
    np.testing.assert_allclose(action.max(0), 1, atol=1e-6)


def test_no_precision_is_lost_far_from_zero() -> None:
    """Positions in a map frame: float32 would round away millimetres before the mean is subtracted."""
    data = np.array([[1e6], [1e6 + 0.002]])
    statistics = compute_statistics(data)
    normalizer = Normalizer(Normalization(floor=1e-6), {"state": statistics, "action": statistics})
    np.testing.assert_allclose(normalizer.normalize("state", data)[:, 0], [-1, 1], atol=1e-3)


def test_the_floor_bounds_the_gain_of_an_entry_that_never_moved() -> None:
    data = np.array([[5.0, 0.0], [5.0, 1.0]])
    normalizer = fitted(data, floor=0.1)
    for name in ("state", "action"):
        still, moving = normalizer.normalize(name, np.array([5.1, 1.0]))
        assert still == pytest.approx(1.0, abs=1e-6), "0.1 from the only value seen is one floor away"
        assert moving == pytest.approx(1.0)


def test_leading_axes_are_free() -> None:
    data = np.random.default_rng(1).normal(size=(10, 3))
    normalizer = fitted(data)
    chunk = data[:8].reshape(2, 4, 3)
    np.testing.assert_array_equal(normalizer.normalize("action", chunk)[1, 2], normalizer.normalize("action", data[6]))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"state": {"mean": [0.0], "std": [1.0]}}, r"'action'; .*has: state"),
        ({}, r"'state'; .*has: \(none\)"),
        (
            {"state": {"mean": [0.0], "std": [1.0]}, "action": {"mean": [0.0], "max": [1.0]}},
            r"'action' lack min for min_max; they have: max, mean",
        ),
        ({"state": {"min": [0.0]}, "action": {}}, r"'state' lack mean, std for mean_std; they have: min"),
    ],
)
def test_a_missing_statistic_lists_what_is_there(statistics: Statistics, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        Normalizer(Normalization(), statistics)


def test_a_mode_that_needs_no_statistics_asks_for_none() -> None:
    normalizer = Normalizer(Normalization(state="none", action="none"), {})
    assert normalizer.normalize("state", np.array([3.0, 4.0])).tolist() == [3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(bad: float) -> None:
    good = {"mean": [0.0], "std": [1.0], "min": [0.0], "max": [1.0]}
    with pytest.raises(StatisticsError, match=r"'state'.*mean"):
        Normalizer(Normalization(), {"state": {**good, "mean": [bad]}, "action": good})


def test_statistics_of_bad_data_are_refused() -> None:
    with pytest.raises(StatisticsError, match="3 rows of which 1 "):
        compute_statistics(np.array([[1.0], [np.nan], [2.0]]))
    with pytest.raises(StatisticsError, match="0 rows"):
        compute_statistics(np.zeros((0, 2)))


scales = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30])
entries = st.dictionaries(st.sampled_from([f"{f}.{n}" for f, names in NAMES.items() for n in names]), modes)


@given(tables, modes, modes, entries, scales, st.booleans())
def test_the_inverse_holds_for_every_mode_mask_and_scale(
    data: np.ndarray, state: Mode, action: Mode, own: dict[str, Mode], size: float, still: bool
) -> None:
    """One row, constant columns, tiny and huge numbers; the error is a float32's share of what was normalized."""
    data = data * size
    if still:
        data[:, 1] = data[0, 1]
    options = Normalization(state=state, action=action, entries=own, floor=1e-3 * size)
    normalizer = Normalizer(
        options, {"state": compute_statistics(data), "action": compute_statistics(data)}, names=NAMES
    )
    for name in ("state", "action"):
        normalized = normalizer.normalize(name, data)
        assert normalized.dtype == np.float32 and np.isfinite(normalized).all()
        back = normalizer.unnormalize(name, normalized)
        scale = np.maximum(np.ptp(data, axis=0), 1e-3 * size)
        np.testing.assert_array_less(
            np.abs(back - data), 1e-6 * np.maximum(np.abs(normalized) * scale, scale) + 1e-7 * np.abs(data) + 1e-45
        )
        again = normalizer.normalize(name, back)
        np.testing.assert_allclose(again, normalized, rtol=1e-5, atol=1e-5)


@given(tables)
def test_quantiles_are_those_of_openvla_and_openpi(data: np.ndarray) -> None:
    """Their formulas, without the epsilon by which they avoid a division by zero."""
    data[:, 0] += np.linspace(0, 10, len(data))
    if len(data) == 1 or not (np.quantile(data, 0.99, axis=0) - np.quantile(data, 0.01, axis=0) > 1e-2).all():
        return
    low, high = np.quantile(data, 0.01, axis=0), np.quantile(data, 0.99, axis=0)
    normalizer = fitted(data, action="quantile", floor=1e-9)
    openpi = (data - low) / (high - low) * 2.0 - 1.0
    np.testing.assert_allclose(normalizer.normalize("action", data), openpi, rtol=1e-5, atol=1e-4)
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (7, 3))
    openvla = 0.5 * (actions + 1) * (high - low) + low
    np.testing.assert_allclose(normalizer.unnormalize("action", actions), openvla, rtol=1e-6, atol=1e-6)
    clipped = Normalizer(
        Normalization(action="quantile", clip={"action": 1.0}, floor=1e-9),
        {name: compute_statistics(data) for name in ("state", "action")},
    )
    np.testing.assert_allclose(clipped.normalize("action", data), np.clip(openpi, -1, 1), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(clipped.normalize("state", data), normalizer.normalize("state", data))


@given(st.integers(0, 2**32 - 1))
def test_numbers_and_inverse_are_those_of_lerobot(seed: int) -> None:
    """Its formulas (normalize_processor.py of lerobot 0.4.4), for entries that move more than the floor."""
    rng = np.random.default_rng(seed)
    data = rng.normal(rng.uniform(-100, 100, 3), rng.uniform(0.1, 50, 3), (100, 3))
    found = {name: np.array(value) for name, value in compute_statistics(data).items()}
    ranges = {"min_max": ("min", "max"), "quantile": ("q01", "q99")}
    for mode in ("mean_std", "min_max", "quantile"):
        if mode == "mean_std":
            there, back = (data - found["mean"]) / (found["std"] + 1e-8), data * found["std"] + found["mean"]
        else:
            low, high = (found[key] for key in ranges[mode])
            there, back = 2 * (data - low) / (high - low) - 1, (data + 1) / 2 * (high - low) + low
        normalizer = fitted(data, action=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(normalizer.normalize("action", data), there, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(normalizer.unnormalize("action", data), back, rtol=1e-9, atol=1e-9)


def test_numbers_by_hand_for_each_mode() -> None:
    """q01 2, q99 6: 2 is -1, 4 is 0, 8 is 2; and so on."""
    numbers = {"mean": [3.0], "std": [2.0], "min": [0.0], "max": [10.0], "q01": [2.0], "q99": [6.0]}
    expected = {"mean_std": [-0.5, 0.5, 2.5], "min_max": [-0.6, -0.2, 0.6], "quantile": [-1, 0, 2], "none": [2, 4, 8]}
    for mode, values in expected.items():
        normalizer = Normalizer(Normalization(state=mode, action=mode), {"state": numbers, "action": numbers})
        found = normalizer.normalize("action", np.array([[2.0], [4.0], [8.0]]))
        np.testing.assert_allclose(found[:, 0], values, rtol=1e-6)


def test_an_entry_has_a_mode_of_its_own() -> None:
    """OpenVLA's mask: the gripper passes through, and is clipped neither."""
    data = np.random.default_rng(0).normal(0, 3, (50, 3))
    data[:, 2] = np.arange(50) % 2 * 5
    own = {"action.gripper": "none", "action.linear.y": "mean_std", "state.shoulder": "none"}
    options = from_dict(Normalization, {"action": "quantile", "entries": own, "clip": {"action": 1.0}})
    assert from_dict(Normalization, to_dict(options)) == options
    statistics = compute_statistics(data)
    normalizer = Normalizer(options, {"state": statistics, "action": statistics}, names=NAMES)
    found = normalizer.normalize("action", data)
    np.testing.assert_array_equal(found[:, 2], data[:, 2].astype(np.float32))
    assert np.abs(found[:, :2]).max() == 1
    plain = fitted(data, action="mean_std").normalize("action", data)
    np.testing.assert_array_equal(found[:, 1], plain[:, 1].clip(-1, 1))
    np.testing.assert_array_equal(normalizer.normalize("state", data)[:, 0], data[:, 0].astype(np.float32))
    np.testing.assert_array_equal(normalizer.unnormalize("action", found)[:, 2], data[:, 2])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"action.grip": "none"}, r"entries\.action\.grip: no such entry; choices: gripper, linear\.x, linear\.y"),
        ({"state.elbow": "none"}, r"state\.elbow: may be arm\.elbow, tool\.elbow; write the whole name"),
        ({"gripper": "none"}, r"entries\.gripper: expected action\.<name> or state\.<name>"),
        ({"image.x": "none"}, r"entries\.image\.x: expected action"),
    ],
)
def test_an_entry_that_is_not_there_is_refused_with_the_choices(entries: dict[str, Mode], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Normalizer(Normalization(state="none", action="none", entries=entries), {}, names=NAMES)


def test_entries_need_names_and_statistics_of_their_number() -> None:
    options = Normalization(entries={"action.gripper": "none"})
    numbers = compute_statistics(np.random.default_rng(0).normal(size=(5, 3)))
    with pytest.raises(ConfigError, match="names of the feature's entries are not known"):
        Normalizer(options, {"state": numbers, "action": numbers})
    short = compute_statistics(np.zeros((5, 2)))
    with pytest.raises(StatisticsError, match=r"'action' have 2 entries, not 3: linear\.x, linear\.y, gripper"):
        Normalizer(options, {"state": numbers, "action": short}, names=NAMES)
    masked = Normalizer(Normalization(state="none", action="none", entries={"action.gripper": "quantile"}),
                        {"action": {"q01": [0, 0, 2], "q99": [0, 0, 4]}}, names=NAMES)  # fmt: skip
    assert masked.normalize("action", np.array([7.0, 8.0, 3.5])).tolist() == [7, 8, 0.5]


@pytest.mark.parametrize("options", [{"floor": 0.0}, {"floor": -1.0}, {"clip": {"action": 0.0}}, {"clip": {"x": 1.0}}])
def test_numbers_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"floor|clip"):
        Normalization(**options)


def test_names_of_a_contract() -> None:
    assert entry_names(SPEC, CONTRACT) == {"state": ("arm.shoulder", "arm.elbow"), "action": ("shoulder", "elbow")}


def warned(data: np.ndarray, **options: object) -> list[str]:
    statistics = {"state": compute_statistics(data), "action": compute_statistics(data)}
    modes = Normalization(**{"state": "none", "action": "mean_std", **options})  # type: ignore[arg-type]
    return Normalizer(modes, statistics, names=NAMES).warnings()


def test_what_cannot_be_normalized_well_is_named() -> None:
    rng = np.random.default_rng(0)
    clean = rng.uniform(-1, 1, (1000, 3))
    for mode in ("mean_std", "min_max", "quantile", "none"):
        assert warned(clean, action=mode) == []
    still, tiny, rare, wild = clean.copy(), clean.copy(), clean.copy(), clean.copy()
    still[:, 1] = 3.0
    (line,) = warned(still)
    assert "action: linear.y never moves" in line
    tiny[:, 0] *= 1e-4
    (line,) = warned(tiny)
    assert "std of linear.x (5.9e-05) is below normalization.floor 0.01" in line
    rare[:, 2] = 0
    rare[::200, 2] = 1  # a gripper that closes five times
    (line,) = warned(rare, action="quantile")
    assert "q01 and q99 of gripper are equal though it moves; choose min_max or none" in line
    assert warned(rare, action="quantile", entries={"action.gripper": "none"}) == []
    wild[0, 0] = 500.0
    (line,) = warned(wild, action="quantile")
    assert "outliers of linear.x" in line and "vla inspect" in line
    assert len(warned(still, state="min_max")) == 2, "both features"


def test_bins_and_clipped_samples_need_a_range_that_is_theirs() -> None:
    spread, ranged = Normalization(action="mean_std"), Normalization(action="quantile")
    refused = {
        DiscreteHeadConfig(): "bins of the head 'discrete'",
        TransformerHeadConfig(bins=256): "bins of the head 'transformer'",
        DiffusionHeadConfig(): "cuts its answers at 1 deviations",
    }
    for head, message in refused.items():
        with pytest.raises(ConfigError, match=f"normalization.action: found mean_std.*{message}"):
            check_modes(spread, head)
        check_modes(ranged, head)
        with pytest.raises(ConfigError, match=r"normalization\.entries\.action\.elbow"):
            check_modes(Normalization(entries={"action.elbow": "mean_std"}), head)
        check_modes(Normalization(entries={"state.elbow": "mean_std"}), head)
    for head in (MLPHeadConfig(), TransformerHeadConfig(), DiffusionHeadConfig(clip_sample=None)):
        check_modes(spread, head)
