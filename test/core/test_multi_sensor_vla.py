"""MultiSensorVLA: every sensor counts when it is there and not when it is masked; with encoders of its user's own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.commands import decode, encode
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY
from vla_core.model.fusion.sensor_fusion import FiLMFusionConfig, HierarchicalConfig, PooledFusionConfig
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.sensor import PathConfig
from vla_core.model.sensor.bev import BEVConfig, GridConfig
from vla_core.model.vla import MultiSensorConfig, MultiSensorVLA, build_model
from vla_core.model.vla.multi_sensor_vla import pose_matrix, token_grid
from vla_core.model.vlm import MaxPoolingConfig, TinyCNNEncoderConfig, TinyTransformerConfig
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation, ObservationSpec, Window
from vla_core.observation.calibration import blank_calibration
from vla_core.observation.normalizer import Normalization, Normalizer, StatisticsError
from vla_core.observation.spec import CloudSpec, ImageSize

from .helpers import START
from .test_batch import tokenizer
from .test_vla_model import HEADS, PROJECTORS
from .whole_models import ACTION, CLOUD, FRONT, HORIZON, IMU, LLM, chunk, chunk_of, fake, sensor_config
from .whole_models import one_thread as one_thread

SENSORS = ("lidar", "radar", "imu", "doppler")
FUSIONS = {
    "cross_modal": sensor_config().fusion,
    "mlp": PooledFusionConfig(),
    "hierarchical": HierarchicalConfig(scene=("lidar", "radar"), heads=2),
    "film": FiLMFusionConfig(condition="imu"),
}


def made(seed: int = 0, **changes: Any) -> MultiSensorVLA:
    torch.manual_seed(seed)
    return MultiSensorVLA(sensor_config(**changes)).eval()


def masked(inputs: ModelInputs, name: str, filler: float) -> ModelInputs:
    """The same batch without the sensor ``name``, and ``filler`` in its place."""
    found = inputs.sensor(name)
    assert found is not None
    place = next(p for p in ("clouds", "sequences", "maps") if name in getattr(inputs, p))
    gone = Masked(torch.full_like(found.values, filler), torch.zeros_like(found.mask))
    return dataclasses.replace(inputs, **{place: {**getattr(inputs, place), name: gone}})


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("head", HEADS)
def test_it_learns_one_batch_and_comes_back(fusion: str, head: str) -> None:
    number = list(FUSIONS).index(fusion) + HEADS.index(head)
    projector = list(PROJECTORS.values())[number % len(PROJECTORS)]
    model = made(fusion=FUSIONS[fusion], head=ACTION_HEAD_REGISTRY[head].Config(), projector=projector)
    inputs, (actions, mask) = fake(model.config), chunk(model.config)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(40):
        loss = model.train().loss(inputs, actions, mask, torch.Generator().manual_seed(step % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4]), losses
    config = from_dict(MultiSensorConfig, to_dict(model.config))
    assert config == model.config
    back = build_model(config)
    back.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(chunk_of(back, inputs), chunk_of(model, inputs))


@pytest.mark.parametrize("name", SENSORS)
def test_a_masked_sensor_has_no_influence_and_one_that_is_there_has(name: str) -> None:
    model = made()
    inputs = fake(model.config)
    chunks = [chunk_of(model, masked(inputs, name, filler)) for filler in (0.0, 50.0, float("nan"))]
    assert torch.equal(chunks[0], chunks[1]) and torch.equal(chunks[0], chunks[2])
    assert not torch.allclose(chunk_of(model, inputs), chunks[0], atol=1e-6)


def test_a_camera_without_calibration_is_seen_but_not_from_above() -> None:
    model = made()
    inputs = fake(model.config)
    unknown = Masked(torch.full((4, 3, 3), float("nan")), torch.zeros(4, dtype=torch.bool))
    blind = dataclasses.replace(inputs, intrinsics={"left": unknown})
    assert chunk_of(model, blind).isfinite().all()
    assert not torch.allclose(chunk_of(model, inputs), chunk_of(model, blind), atol=1e-6)


def test_where_a_sensor_is_comes_from_the_config_unless_it_is_given() -> None:
    model = made()
    inputs = fake(model.config)
    everywhere = torch.ones(4, dtype=torch.bool)
    same = {n: Masked(pose_matrix(p).expand(4, 4, 4), everywhere) for n, p in model.config.mounts.items()}
    assert torch.equal(chunk_of(model, dataclasses.replace(inputs, extrinsics=same)), chunk_of(model, inputs))
    moved = {**same, "lidar": Masked(pose_matrix((3.0, 1.0, 1.5, 0, 0, 0, 1)).expand(4, 4, 4), everywhere)}
    assert not torch.allclose(
        chunk_of(model, dataclasses.replace(inputs, extrinsics=moved)), chunk_of(model, inputs), atol=1e-6
    )
    lost = {**same, "lidar": Masked(torch.full((4, 4, 4), float("nan")), ~everywhere)}
    assert chunk_of(model, dataclasses.replace(inputs, extrinsics=lost)).isfinite().all()


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3), absent=st.sets(st.sampled_from(SENSORS)), bev=st.booleans(), llm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_all_that_may_be_absent(batch: int, absent: set[str], bev: bool, llm: bool, dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {} if bev else {"bev": None, "bev_clouds": (), "calibrated": ()}
    if llm:
        changes["language"] = LLM
    model = made(**changes).to(dtype)
    inputs = fake(model.config, batch)
    for name in absent:
        inputs = masked(inputs, name, float("nan"))
    predicted = chunk_of(model, inputs)
    assert predicted.shape == (batch, HORIZON, ACTION) and predicted.isfinite().all()
    loss = model.train().loss(inputs, *chunk(model.config, batch))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Own(nn.Module):
    """An encoder as a user writes one: no masks, no tokens."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.net = nn.Linear(len(IMU), output_dim)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        return self.net(values).mean(dim=1)


