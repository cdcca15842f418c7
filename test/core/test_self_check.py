"""Whether a policy looks and listens is asked of the policy as it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from test.core import published_openvla as published
from test.core.helpers import CONTRACT, checkpoint
from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.model.vla.openvla_vision import Vision
from vla_core.observation.builder import Observation
from vla_core.pretrained.openvla import load
from vla_core.pretrained.self_check import SelfCheckError, self_check
from vla_core.runtime.chunk import ActionChunk
from vla_core.runtime.policy import CheckpointPolicy, Policy


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with published.tiny_backbones():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(tmp_path_factory.mktemp("openvla") / "tiny")


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text(CONTRACT.to_yaml())
    return file


class Answers(Policy):
    """A policy that is a function of the observation."""

    def __init__(self, answer: Any, **spec: Any) -> None:
        made = checkpoint()
        self.contract, self.spec = CONTRACT, dataclasses.replace(made.config.observation, **spec)
        self._answer = answer
        self.asked: list[Observation] = []

    def predict(self, observation: Observation, continues: Any = None) -> ActionChunk:
        self.asked.append(observation)
        return ActionChunk(0, 10, np.full((1, 2), float(self._answer(observation))), None)


def test_what_changes_the_actions_is_told_as_a_share_of_their_range() -> None:
    found = self_check(Answers(lambda o: 0.5 * (o.images["camera"][0, 0, 0] > 200) + 0.1 * len(o.instruction)))
    assert set(found.changes) == {"camera camera", "instruction"}
    assert found.changes["camera camera"] == pytest.approx(0.5)  # the first entry's half range is 1, the second's 2
    assert "camera camera: changes the actions by up to 0.5 of their half range" in found.lines()


@pytest.mark.parametrize(
    ("answer", "ignored"),
    [
        (lambda o: len(o.instruction), "ignored: camera camera;"),
        (lambda o: o.images["camera"].mean(), "ignored: instruction;"),
        (lambda o: 1.0, "ignored: camera camera, instruction;"),
        (lambda o: o.state.sum(), "ignored: camera camera, instruction;"),
    ],
)
def test_what_is_ignored_is_named(answer: Any, ignored: str) -> None:
    with pytest.raises(SelfCheckError, match=ignored):
        self_check(Answers(answer))


def test_noise_alone_is_no_answer_to_a_picture() -> None:
    draw = np.random.default_rng(0)
    with pytest.raises(SelfCheckError, match="ignored: camera camera"):
        self_check(Answers(lambda o: 1e-7 * draw.normal() + len(o.instruction)))


def test_a_picture_that_only_noise_would_change_is_seen() -> None:
    """Black and white may be answered alike by a policy that tells pictures apart."""
    found = self_check(Answers(lambda o: o.images["camera"].std() + len(o.instruction)))
    assert found.changes["camera camera"] > 0


def test_inputs_that_are_not_there_are_said_to_be_unchecked() -> None:
    found = self_check(Answers(lambda o: len(o.instruction), images={}))
    assert found.lines()[-1] == "pictures: not checked, it sees none"


def test_a_small_policy_passes_and_one_without_its_camera_does_not() -> None:
    made = checkpoint()
    assert set(self_check(CheckpointPolicy(made)).changes) == {"camera camera", "instruction"}
    with torch.no_grad():
        for weight in made.model.image_encoders.parameters():
            weight.zero_()
    with pytest.raises(SelfCheckError, match="camera camera"):
        self_check(CheckpointPolicy(made))


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_published_policy_is_imported_and_runs(
    folder: Path, contract: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    words = ["import", "openvla", str(folder), "--contract", str(contract), "--out", str(out), "--unnorm-key", "arm"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "instruction: changes the actions by up to" in said
    assert "unnorm_key: arm" in said and "center crop: off (--center-crop" in said
    imported, loaded = Checkpoint.load(out), load(folder, CONTRACT, unnorm_key="arm")
    assert imported.config == loaded.config
    assert main(["inspect", str(out), "--self-check"]) == 0
    assert "camera camera: changes the actions" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "openvla" in capsys.readouterr().out


def test_a_policy_that_ignores_its_pictures_is_not_imported(
    folder: Path, contract: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the published code does on transformers from 4.50 on."""
    forward = Vision.forward
    monkeypatch.setattr(Vision, "forward", lambda self, pictures: forward(self, torch.zeros_like(pictures)))
    out = tmp_path / "checkpoint"
    words = ["import", "openvla", str(folder), "--contract", str(contract), "--out", str(out), "--unnorm-key", "arm"]
    assert main(words) == 1
    assert "self-check: ignored: camera camera" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--no-self-check", "--center-crop", "--cameras", "camera"]) == 0
    assert "center crop: on" in capsys.readouterr().out
    assert main(["inspect", str(out), "--self-check"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cameras", "camera=observation.images.top"], "OpenVLA's cameras have no keys"),
        (["--cameras", "camera", "camera"], "expected distinct names"),
        (["--cameras", "camera="], "expected distinct names, NAME or NAME=KEY"),
        ([], "--unnorm-key: the model was trained on 3 datasets"),
    ],
)
def test_a_wrong_option_says_what_is_expected(
    folder: Path, contract: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "openvla", str(folder), "--contract", str(contract), "--out", str(tmp_path / "checkpoint")]
    assert main([*words, *options]) == 1
    assert message in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(
    folder: Path, contract: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    words = ["import", "openvla", str(folder), "--contract", str(contract), "--out", str(tmp_path / "thesis")]
    assert main([*words, "--unnorm-key", "arm"]) == 1
    assert "exists and is no checkpoint" in capsys.readouterr().err


def test_recorded_drives_are_imported_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "kitti", str(tmp_path), "--out", str(tmp_path / "bags")]) == 1
    assert "error:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["import", "waymo", str(tmp_path)])
    assert "nuscenes" in capsys.readouterr().err
