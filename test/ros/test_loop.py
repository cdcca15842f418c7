"""The loop itself, on real processes: live against bag, over ROS against one process, and the whole demo, tiny."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_core.data.bag import find_bags
from vla_core.evaluation.closed_loop import evaluate
from vla_core.evaluation.parity import ParityError, compare
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.metaworld import MetaWorld, instruction_for
from vla_ros import cli
from vla_ros.graph import load_graph
from vla_ros.up import run_graph

REPORT_KEYS = {
    "success_rate", "success_ci95", "episodes", "baseline_success_rate", "mean_steps", "train_seconds",
    "inference_ms_p50", "inference_ms_p99", "observation_to_command_ms_p50", "observation_to_command_ms_p99",
    "replay_mae", "parity_max_abs_diff", "frames", "bag_bytes", "versions",
}  # fmt: skip


def run(name: str, **arguments: Any) -> None:
    lines: list[str] = []
    status = run_graph(load_graph(name), arguments, write=lines.append)
    assert status == 0, "\n".join(lines)


def test_live_inputs_equal_those_of_the_recorded_bag_bit_by_bit(domain: int, checkpoint: Path, tmp_path: Path) -> None:
    run("record_policy", checkpoint=str(checkpoint), output=str(tmp_path / "bags"), log_dir=str(tmp_path),
        episodes=2, max_steps=40)  # fmt: skip
    policy = CheckpointPolicy.load(checkpoint)
    found = [compare(tmp_path / "inputs.safetensors", bag, policy) for bag in find_bags([tmp_path / "bags"])]
    assert [parity.compared for parity in found] == [10, 10], "one inference for every four of 40 steps"
    assert [parity.inputs_max_abs_diff for parity in found] == [0.0, 0.0]
    assert [parity.chunks_max_abs_diff for parity in found] == [0.0, 0.0]


def test_parity_notices_another_picture(domain: int, checkpoint: Path, tmp_path: Path) -> None:
    run("record_policy", checkpoint=str(checkpoint), output=str(tmp_path / "bags"), log_dir=str(tmp_path),
        episodes=1, max_steps=8)  # fmt: skip
    from safetensors.numpy import load_file, save_file

    log = tmp_path / "inputs.safetensors"
    arrays = load_file(log)
    pixels = arrays["image.image"].copy()
    pixels[0, 0, 3, 3] += 1 / 255
    save_file({**arrays, "image.image": pixels}, log)
    (bag,) = find_bags([tmp_path / "bags"])
    assert compare(log, bag, CheckpointPolicy.load(checkpoint)).inputs_max_abs_diff == pytest.approx(1 / 255, rel=1e-4)
    arrays["stamp_ns"] = arrays["stamp_ns"] + 10**15
    save_file(arrays, log)
    with pytest.raises(ParityError, match="none of the 2 logged stamps"):
        compare(log, bag, CheckpointPolicy.load(checkpoint))


def test_lockstep_over_ros_equals_the_evaluation_in_one_process(domain: int, checkpoint: Path, tmp_path: Path) -> None:
    run("push_demo", checkpoint=str(checkpoint), clock="lockstep", inference="synchronous", episodes=1,
        max_steps=40, seed=123, log_dir=str(tmp_path), results=str(tmp_path / "episodes.json"))  # fmt: skip
    from safetensors.numpy import load_file

    over_ros = load_file(tmp_path / "inputs.safetensors")
    core = PolicyCore(CheckpointPolicy.load(checkpoint))
    states: list[np.ndarray] = []
    predict = core.policy.predict

    def noting(observation: Any) -> Any:
        states.append(observation.state)
        return predict(observation)

    # The sampling noise follows the stamps: shift them to those of the run over ROS, which starts at one second.
    core.policy.predict = noting  # type: ignore[method-assign]
    world = MetaWorld("push-v3", "corner2", core.contract)
    from vla_core.evaluation.closed_loop import run_episode

    run_episode(world, core, instruction_for("push-v3"), 123, 40, start_ns=10**9)
    normalized = core.policy.checkpoint.normalizer.normalize("state", np.stack(states))
    np.testing.assert_array_equal(normalized, over_ros["state"])
    assert len(evaluate(world, core, "push", range(2), 8)) == 2


def test_an_unanswered_simulator_says_who_is_missing(domain: int, tmp_path: Path, capfd: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vla_ros.simulator_node", "--ros-args", "-p", "clock:=lockstep",
         "-p", "wait_for:=[policy]", "-p", "wait_timeout_s:=1.0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: waited 1 s in vain for policy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "fly-v3"], ["fly-v3", "push-v3"]),
        (["--camera", "moon"], ["moon", "corner2"]),
        (["--recipe", "huge"], ["huge", "mini_vla"]),
        (["model.head.stepz=3"], ["model.head.stepz", "train_steps"]),
    ],
)
def test_the_demo_refuses_bad_names_at_once(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["vla", "demo", "--out", str(out), *arguments])
    assert cli.main() == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert not out.exists()


def test_the_demo_empties_no_folder_but_its_own(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr("sys.argv", ["vla", "demo", "--out", str(tmp_path)])
    assert cli.main() == 1
    assert "holds something else than an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").is_file()


def test_the_whole_demo_tiny(domain: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", [
        "vla", "demo", "--out", str(out), "--episodes", "2", "--held-out-episodes", "1", "--evaluation-episodes", "1",
        "--realtime-episodes", "1", "--max-steps", "40", "--baseline-steps", "5", "training.steps=10",
        "training.batch_size=8",
    ])  # fmt: skip
    assert cli.main() == 0
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["episodes"] == 1 and report["demonstrations"] == 2 and 80 < report["frames"] < 200
    assert report["parity_max_abs_diff"] == 0.0 and report["parity_compared"] == 20
    for name in ("inference_ms", "observation_to_command_ms"):
        median, most = report[f"{name}_p50"], report[f"{name}_p99"]
        # Realtime: on a busy machine every picture may be too old when it comes, and the report must say so.
        assert (median is None and most is None) or most >= median > 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and page.count("data:image/gif;base64,") == 1
    assert not re.search(r'(src|href)="?(https?:|/|\.)', page), "the page must be self-contained"
    assert list((out / "tensorboard").rglob("events.out.*"))
    assert json.loads((out / "live" / "live" / "episodes.json").read_text())["episodes"][0]["steps"] <= 40


@pytest.mark.parametrize(("parameter", "least"), [("seed:=-1", 0), ("episodes:=0", 1), ("camera_size:=-1", 0)])
def test_the_simulator_refuses_numbers_out_of_range(domain: int, parameter: str, least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vla_ros.simulator_node", "--ros-args", "-p", parameter],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    name, _, found = parameter.partition(":=")
    assert done.stderr.strip().splitlines() == [f"error: parameter {name} is {found}; expected at least {least}"]
