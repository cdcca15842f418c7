"""Evaluations: the same in any number of processes, repeatable from their file, and honest about what went wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_core.checkpoint import Checkpoint, PolicyConfig, fingerprint
from vla_core.cli import main
from vla_core.errors import VlaError
from vla_core.evaluation.closed_loop import closed_loop_success, evaluate, run_episode
from vla_core.evaluation.ensemble import Ensemble
from vla_core.evaluation.plan import EvaluationError, Wanted, make_plan
from vla_core.evaluation.results import differences, load_results
from vla_core.evaluation.runner import Outcome, run_plan
from vla_core.evaluation.suites import Assignment, assignments
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA
from vla_core.observation.builder import Observation
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.worlds import make_world

from . import toy_world
from .helpers import CONTRACT, SPEC, checkpoint, with_stream

SAMPLED = DiffusionHeadConfig(hidden_dim=32, train_steps=20, inference_steps=3)  # outcomes hang on the sampling noise


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two trainings of one policy, and the toy's world installed."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        checkpoint(SAMPLED).save(tmp_path / name)
    with toy_world.installed(tmp_path / "site", monkeypatch):
        yield tmp_path


def timeless(record: Any) -> Any:
    """A results record without what depends on the clock, and the command line."""
    if isinstance(record, dict):
        return {key: timeless(value) for key, value in record.items() if key not in ("timing", "command")}
    return [timeless(value) for value in record] if isinstance(record, list) else record


def run(*arguments: str, out: str = "out.json") -> tuple[int, Any]:
    status = main(["evaluate", *arguments, "--out", out])
    return status, json.loads(Path(out).read_text())


COMMON = ("--task", "toy:lift", "toy:drop", "--episodes", "4", "--seed", "0")


def test_the_number_of_processes_does_not_change_the_results(place: Path) -> None:
    options = (*COMMON, "--strategy", "receding", "blend", "--delay-steps", "0", "1", "--execution", "steps=2")
    status, alone = run("one", "two", *options)
    assert status == 0 and alone["timing"]["workers"] == 1
    status, together = run("one", "two", *options, "--workers", "2")
    assert status == 0 and together["timing"]["workers"] == 2
    assert timeless(alone) == timeless(together)
    assert len(alone["runs"]) == 8 and all(len(row["episodes"]) == 8 for row in alone["runs"])
    episodes = [episode for row in alone["runs"] for episode in row["episodes"]]
    assert len({episode["roughness"] for episode in episodes}) > 10, "the figures compared are not all the same"
    assert {True, False} == {episode["success"] for episode in episodes}


def test_an_episode_is_the_same_alone_and_after_others(place: Path) -> None:
    world, core = make_world("toy:lift", CONTRACT), PolicyCore(CheckpointPolicy.load("one"))
    together = evaluate(world, core, "lift it", [3, 8, 5], 12, delay_steps=1)
    alone = run_episode(world, PolicyCore(CheckpointPolicy.load("one")), "lift it", 5, 12, delay_steps=1)
    assert dataclasses.replace(together[2], inference_ms=()) == dataclasses.replace(alone, inference_ms=())
    assert len(alone.inference_ms) == len(together[2].inference_ms) > 1


def test_a_result_can_be_repeated_from_its_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, before = run("one", *COMMON, "--instructions", "canonical", "--black-camera")
    assert before["command"][:2] == ["vla", "evaluate"] and before["versions"]["torch"] == torch.__version__
    (member,) = before["plan"]["entries"][0]["members"]
    assert member["fingerprint"] == fingerprint("one")
    capsys.readouterr()
    assert main(["evaluate", "--repeat", "out.json", "--out", "again.json"]) == 0
    assert "identical: all 8 episodes of out.json ended as before" in capsys.readouterr().out
    assert timeless(json.loads(Path("again.json").read_text())) == timeless(before)

    # A checkpoint that has moved may be named; another one is refused.
    os.rename("one", "moved")
    assert main(["evaluate", "--repeat", "out.json"]) == 1
    assert "one: not a checkpoint" in capsys.readouterr().err
    assert main(["evaluate", "moved", "--repeat", "out.json"]) == 0
    assert main(["evaluate", "two", "--repeat", "out.json"]) == 1
    assert f"two: not the checkpoint of this evaluation, whose fingerprint is {fingerprint('moved')}" in (
        capsys.readouterr().err
    )
    config = json.loads(Path("moved/config.json").read_text())
    config["execution"]["steps"] = 3
    Path("moved/config.json").write_text(json.dumps(config))
    assert main(["evaluate", "moved", "--repeat", "out.json"]) == 1
    assert "these files differ: config.json" in capsys.readouterr().err


def test_what_ended_otherwise_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, record = run("one", *COMMON)
    episode = record["runs"][0]["episodes"][5]
    episode["success"], episode["steps"] = not episode["success"], 99
    record["versions"]["torch"] = "0.1"
    Path("out.json").write_text(json.dumps(record))
    assert main(["evaluate", "--repeat", "out.json"]) == 1
    told = capsys.readouterr().out
    assert "toy:drop, seed 1: success" in told and "steps 99 before" in told and "torch 0.1 then" in told
    assert told.count("seed") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format="v0"), "its format is 'v0', expected 'vla_ros_evaluation_v1'"),
        (lambda record: record["plan"].update(sedes=[1]), "plan.sedes: unknown key"),
        (lambda record: record["plan"].update(seeds=[1, 1]), "seeds: expected distinct ones"),
        (lambda record: record["plan"].update(tasks=[]), "tasks: expected at least one"),
    ],
)
def test_a_damaged_file_is_refused(place: Path, change: Callable[[Any], None], message: str) -> None:
    _, record = run("one", "--task", "toy:lift", "--episodes", "1", "--seed", "0")
    change(record)
    Path("out.json").write_text(json.dumps(record))
    with pytest.raises(EvaluationError, match=message):
        load_results(Path("out.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_episode_that_goes_wrong_is_named_and_the_others_are_kept(
    place: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With processes of their own, also one that exits and one that is killed."""
    seeds = range(11, 14) if workers == 1 else range(11, 19)
    arguments = ("one", "--task", "toy:lift", "--seed", "11", "--episodes", str(len(seeds)))
    status, record = run(*arguments, "--workers", str(workers))
    assert status == 1, "not all that was asked for was run"
    wrong = {13: "RuntimeError: the table broke (toy_world_plugin.py:"}
    if workers > 1:
        wrong |= {14: "its process ended with status 7", 15: "its process was ended by SIGKILL; was the memory full?"}
    (row,) = record["runs"]
    assert [episode["seed"] for episode in row["episodes"]] == list(seeds)
    for episode in row["episodes"]:
        assert ("error" in episode) == (episode["seed"] in wrong), episode
        assert wrong.get(episode["seed"], "") in episode.get("error", "")
    assert row["trials"] == len(seeds) - len(wrong)
    told = capsys.readouterr().out
    assert all(f"not run: toy:lift, seed {seed}: {words}" in told for seed, words in wrong.items())