def test_a_users_own_encoder() -> None:
    torch.manual_seed(0)
    model = MultiSensorVLA(sensor_config(), sensor_encoders={"imu": Own(output_dim=6)})
    assert model.config.own_sensors == ("imu",) and "imu" not in model.config.sensors
    inputs = fake(model.config)
    gone = [chunk_of(model, masked(inputs, "imu", filler)) for filler in (1.0, float("nan"))]
    assert torch.equal(*gone) and not torch.allclose(gone[0], chunk_of(model, inputs), atol=1e-6)
    config = from_dict(MultiSensorConfig, to_dict(model.config))
    back = build_model(config, sensor_encoders={"imu": Own(output_dim=6)})
    back.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(chunk_of(back, inputs), chunk_of(model, inputs))
    with pytest.raises(VlaError, match=r"found \(none\), but .*own for imu"):
        build_model(config)
    others = {name: part for name, part in sensor_config().sensors.items() if name != "imu"}
    declared = sensor_config(sensors=others, own_sensors=("imu",))
    assert MultiSensorVLA(declared, sensor_encoders={"imu": Own(output_dim=6)}).config == declared
    with pytest.raises(VlaError, match="Linear has no output_dim"):
        MultiSensorVLA(sensor_config(), sensor_encoders={"imu": nn.Linear(6, 6)})


def test_frozen_parts_stay_as_they_are() -> None:
    model = made()
    for part in ("sensors", "bev", "projector"):
        model.freeze(part)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert not trained & {"sensors", "bev", "projector"} and {"fusion", "widen", "vision", "head"} <= trained
    model.train()
    assert model.training and not model.sensors.training and not model.bev.training and model.fusion.training
    assert build_model(model.config).config.frozen == ("sensors", "bev", "projector")
    with pytest.raises(ConfigError, match="no part 'bev'; choices: fusion, head"):
        made(bev=None, bev_clouds=(), calibrated=()).freeze("bev")


