"""The command line: one line on stderr and status 1 for every mistake of its user, and nothing half-made left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vla_core.checkpoint import PolicyConfig
from vla_core.cli import main
from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.data.bag import BagWriter
from vla_core.data.convert import convert
from vla_core.data.dataset import load
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import CONTRACT, SPEC, START, arm, checkpoint, recipe, stream_messages, write_bag


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made(place: Path) -> Path:
    """A bag, a recipe, a dataset and a checkpoint of the toy robot."""
    write_bag(place / "bags" / "one", stream_messages(20))
    write_bag(place / "bags" / "two", stream_messages(15, seed=1))
    (place / "toy.yaml").write_text(yaml.safe_dump(to_dict(recipe(steps=4))))
    convert([place / "bags" / "one"], place / "set", SPEC)
    checkpoint().save(place / "policy")
    return place


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail as a user's mistake does; returns the line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 1
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ") and "Traceback" not in err
        return lines[0]

    return run


def test_the_loop_of_a_user(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """convert, train, replay and inspect on the toy robot, as typed."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    assert "2 episodes, 35 ticks" in run("convert", "bags", "--out", "data", "--recipe", "toy.yaml")
    assert [e.bag for e in load(made / "data").episodes] == ["one", "two"]
    run("train", "toy.yaml", "training.steps=6", "--dataset", "data", "--validation", "set", "--out", "run/policy")
    assert any((made / "run" / "policy.training" / "tensorboard").iterdir())
    assert CheckpointPolicy.load(made / "run" / "policy").checkpoint.config.provenance["recipe"] == "toy.yaml"
    run("replay", "run/policy", "bags/one", "--out", "replayed")
    figures = json.loads((made / "replayed" / "replay.json").read_text())
    assert figures["ticks"] == 20 and set(figures["mae_per_action"]) == {"shoulder", "elbow"}
    assert all((made / "replayed" / name).read_bytes()[:4] == b"\x89PNG" for name in ("traces.png", "errors.png"))
    expected = {
        "bags": ("one", "two", "arm/state", "toy, 100 Hz"),
        "data": ("35 frames", "camera: 8x6", "'lift it'"),
        "run/policy": ("parameters", "shoulder [rad/s]", "recipe: toy.yaml"),
    }
    for path, words in expected.items():
        text = run("inspect", path)
        assert all(word in text for word in words), text


def test_recipes(made: Path, fails: Fails) -> None:
    common = ("--dataset", "set", "--out", "new")
    assert "'maxi'; choices: drive, driving, mini_vla, " in fails("train", "maxi", *common)
    line = fails("train", "mini_vla", "training.stepz=3", *common)
    assert "training.stepz: unknown key; choices: accumulate, " in line
    assert "model.head.type: found 'x'" in fails("train", "mini_vla", "model.head.type=x", *common)
    assert "expected key=value" in fails("train", "mini_vla", "steps", *common)
    (made / "bad.yaml").write_text("observation: [")
    assert "bad.yaml" in fails("train", "bad.yaml", *common)
    (made / "bad.yaml").write_bytes(b"\xff\x00")
    assert "bad.yaml" in fails("train", "bad.yaml", *common)
    assert "'maxi'" in fails("convert", "bags", "--out", "new", "--recipe", "maxi")
    assert not (made / "new").exists()


@pytest.mark.parametrize("override", ["training.steps=[", "model.head.type=[x]"])
def test_overrides_that_are_no_values(made: Path, fails: Fails, override: str) -> None:
    fails("train", "toy.yaml", override, "--dataset", "set", "--out", "new")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(made: Path, fails: Fails, device: str) -> None:
    line = fails("train", "toy.yaml", f"training.device={device}", "--dataset", "set", "--out", "new")
    assert device in line


def test_datasets(made: Path, fails: Fails) -> None:
    assert "nowhere/meta/info.json is missing" in fails("train", "toy.yaml", "--dataset", "nowhere", "--out", "new")
    assert "another observation" in fails("train", "mini_vla", "--dataset", "set", "--out", "new")
    line = fails("train", "toy.yaml", "--dataset", "set", "--validation", "nothing", "--out", "new")
    assert "nothing/meta/info.json is missing" in line
    assert not (made / "new").exists()


