"""Collected bags say what the simulator did, and what the expert would do; nothing half-made looks whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vla_core import cli
from vla_core.checkpoint import Checkpoint, Execution, PolicyConfig
from vla_core.commands import decode as decode_command
from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.data import bag
from vla_core.data.episodes import EPISODE_TOPIC, EPISODE_TYPE
from vla_core.errors import VlaError
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.image import resize
from vla_core.observation.messages import deserialize
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.sim.base import IMAGES, SimulationError
from vla_core.sim.collect import EXECUTED, Collected, Collection, Driver, collect, without_images
from vla_core.sim.metaworld import MetaWorld, instruction_for
from vla_core.sim.noise import Noise

from .replayed import read_episode

SIGHT = RobotContract.load("metaworld_sight")
SAWYER = RobotContract.load("metaworld_sawyer")
(HAND,) = SIGHT.actions.values()
CAMERAS = ("gripperPOV", "behindGripper", "corner4")
BLIND = Collection(episodes=2, images=False)


def commands(path: Path, topic: str) -> np.ndarray:
    """Every command of a bag's topic (T, 4), in order."""
    return np.concatenate([decode_command(HAND, m.data) for m in bag.read(path, {topic})])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """One episode with all cameras."""
    out = tmp_path_factory.mktemp("collect") / "bags"
    (episode,) = collect(out, Collection(episodes=1, seed=4, camera_size=48), SIGHT)
    return episode


def test_a_bag_gives_what_the_simulator_gives_when_it_is_stepped(seen: Collected) -> None:
    spec = ObservationSpec(
        images={name: ImageSize(height=32, width=32) for name in CAMERAS}, state=("hand", "state"),
        instruction="instruction",
    )  # fmt: skip
    episode = read_episode(seen.bag, SIGHT, spec)
    world = MetaWorld("push-v3", "corner2", SIGHT, camera_size=48)
    world.reset(4)
    assert len(episode.observations) == seen.steps > 20
    assert episode.dropped_ticks == 0
    pictures: dict[str, np.ndarray] = {}
    for step, (observation, action) in enumerate(zip(episode.observations, episode.actions, strict=True)):
        if step % 4 == 0:
            pictures = {name: world.render(name) for name in CAMERAS}
        for name, pixels in pictures.items():
            lossy = np.abs(observation.images[name].astype(int) - resize(pixels, 32, 32)).mean()
            assert lossy < 4, f"{name} at step {step}: the newest picture, as JPEG"
        np.testing.assert_array_equal(observation.state, np.concatenate([world._state[:4], world._state]).astype("f4"))
        assert observation.instruction == "push the puck to the goal"
        expert = world.expert()
        np.testing.assert_array_equal(action, expert.astype(np.float32))
        world.step(expert)
    assert world.success and seen.success
    assert len({pixels.tobytes() for pixels in pictures.values()}) == 3, "three cameras, three pictures"
    world.close()


def test_a_bag_is_marked_and_described_as_the_recorder_does(seen: Collected) -> None:
    found = bag.info(seen.bag)
    assert found.whole and found.contract == SIGHT
    described = {key: found.metadata[key] for key in ("task", "seed", "instruction", "outcome")}
    assert described == {"task": "push-v3", "seed": "4", "instruction": instruction_for("push-v3"),
                         "outcome": "succeeded"}  # fmt: skip
    assert json.loads(found.metadata["dropped_messages"]) == {}
    assert set(found.topics) == {s.topic for s in SIGHT.observations.values()} | {HAND.topic, EPISODE_TOPIC}
    first, last = (deserialize(EPISODE_TYPE, m.data) for m in bag.read(seen.bag, {EPISODE_TOPIC}))
    assert (first.state, first.steps, last.state, last.steps) == (0, 0, 1, seen.steps)
    assert all(mark.seed == 4 and mark.task == "push-v3" for mark in (first, last))
    instruction = next(bag.read(seen.bag, {"instruction"}))
    assert instruction.stamp_ns == found.start_ns, "before anything that it is about"


