"""Checkpoints and datasets through a hub: the real client over HTTP against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from vla_core import hub
from vla_core.card import success_rows
from vla_core.checkpoint import FILES, Checkpoint
from vla_core.cli import main
from vla_core.config import to_dict
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.errors import VlaError
from vla_core.hub import HubError
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import checkpoint, episodes, recipe, write_dataset
from .hub_server import Hub, serve
from .test_checkpoint import observation

UNREACHABLE = "http://127.0.0.1:9"  # the port of `discard`, where nobody listens


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with an empty cache on this side; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serve() as running:
        turn_to(running.address, monkeypatch)
        yield running
        huggingface_hub.close_session()


def turn_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when the library is imported."""
    huggingface_hub.close_session()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


def test_a_policy_comes_back_as_it_went(remote: Hub) -> None:
    original = checkpoint()
    assert original.push_to_hub("user/policy") == f"{remote.address}/user/policy"
    files = remote.repositories["models/user/policy"].files("main")
    assert files is not None and sorted(files) == sorted([*FILES, "README.md"])
    back = Checkpoint.from_pretrained("user/policy")
    assert back.config == original.config and back.contract == original.contract
    expected = CheckpointPolicy(original).predict(observation()).actions
    assert CheckpointPolicy.load("user/policy").predict(observation()).actions.tobytes() == expected.tobytes()


def test_what_was_downloaded_runs_without_a_network(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint().push_to_hub("user/policy")
    first = hub.local_folder("user/policy")
    turn_to(UNREACHABLE, monkeypatch)
    assert hub.local_folder("user/policy") == first
    CheckpointPolicy.load("user/policy")
    with pytest.raises(HubError, match=r"user/other: no such folder here, and user/other is not in the local cache .*"
                                       r"cannot be reached .*: download it once") as caught:  # fmt: skip
        CheckpointPolicy.load("user/other")
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError, match=r"not uploaded: user/policy at http://127\.0\.0\.1:9"):
        checkpoint().push_to_hub("user/policy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.local_folder("user/policy") == first
    with pytest.raises(HubError, match="was not asked"):
        hub.local_folder("user/other")


def test_a_local_folder_goes_first(remote: Hub, tmp_path: Path) -> None:
    checkpoint().push_to_hub("user/policy")
    asked = len(remote.requests)
    checkpoint().save(tmp_path / "user" / "policy")
    assert hub.local_folder("user/policy") == Path("user/policy")
    assert hub.local_folder("nowhere") == Path("nowhere"), "no name of a repository: the caller says what it lacks"
    assert hub.local_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert len(remote.requests) == asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/nothing", r"no such folder here, and .* has no repository user/nothing that you may see"),
        ("user/policy@v9", "has no such revision"),
        ("user/a..b", "user/a..b at "),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(remote: Hub, name: str, message: str) -> None:
    checkpoint().push_to_hub("user/policy")
    with pytest.raises(HubError, match=message) as caught:
        Checkpoint.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_revision_is_a_part_of_the_name(remote: Hub) -> None:
    old = checkpoint()
    old.push_to_hub("user/policy")
    repository = remote.repositories["models/user/policy"]
    repository.refs["v1"] = repository.refs["main"]
    new = checkpoint()
    new.push_to_hub("user/policy")
    for name, expected in (("user/policy@v1", old), ("user/policy", new), ("user/policy@main", new)):
        found = CheckpointPolicy.load(name).predict(observation()).actions
        assert found.tobytes() == CheckpointPolicy(expected).predict(observation()).actions.tobytes()
    revision = Checkpoint.from_pretrained("user/policy", revision=repository.refs["v1"])
    assert CheckpointPolicy(revision).predict(observation()).actions.tobytes() == (
        CheckpointPolicy(old).predict(observation()).actions.tobytes()
    )


def test_nothing_but_a_checkpoints_files_travels(remote: Hub, tmp_path: Path) -> None:
    """Neither training states on the way up, nor somebody's pickle on the way down."""
    checkpoint().save(tmp_path / "policy")
    (tmp_path / "policy" / "training").mkdir()
    (tmp_path / "policy" / "training" / "state.safetensors").write_bytes(b"big")
    hub.push(tmp_path / "policy", "user/policy")
    repository = remote.repositories["models/user/policy"]
    assert set(repository.files("main") or {}) == {*FILES, "README.md"}
    repository.commit([{"key": "file", "value": {"path": "evil.pkl", "encoding": "base64", "content": "gASV"}}])
    assert not (hub.local_folder("user/policy") / "evil.pkl").exists()
    assert not any("evil.pkl" in request for request in remote.requests)


def test_what_is_gone_here_goes_there(remote: Hub) -> None:
    mixture = {"a": checkpoint().normalizer.statistics, "b": checkpoint().normalizer.statistics}
    checkpoint(dataset_statistics=mixture).push_to_hub("user/policy")
    repository = remote.repositories["models/user/policy"]
    assert "dataset_statistics.json" in (repository.files("main") or {})
    repository.commit([{"key": "file", "value": {"path": "notes.txt", "encoding": "base64", "content": "YQ=="}}])
    checkpoint().push_to_hub("user/policy")
    assert set(repository.files("main") or {}) == {*FILES, "README.md", "notes.txt"}


def test_the_card_says_what_the_policy_sees_and_scored(remote: Hub, tmp_path: Path) -> None:
    policy = checkpoint()
    policy.config.provenance["dataset"] = "bags | of May"
    run = {"success_rate": 0.9, "success_ci95": [0.7, 0.97], "trials": 20, "delay_steps": 0,
           "execution": {"strategy": "receding"}}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps({"task": "lift", "runs": [run]}))
    policy.push_to_hub("user/policy", evaluation=tmp_path / "evaluation.json")
    files = remote.repositories["models/user/policy"].files("main") or {}
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "robotics" and "vla_ros" in front["tags"]
    for line in ("| camera | camera, 8x6 RGB |", "| elbow | rad/s | -2 to 2 |", "| dataset | bags \\| of May |",
                 "| lift | receding, chunks 0 steps late | 0.90 (0.70 to 0.97) | 20 |"):  # fmt: skip
        assert line in card
    assert json.loads(files["evaluation.json"])["task"] == "lift"