def test_the_instruction_is_computed_once_for_a_control_loop() -> None:
    model = made(language=LLM)
    first = fake(model.config, batch=1)
    for seed in range(4):
        model.predict(dataclasses.replace(fake(model.config, batch=1, seed=seed), tokens=first.tokens))
    assert model.prefix_cache.computed == 1


WRONG: dict[str, dict[str, Any]] = {
    r"sensors\.sonar: no such stream.*doppler, imu, lidar, radar": {
        "sensors": {**sensor_config().sensors, "sonar": sensor_config().sensors["radar"]}
    },
    "bev_clouds: no cloud 'sonar'; choices: lidar, radar": {"bev_clouds": ("sonar",)},
    "bev_clouds: found lidar, but no bev": {"bev": None},
    "bev: nothing to see from above": {"bev_clouds": (), "calibrated": ()},
    "mounts: lack left": {"mounts": {"lidar": FRONT}},
    r"mounts\.left: expected a quaternion": {"mounts": {"left": (0, 0, 0, 1, 1, 0, 0), "lidar": FRONT}},
    "sensors: nothing encodes imu": {"sensors": {n: c for n, c in sensor_config().sensors.items() if n != "imu"}},
    "sensors: nothing encodes calibrations": {"bev": None, "bev_clouds": ()},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_config_that_cannot_work(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sensor_config(**WRONG[message])


def test_columns_that_have_no_place_are_not_seen_from_above() -> None:
    with pytest.raises(ConfigError, match="radar has the columns"):
        made(clouds={"lidar": CLOUD, "radar": ("range", "azimuth", "v", "r", "s")}, bev_clouds=("radar",),
             mounts={"left": FRONT, "radar": FRONT})  # fmt: skip


def test_a_pose_is_its_matrix() -> None:
    """A quarter turn left about z, 2 m ahead: x of the sensor is y of the robot."""
    half = math.sqrt(0.5)
    point = pose_matrix((2.0, 0.0, 1.0, 0.0, 0.0, half, half)) @ torch.tensor([1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(point, torch.tensor([2.0, 1.0, 1.0, 1.0]))
    ahead = pose_matrix(FRONT) @ torch.tensor([0.0, 0.0, 5.0, 1.0])  # 5 m along the optical axis
    torch.testing.assert_close(ahead, torch.tensor([5.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("count", "size", "grid"), [(4, (8, 8), (2, 2)), (8, (16, 32), (2, 4)), (448, (224, 392), (16, 28))]
)
def test_the_grid_of_an_images_tokens(count: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(count, size) == grid


SPEC = ObservationSpec(
    images={"left": ImageSize(height=8, width=8), "right": ImageSize(height=8, width=8)}, state=("arm",),
    instruction="task", clouds={"lidar": CloudSpec(max_points=9), "radar": CloudSpec(max_points=9)},
    sequences=("imu",), maps=("doppler",), calibrations={"left": "left_info"}, history=3,
)  # fmt: skip
NUMBERS = {"mean": [1.0, 2.0, 3.0], "std": [2.0, 2.0, 2.0], "min": [-1.0, -1.0], "max": [1.0, 1.0]}
IMU_NUMBERS = {"mean": [0.5] * 6, "std": [2.0] * 6}
MODES = Normalization(streams={
    "lidar": {"intensity": (0.0, 100.0)}, "radar": {"vx": (0.0, 10.0), "vy": (0.0, 10.0), "rcs": (5.0, 2.0)},
    "doppler": {"value": (0.0, 4.0)},
})  # fmt: skip
COLUMNS = {"lidar": CLOUD, "radar": ("x", "y", "vx", "vy", "rcs"), "imu": IMU, "doppler": ("value",)}


def normalizer(**changes: Any) -> Normalizer:
    statistics = {"state": NUMBERS, "action": NUMBERS, "imu": IMU_NUMBERS}
    return Normalizer(**{"modes": MODES, "statistics": statistics, "columns": COLUMNS, **changes})


def observe(stamp_ns: int = START, points: int = 5, history: int = 2, **changes: Any) -> Observation:
    rng = np.random.default_rng(stamp_ns % 1000)
    values: dict[str, Any] = {
        "stamp_ns": stamp_ns,
        "images": {n: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for n in ("left", "right")},
        "state": rng.normal(size=3).astype(np.float32), "instruction": "lift it", "ages_ns": {},
        "clouds": {"lidar": rng.normal(size=(points, 4)).astype(np.float32) * 10,
                   "radar": rng.normal(size=(2, 5)).astype(np.float32)},
        "sequences": {"imu": Window(rng.normal(size=(5, 6)).astype(np.float32), np.arange(5) >= 2)},
        "maps": {"doppler": rng.normal(size=(4, 6)).astype(np.float32)},
        "calibrations": {"left": blank_calibration(8, 8)},
        "history": tuple(observe(stamp_ns - k, history=0) for k in range(history, 0, -1)),
    }  # fmt: skip
    return Observation(**{**values, **changes})


def test_observations_of_all_kinds_become_one_batch() -> None:
    full, bare = observe(START + 7), observe(
        START + 9, clouds={}, sequences={}, maps={}, calibrations={}, present={"task": False}
    )  # fmt: skip
    broken = full.clouds["lidar"].copy()
    broken[1, 3] = np.nan
    holed = full.maps["doppler"].copy()
    holed[0, 0] = np.nan
    full = dataclasses.replace(full, clouds={**full.clouds, "lidar": broken}, maps={"doppler": holed})
    batch = collate([full, bare], normalizer(), tokenizer(), SPEC)
    lidar = batch.clouds["lidar"]
    assert lidar.mask.tolist() == [[True, False, True, True, True], [False] * 5]
    expected = np.where(np.isnan(broken).any(1)[:, None], 0, broken * [1, 1, 1, 0.01])
    np.testing.assert_allclose(lidar.values[0].numpy(), expected, rtol=1e-5)
    assert not lidar.values[1].any() and batch.clouds["radar"].values.shape == (2, 2, 5)
    np.testing.assert_allclose(
        batch.clouds["radar"].values[0, :, 4].numpy(), (full.clouds["radar"][:, 4] - 5) / 2, rtol=1e-5
    )
    imu = batch.sequences["imu"]
    assert imu.mask.tolist() == [[False, False, True, True, True], [False] * 5]
    np.testing.assert_allclose(imu.values[0, 2:].numpy(), (full.sequences["imu"].values[2:] - 0.5) / 2, rtol=1e-5)
    doppler = batch.maps["doppler"]
    assert doppler.mask.tolist() == [True, False] and doppler.values[0, 1].sum() == 23
    np.testing.assert_allclose(doppler.values[0, 0].numpy(), np.nan_to_num(holed / 4), rtol=1e-5)
    assert batch.intrinsics["left"].mask.tolist() == [True, False]
    assert batch.token_mask is not None and batch.token_mask.tolist() == [[True, True], [False, False]]
    past = batch.history
    assert past is not None and past.state.shape == (2, 2, 3) and past.history is None
    assert past.clouds["lidar"].values.shape == (2, 2, 5, 4)
    np.testing.assert_allclose(past.state[0, 1].numpy(), (full.history[1].state - [1, 2, 3]) / 2, rtol=1e-5)
    moved = batch.to("meta")
    assert moved.history is not None and moved.history.maps["doppler"].values.is_meta and moved.tokens.is_meta
    model = made(state_dim=3, vocab_size=4)
    assert chunk_of(model, batch).isfinite().all()


def test_a_column_without_a_scale_is_refused_with_its_name() -> None:
    with pytest.raises(StatisticsError, match=r"no statistics for 'imu'.*of w0, w1.*normalization\.streams\.imu"):
        normalizer(statistics={"state": NUMBERS, "action": NUMBERS})
    with pytest.raises(StatisticsError, match="'imu' have 2 entries, not 6"):
        normalizer(statistics={"state": NUMBERS, "action": NUMBERS, "imu": {"mean": [0, 0], "std": [1, 1]}})
    with pytest.raises(ConfigError, match=r"streams\.lidar: no column 'color'; choices: intensity, x, y, z"):
        normalizer(modes=dataclasses.replace(MODES, streams={"lidar": {"color": (0.0, 1.0)}}))
    with pytest.raises(ConfigError, match=r"streams\.lidar\.x: a coordinate stays in m"):
        Normalization(streams={"lidar": {"x": (0.0, 10.0)}})
    with pytest.raises(ConfigError, match=r"positive scale, found 0\.0 and 0\.0"):
        Normalization(streams={"lidar": {"intensity": (0.0, 0.0)}})
    assert from_dict(Normalization, to_dict(MODES)) == MODES


def test_a_vehicles_chunk_is_its_trajectory() -> None:
    """Rows of the chunk are waypoints of the contract, and go out as its message."""
    contract = RobotContract.load("vehicle")
    model = made(action_dim=len(contract.action_names), state_dim=2, history=1)
    rows = chunk_of(model, fake(model.config, batch=1))[0].double().numpy()
    action = contract.actions["trajectory"]
    sent = encode(action, START, rows, contract.chunk_step_ns)
    np.testing.assert_allclose(decode(action, sent), rows, rtol=1e-6)
    assert rows.shape == (HORIZON, 4)


# --- driving by an instruction ---

ROAD = ("x", "y", "z", "intensity")


def crossing(batch: int, seed: int) -> tuple[ModelInputs, Tensor]:
    """Clouds of a left and a right radar that see a way to their side each, at a distance of its own, the words 2
    (left) or 3 (right), and where the way of that side is: (B, 1, 1)."""
    random = torch.Generator().manual_seed(seed)
    far = 1.0 + 2.0 * torch.rand(batch, 2, 1, generator=random)  # m to the left and to the right
    x = 8.0 * torch.rand(batch, 2, 12, generator=random)
    y = far.expand(-1, -1, 12) * torch.tensor([1.0, -1.0])[:, None]
    points = torch.stack([x, y, torch.zeros_like(x), torch.ones_like(x)], dim=-1)
    side = torch.randint(0, 2, (batch,), generator=random)
    there = torch.ones(batch, 12, dtype=torch.bool)
    inputs = ModelInputs(
        images={"front": torch.zeros(batch, 3, 8, 8)}, image_mask={"front": torch.zeros(batch, dtype=torch.bool)},
        state=torch.zeros(batch, 1), state_mask=torch.ones(batch, dtype=torch.bool), tokens=2 + side[:, None],
        clouds={"left": Masked(points[:, 0], there), "right": Masked(points[:, 1], there)},
    )  # fmt: skip
    return inputs, (far[:, :, 0] * torch.tensor([1.0, -1.0])).gather(1, side[:, None])[..., None]


def driver(**changes: Any) -> MultiSensorConfig:
    """Both radars as one map, which the instruction modulates, to one number."""
    grid = GridConfig(x_m=(0.0, 8.0), y_m=(-4.0, 4.0), resolution_m=1.0)
    values: dict[str, Any] = {
        "cameras": ("front",), "state_dim": 1, "action_dim": 1, "vocab_size": 4, "horizon": 1,
        "vision": TinyCNNEncoderConfig(image_size=8, output_dim=8, channels=(8,)),
        "projector": MaxPoolingConfig(channels=8), "language": TinyTransformerConfig(d_model=32, layers=1),
        "head": ACTION_HEAD_REGISTRY["mlp"].Config(hidden_dim=32), "readout_tokens": 1,
        "clouds": {"left": ROAD, "right": ROAD}, "bev_clouds": ("radar",), "bev_merged": {"radar": ("left", "right")},
        "bev": BEVConfig(grid=grid, width=16, mix_layers=1, stages=(16,), output="global", output_dim=32),
        "conditioned": True, "summary": True, "mounts": dict.fromkeys(("left", "right"), (0.0,) * 6 + (1.0,)),
        "fusion": PooledFusionConfig(),
    }  # fmt: skip
    return MultiSensorConfig(**{**values, **changes})


def test_an_instruction_chooses_between_two_ways_that_are_seen() -> None:
    torch.manual_seed(0)
    model = MultiSensorVLA(driver()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(160):
        inputs, way = crossing(32, step)
        loss = model.loss(inputs, way, torch.ones(32, 1, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, way = crossing(64, 10_000)  # distances that it has not seen
    error = (chunk_of(model, inputs) - way).abs().mean()
    other = dataclasses.replace(inputs, tokens=5 - inputs.tokens)
    assert error < 0.25, f"{error:.2f} m; who knows the side alone is off by 0.5 m"
    assert (chunk_of(model, other) * way < 0).float().mean() > 0.95, "the same place and the other word: the other way"


def test_the_way_behind_chooses_between_two_ways_that_are_seen() -> None:
    """The words are the same; who came by a curve to the left takes the way to the left."""
    torch.manual_seed(0)
    config = driver(
        sequences={"way": ("speed", "yaw_rate")}, sensors={"way": PathConfig(points=4, length_m=8.0)}, guides=("way",)
    )
    model = MultiSensorVLA(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def came(inputs: ModelInputs) -> ModelInputs:
        turned = torch.where(inputs.tokens == 2, 0.4, -0.4)[:, :, None].expand(-1, 150, 1)
        way = Masked(torch.cat([torch.full_like(turned, 3.0), turned], dim=-1), torch.ones(len(turned), 150).bool())
        return dataclasses.replace(inputs, tokens=torch.full_like(inputs.tokens, 2), sequences={"way": way})

    for step in range(160):
        inputs, way = crossing(32, step)
        loss = model.loss(came(inputs), way, torch.ones(32, 1, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, way = crossing(64, 10_000)
    error = (chunk_of(model, came(inputs)) - way).abs().mean()
    assert error < 0.25, f"{error:.2f} m; who knows the side alone is off by 0.5 m"


def test_a_radar_of_several_may_be_lost() -> None:
    model, (inputs, _) = MultiSensorVLA(driver()).eval(), crossing(4, 0)
    gone = Masked(inputs.clouds["right"].values * float("nan"), torch.zeros_like(inputs.clouds["right"].mask))
    lost = dataclasses.replace(inputs, clouds={**inputs.clouds, "right": gone})
    found = chunk_of(model, lost)
    assert found.isfinite().all() and not torch.allclose(found, chunk_of(model, inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bev_merged": {"radars": ("left", "right")}}, r"bev_merged.radars: expected one of bev_clouds: radar"),
        ({"bev_merged": {"radar": ("left", "back")}}, "bev_clouds: no cloud 'back'; choices: left, right"),
        ({"clouds": {"left": ROAD, "right": ROAD[:3]}}, "bev_merged.radar: expected clouds of the same columns, found "
                                                        "left: x, y, z, intensity; right: x, y, z"),
        ({"bev": BEVConfig(patch=4), "summary": False}, "conditioned: needs a bev with stages"),
        ({"guides": ("way",)}, "guides: no encoder of a stream 'way'; choices: \\(none\\)"),
        ({"guides": ("way",), "conditioned": False, "summary": False}, "guides: have nothing to guide"),
        ({"mounts": {"left": (0.0,) * 6 + (1.0,)}}, "mounts: lack right, which the bev places by it"),
    ],
)  # fmt: skip
def test_drivers_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        driver(**changes)