def test_workers_do_not_change_a_byte_of_what_was_said(tmp_path: Path) -> None:
    tasks = dataclasses.replace(BLIND, tasks=("reach-v3", "push-v3"), noise=Noise())
    told: list[int] = []

    def note(done: Sequence[Collected]) -> None:
        told.append(len(done))

    alone = collect(tmp_path / "alone", tasks, SAWYER)
    together = collect(tmp_path / "together", tasks, SAWYER, workers=2, progress=note)
    assert told == [1, 2, 3, 4]
    assert [e.bag.relative_to(tmp_path / "alone") for e in alone] == [
        Path(task) / f"episode_00000{i}" for task in ("reach-v3", "push-v3") for i in range(2)
    ]
    assert [(e.task, e.seed) for e in together] == [(e.task, e.seed) for e in alone]
    for a, b in zip(alone, together, strict=True):
        assert list(bag.read(a.bag)) == list(bag.read(b.bag))
        assert bag.info(a.bag).metadata["instruction"] == instruction_for(a.task)
    assert not list(tmp_path.glob(".*"))


def test_without_images_nothing_else_changes(tmp_path: Path) -> None:
    contract = without_images(SAWYER)
    assert not any(stream.type in IMAGES for stream in contract.observations.values())
    assert contract.safety.sensors == ("hand", "state")
    assert set(SAWYER.observations) - set(contract.observations) == {"image", "image_raw"}
    (episode, _) = collect(tmp_path / "bags", BLIND, SAWYER)
    assert bag.info(episode.bag).contract == contract


def test_noise_is_executed_and_the_label_is_the_experts(tmp_path: Path) -> None:
    noise = Noise(scale=0.5, share=0.4)
    (episode, _) = collect(tmp_path / "bags", dataclasses.replace(BLIND, noise=noise), SIGHT)
    label, executed = commands(episode.bag, HAND.topic), commands(episode.bag, EXECUTED + HAND.topic)
    assert len(label) == len(executed) == episode.steps
    world = MetaWorld("push-v3", "corner2", without_images(SIGHT))
    world.reset(0)
    for wanted, sent in zip(label, executed, strict=True):
        np.testing.assert_array_equal(world.expert(), wanted)
        world.step(sent)
    assert world.success == episode.success
    moved = np.abs(executed - label)
    low, high = SIGHT.action_low, SIGHT.action_high
    assert (moved <= noise.scale * (high - low) / 2 + 1e-12).all()
    assert ((low <= executed) & (executed <= high)).all()
    disturbed = moved.max(axis=1) > 0
    assert 0.15 < disturbed.mean() < 0.7, "about the share that was asked for"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], disturbed.astype(int), [0]])))
    lengths = edges[1::2] - edges[::2]
    assert (lengths[:-1] >= noise.steps[0]).all(), "bursts, the last of which the episode's end may cut"


def still_policy(path: Path, contract: RobotContract) -> Path:
    """A checkpoint that sees the hand and always commands the middle of the range: it stands still."""
    config = MiniVLAConfig(cameras=(), state_dim=4, action_dim=4, horizon=4, vocab_size=2, head=MLPHeadConfig())
    model = MiniVLA(config)
    for parameter in model.head.parameters():
        parameter.data.zero_()
    statistics = {
        name: {key: [number] * 4 for key, number in (("mean", 0.0), ("std", 1.0), ("min", -0.8), ("max", 0.8))}
        for name in ("state", "action")
    }  # fmt: skip
    policy = PolicyConfig(
        model=config, observation=ObservationSpec(state=("hand",), instruction="instruction"),
        execution=Execution(steps=4),
    )  # fmt: skip
    normalizer = Normalizer(Normalization(), statistics)
    Checkpoint(
        config=policy, model=model.eval(), normalizer=normalizer, tokenizer=WordTokenizer(), contract=contract
    ).save(path)
    return path


