"""Typed configuration trees: what is written is read back, and what does not fit is named by its dotted path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vla_core.config import ConfigError, from_dict, load_yaml, override, to_dict
from vla_core.training.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class Wheel:
    type: Literal["wheel"] = "wheel"
    radius: float
    spokes: int = 8

    def __post_init__(self) -> None:
        if self.spokes < 0:
            raise ConfigError(f"spokes: expected at least 0, found {self.spokes}")


@dataclass(frozen=True, kw_only=True)
class Leg:
    type: Literal["leg"] = "leg"
    joints: tuple[str, ...] = ()
    size: tuple[float, int] = (1.0, 2)


@dataclass(frozen=True, kw_only=True)
class Machine:
    name: str
    part: Wheel | Leg
    spare: Wheel | None = None
    more: dict[str, Wheel | Leg] = field(default_factory=dict)
    gains: list[float] = field(default_factory=list)
    limit: float | None = 1.0
    mark: int | str = 0
    mode: Literal["slow", "fast"] = "slow"
    on: bool = False


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=6)
wheels = st.builds(Wheel, radius=finite, spokes=st.integers(0, 99))
legs = st.builds(Leg, joints=st.lists(words).map(tuple), size=st.tuples(finite, st.integers()))
machines = st.builds(
    Machine, name=words, part=wheels | legs, spare=st.none() | wheels, more=st.dictionaries(words, wheels | legs),
    gains=st.lists(finite), limit=st.none() | finite, mark=st.integers() | words,
    mode=st.sampled_from(["slow", "fast"]), on=st.booleans(),
)  # fmt: skip


@given(machines)
def test_round_trip_through_plain_data_and_yaml(machine: Machine) -> None:
    plain = to_dict(machine)
    assert from_dict(Machine, plain) == machine
    assert from_dict(Machine, yaml.safe_load(yaml.safe_dump(plain))) == machine


GOOD = {"name": "m", "part": {"type": "wheel", "radius": 1}, "more": {"left": {"type": "leg"}}}


def test_an_int_is_a_float_but_nothing_else_is_converted() -> None:
    machine = from_dict(Machine, GOOD)
    assert isinstance(machine.part, Wheel) and type(machine.part.radius) is float
    assert isinstance(machine.more["left"], Leg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part.spoke": 3}, r"part\.spoke: unknown key; choices: radius, spokes, type"),
        ({"part.spokes": 2.5}, r"part\.spokes: .*int.*2\.5"),
        ({"part.spokes": True}, r"part\.spokes: .*int.*True"),
        ({"part.spokes": -1}, r"part\.spokes: expected at least 0, found -1"),
        ({"part.radius": "1"}, r"part\.radius: .*float.*'1'"),
        ({"part.radius": True}, r"part\.radius: .*float.*True"),
        ({"part.radius": None}, r"part\.radius: .*float.*None"),
        ({"part.type": "wing"}, r"part\.type: found 'wing', expected one of leg, wheel"),
        ({"part": "wheel"}, r"part.*leg, wheel"),
        ({"part": None}, r"part: .*None"),
        ({"spare": {"type": "leg"}}, r"spare"),
        ({"spare": {"radius": 1, "x": 2}}, r"spare\.x: unknown key; choices: radius, spokes, type"),
        ({"more.left.joints": ["a", 3]}, r"more\.left\.joints\[1\]: .*str.*3"),
        ({"more.left.joints": "ab"}, r"more\.left\.joints: expected a list, found 'ab'"),
        ({"more.left.size": [1.0]}, r"more\.left\.size: expected 2 values"),
        ({"more": [1]}, r"more: expected a group of keys"),
        ({"gains": [1, "x"]}, r"gains\[1\]: .*float.*'x'"),
        ({"limit": "low"}, r"limit: .*float.*'low'"),
        ({"mark": 1.5}, r"mark: .*int or str.*1\.5"),
        ({"mode": "medium"}, r"mode: expected one of fast, slow, found 'medium'"),
        ({"on": 1}, r"on: .*bool.*1"),
        ({"name": 3}, r"name: .*str.*3"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    data = to_dict(GOOD)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        from_dict(Machine, data)
    assert "\n" not in str(caught.value)


def test_a_tag_that_cannot_be_a_tag_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"part\.type: .*leg, wheel"):
        from_dict(Machine, {"name": "m", "part": {"type": ["wheel"], "radius": 1}})


def test_missing_key_and_wrong_top() -> None:
    with pytest.raises(ConfigError, match=r"^part\.radius: missing"):
        from_dict(Machine, {"name": "m", "part": {"type": "wheel"}})
    with pytest.raises(ConfigError, match=r"^\(top\): expected a group of keys"):
        from_dict(Machine, [1])


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a.b=3", {"a": {"b": 3, "c": 2}}),
        ("a.b=null", {"a": {"b": None, "c": 2}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": 2}}),
        ("a.b=[1, two]", {"a": {"b": [1, "two"], "c": 2}}),
        ("d.e.f=true", {"a": {"b": 1, "c": 2}, "d": {"e": {"f": True}}}),
    ],
)
def test_override(assignment: str, expected: dict[str, object]) -> None:
    data = {"a": {"b": 1, "c": 2}}
    assert override(data, [assignment]) == expected
    assert data == {"a": {"b": 1, "c": 2}}, "the original must stay as it is"


@pytest.mark.parametrize("assignment", ["a.b", "=3", "a.b.c=3", "a.b=[1", "a.b={x"])
def test_a_bad_override_is_named(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"a": {"b": 1}}, [assignment])
    assert assignment in str(caught.value) and "\n" not in str(caught.value)


def test_a_learning_rate_may_be_written_as_people_write_it() -> None:
    assert load_recipe("mini_vla", ["training.learning_rate=1e-3"]).training.learning_rate == 1e-3


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [", b"[1]", b""])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


RECIPES = sorted((Path(__file__).parents[2] / "config" / "train").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_load_and_round_trip(file: Path) -> None:
    recipe = load_recipe(file.stem)
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert load_recipe(str(file)) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batchsize=3"], r"training\.batchsize: unknown key; choices: .*batch_size"),
        (["model.head.type=guess"], r"model\.head\.type: found 'guess', expected one of chunker, diffusion, "),
        (["model.vision.pooling=max"], r"model\.vision\.pooling: expected one of average, spatial_softmax"),
        (["training.steps=0"], r"training\.steps: expected at least 1, found 0"),
        (["execution.steps=9"], r"execution\.steps: .*model\.horizon \(8\), found 9"),
        (["observation.images.image.height=0"], r"observation\.images\.image\.height: .*1x1"),
        (["training.learning_rate=.nan"], r"training\.learning_rate: "),
        (["training.ema_decay=1.5"], r"training\.ema_decay: "),
        (["training.image_shift=-2"], r"training\.image_shift: "),
        (["model.horizon=-1", "execution.steps=1"], r"(model\.horizon|execution\.steps): "),
        (["model.d_model=64"], r"model\.(vision\.)?d_model: "),
    ],
)
def test_a_bad_recipe_key_is_named_with_the_file(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mini_vla\.yaml: {message}") as caught:
        load_recipe("mini_vla", overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"'maxi_vla'; choices: .*mini_vla.*mini_vla_seed"):
        load_recipe("maxi_vla")
