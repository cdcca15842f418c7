"""Mixtures: every part in its own units, in one batch; and what cannot be mixed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset
from vla_core.data.mixture import Mixture, MixtureError, join
from vla_core.model.vla.sizes import columns
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.batch import collate
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer

from . import test_multi_sensor as many
from .helpers import CONTRACT, SPEC, episodes, with_action
from .test_batches import assert_same, data_of
from .test_side import SPECS, observed


def tokenizer() -> WordTokenizer:
    made = WordTokenizer()
    made.fit(["lift it", "put it into the box over there"])
    return made


def parts(*datasets: Dataset, horizon: int = 4) -> list[Batches]:
    words = tokenizer()
    made = []
    for data in datasets:
        normalizer = Normalizer(Normalization(), data.statistics(), columns(data.spec, data.contract))
        made.append(Batches(data, horizon, normalizer, words))
    return made


def named(name: str, lengths: tuple[int, ...], scale: float = 1.0, text: str = "lift it") -> Dataset:
    made = [dataclasses.replace(e, state=scale * e.state, instruction=text) for e in episodes(lengths)]
    return Dataset.from_episodes(CONTRACT, SPEC, made, name)


def test_each_sample_is_that_of_its_part_in_its_part_units() -> None:
    """Row by row against the parts; the longer instruction pads the shorter one."""
    small = named("small", (9, 4))
    large = named("large", (12,), scale=40, text="put it into the box over there")
    ours = parts(small, large)
    mixed = Mixture(ours, [1, 3])
    assert len(mixed) == 25 and mixed.lengths == (13, 12)
    index = np.array([24, 3, 13, 12, 0, 20])
    batch = mixed.draw(index)
    assert batch.rows.tolist() == [[1, 11], [0, 3], [1, 0], [0, 12], [0, 0], [1, 7]]
    for place, (source, row) in enumerate(batch.rows):
        one = ours[source].draw(np.array([row]))
        length = one.inputs.tokens.shape[1]
        assert torch.equal(batch.inputs.images["camera"][place], one.inputs.images["camera"][0])
        assert torch.equal(batch.inputs.state[place], one.inputs.state[0])
        assert torch.equal(batch.actions[place], one.actions[0]) and torch.equal(batch.mask[place], one.mask[0])
        assert batch.inputs.tokens[place].tolist() == one.inputs.tokens[0].tolist() + [0] * (7 - length)
        assert batch.inputs.token_mask is not None and batch.inputs.token_mask[place].sum() == length
    spread = [mixed.draw(np.arange(first, last)).inputs.state.std(0) for first, last in ((0, 13), (13, 25))]
    torch.testing.assert_close(spread[0], spread[1], rtol=0.2, atol=0)  # their own statistics make them alike


@pytest.mark.parametrize("name", sorted(SPECS))
def test_joined_batches_are_one_batch(name: str) -> None:
    """Of clouds, windows, maps and history, with other lengths in each part: as if collated in one piece."""
    spec = SPECS[name]
    streams = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in many.MANY.observations.items()}
    contract = dataclasses.replace(many.MANY, observations=streams)
    recorded = [m for m in many.recording(np.random.default_rng(1)) if m.topic not in ("lidar", "radar/map")
                or m.stamp_ns > many.START + 250 * many.MS]  # fmt: skip
    seen = observed(contract, spec, recorded)
    assert name == "held alone" or len({len(o.present) - sum(o.present.values()) for o in seen}) > 1
    (part,) = parts(Dataset.from_episodes(contract, spec, [data_of(seen, contract, spec)]))
    pieces = [part.draw(np.arange(first, last)).inputs for first, last in ((0, 3), (3, 4), (4, len(seen)))]
    assert_same(join(pieces), collate(seen, part.normalizer, part.tokenizer, spec))


@pytest.mark.parametrize(("other", "message"), [
    (lambda: Dataset.from_episodes(CONTRACT, ObservationSpec(state=("arm",), instruction="task"), episodes((5,)), "b"),
     r"images: a has \{'camera': '8x6'\}, b has \{\}; one model needs the same layout"),
    (lambda: dataclasses.replace(named("b", (5,)), spec=ObservationSpec(
        images={"camera": ImageSize(height=12, width=8)}, state=("arm",), instruction="task")),
     "images: a has .*8x6.*, b has .*8x12"),
    (lambda: dataclasses.replace(named("b", (5,)), contract=with_action(
        names=("shoulder",), units=("rad/s",), low=(-1.0,), high=(1.0,), safe=("zero",))),
     "action: a has 2, b has 1"),
    (lambda: dataclasses.replace(named("b", (5,)), spec=dataclasses.replace(SPEC, instruction=None)),
     "instruction: a has True, b has False"),
])  # fmt: skip
def test_what_one_model_cannot_see_is_refused(other, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MixtureError, match=message):
        Mixture([*parts(named("a", (6,))), *parts(other())])


def test_parts_that_were_made_apart_are_refused() -> None:
    one, other = named("a", (6,)), named("b", (6,))
    with pytest.raises(MixtureError, match="one horizon and one tokenizer"):
        Mixture([*parts(one), *parts(other)])
    first, second = parts(one, other)
    second.normalizer = Normalizer(Normalization(state="min_max"), other.statistics())
    with pytest.raises(MixtureError, match="same modes"):
        Mixture([first, second])
    with pytest.raises(MixtureError, match="no datasets"):
        Mixture([])