def test_a_policy_drives_and_the_label_is_the_experts(tmp_path: Path) -> None:
    blind = without_images(SIGHT)
    checkpoint = still_policy(tmp_path / "still", blind)
    short = dataclasses.replace(BLIND, episodes=1, max_steps=120)
    driver = Driver(checkpoint=str(checkpoint), beta=0.0)
    (stood,) = collect(tmp_path / "stood", dataclasses.replace(short, driver=driver), blind)
    assert not stood.success and stood.steps == 120
    assert bag.info(stood.bag).metadata["outcome"] == "failed"
    assert not commands(stood.bag, EXECUTED + HAND.topic).any(), "it stood still"
    label = commands(stood.bag, HAND.topic)
    assert np.abs(label[0, :3]).max() > 0.1, "the expert would have moved"
    assert np.ptp(label[20:], axis=0).max() < 0.05, "and wants the same all the time: it is asked in the true state"
    (led,) = collect(tmp_path / "led", dataclasses.replace(short, driver=dataclasses.replace(driver, beta=1.0)), blind)
    assert led.success
    np.testing.assert_array_equal(commands(led.bag, EXECUTED + HAND.topic), commands(led.bag, HAND.topic))
    mixed = dataclasses.replace(short, driver=dataclasses.replace(driver, beta=0.5, segment_steps=10))
    (shared,) = collect(tmp_path / "mixed", mixed, blind)
    executed, wanted = commands(shared.bag, EXECUTED + HAND.topic), commands(shared.bag, HAND.topic)
    by_policy = [not executed[k : k + 10].any() for k in range(0, len(executed), 10)]
    by_expert = [np.array_equal(executed[k : k + 10], wanted[k : k + 10]) for k in range(0, len(executed), 10)]
    assert all(p or e for p, e in zip(by_policy, by_expert, strict=True))
    assert any(by_policy) and any(by_expert)
    with pytest.raises(VlaError, match="the contracts disagree at name"):
        collect(tmp_path / "other", dataclasses.replace(short, driver=driver), without_images(SAWYER))


def test_a_failed_episode_is_marked_as_failed(tmp_path: Path) -> None:
    (episode, _) = collect(tmp_path / "bags", dataclasses.replace(BLIND, max_steps=5), SAWYER)
    assert (episode.success, episode.steps) == (False, 5)
    spec = ObservationSpec(state=("hand",), instruction="instruction")
    info = read_episode(episode.bag, without_images(SAWYER), spec).infos[-1]  # the first is what came before the start
    assert (info.outcome, info.seed) == ("failed", 0)


def test_what_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(done: Sequence[Collected]) -> None:
        raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "bags", BLIND, SAWYER, workers, fails)
        assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(VlaError, match=r"there exists already; remove it or choose another folder"):
        collect(tmp_path / "there", BLIND, SAWYER)
    with pytest.raises(SimulationError, match="unknown task 'push-v9'"):
        collect(tmp_path / "bags", dataclasses.replace(BLIND, tasks=("push-v3", "push-v9")), SAWYER)
    monkeypatch.setattr(MetaWorld, "observe_state", lambda world, stamp_ns: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path / "bags", BLIND, SAWYER)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Noise(scale=0), "noise.scale: expected above 0"),
        (lambda: Noise(share=1.0), "noise.share: expected between 0 and 1"),
        (lambda: Noise(steps=(5, 4)), "noise.steps: expected 1 <= shortest <= longest"),
        (lambda: Driver(checkpoint="x", beta=1.5), "beta: expected 0 to 1, found 1.5"),
        (lambda: Driver(checkpoint="x", segment_steps=0), "segment_steps: expected at least 1"),
        (lambda: collect(Path("never"), Collection(max_steps=501), SAWYER), "push-v3 ends after 500, found 501"),
        (lambda: Collection(max_steps=0), "max_steps: expected at least 1, found 0"),
        (lambda: Collection(tasks=("push-v3", "push-v3")), "expected distinct tasks"),
        (lambda: Collection(episodes=0), "episodes: expected at least 1, found 0"),
    ],
)
def test_wrong_settings_are_named(wrong, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bags"
    arguments = ["collect", "--episodes", "1", "--seed", "3", "--out", str(out), "--no-images"]
    assert cli.main([*arguments, "--noise", "scale=0.2", "share=0.2"]) == 0
    assert "1 bags" in capsys.readouterr().out
    assert bag.info(out / "episode_000000").metadata["seed"] == "3"
    assert cli.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments[:-2], str(tmp_path / "other"), "--noise", "size=1"]) == 1
    assert "noise.size: unknown key; choices: entries, episodes, lowered, scale" in capsys.readouterr().err
    assert cli.main([*arguments, "--beta", "0.5"]) == 1
    assert "--beta: belongs to --policy" in capsys.readouterr().err
