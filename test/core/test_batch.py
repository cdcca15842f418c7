"""Model inputs from observations with something missing."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation, ObservationBuilder
from vla_core.observation.normalizer import Normalization, Normalizer

from .helpers import CONTRACT, SPEC, START, arm, camera, checkpoint, pixels, task

NORMALIZER = Normalizer(Normalization(), {
    "state": {"mean": [0.1, 0.2], "std": [0.5, 2.0]}, "action": {"min": [-1.0, -2.0], "max": [1.0, 2.0]},
})  # fmt: skip


def tokenizer() -> WordTokenizer:
    made = WordTokenizer()
    made.fit(["lift it"])
    return made


def observe(*names: str) -> Observation:
    """With only these streams there, all of them allowed to be missing but the task."""
    streams = {n: dataclasses.replace(s, missing="mask") for n, s in CONTRACT.observations.items()}
    builder = ObservationBuilder(dataclasses.replace(CONTRACT, observations=streams), SPEC)
    buffer = builder.make_buffer()
    everything = {"camera": camera(START, 1), "arm": arm(START, 0.6, 4.2), "task": task(START, "lift it")}
    for name in names:
        buffer.add(name, START, everything[name].data)
    return builder.build(buffer, START)


def test_what_is_missing_is_masked_and_the_rest_is_as_ever() -> None:
    whole, blind, numb = observe("camera", "arm", "task"), observe("arm", "task"), observe("camera", "task")
    batch = collate([whole, blind, numb], NORMALIZER, tokenizer())
    assert batch.image_mask["camera"].tolist() == [True, False, True]
    assert batch.state_mask.tolist() == [True, True, False]
    np.testing.assert_allclose(batch.state.numpy(), [[1, 2], [1, 2], [0, 0]], atol=1e-6)
    shown = pixels(1).transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_allclose(batch.images["camera"].numpy(), [shown, 0 * shown, shown], atol=1e-7)
    assert batch.tokens[0].tolist() == batch.tokens[1].tolist()


def test_a_camera_that_nobody_saw_has_the_size_of_the_spec() -> None:
    blind = observe("arm", "task")
    batch = collate([blind], NORMALIZER, tokenizer(), SPEC)
    assert batch.images["camera"].shape == (1, 3, 6, 8) and not batch.image_mask["camera"].any()
    assert not batch.images["camera"].any()
    assert "camera" not in collate([blind], NORMALIZER, tokenizer()).images


def test_a_model_does_not_see_what_is_masked() -> None:
    """The same chunk, whatever stands in the place of the masked picture and the masked state."""
    model = checkpoint().model
    batch = collate([observe("task")], NORMALIZER, tokenizer(), SPEC)
    other = dataclasses.replace(batch, images={"camera": batch.images["camera"] + 0.7}, state=batch.state - 3)
    assert model.predict(batch).tolist() == model.predict(other).tolist()
    there = collate([observe("camera", "arm", "task")], NORMALIZER, tokenizer(), SPEC)
    assert not np.allclose(model.predict(there), model.predict(batch), atol=1e-3)