def test_an_evaluation_of_which_nothing_runs_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "one", "--task", "toy:lift", "--seed", "13", "--episodes", "1", "--out", "o.json"]) == 1
    assert "no episode could be run: toy:lift, seed 13: RuntimeError: the table broke" in capsys.readouterr().err
    assert not Path("o.json").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_cannot_be_loaded_stops_everything_at_once(
    place: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observations = {("side" if name == "camera" else name): s for name, s in CONTRACT.observations.items()}
    config = checkpoint().config
    model = dataclasses.replace(config.model, cameras=("side",))
    spec = dataclasses.replace(SPEC, images={"side": SPEC.images["camera"]})
    checkpoint(
        config=PolicyConfig(model=model, observation=spec, execution=config.execution), model=MiniVLA(model).eval(),
        contract=dataclasses.replace(CONTRACT, observations=observations),
    ).save(place / "odd")  # fmt: skip
    assert main(["evaluate", "odd", *COMMON, "--workers", workers]) == 1
    assert "the toy has no camera 'side'; choices: camera" in capsys.readouterr().err
    assert main(["evaluate", "one", "--task", "toy:fly", "--workers", workers]) == 1
    assert "the toy has no task 'fly'" in capsys.readouterr().err


def test_ctrl_c_ends_all_processes(place: Path) -> None:
    command = [sys.executable, "-c", "import sys; from vla_core.cli import main; sys.exit(main(sys.argv[1:]))",
               "evaluate", "one", "--task", "toy:lift", "--seed", "1000", "--episodes", "2", "--workers", "2",
               "--out", "out.json"]  # fmt: skip
    process = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(pids := [int(path.name[4:]) for path in place.glob("pid_*")]) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "both workers have begun"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip() == "interrupted"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(place.glob("*out.json*"))


def test_several_trainings_are_put_together(place: Path) -> None:
    status, record = run("one", "two", *COMMON)
    assert status == 0
    assert [row["entry"] for row in record["runs"]] == ["training 0", "training 1"]
    (group,) = record["groups"]
    outcomes = {
        (row["entry"], task): [e["success"] for e in row["episodes"] if e["task"] == task]
        for row in record["runs"] for task in ("toy:lift", "toy:drop")
    }  # fmt: skip
    assert group["trainings"] == 2 and group["trials"] == 16
    for found in group["tasks"]:
        counted = [outcomes[entry, found["task"]] for entry in ("training 0", "training 1")]
        assert found["successes"] == np.sum(counted) and found["trials"] == 8
    means = [np.mean([outcomes[entry, task] for task in ("toy:lift", "toy:drop")])
             for entry in ("training 0", "training 1")]  # fmt: skip
    assert group["success_rate"] == pytest.approx(np.mean(means))
    assert "Student" in group["interval"] and "Wilson" in run("one", *COMMON)[1]["groups"][0]["interval"]


def test_checkpoints_of_different_models_are_not_averaged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint().save(place / "other")
    assert main(["evaluate", "one", "other", *COMMON]) == 1
    assert "other: its model differs from that of one" in capsys.readouterr().err


def test_an_ensemble_executes_the_mean_of_its_members_chunks(place: Path) -> None:
    seen: list[Observation] = []
    members = [CheckpointPolicy.load("one"), CheckpointPolicy.load("two")]
    ensemble = Ensemble(members)
    predict = ensemble.predict

    def noting(observation: Observation, *more: Any) -> Any:
        seen.append(observation)
        return predict(observation, *more)

    ensemble.predict = noting  # type: ignore[method-assign]
    run_episode(make_world("toy:lift", CONTRACT), PolicyCore(ensemble), "lift it", 0, 4)
    assert len(seen) == 2
    for observation in seen:
        chunks = [member.predict(observation).actions for member in members]
        np.testing.assert_allclose(predict(observation).actions, (chunks[0] + chunks[1]) / 2, rtol=1e-6)
        assert np.abs(chunks[0] - chunks[1]).max() > 1e-3


def test_a_comparison_is_one_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint().save(place / "mlp")
    status = main(["compare", "--checkpoint", "a=one", "both=one+two", "seeds=one,two", "mlp", *COMMON,
                   "--strategy", "receding", "rtc", "--execution", "steps=2", "--out", "table"])  # fmt: skip
    assert status == 0
    record = json.loads(Path("table/comparison.json").read_text())
    rows = [(group["group"], group["execution"]["strategy"], group["trainings"]) for group in record["groups"]]
    assert rows == [("a", "receding", 1), ("a", "rtc", 1), ("both", "receding", 1), ("both", "rtc", 1),
                    ("seeds", "receding", 2), ("seeds", "rtc", 2), ("mlp", "receding", 1)]  # fmt: skip
    assert len(record["left_out"]) == 1 and "mlp without rtc" in record["left_out"][0]
    text = Path("table/comparison.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| seeds (2 trainings) | rtc | 0 | 16 |")]
    (row,) = lines
    group = record["groups"][5]
    assert f"{group['success_rate']:.2f} ({group['success_ci95'][0]:.2f} to" in row
    assert f"{group['roughness']:.3f}" in row and "Left out: mlp without rtc" in text
    assert Path("table/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "left out: mlp without rtc" in capsys.readouterr().out
    # The same through `evaluate`: one path for both.
    _, alone = run("one", *COMMON, "--strategy", "receding", "rtc", "--execution", "steps=2")
    mine = timeless([row["episodes"] for row in record["runs"] if row["entry"] == "a"])
    assert mine == timeless([row["episodes"] for row in alone["runs"]])


def test_ensembles_need_members_that_fit(place: Path) -> None:
    config = checkpoint().config
    longer = dataclasses.replace(config.model, horizon=6)
    changed = dataclasses.replace(config, model=longer)
    checkpoint(config=changed, model=MiniVLA(longer).eval()).save(place / "long")
    tasks = [Assignment(world="toy:lift", instructions=("go",), max_steps=3)]
    with pytest.raises(EvaluationError, match=r"no ensemble of one and long: their model.horizon differ: 4 and 6"):
        make_plan([Wanted(label="x", trainings=(("one", "long"),))], tasks, [0])


def test_where_nothing_can_be_written_nothing_is_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for arguments in (
        ("evaluate", "one", *COMMON, "--out", "file/out.json"),
        ("evaluate", "one", *COMMON, "--out", "two"),
        ("compare", "--checkpoint", "one", *COMMON, "--out", "file"),
    ):
        assert main(list(arguments)) == 1
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and "succeeded" not in told.out


def test_a_strategy_that_no_policy_can_follow_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint().save(place / "mlp")
    assert main(["compare", "--checkpoint", "mlp", *COMMON, "--strategy", "rtc", "--out", "table"]) == 1
    assert "nothing is left to run: mlp without rtc: execution.strategy: found 'rtc'" in capsys.readouterr().err


def test_videos_show_every_picture_and_tell_the_outcome(place: Path) -> None:
    import av

    status, record = run("one", *COMMON, "--videos", "all")
    assert status == 0
    assert run("one", *COMMON, "--videos", "failed", "--videos-of", "failures")[0] == 0
    episodes = record["runs"][0]["episodes"]
    names = {
        f"toy_{e['task'][4:]}_seed{e['seed']}_{'success' if e['success'] else 'failure'}.mp4": e for e in episodes
    }  # fmt: skip
    assert {path.name for path in Path("all").iterdir()} == set(names)
    failed = {name for name in names if "failure" in name}
    assert {path.name for path in Path("failed").iterdir()} == failed and 0 < len(failed) < len(names)
    for name, episode in names.items():
        with av.open(f"all/{name}") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 25 and container.streams.video[0].name == "h264"
        # At 25 Hz of 100, and the last one after the last step.
        assert len(frames) == (episode["steps"] + 3) // 4 + 1
        assert frames[0].shape == (32, 48, 3)
    first = {(e["task"], e["seed"]): e for e in episodes}["toy:lift", 0]
    world = make_world("toy:lift", CONTRACT)
    world.reset(0)
    name = next(name for name, episode in names.items() if episode is first)
    with av.open(f"all/{name}") as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert np.abs(shown - world.render_for_people()).max() < 8, "the start, as H.264 keeps it"


def test_words_take_turns_over_the_seeds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vla_core.sim.instructions import MT10, instructions

    mt10 = assignments((), "mt10", "unseen")
    assert [task.world for task in mt10] == list(MT10) and len(mt10) == 10
    assert all(task.max_steps == 500 for task in mt10)
    for task in mt10:
        unseen = instructions(task.world, "unseen")
        assert [task.instruction(seed) for seed in range(len(unseen))] == list(unseen)
    assert assignments(("push-v3",), max_steps=7) == (
        Assignment(world="push-v3", instructions=("push the puck to the goal",), max_steps=7),
    )
    assert main(["evaluate", "one", "--suite", "mt11"]) == 1
    assert "unknown suite 'mt11'; choices: driving, libero_10" in capsys.readouterr().err
    assert main(["evaluate", "one", *COMMON, "--instructions", "unseen"]) == 1
    assert "toy:lift has no paraphrases" in capsys.readouterr().err
    assert main(["evaluate", "one", *COMMON, "--camera-size", "8"]) == 1
    assert "size: expected at least 16 pixels, found 8" in capsys.readouterr().err
    assert main(["evaluate", "one", *COMMON, "--camera", "nose"]) == 1
    assert "camera 'nose': toy:lift, toy:drop has the cameras that its contract names" in capsys.readouterr().err


def test_a_trainer_gets_the_success_of_a_policy_in_memory(place: Path) -> None:
    found = closed_loop_success(CheckpointPolicy.load("one"), "toy:drop", range(6), 10)
    _, record = run("one", "--task", "toy:drop", "--seed", "0", "--episodes", "6", "--max-steps", "10")
    assert found["trials"] == 6
    assert found["successes"] == record["runs"][0]["successes"]
    assert found["success_ci95"] == pytest.approx(record["runs"][0]["success_ci95"])


def test_pictures_that_no_chunk_is_inferred_from_are_not_asked_for(place: Path) -> None:
    """Only where a new one comes at every tick; the policy's answers do not change."""
    fast = with_stream("camera", rate_hz=100.0)
    made: Checkpoint = checkpoint(SAMPLED, contract=fast)
    execution = Execution(steps=3)
    world: Any = make_world("toy:lift", fast)
    lazy = run_episode(world, PolicyCore(CheckpointPolicy(made), execution), "lift it", 4, 7)
    assert lazy.steps == 7 and world.pictures == 3
    eager = make_world("toy:lift", fast)
    eager.steps_per_frame = 1
    state = eager.observe_state
    eager.observe_state = lambda stamp_ns: state(stamp_ns) + eager.observe_camera(stamp_ns)  # type: ignore[method-assign]
    result = run_episode(eager, PolicyCore(CheckpointPolicy(made), execution), "lift it", 4, 7)
    assert dataclasses.replace(result, inference_ms=()) == dataclasses.replace(lazy, inference_ms=())


def test_differences_compare_every_figure() -> None:
    episode = {"task": "t", "seed": 3, "success": True, "roughness": 0.25}
    before = {"runs": [{"entry": "a", "episodes": [episode]}], "versions": {"torch": "2"}}
    after = copy.deepcopy(before)
    assert differences(before, after) == []
    after["runs"][0]["episodes"][0]["roughness"] = 0.2500001
    assert differences(before, after) == ["a, t, seed 3: roughness 0.25 before, 0.2500001 now"]


def test_outcomes_come_in_the_plans_order_whatever_the_order_of_arrival(place: Path) -> None:
    from vla_core.evaluation.results import results

    plan, _ = make_plan([Wanted(label="x", trainings=(("one",),))],
                        [Assignment(world="toy:lift", instructions=("go",), max_steps=3)], range(5))  # fmt: skip
    outcomes: list[Outcome] = list(run_plan(plan))
    forth = results(plan, outcomes, [], {})
    assert timeless(results(plan, outcomes[::-1], [], {})) == timeless(forth)
    assert [episode["seed"] for episode in forth["runs"][0]["episodes"]] == list(range(5))


@pytest.mark.parametrize("workers", [1, 2])
def test_models_run_on_the_device_that_is_asked_for(place: Path, workers: int) -> None:
    plan, _ = make_plan([Wanted(label="x", trainings=(("one",),))],
                        [Assignment(world="toy:lift", instructions=("go",), max_steps=3)], range(2))  # fmt: skip
    assert all(outcome.result is not None for outcome in run_plan(plan, workers, None, "cpu"))
    with pytest.raises(VlaError, match=r"device 'cuda:99': torch .* has none here; choices: cpu"):
        list(run_plan(plan, workers, None, "cuda:99"))
