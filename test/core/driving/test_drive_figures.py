"""A real recorded drive, a policy that was trained for one step, and what the report shows of the two."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.contract import RobotContract
from vla_core.data.convert import convert
from vla_core.data.dataset import load
from vla_core.evaluation.drive_figures import Glimpse, glimpse, glimpses
from vla_core.evaluation.driven import Drive, boxes_of, compared, plans, read_drive
from vla_core.evaluation.open_loop import replay
from vla_core.evaluation.planning import figures
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.collect import Collection, collect
from vla_core.sim.driving.routes import scenario
from vla_core.training.recipe import load_recipe
from vla_core.training.trainer import train

CONTRACT = RobotContract.load("driving")
KIND, SEED, STEPS = "turn_left", 3, 45


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 9 s of an expert's drive."""
    out = tmp_path_factory.mktemp("drive") / "bags"
    collection = Collection(tasks=(f"driving:{KIND}",), episodes=1, seed=SEED, max_steps=STEPS)
    return collect(out, collection, CONTRACT)[0].bag


@pytest.fixture(scope="module")
def drive(bag: Path) -> Drive:
    return read_drive(bag)


@pytest.fixture(scope="module")
def core(bag: Path, tmp_path_factory: pytest.TempPathFactory) -> PolicyCore:
    folder = tmp_path_factory.mktemp("policy")
    recipe = load_recipe("drive", ["training.steps=1", "training.batch_size=2", "data.cache=none"])
    convert([bag], folder / "data", recipe.observation, keep_failed=True, workers=1)
    checkpoint: Checkpoint = train(recipe, load(folder / "data", spec=recipe.observation)).checkpoint
    return PolicyCore(CheckpointPolicy(checkpoint))


@pytest.fixture(scope="module")
def shown(drive: Drive, core: PolicyCore) -> list[Glimpse]:
    return glimpses(drive, core, 2)


def test_the_experts_own_plan_is_nearly_what_is_driven(bag: Path, drive: Drive, core: PolicyCore) -> None:
    assert (drive.world, drive.seed) == (f"driving:{KIND}", SEED)
    replayed = replay(bag, core)
    assert len(replayed.stamps_ns) == STEPS
    solids = boxes_of(scenario(KIND, SEED).town.solids)
    expert = figures([compared(drive, replayed.stamps_ns, replayed.recorded[..., :3], CONTRACT.chunk_step_ns, solids)])
    policy = figures([plans(drive, replayed, CONTRACT, solids)])
    assert expert["ticks"] == STEPS
    assert expert["l2_3s"] < min(0.7, policy["l2_3s"] / 2)
    assert expert["collision_rate"] == expert["driven_collision_rate"] == 0


def test_a_replay_tells_the_displacement(
    bag: Path, core: PolicyCore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core.policy.checkpoint.save(tmp_path / "checkpoint")
    assert main(["replay", str(tmp_path / "checkpoint"), str(bag), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "replay.json").read_text())["planning"]
    assert f"1 s ahead {found['l2_1s']:.2f} m" in capsys.readouterr().out
    assert found["ticks"] == STEPS


def test_glimpses_are_in_the_vehicles_frame(drive: Drive, shown: list[Glimpse], core: PolicyCore) -> None:
    assert [round(each.seconds) for each in shown] == [3, 6]
    for each in shown:
        assert len(each.observation.images) == 6
        assert each.driven[0] == pytest.approx(np.zeros(3), abs=1e-9)
        assert each.driven[4, 0] > 1  # it drives ahead
        assert each.planned.shape == (7, 3)
        assert each.above is not None and each.above.shape == core.policy.checkpoint.config.model.bev.grid.shape
        near = np.hypot(*each.points[:, :2].T)
        assert len(each.points) > 1000 and near.min() > 0.5
        # The ground truth's boxes are where the LiDAR sees something: the nearest one in sight has points in it.
        for x, y, heading, length, width in each.others:
            away = each.points[:, :2] - (x, y)
            along = away[:, 0] * np.cos(heading) + away[:, 1] * np.sin(heading)
            aside = away[:, 1] * np.cos(heading) - away[:, 0] * np.sin(heading)
            if np.hypot(x, y) < 12:
                assert np.any((np.abs(along) < length / 2 + 0.2) & (np.abs(aside) < width / 2 + 0.2))


def test_a_glimpse_is_a_picture(shown: list[Glimpse]) -> None:
    picture = cv2.imdecode(np.frombuffer(glimpse(shown[0]), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and picture.shape[1] > 1000 and picture.std() > 20


def test_the_hook_is_gone_afterwards(core: PolicyCore, shown: list[Glimpse]) -> None:
    assert not core.policy.checkpoint.model.bev.mix._forward_hooks
