"""The driving demo's command line: what cannot work fails before minutes of work, and removes nothing of others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vla_core.cli import main
from vla_core.evaluation.ablations import Condition, load_ablations
from vla_ros.cli import _node_commands
from vla_ros.drive_demo import CONDITIONS, DRIVE_BYTES, DriveDemoError, _require_space, _words


def demo(*arguments: object) -> int:
    return main(["demo-drive", *map(str, arguments)], more=_node_commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "push-v3"], "--task push-v3: expected a world of the contract 'driving', such as driving:mixed"),
        (["--task", "driving:backwards"], "unknown kind of driving 'backwards'"),
        (["--recipe", "driv"], "no recipe 'driv'; choices: drive, driving"),
        (["training.stepz=3"], "training.stepz: unknown key"),
        (["--drives", "9999992"], "10000000 drives take about 1600000.0 GB with dataset and pictures"),
    ],
)
def test_bad_names_come_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(*arguments, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    assert demo("--out", tmp_path) == 1
    assert "holds something else than an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_the_disk_must_hold_it_and_an_earlier_demo_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "dataset").write_bytes(bytes(1000))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * DRIVE_BYTES - 1000))
    _require_space(tmp_path / "old", 2)
    with pytest.raises(DriveDemoError, match=r"2 drives take about 0\.3 GB .*, 0\.3 GB are free; .* --drives"):
        _require_space(tmp_path / "new" / "demo", 2)


def test_what_is_taken_away_is_known_and_told() -> None:
    known = load_ablations("drive").conditions
    assert [name for name in CONDITIONS if name not in known] == []
    assert _words(Condition(black=True, faults=("imu=dropped",))) == "black pictures, imu=dropped"
    assert _words(known["instruction_swapped"]) == "another instruction than the route's"