def test_an_output_that_cannot_be_written_is_an_error(made: Path, fails: Fails) -> None:
    (made / "file").write_text("x")
    assert "file" in fails("train", "toy.yaml", "--dataset", "set", "--out", "file/policy")


@pytest.mark.parametrize("out", ["set", "bags", "."])
def test_training_does_not_replace_what_is_no_checkpoint(made: Path, fails: Fails, out: str) -> None:
    """The dataset itself, the bags, the folder one stands in: said before hours of training."""
    assert out in fails("train", "toy.yaml", "--dataset", "set", "--out", out)
    assert (made / "bags" / "one" / "metadata.yaml").is_file()
    assert load(made / "set").frames == 20


def test_bags(made: Path, fails: Fails) -> None:
    out = ("--out", "new", "--recipe", "toy.yaml")
    assert "nowhere: no such folder" in fails("convert", "nowhere", *out)
    assert "no bag here" in fails("convert", "policy", *out)
    assert "image" in fails("convert", "bags", "--out", "new"), "the default recipe sees what the toy robot lacks"
    assert "set exists already" in fails("convert", "bags", "--out", "set", "--recipe", "toy.yaml")
    assert "'nobody'; choices: arm, carla, diff_drive, driving, " in fails(
        "convert", "bags", *out, "--contract", "nobody"
    )
    assert "the contracts disagree" in fails("convert", "bags", *out, "--contract", "metaworld_sawyer")
    (file,) = (made / "bags" / "two").glob("*.mcap")
    os.truncate(file, file.stat().st_size // 2)
    assert "two: truncated or damaged" in fails("convert", "bags", *out)
    shutil.rmtree(made / "bags" / "two")
    with BagWriter(made / "bags" / "two") as writer:
        writer.add_topic("arm/state", "sensor_msgs/msg/JointState")
    assert "two: empty" in fails("convert", "bags", *out)
    shutil.rmtree(made / "bags" / "two")
    writer = BagWriter(made / "bags" / "two")
    writer.add_topic("arm/state", "sensor_msgs/msg/JointState")
    writer.write("arm/state", START, arm(START, 0).data)
    writer.abort()
    assert "two: never closed" in fails("convert", "bags", *out)
    assert main(["inspect", "bags/two"]) == 0, "what a killed recorder left can be looked at"
    assert not (made / "new").exists()
    assert [path.name for path in made.glob(".*")] == [".new.partial"], "the other bag need not be read again"


def test_inspect(made: Path, fails: Fails) -> None:
    assert "nowhere: no such" in fails("inspect", "nowhere")
    assert "toy.yaml: neither" in fails("inspect", "toy.yaml")
    (made / "empty").mkdir()
    assert "empty: no bag" in fails("inspect", "empty")
    (made / "policy" / "statistics.json").unlink()
    assert "statistics.json missing" in fails("inspect", "policy")
    (made / "set" / "meta" / "info.json").write_text("{")
    assert "info.json: damaged" in fails("inspect", "set")


@pytest.mark.parametrize("command", ["evaluate", "replay"])
def test_checkpoints(made: Path, fails: Fails, command: str) -> None:
    more = ("bags/one", "--out", "new") if command == "replay" else ()
    assert "nowhere: not a checkpoint" in fails(command, "nowhere", *more)
    file = made / "policy" / "statistics.json"
    statistics = json.loads(file.read_text())
    del statistics["action"]
    file.write_text(json.dumps(statistics))
    assert "no statistics for 'action'; the checkpoint has: state" in fails(command, "policy", *more)
    file.unlink()
    assert "statistics.json missing" in fails(command, "policy", *more)
    assert not (made / "new").exists()


def test_tasks_and_cameras(made: Path, fails: Fails) -> None:
    assert "unknown task 'fly-v3'; choices: assembly-v3, " in fails("evaluate", "policy", "--task", "fly-v3")
    line = fails("evaluate", "policy", "--camera", "nose")
    assert "unknown camera 'nose'; choices: " in line and "corner2" in line


def test_a_policy_of_another_robot_is_not_let_loose_in_the_simulator(made: Path, fails: Fails) -> None:
    assert "Meta-World has no 'arm'" in fails("evaluate", "policy", "--episodes", "1")


@pytest.fixture
def sawyer(place: Path) -> Path:
    """An untrained policy for the simulated robot that sees a 16x16 picture, the hand and the instruction."""
    config = PolicyConfig(
        model=MiniVLAConfig(
            cameras=("image",), state_dim=4, action_dim=4, horizon=4, vocab_size=2, d_model=32,
            vision=TinyCNNConfig(d_model=32, channels=(8, 16)), head=MLPHeadConfig(hidden_dim=32),
        ),
        observation=ObservationSpec(
            images={"image": ImageSize(height=16, width=16)}, state=("hand",), instruction="instruction"
        ),
        normalization=Normalization(state="none", action="none"),
    )  # fmt: skip
    checkpoint(
        config=config, model=MiniVLA(config.model), normalizer=Normalizer(config.normalization, {}),
        tokenizer=WordTokenizer(), contract=RobotContract.load("metaworld_sawyer"),
    ).save(place / "sawyer")  # fmt: skip
    return place


def test_an_evaluation_in_the_simulator(sawyer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("evaluate", "sawyer", "--episodes", "2", "--max-steps", "24", "--seed", "30")
    assert main([*common, "--out", "new/figures.json"]) == 0
    assert "success 0.00 (95 % interval 0.00 to 0.66) over 2 episodes of push-v3" in capsys.readouterr().out
    figures = json.loads((sawyer / "new" / "figures.json").read_text())
    (run,) = figures["runs"]
    assert {episode["instruction"] for episode in run["episodes"]} == {"push the puck to the goal"}
    assert run["success_rate"] == 0 and run["success_ci95"] == pytest.approx([0, 0.6576], abs=1e-4)
    assert run["delay_steps"] == 0 and run["execution"]["strategy"] == "receding"
    assert [(e["seed"], e["success"], e["steps"]) for e in run["episodes"]] == [(30, False, 24), (31, False, 24)]
    assert main([*common, "--black-camera", "--camera", "topview", "--task", "reach-v3", "--instruction", "stay"]) == 0
    assert "reach-v3" in capsys.readouterr().out


def test_a_table_over_strategies_and_delays(sawyer: Path, fails: Fails) -> None:
    common = ("evaluate", "sawyer", "--episodes", "1", "--max-steps", "12")
    table = ("--strategy", "receding", "blend", "--delay-steps", "0", "1", "--execution", "steps=2")
    assert main([*common, *table, "--out", "table.json"]) == 0
    runs = json.loads(Path("table.json").read_text())["runs"]
    rows = [(run["execution"]["strategy"], run["execution"]["steps"], run["delay_steps"]) for run in runs]
    assert rows == [("receding", 2, 0), ("receding", 2, 1), ("blend", 2, 0), ("blend", 2, 1)]
    assert all(run["boundary_jump"] is not None and run["roughness"] > 0 for run in runs)
    assert "the head 'mlp' cannot be guided" in fails(*common, "--strategy", "rtc")
    assert "execution.beta: unknown key" in fails(*common, "--execution", "beta=5")


@pytest.mark.parametrize(("option", "value"), [("--episodes", "0"), ("--episodes", "-3"), ("--max-steps", "0")])
def test_an_evaluation_of_nothing_is_refused(sawyer: Path, option: str, value: str) -> None:
    try:
        status = main(["evaluate", "sawyer", "--episodes", "1", "--max-steps", "2", option, value])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status != 0


def test_replay_on_a_bag_of_another_robot(made: Path, fails: Fails) -> None:
    lacking = [m for m in stream_messages(10) if m.topic != "arm/state"]
    write_bag(made / "other", lacking, CONTRACT)
    assert "'arm/state'" in fails("replay", "policy", "other", "--out", "new")
    assert not (made / "new").exists()


def test_assignments_may_follow_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "mini_vla", "--dataset", str(tmp_path), "--out", str(tmp_path / "out"), "model.horizn=3"]
    assert main(arguments) == 1
    assert "model.horizn: unknown key" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--stepz", "3"])
    assert stop.value.code == 2 and "--stepz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path), str(tmp_path), "--out", "new", "a=b"])
    assert "unrecognized arguments: a=b" in capsys.readouterr().err


def test_negative_seeds_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "policy", "--seed", "-1"])
    assert "invalid not_negative value" in capsys.readouterr().err
    assert main(["train", "toy.yaml", "--dataset", "set", "--out", "of_seed", "training.seed=-1"]) == 1
    assert "seed: expected at least 0, found -1" in capsys.readouterr().err