def test_every_task_of_an_evaluation_is_told() -> None:
    def figures(task: str, successes: int) -> dict[str, object]:
        return {"task": task, "trials": 10, "success_rate": successes / 10, "success_ci95": [0.1, 0.9]}

    several = {**figures("2 tasks", 7), "delay_steps": 2, "execution": {"strategy": "rtc"}}
    several["tasks"] = [figures("push", 9), figures("pull", 5)]
    single = {**figures("push", 9), "tasks": [figures("push", 9)]}
    nothing = {"task": "lift", "trials": 0, "success_rate": None}
    rows = success_rows({"runs": [several, single, nothing]})
    assert [(task, success.split()[0], trials) for task, _, success, trials in rows] == [
        ("2 tasks", "0.70", "10"), ("push", "0.90", "10"), ("pull", "0.50", "10"), ("push", "0.90", "10")
    ]  # fmt: skip
    assert rows[0][1] == "rtc, chunks 2 steps late"
    assert success_rows(None) == success_rows({}) == []


def test_a_card_of_ones_own_is_kept(remote: Hub, tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "policy")
    (tmp_path / "policy" / "README.md").write_text("mine")
    hub.push(tmp_path / "policy", "user/policy")
    assert (remote.repositories["models/user/policy"].files("main") or {})["README.md"] == b"mine"


def test_a_dataset_is_tagged_with_its_version(remote: Hub, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", episodes((20, 15)), version="v2.1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "frames.bin").write_bytes(b"decoded")
    assert hub.push(folder, "user/data") == f"{remote.address}/datasets/user/data"
    repository = remote.repositories["datasets/user/data"]
    first, files = repository.refs["v2.1"], set(repository.files("v2.1") or {})
    here = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts}
    assert files == {*here, "README.md"}
    card = (repository.files("main") or {})["README.md"].decode()
    assert "2 episodes, 35 frames at 100 Hz" in card and "| `action` | float32 | 2 |" in card and "`toy`" in card
    hub.push(write_dataset(tmp_path / "less", episodes((20,)), version="v2.1"), "user/data")
    assert repository.refs["v2.1"] != first, "the tag moves to the new commit"
    gone = files - set(repository.files("v2.1") or {})
    assert gone == {"data/chunk-000/episode_000001.parquet"}, "else readers would find an episode too many"
    copy = hub.local_folder("user/data", "dataset")
    assert LeRobotFolder(copy).column("action").shape == (20, 2)


def test_a_dataset_on_the_hub_is_trained_on(remote: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push(write_dataset(tmp_path / "data", episodes()), "user/data")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(to_dict(recipe(steps=2))))
    assert main(["train", "toy.yaml", "--dataset", "user/data", "--out", "policy"]) == 0
    CheckpointPolicy.load(tmp_path / "policy").predict(observation())
    capsys.readouterr()
    assert main(["inspect", "user/data"]) == 0
    assert "2 episodes, 35 frames" in capsys.readouterr().out


def test_folders_that_are_neither_are_refused(remote: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"neither a checkpoint .* nor a dataset"):
        hub.push(tmp_path, "user/x")
    checkpoint().save(tmp_path / "policy")
    for name in ("policy", "a/b/c", "user/policy@v1", "-/x"):
        with pytest.raises(HubError, match="is no name of a repository"):
            hub.push(tmp_path / "policy", name)
    with pytest.raises(HubError, match="has no evaluation"):
        hub.push(write_dataset(tmp_path / "data", episodes()), "user/x", evaluation=tmp_path / "e.json")
    (tmp_path / "policy" / "contract.yaml").unlink()
    with pytest.raises(HubError, match=r"policy: not a whole checkpoint: contract\.yaml missing"):
        hub.push(tmp_path / "policy", "user/x")
    (tmp_path / "data" / "meta" / "tasks.parquet").unlink()
    with pytest.raises(VlaError, match=r"tasks\.parquet"):
        hub.push(tmp_path / "data", "user/x")
    assert not remote.repositories


def test_push_and_pull_as_typed(remote: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint().save(tmp_path / "policy")
    assert main(["push", "policy", "user/policy", "--message", "first"]) == 0
    assert capsys.readouterr().out.strip() == f"{remote.address}/user/policy"
    assert main(["pull", "user/policy", "--out", "copy"]) == 0
    Checkpoint.load(tmp_path / "copy")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir()), "a copy without the cache"
    capsys.readouterr()
    assert main(["pull", "user/policy", "--out", "copy"]) == 1
    assert "copy exists already" in capsys.readouterr().err
    assert main(["inspect", "user/policy"]) == 0
    assert "mini_vla" in capsys.readouterr().out
    write_dataset(tmp_path / "data", episodes())
    assert main(["push", "data", "user/data"]) == 0
    assert main(["pull", "user/data", "--dataset", "--out", "set"]) == 0
    assert (tmp_path / "set" / "vla_ros" / "dataset.json").is_file()


def test_the_environment_names_the_hub(remote: Hub, tmp_path: Path) -> None:
    """As a user sets it, in a process of its own."""
    checkpoint().push_to_hub("user/policy")
    environment = {**os.environ, "HF_ENDPOINT": remote.address, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", "from vla_core.cli import main; main(['pull', 'user/policy'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    Checkpoint.load(done.stdout.strip().splitlines()[-1])
