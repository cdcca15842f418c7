"""What was true in a word: from a bag to a dataset's column, to the classes of a batch, to a head that learns it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.data.batches import Batches
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, DatasetError, load
from vla_core.data.lerobot.layout import V21, V30
from vla_core.data.mixture import Mixture
from vla_core.model.auxiliary import AuxiliaryConfig
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla import MultiSensorRecipe, MultiSensorVLA
from vla_core.model.vlm import TinyCNNEncoderConfig
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.messages import Message, text
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.training.faults import save_batch
from vla_core.training.trainer import Result, train

from .helpers import START, STEP, dataset, recipe, stream_messages, write_bag
from .test_batches import tokenizer
from .test_multi_sensor_vla import driver
from .whole_models import chunk_of
from .whole_models import one_thread as one_thread

ARM = ObservationSpec(state=("arm",))
WORDS = ("none", "green", "red")


def said(k: int, word: str) -> Message:
    stamp_ns = START + k * STEP
    return Message("ground_truth/light", "std_msgs/msg/String", stamp_ns, text(word))


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [V21, V30])
def test_what_was_true_becomes_a_column(tmp_path: Path, version: str) -> None:
    """Where it was said: not at tick 5, and not in a bag without the topic; other truths are no words."""
    words = ["none"] * 3 + ["red"] * 6 + ["green"] * 3
    told = [said(k, word) for k, word in enumerate(words) if k != 5]
    bags = [
        write_bag(tmp_path / "told", sorted([*stream_messages(12), *told], key=lambda m: m.stamp_ns)),
        write_bag(tmp_path / "silent", stream_messages(12)),
    ]
    convert(bags, tmp_path / "dataset", ARM, version=version)
    found = load(tmp_path / "dataset")
    words[5] = ""
    assert list(found.truths) == ["light"]
    assert found.truths["light"].tolist() == [*words, *[""] * 12]
    assert found.select([1]).truths["light"].tolist() == [""] * 12
    convert(bags[1:], tmp_path / "other", ARM, version=version)
    assert not load(tmp_path / "other").truths


def batches(data: Dataset, **classes: tuple[str, ...]) -> Batches:
    return Batches(data, 4, Normalizer(Normalization(), data.statistics()), TOKENIZER, classes=classes)


DATA = dataset()
TOKENIZER = tokenizer(DATA.tasks)


def test_a_batch_has_the_class_of_each_word(tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice([*WORDS, ""], DATA.frames)
    one = dataclasses.replace(DATA, truths={"light": words}, name="one")
    other = dataclasses.replace(DATA, truths={"light": words[::-1]}, name="other")
    mixture = Mixture([batches(one, light=WORDS), batches(other, light=WORDS)])
    index = np.random.default_rng(1).permutation(len(mixture))
    batch = mixture.draw(index)
    numbers = {"none": 0, "green": 1, "red": 2, "": -1}
    expected = [numbers[(words, words[::-1])[source][frame]] for source, frame in batch.rows]
    assert batch.truths["light"].tolist() == expected and batch.truths["light"].dtype == torch.int64
    place = save_batch(tmp_path, 3, [batch], [one, other], 0, {})
    assert torch.equal(load_file(place / "batch_0_0.safetensors")["truths.light"], batch.truths["light"])
    assert not batches(one).draw(index[:3] % len(one.window_rows)).truths


def test_words_that_the_model_does_not_tell_are_named() -> None:
    strange = dataclasses.replace(DATA, truths={"light": np.full(DATA.frames, "blue")})
    with pytest.raises(DatasetError, match=r"light was 'blue'; the model tells green, none, red"):
        batches(strange, light=WORDS)
    with pytest.raises(DatasetError, match=r"what light was, .* says \(none\); record ground_truth/light"):
        batches(DATA, light=WORDS)


# -- the head ----------------------------------------------------------------------------------------------------------


LIGHT = {"light": AuxiliaryConfig(camera="front", classes=("none", "red"), weight=0.5)}


def lights(batch: int, seed: int) -> tuple[ModelInputs, Tensor]:
    """Grey noise with a bright pixel in half of the pictures, in a place of its own, and which ones (B,) int64."""
    random = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(batch, 3, 8, 8, generator=random)
    red = torch.randint(0, 2, (batch,), generator=random)
    row, column = torch.randint(0, 8, (2, batch), generator=random)
    images[torch.arange(batch), 0, row, column] += red
    inputs = ModelInputs(
        images={"front": images}, image_mask={"front": torch.ones(batch, dtype=torch.bool)},
        state=torch.zeros(batch, 1), state_mask=torch.ones(batch, dtype=torch.bool),
        tokens=torch.full((batch, 1), 2),
    )  # fmt: skip
    return inputs, red


# One camera alone, of the driver of the other test.
PLAIN: dict[str, Any] = {"clouds": {}, "bev_clouds": (), "bev_merged": {}, "bev": None, "conditioned": False,
                         "mounts": {}}  # fmt: skip


def model(**changes: Any) -> MultiSensorVLA:
    torch.manual_seed(0)
    return MultiSensorVLA(driver(**{**PLAIN, "auxiliary": LIGHT, **changes}))


def test_its_loss_is_the_cross_entropy_of_what_is_seen_and_known() -> None:
    made = model().eval()
    inputs, red = lights(6, 0)
    seen = torch.tensor([True, True, False, True, True, True])
    inputs = dataclasses.replace(inputs, image_mask={"front": seen})
    truth = red.clone()
    truth[4] = -1
    actions, mask = torch.zeros(6, 1, 1), torch.ones(6, 1, dtype=torch.bool)
    plain = made.loss(inputs, actions, mask)
    told = made.tell(inputs)["light"]
    expected = -sum(math.log(told[i, red[i]].item()) for i in (0, 1, 3, 5)) / 4
    with_it = made.loss(inputs, actions, mask, truths={"light": truth})
    assert (with_it - plain).item() == pytest.approx(0.5 * expected, rel=1e-5)
    nothing = {"light": torch.full((6,), -1)}
    assert made.loss(inputs, actions, mask, truths=nothing).item() == pytest.approx(plain.item())


def test_without_a_picture_nothing_is_told() -> None:
    made = model().eval()
    inputs, _ = lights(4, 0)
    gone = dataclasses.replace(inputs, image_mask={"front": torch.zeros(4, dtype=torch.bool)})
    white = dataclasses.replace(gone, images={"front": torch.ones(4, 3, 8, 8)})
    assert torch.equal(chunk_of(made, gone), chunk_of(made, white))


def test_it_learns_what_it_is_told_and_the_action_follows_it() -> None:
    made = model().train()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(400):
        inputs, red = lights(32, step)
        truths = {"light": red}
        loss = made.loss(inputs, red.float()[:, None, None], torch.ones(32, 1, dtype=torch.bool), truths=truths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, red = lights(200, 10_000)
    told = made.eval().tell(inputs)["light"].argmax(dim=-1)
    assert (told == red).float().mean() > 0.95
    assert ((chunk_of(made, inputs)[:, 0, 0] > 0.5) == red.bool()).float().mean() > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camera": "back"}, r"auxiliary.light.camera: no camera 'back'; choices: front"),
        ({"classes": ("red",)}, r"classes: expected at least two, all different, found \['red'\]"),
        ({"weight": 0.0}, r"weight: expected a positive number, found 0.0"),
    ],
)
def test_heads_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(auxiliary={"light": dataclasses.replace(LIGHT["light"], **change)})


def test_training_and_what_is_held_out_know_what_was_true() -> None:
    """The same run with other words in the dataset is another one."""
    words = np.random.default_rng(0).choice(WORDS, DATA.frames)
    plain = {f.name: getattr(driver(**PLAIN), f.name) for f in dataclasses.fields(MultiSensorRecipe)}
    vision = TinyCNNEncoderConfig(image_size=(6, 8), output_dim=8, channels=(8,))
    light = {"light": AuxiliaryConfig(camera="camera", classes=WORDS)}
    model = MultiSensorRecipe(**{**plain, "horizon": 4, "vision": vision, "auxiliary": light})
    wanted = dataclasses.replace(recipe(steps=3, validate_every=3), model=model)

    def run(shown: np.ndarray, held_out: np.ndarray) -> tuple[torch.Tensor, float | None]:
        data, rest = (dataclasses.replace(DATA, truths={"light": told}) for told in (shown, held_out))
        result: Result = train(wanted, data.select([0]), rest.select([1]))
        return result.checkpoint.model.auxiliary["light"].classify[0].weight, result.validation_loss

    others = np.roll(words, 1)
    pairs = (words, words), (words, words), (others, words), (words, others)
    first, again, taught, measured = (run(shown, held_out) for shown, held_out in pairs)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], taught[0])
    assert torch.equal(first[0], measured[0]) and first[1] != measured[1]
