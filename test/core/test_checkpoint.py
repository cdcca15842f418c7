"""A checkpoint is enough to run, or is refused with what it lacks; saving never spoils what was there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_core import checkpoint as checkpoint_module
from vla_core.checkpoint import FILES, Checkpoint, CheckpointError, fingerprint, whole_folder
from vla_core.errors import VlaError
from vla_core.observation.builder import Observation
from vla_core.observation.normalizer import Normalization, Normalizer, Statistics, entry_names
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import CheckpointPolicy, PolicyError

from .helpers import CONTRACT, SPEC, START, checkpoint, pixels, with_action


def observation(seed: int = 0) -> Observation:
    return Observation(START + seed, {"camera": pixels(seed)}, np.array([0.3, -0.7], np.float32), "lift it", {})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint().save(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_loaded_policy_predicts_bit_for_bit_the_same(tmp_path: Path) -> None:
    original = checkpoint()
    original.save(tmp_path / "a" / "policy")
    loaded = Checkpoint.load(tmp_path / "a" / "policy")
    assert not loaded.model.training
    for seed in range(5):
        a = CheckpointPolicy(original).predict(observation(seed)).actions
        b = CheckpointPolicy(loaded).predict(observation(seed)).actions
        assert a.tobytes() == b.tobytes() and np.ptp(a) > 0
    assert loaded.config == original.config and loaded.contract == CONTRACT
    assert loaded.tokenizer.encode("lift it now") == original.tokenizer.encode("lift it now") == [2, 3, 1]
    assert loaded.normalizer.statistics == original.normalizer.statistics
    assert sorted(os.listdir(tmp_path / "a" / "policy")) == sorted(FILES)


def test_a_prediction_is_in_the_units_of_the_contract(saved: Path) -> None:
    """min -1/-2, max 1/2: what the model says is scaled by 1 and 2."""
    policy = CheckpointPolicy.load(saved)
    with torch.no_grad():
        for parameter in policy.checkpoint.model.head.parameters():
            parameter.zero_()
        policy.checkpoint.model.head.net[-1].bias.fill_(0.5)
    chunk = policy.predict(observation())
    np.testing.assert_allclose(chunk.actions, np.tile([0.5, 1.0], (4, 1)))
    assert (chunk.observation_stamp_ns, chunk.step_ns) == (START, 10_000_000)


def test_a_policy_that_predicts_no_number_is_stopped(saved: Path) -> None:
    policy = CheckpointPolicy.load(saved)
    with torch.no_grad():
        next(policy.checkpoint.model.head.parameters()).fill_(float("nan"))
    with pytest.raises(PolicyError, match=f"non-finite.*{START}"):
        policy.predict(observation())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(VlaError, match=f"policy: not a checkpoint: {name} missing; found: ") as caught:
        Checkpoint.load(saved)
    assert all(other in str(caught.value).split("found")[1] for other in FILES if other != name)


def test_no_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(VlaError, match="not a checkpoint"):
            Checkpoint.load(path)


def edited(path: Path, name: str, change: Callable[[dict], object]) -> None:
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))


EDITS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "no action statistics": ("statistics.json", lambda d: d.pop("action"), r"no statistics for 'action'.*has: state"),
    "no statistics": ("statistics.json", lambda d: d.clear(), r"no statistics for 'state'.*\(none\)"),
    "no deviation": (
        "statistics.json", lambda d: d["state"].pop("std"), r"'state' lack std for mean_std; they have: max, mean, min"
    ),
    "short statistics": (
        "statistics.json", lambda d: d["action"]["min"].pop(), r"action\.min have 1 entries, not 2"
    ),
    "not finite": ("statistics.json", lambda d: d["state"].update(mean=[float("nan"), 0]), r"state.*mean"),
    "statistics of another kind": ("statistics.json", lambda d: d["state"].update(mean=3), r"state.*mean"),
    "unknown key": (
        "config.json", lambda d: d["model"].update(width=3), r"model\.width: unknown key; choices: .*d_model"
    ),
    "unknown nested key": (
        "config.json", lambda d: d["model"]["head"].update(depth=1), r"model\.head\.depth: unknown .*: .*layers"
    ),
    "unknown head": ("config.json", lambda d: d["model"]["head"].update(type="x"), r"model\.head\.type: found 'x'"),
    "format": ("config.json", lambda d: d.update(format="v9"), r"format 'v9', expected 'vla_ros_checkpoint_v1'"),
    "steps": ("config.json", lambda d: d["execution"].update(steps=5), r"execution\.steps"),
    "action dimension": (
        "config.json", lambda d: d["model"].update(action_dim=3), r"contract has 2 numbers in 'action', the model 3"
    ),
    "state dimension": (
        "config.json", lambda d: d["model"].update(state_dim=3), r"contract has 2 numbers in 'state', the model 3"
    ),
    "stream": ("config.json", lambda d: d["observation"].update(state=["lidar"]), r"'lidar'.*arm, camera, task"),
    "instruction stream": (
        "config.json", lambda d: d["observation"].update(instruction="lidar"), r"'lidar'.*arm, camera, task"
    ),
    "cameras": ("config.json", lambda d: d["model"].update(cameras=["wrist"]), r"wrist.*camera"),
    "tokenizer words": (
        "tokenizer.json", lambda d: d["words"].extend(["a", "b"]), r"tokenizer.*6.*4|6 words.*4|vocab_size"
    ),
    "tokenizer type": ("tokenizer.json", lambda d: d.update(type="bpe"), r"expected type 'word'"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_what_does_not_fit_is_refused_at_load(saved: Path, case: str) -> None:
    name, change, message = EDITS[case]
    edited(saved, name, change)
    with pytest.raises(VlaError, match=message) as caught:
        Checkpoint.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "statistics.json", "tokenizer.json", "contract.yaml"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff\xfe", b""])
def test_files_of_another_kind_are_an_error_that_names_them(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(VlaError, match=r"config|statistics|tokenizer|contract") as caught:
        Checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    good = load_file(file)
    name = "head.net.0.weight"
    cases = {
        rf"missing \['{name}'\], unexpected none": {k: v for k, v in good.items() if k != name},
        r"missing none, unexpected \['extra'\]": {**good, "extra": torch.zeros(1)},
        rf"'{name} \(1, 2\) instead of \(64, 32\)'": {**good, name: torch.zeros(1, 2)},
    }
    for message, weights in cases.items():
        save_file(weights, file)
        with pytest.raises(VlaError, match=message):
            Checkpoint.load(saved)


def test_truncated_weights_are_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    for size in (file.stat().st_size // 2, 4, 0):
        os.truncate(file, size)
        with pytest.raises(VlaError, match=r"model\.safetensors: damaged") as caught:
            Checkpoint.load(saved)
        assert "\n" not in str(caught.value)


def test_a_contract_with_another_action_dimension_is_refused(saved: Path) -> None:
    other = with_action(names=("shoulder", "elbow", "wrist"), units=("r", "r", "r"),
                                 low=(-1, -1, -1), high=(1, 1, 1), safe=("zero",) * 3)  # fmt: skip
    (saved / "contract.yaml").write_text(other.to_yaml())
    with pytest.raises(VlaError, match="contract has 3 numbers in 'action', the model 2"):
        Checkpoint.load(saved)


@pytest.mark.parametrize("failing", ["save_file", "replace_folder"])
def test_a_save_that_fails_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = fingerprint(saved)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_module, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint().save(saved)
    assert fingerprint(saved) == before
    Checkpoint.load(saved)
    assert os.listdir(saved.parent) == ["policy"]


def test_a_rename_that_fails_midway_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, calls = fingerprint(saved), os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("not now")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="not now"):
        checkpoint().save(saved)
    monkeypatch.undo()
    Checkpoint.load(saved)
    assert fingerprint(saved) == before


def test_a_new_checkpoint_replaces_the_old_one(saved: Path) -> None:
    before = fingerprint(saved)
    new = checkpoint()
    new.save(saved)
    assert fingerprint(saved) != before
    expected = CheckpointPolicy(new).predict(observation()).actions
    np.testing.assert_array_equal(CheckpointPolicy.load(saved).predict(observation()).actions, expected)
    assert os.listdir(saved.parent) == ["policy"]


def test_a_folder_that_is_no_checkpoint_is_not_deleted(tmp_path: Path) -> None:
    """--out with a slip of the hand must not cost somebody's files."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(VlaError, match="home"):
        checkpoint().save(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"


def mixture() -> dict[str, Statistics]:
    """Statistics of two datasets whose actions are of another size."""
    own = checkpoint().normalizer.statistics
    other = {"min": [-10.0, -20.0], "max": [10.0, 20.0], "mean": [0.0, 0.0], "std": [5.0, 10.0]}
    return {"kitchen": own, "garage": {"state": own["state"], "action": other}}


def test_a_mixture_runs_by_the_statistics_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    checkpoint(dataset_statistics=mixture()).save(path)
    assert sorted(os.listdir(path)) == sorted([*FILES, "dataset_statistics.json"])
    assert Checkpoint.load(path).dataset_statistics == mixture()
    plain = CheckpointPolicy.load(path).predict(observation()).actions
    np.testing.assert_array_equal(CheckpointPolicy.load(path, dataset="kitchen").predict(observation()).actions, plain)
    np.testing.assert_allclose(CheckpointPolicy.load(path, dataset="garage").predict(observation()).actions, 10 * plain)
    with pytest.raises(VlaError, match="policy: no statistics of a dataset 'attic'; choices: garage, kitchen"):
        CheckpointPolicy.load(path, dataset="attic")
    Checkpoint.load(path, dataset="garage").save(tmp_path / "deployed")
    np.testing.assert_allclose(CheckpointPolicy.load(tmp_path / "deployed").predict(observation()).actions, 10 * plain)


def test_statistics_of_a_mixture_are_checked_as_the_others(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "single")
    with pytest.raises(VlaError, match=r"no statistics of a dataset 'kitchen'; choices: \(none\)"):
        Checkpoint.load(tmp_path / "single", dataset="kitchen")
    path = tmp_path / "policy"
    checkpoint(dataset_statistics=mixture()).save(path)
    edited(path, "dataset_statistics.json", lambda d: d["garage"]["action"]["min"].pop())
    with pytest.raises(VlaError, match=r"action\.min have 1 entries, not 2"):
        Checkpoint.load(path, dataset="garage")
    for content in ("[]", '{"garage": 3}', "{"):
        (path / "dataset_statistics.json").write_text(content)
        with pytest.raises(VlaError, match=r"dataset_statistics\.json: (expected groups|not valid JSON)"):
            Checkpoint.load(path)


def test_an_entry_with_a_mode_of_its_own_survives_the_folder(tmp_path: Path) -> None:
    """The names of the entries are not in the normalization: they come from the contract."""
    options = Normalization(entries={"action.elbow": "none", "state.arm.shoulder": "min_max"})
    numbers = checkpoint().normalizer.statistics
    made = checkpoint()
    normalizer = Normalizer(options, numbers, names=entry_names(SPEC, CONTRACT))
    config = dataclasses.replace(made.config, normalization=options)
    original = dataclasses.replace(made, config=config, normalizer=normalizer)
    original.save(tmp_path / "policy")
    values = np.array([[0.3, -0.4]])
    found = Checkpoint.load(tmp_path / "policy").normalizer
    for name in ("state", "action"):
        np.testing.assert_array_equal(found.normalize(name, values), normalizer.normalize(name, values))
    assert found.normalize("action", values)[0, 1] == np.float32(-0.4)
    edited(tmp_path / "policy", "config.json", lambda d: d["normalization"].update(entries={"action.wrist": "none"}))
    with pytest.raises(VlaError, match=r"action\.wrist: no such entry; choices: elbow, shoulder"):
        Checkpoint.load(tmp_path / "policy")


def test_a_full_disk_leaves_the_old_checkpoint(saved: Path) -> None:
    """Files may grow to 20 kB only, in a process of its own: less than the weights need."""
    before = fingerprint(saved)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from vla_core.checkpoint import Checkpoint\n"
        "found = Checkpoint.load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    found.save(sys.argv[1])\n"
        "except (OSError, ValueError) as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout or "File too large" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert fingerprint(saved) == before
    Checkpoint.load(saved)
    assert os.listdir(saved.parent) == ["policy"]


def test_a_device_that_is_not_there_is_refused(saved: Path) -> None:
    for name in ("cuda:99", "gpu"):
        with pytest.raises(PolicyError, match=rf"device '{name}': torch .* has none here; choices: cpu"):
            load_policy(saved, device=name)


@pytest.mark.parametrize(("error", "raised"), [
    (SafetensorError("I/O error: No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt),
])  # fmt: skip
def test_a_folder_that_could_not_be_filled_leaves_the_old_one(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    place = tmp_path / "policy"
    with whole_folder(place) as partial:
        (partial / "config.json").write_text("old")
    with pytest.raises(raised), whole_folder(place) as partial:
        (partial / "config.json").write_text("new")
        raise error
    assert (place / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
