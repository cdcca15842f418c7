"""The experiment beyond the demonstrations: what is done stays done, and the report's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_core.cli import main
from vla_core.config import ConfigError, from_dict, load_yaml
from vla_core.contract import RobotContract
from vla_core.evaluation.plan import EvaluationError
from vla_core.experiments import beyond_demos
from vla_core.experiments.beyond_demos import BeyondDemos, Experiment
from vla_core.experiments.report import write_report
from vla_core.resources import share

OPTIONS = BeyondDemos(task="reach-v3", trainings=2, episodes=4)
OUTCOMES = {
    ("imitation", 0): [1, 0, 0, 0], ("imitation", 1): [1, 1, 0, 0],
    ("planning", 0): [1, 1, 0, 0], ("planning", 1): [1, 1, 0, 0],
    ("ppo", 0): [1, 1, 1, 0], ("ppo", 1): [1, 1, 1, 1],
}  # fmt: skip
STAGES = ("imitation", "practice", "practice_data", "world", "ppo")


def outcomes(method: str, k: int) -> dict[str, Any]:
    return {"method": method, "seconds": 1.0, "episodes": [
        {"seed": 10_000 + i, "success": bool(ok), "steps": 50, "inference_ms_p50": 2.0}
        for i, ok in enumerate(OUTCOMES[method, k])
    ]}  # fmt: skip


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of an experiment that was done."""
    (tmp_path / "demonstrations.cost.json").write_text(json.dumps({"steps": 500, "seconds": 6.0}))
    for k in (0, 1):
        folder = tmp_path / f"seed{k}"
        folder.mkdir()
        for number, stage in enumerate(STAGES):
            cost = {"steps": 1000 * number, "seconds": 60.0 * (k + 1)}
            (folder / f"{stage}.cost.json").write_text(json.dumps(cost))
        for method in ("imitation", "planning", "ppo"):
            (folder / f"{method}.json").write_text(json.dumps(outcomes(method, k)))
        (folder / "world_returns.json").write_text(json.dumps({"episodes": 9, "observed": 0.95 - 0.1 * k,
                                                               "imagined": 0.7}))  # fmt: skip
        (folder / "ppo_history.json").write_text(json.dumps([{"steps": 10, "success": 0.5}]))
    return tmp_path


def test_the_report_has_success_gain_and_cost_of_each_method(done: Path) -> None:
    record = write_report(OPTIONS, RobotContract.load("metaworld_sawyer"), done)
    assert json.loads((done / "report.json").read_text()) == json.loads(json.dumps(record)) and not record["missing"]
    methods = record["methods"]
    assert [methods[name]["success_rate"] for name in methods] == [3 / 8, 4 / 8, 7 / 8]
    assert methods["planning"]["gain"] == pytest.approx(1 / 8) and not methods["planning"]["gained_enough"]
    assert methods["ppo"]["gain"] == pytest.approx(4 / 8) and methods["ppo"]["gained_enough"]
    low, high = methods["ppo"]["gain_ci95"]
    paired = np.mean([np.subtract(OUTCOMES["ppo", k], OUTCOMES["imitation", k]) for k in (0, 1)], axis=0)
    assert paired.min() <= low <= 0.5 <= high <= paired.max()
    assert methods["planning"]["environment_steps"] == 1000 + 2000 + 3000
    assert methods["ppo"]["minutes"] == pytest.approx(1.5) and methods["planning"]["minutes"] == pytest.approx(4.5)
    assert record["reward_prediction"]["rank_correlation"] == [0.95, pytest.approx(0.85)]
    assert not record["reward_prediction"]["correlated_enough"]
    page = (done / "report.html").read_text()
    assert "0.88 (0.53 to 0.98)" in page and "+50" in page and "0.950, 0.850" in page


def test_what_is_not_done_yet_is_missing(done: Path) -> None:
    (done / "seed1" / "ppo.json").unlink()
    record = write_report(OPTIONS, RobotContract.load("metaworld_sawyer"), done)
    assert record["missing"] == ["ppo"]
    assert record["methods"]["ppo"]["gain"] == pytest.approx(2 / 4), "against the imitation of the same training"
    assert "Not done yet: ppo" in (done / "report.html").read_text()


class Made(Experiment):
    """Stages that leave a mark; ``fails`` is one that is interrupted in its middle."""

    fails = ""

    def _make(self, place: Path, *rest: Any) -> int:
        self.calls.append(f"{place.parent.name}/{place.name}" if "seed" in place.parent.name else place.name)
        place.mkdir()
        if place.name == self.fails:
            raise KeyboardInterrupt
        (place / "whole").touch()
        return 7

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[str] = []
        for name in ("_demonstrate", "_to_imitate", "_imitate"):
            setattr(self, name, self._make)
        for name in ("_practise", "_reinforce", "_model"):
            setattr(self, name, lambda source, place, k: self._make(place))
        setattr(self, "_convert", lambda places, place, spec, failed: self._make(place))  # noqa: B010 - mypy's sake


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def evaluated(place: Path, *rest: Any) -> list[dict[str, Any]]:
        found.append(f"{place.parent.name}/{place.name}")
        return list(outcomes("imitation", 0)["episodes"])

    monkeypatch.setattr(beyond_demos, "evaluated", evaluated)
    return found


def test_what_is_done_is_not_done_again(tmp_path: Path, evaluations: list[str]) -> None:
    first = Made(OPTIONS, tmp_path / "out")
    first.fails = "world"
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.calls == ["demonstrations", "dataset", "seed0/imitation", "seed1/imitation", "seed0/practice",
                           "seed0/practice_data", "seed0/world"]  # fmt: skip
    second = Made(OPTIONS, tmp_path / "out")
    second.run()
    assert second.calls == ["seed0/world", "seed1/practice", "seed1/practice_data", "seed1/world", "seed0/ppo",
                            "seed1/ppo"]  # fmt: skip
    assert evaluations == ["seed0/imitation", "seed1/imitation", "seed0/planner.yaml", "seed1/planner.yaml",
                           "seed0/ppo", "seed1/ppo"]  # fmt: skip
    third = Made(OPTIONS, tmp_path / "out")
    assert third.run()["missing"] == [] and third.calls == [] and len(evaluations) == 6


def test_another_experiment_does_not_go_on_in_the_folder(tmp_path: Path, evaluations: list[str]) -> None:
    Made(BeyondDemos(task="reach-v3", trainings=1, methods=("imitation",)), tmp_path / "out").run()
    Made(BeyondDemos(task="reach-v3", trainings=2), tmp_path / "out").run()  # more of the same
    with pytest.raises(EvaluationError, match="task was 'reach-v3'; remove the folder"):
        Made(BeyondDemos(task="push-v3", trainings=2), tmp_path / "out").run()


def test_the_shipped_settings_are_whole_and_bad_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = from_dict(BeyondDemos, load_yaml(share("config/experiments") / "beyond_demos.yaml"))
    assert (shipped.demonstrations, shipped.trainings, shipped.episodes) == (10, 3, 50)
    with pytest.raises(ConfigError, match="methods: expected imitation and some of planning, ppo"):
        BeyondDemos(methods=("ppo",))
    assert main(["experiment", "beyond_demos", "trainings=0"]) == 1
    assert "trainings: expected at least 1, found 0" in capsys.readouterr().err
