"""Ablations on the toy robot: what is done is not done again, what changed is refused, and the table's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.config import ConfigError, to_dict
from vla_core.contract import RobotContract
from vla_core.evaluation import ablations as module
from vla_core.evaluation.ablations import Ablations, Study, load_ablations, summary
from vla_core.evaluation.metrics import wilson_interval
from vla_core.model.vla import MODEL_REGISTRY
from vla_core.sim.faults import Faults
from vla_core.sim.worlds import find
from vla_core.training.recipe import load_recipe

from . import toy_world
from .helpers import episodes, recipe, write_dataset

FILE: dict[str, Any] = {
    "recipe": "toy.yaml", "tasks": ["toy:lift"], "episodes": 3, "seed": 100, "trainings": 2, "reference": "all",
    "variants": {"all": [], "small": ["model.head.hidden_dim=8"]},
    "conditions": {"blind": {"black": True}},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe, a dataset and a file of ablations, and the toy's world installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(to_dict(recipe(steps=8, learning_rate=1e-2))))
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(FILE))
    write_dataset(tmp_path / "data", episodes())
    with toy_world.installed(tmp_path / "site", monkeypatch):
        yield tmp_path


def ablate(*arguments: str) -> dict[str, Any]:
    assert main(["ablate", "file.yaml", "--dataset", "data", "--out", "out", *arguments]) == 0
    found: dict[str, Any] = json.loads(Path("out/table.json").read_text())
    return found


def test_a_study_from_one_command(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ablate("--only", "small")  # the reference comes along: it is what the others are told from
    assert [row["name"] for row in first["rows"]] == ["all", "small"]
    assert first["missing"] == ["blind"]
    trained = {path: path.stat().st_mtime_ns for path in place.glob("out/*/seed*/checkpoint/model.safetensors")}
    assert len(trained) == 4

    table = ablate()
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["all", "small", "blind"] and table["missing"] == []
    assert [row["episodes"] for row in rows.values()] == [6, 6, 6]
    assert rows["all"]["difference"] is None
    for row in rows.values():
        counted = [e for path in row["evaluations"] for e in json.loads((place / "out" / path).read_text())["runs"][0]
                   ["episodes"]]  # fmt: skip
        assert row["successes"] == sum(e["success"] for e in counted)
        assert tuple(row["success_ci95"]) == wilson_interval(row["successes"], 6)
    for name in ("small", "blind"):
        expected = (rows[name]["successes"] - rows["all"]["successes"]) / 6
        assert rows[name]["difference"] == pytest.approx(expected)
    # Each is what it says: the variant's model, the trainings' seeds, the view that was black.
    loaded = Checkpoint.load(place / "out/small/seed1/checkpoint")
    assert loaded.config.model.head.hidden_dim == 8
    assert json.loads((place / "out/small/seed1/settings.json").read_text())["recipe"]["training"]["seed"] == 1
    views = [json.loads(path.read_text())["plan"]["entries"][0]["view"]["black"]
             for path in sorted(place.glob("out/all/seed0/evaluations/*.json"))]  # fmt: skip
    assert views == [True, False]  # blind, intact
    assert "| blind | 6 |" in (place / "out/table.md").read_text()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("everything is done")

    monkeypatch.setattr(module, "train", fail)
    monkeypatch.setattr(module, "run_plan", fail)
    assert ablate() == table
    capsys.readouterr()

    assert main(["ablate", "file.yaml", "seed=7", "--dataset", "data", "--out", "out"]) == 1
    assert "is of another checkpoint, or of other episodes" in capsys.readouterr().err


def test_an_interrupted_training_goes_on_and_a_changed_one_does_not(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = module.train

    def interrupted(*arguments: Any, **named: Any) -> Any:
        """One that stores its states, and is then killed."""
        known(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    assert main(["ablate", "file.yaml", "--dataset", "data", "--out", "out", "--only", "all"]) == 130
    assert not (place / "out/all/seed0/checkpoint").exists()
    capsys.readouterr()
    changed = ["overrides=[training.learning_rate=0.1]", "--only", "all"]
    assert main(["ablate", "file.yaml", "--dataset", "data", "--out", "out", *changed]) == 1
    assert "recipe.training.learning_rate was 0.01, now 0.1" in capsys.readouterr().err
    monkeypatch.setattr(module, "train", known)
    assert [row["name"] for row in ablate("trainings=1", "--only", "all")["rows"]] == ["all"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "none"}, "reference: no variant 'none'; choices: all, small"),
        ({"tasks": []}, "tasks: expected at least one, or a suite"),
        ({"trainings": 0}, "trainings: expected at least 1, found 0"),
        ({"variants": {"all": [], "a/b": []}}, "variants.a/b: a name is a folder's"),
        ({"conditions": {"intact": {}}}, "conditions.intact: this name is for the policy from which nothing"),
        ({"conditions": {"x": {"dark": True}}}, "conditions.x.dark: unknown key; choices: black, faults, instructions"),
    ],
)
def test_files_that_say_nonsense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}))
    with pytest.raises(ConfigError) as raised:
        load_ablations(str(path))
    assert message in str(raised.value)


def test_bad_names_fail_before_anything_is_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "blnd"], "no variant or condition 'blnd'; choices: all, blind, small"),
        (["variants={all: [], bad: [model.head.sizes=3]}"], "variant bad: "),
    ):
        assert main(["ablate", "file.yaml", *arguments, "--dataset", "data", "--out", "out"]) == 1
        assert message in capsys.readouterr().err
    assert main(["ablate", "none", "--dataset", "data", "--out", "out"]) == 1
    assert "no file of ablations 'none'; choices: drive" in capsys.readouterr().err
    assert not (place / "out").exists()


def episode(seed: int, success: bool, score: float | None, **details: float) -> dict[str, Any]:
    return {"task": "toy:lift", "seed": seed, "success": success, "score": score, "details": details}


def test_seeds_are_the_units_of_a_row() -> None:
    # Two trainings; a seed counts once, with the mean of its trainings.
    found = summary([episode(0, True, 1.0, km=1.0), episode(1, False, 0.2, km=3.0),
                     episode(0, False, 0.5, km=2.0), episode(1, True, 0.8, km=2.0)])  # fmt: skip
    assert found["by_seed"] == {("toy:lift", 0): 0.75, ("toy:lift", 1): 0.5}
    assert (found["score"], found["score_ci95"]) == (0.625, pytest.approx((0.5, 0.75)))
    assert (found["success_rate"], found["details"]) == (0.5, {"km": 2.0})


def test_without_a_score_success_is_what_counts() -> None:
    broken = {"task": "toy:lift", "seed": 2, "error": "the table broke"}
    found = summary([episode(0, True, None), episode(1, False, None), broken])
    assert (found["score"], found["errors"], found["episodes"]) == (None, 1, 2)
    assert found["by_seed"] == {("toy:lift", 0): 1.0, ("toy:lift", 1): 0.0}


def shipped() -> Sequence[str]:
    return [path.stem for path in sorted(Path(__file__).parents[2].glob("config/ablations/*.yaml"))]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_variant_is_a_model_that_differs(name: str) -> None:
    found = load_ablations(name)
    contract = RobotContract.load(find(found.tasks[0])[0].contract)
    recipes = {variant: found.recipe_of(variant) for variant in found.variants}
    kept: list[Any] = []
    for variant, changed in recipes.items():
        assert changed not in kept, f"{variant} is the same as another"
        kept.append(changed)
        config = changed.model_config(contract, vocab_size=50)
        MODEL_REGISTRY[config.type](config)
    assert recipes[found.reference] == load_recipe(found.recipe, [*found.overrides, "training.seed=0"])
    for condition in found.conditions.values():
        Faults.parse(condition.faults, contract)


def test_a_study_names_what_it_lacks(tmp_path: Path) -> None:
    found = Study(
        Ablations(recipe="mini_vla", tasks=("push-v3",), reference="all", variants={"all": ()}), tmp_path,
        lambda recipe: ([], None), ["data"],
    ).table()  # fmt: skip
    assert found["rows"] == [] and found["missing"] == ["all"]
    assert "Not done yet: all." in (tmp_path / "table.md").read_text()
