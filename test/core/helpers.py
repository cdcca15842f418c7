"""A small robot, its messages and its bags, made by hand for the tests of vla_core.

100 Hz control (10 ms), an arm of two joints at 100 Hz, a camera of 8x6 pixels at 25 Hz and a latched instruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.checkpoint import Checkpoint, Execution, PolicyConfig
from vla_core.commands import encode
from vla_core.config import to_dict
from vla_core.contract import Action, RobotContract, Stream
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.dataset import Dataset, EpisodeData
from vla_core.data.folder import FORMAT
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import image, vector
from vla_core.data.lerobot.statistics import column_statistics, image_statistics
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.side import OncePng, side_table
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation import messages
from vla_core.observation.builder import ImageSize, Observation, ObservationSpec
from vla_core.observation.messages import Message, serialize, typestore
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.training.recipe import MiniVLARecipe, Recipe, Training

MS = 1_000_000  # nanoseconds
STEP = 10 * MS
START = 1_700_000_000_000_000_000
IMAGE = "sensor_msgs/msg/Image"
JOINTS = "sensor_msgs/msg/JointState"
STRING = "std_msgs/msg/String"
EPISODE = "vla_ros/msg/Episode"

CONTRACT = RobotContract(
    name="toy",
    rate_hz=100.0,
    observations={
        "camera": Stream(topic="cam/raw", type=IMAGE, rate_hz=25.0, max_age_s=0.1),
        "arm": Stream(
            topic="arm/state", type=JOINTS, rate_hz=100.0, max_age_s=0.05,
            field="position", names=("shoulder", "elbow"), units=("rad", "rad"),
        ),
        "task": Stream(topic="task", type=STRING, latched=True),
    },
    actions={"arm": Action(
        topic="arm/command", type=JOINTS, field="velocity", names=("shoulder", "elbow"), units=("rad/s", "rad/s"),
        kind="velocity", low=(-1.0, -2.0), high=(1.0, 2.0), safe=("zero", "hold"),
    )},
)  # fmt: skip
SPEC = ObservationSpec(images={"camera": ImageSize(height=6, width=8)}, state=("arm",), instruction="task")


def with_action(**changes: Any) -> RobotContract:
    """CONTRACT with a changed action."""
    return dataclasses.replace(CONTRACT, actions={"arm": dataclasses.replace(CONTRACT.actions["arm"], **changes)})


def with_stream(name: str, **changes: Any) -> RobotContract:
    """CONTRACT with a changed stream."""
    stream = dataclasses.replace(CONTRACT.observations[name], **changes)
    return dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, name: stream})


def pixels(seed: int) -> np.ndarray:
    """Noise (6, 8, 3) uint8, different for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def raw_image(data: bytes | np.ndarray, **fields: Any) -> Any:
    """A ``sensor_msgs/Image`` object with exactly these fields."""
    values = {"header": messages.header(0), "is_bigendian": 0, "data": np.frombuffer(bytes(data), np.uint8)}
    return typestore().types[IMAGE](**{**values, **fields})


def camera(stamp_ns: int, seed: int) -> Message:
    return Message("cam/raw", IMAGE, stamp_ns, messages.image(stamp_ns, pixels(seed)))


def arm(stamp_ns: int, shoulder: float, elbow: float = 0.0) -> Message:
    data = messages.joint_state(stamp_ns, ("shoulder", "elbow"), "position", np.array([shoulder, elbow]))
    return Message("arm/state", JOINTS, stamp_ns, data)


def task(stamp_ns: int, text: str) -> Message:
    return Message("task", STRING, stamp_ns, messages.text(text))


def command(stamp_ns: int, shoulder: float, elbow: float = 0.0) -> Message:
    data = encode(CONTRACT.actions["arm"], stamp_ns, np.array([[shoulder, elbow]]), CONTRACT.step_ns)
    return Message("arm/command", JOINTS, stamp_ns, data)


def mark(stamp_ns: int, state: int, seed: int = 7) -> Message:
    """An episode mark: 0 started, 1 succeeded, 2 failed, 3 aborted."""
    cls = typestore().types[EPISODE]
    message = cls(header=messages.header(stamp_ns), state=state, index=0, seed=seed, task="lift",
                  instruction="lift it", steps=0)  # fmt: skip
    return Message("episode", EPISODE, stamp_ns, serialize(EPISODE, message))


def stream_messages(ticks: int = 30, outcome: int = 1, start_ns: int = START, seed: int = 0) -> list[Message]:
    """A clean episode: arm and command at every tick k (shoulder k/100, command k/200), camera at every fourth."""
    out = [mark(start_ns, 0, seed), task(start_ns, "lift it")]
    for k in range(ticks):
        stamp_ns = start_ns + k * STEP
        out += [camera(stamp_ns, 1000 * seed + k)] if k % 4 == 0 else []
        out += [arm(stamp_ns, k / 100, seed), command(stamp_ns, k / 200, -k / 100)]
    return [*out, mark(start_ns + ticks * STEP, outcome, seed)]


def write_bag(path: Path, messages: Sequence[Message], contract: RobotContract | None = CONTRACT) -> Path:
    """Write messages in the given order; the time of receipt is their stamp."""
    with BagWriter(path, {} if contract is None else {CONTRACT_KEY: contract.to_yaml()}) as writer:
        for topic, type_name in {m.topic: m.type for m in messages}.items():
            writer.add_topic(topic, type_name, latched=topic in ("task", "episode"))
        for message in messages:
            writer.write(message.topic, message.stamp_ns, message.data)
    return path


def recipe(**training: Any) -> Recipe:
    """A model that trains in milliseconds a step."""
    options = {"steps": 3, "batch_size": 16, "warmup_steps": 0, "learning_rate": 3e-3, "ema_decay": None}
    return Recipe(
        observation=SPEC,
        model=MiniVLARecipe(
            horizon=4, d_model=32, vision=TinyCNNConfig(d_model=32, channels=(8, 16)),
            head=MLPHeadConfig(hidden_dim=64),
        ),
        execution=Execution(steps=2),
        training=Training(**{**options, **training}),
    )  # fmt: skip


def episodes(lengths: Sequence[int] = (20, 15)) -> list[EpisodeData]:
    """Smooth random episodes: actions follow the state."""
    rng = np.random.default_rng(5)
    made = []
    for i, length in enumerate(lengths):
        state = np.cumsum(rng.normal(0, 0.1, (length, 2)), 0).astype(np.float32)
        made.append(EpisodeData(
            images={"camera": rng.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8)},
            state=state, action=np.tanh(2 * state[:, ::-1]).astype(np.float32),
            stamps_ns=START + STEP * np.arange(length), instruction=("lift it", "drop it")[i % 2], seed=i,
            bag=f"bag_{i}",
        ))  # fmt: skip
    return made


def dataset(lengths: Sequence[int] = (20, 15), contract: RobotContract = CONTRACT) -> Dataset:
    """The episodes as a dataset in memory."""
    return Dataset.from_episodes(contract, SPEC, episodes(lengths))


def observations(made: EpisodeData, spec: ObservationSpec = SPEC) -> list[Observation]:
    """What the robot saw, from an episode's arrays; nothing is missing."""
    streams = dict.fromkeys(name for _, name, _ in spec.uses())
    return [
        Observation(
            stamp_ns=int(made.stamps_ns[k]), images={name: pixels[k] for name, pixels in made.images.items()},
            state=made.state[k], instruction=made.instruction, ages_ns={name: 0 for name in streams},
            present={name: True for name in streams},
        )
        for k in range(len(made))
    ]  # fmt: skip


def write_dataset(
    path: Path,
    made: Sequence[EpisodeData],
    *,
    contract: RobotContract = CONTRACT,
    spec: ObservationSpec = SPEC,
    ours: bool = True,
    **options: Any,
) -> Path:
    """The episodes as a LeRobotDataset with PNG images; ``ours`` with the contract and the side rows."""
    (state,), (camera,) = spec.state, spec.images
    key, size = f"observation.images.{camera}", spec.images[camera]
    described = {"format": FORMAT, "contract": to_dict(contract), "observation": to_dict(spec)}
    features = {
        key: image(size.height, size.width),
        "observation.state": vector(tuple(f"{state}.{name}" for name in contract.stream(state).names)),
        "action": vector(contract.action_names),
    }
    with LeRobotWriter(path, fps=contract.rate_hz, features=features, robot_type=None,
                       description=described if ours else None, **options) as writer:  # fmt: skip
        for episode in made:
            columns = {"observation.state": episode.state, "action": episode.action}
            encode_once = OncePng()
            writer.add(EpisodeRows(
                columns=columns, tasks=[episode.instruction] * len(episode),
                images={key: [encode_once(pixels) for pixels in episode.images[camera]]},
                statistics={**{n: column_statistics(column) for n, column in columns.items()},
                            key: image_statistics(list(episode.images[camera]))},
                frames=side_table(observations(episode, spec), contract, spec) if ours else None,
                entry={"bag": episode.bag, "seed": episode.seed, "task": episode.task, "outcome": episode.outcome},
            ))  # fmt: skip
    return path


def checkpoint(head: MLPHeadConfig | DiffusionHeadConfig | None = None, **changes: Any) -> Checkpoint:
    """A small untrained policy for CONTRACT and SPEC."""
    config = MiniVLAConfig(
        cameras=("camera",), state_dim=2, action_dim=2, horizon=4, vocab_size=4, d_model=32,
        vision=TinyCNNConfig(d_model=32, channels=(8, 16)), head=head or MLPHeadConfig(hidden_dim=64),
    )  # fmt: skip
    numbers = {"mean": [0.1, 0.2], "std": [0.5, 2.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]}
    tokenizer = WordTokenizer()
    tokenizer.fit(["lift it"])
    parts: dict[str, Any] = {
        "config": PolicyConfig(model=config, observation=SPEC, execution=Execution(steps=2)),
        "model": MiniVLA(config).eval(),
        "normalizer": Normalizer(Normalization(), {"state": numbers, "action": numbers}),
        "tokenizer": tokenizer,
        "contract": CONTRACT,
    }
    return Checkpoint(**{**parts, **changes})
