"""Small whole models and their inputs, made by hand for the tests of vla_core.model.vla."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY
from vla_core.model.fusion.sensor_fusion import CrossModalConfig
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.sensor import IMUConfig, PointCloudConfig, RadarConfig
from vla_core.model.sensor.bev import BEVConfig, GridConfig
from vla_core.model.sensor.lidar_encoder import SetAbstractionConfig
from vla_core.model.temporal.history import HistoryConfig
from vla_core.model.vla import MultiSensorConfig, VLAConfig
from vla_core.model.vlm import AttentionPoolingConfig, LLMConfig, TinyCNNEncoderConfig, TinyGRUConfig

STATE, ACTION, HORIZON, WORDS, SIZE = 3, 2, 4, 10, 8
CLOUD = ("x", "y", "z", "intensity")
TARGETS = ("x", "y", "vx", "vy", "rcs")
IMU = tuple(f"w{i}" for i in range(6))
LLM = LLMConfig(
    model_name="smollm2-135m", pretrained=None,
    architecture={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "vocab_size": 12, "pad_token_id": 0},
)  # fmt: skip
FRONT = (0.0, 0.0, 1.0, -0.5, 0.5, -0.5, 0.5)  # an optical frame that looks along x


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 16 columns are slower on two threads, and much slower where something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vla_config(**changes: Any) -> VLAConfig:
    """Two cameras of 8x8 pixels, a state and a history of three ticks."""
    defaults: dict[str, Any] = {
        "cameras": ("left", "right"), "state_dim": STATE, "action_dim": ACTION, "vocab_size": WORDS,
        "horizon": HORIZON, "history": 3,
        "vision": TinyCNNEncoderConfig(image_size=SIZE, output_dim=16, channels=(8, 8)),
        "projector": AttentionPoolingConfig(num_queries=2, num_heads=2),
        "language": TinyGRUConfig(d_model=16),
        "head": ACTION_HEAD_REGISTRY["mlp"].Config(hidden_dim=32),
        "memory": HistoryConfig(context_dim=8, layers=1, heads=2, max_len=4),
        "readout_tokens": 2,
    }  # fmt: skip
    return VLAConfig(**{**defaults, **changes})


def sensor_config(**changes: Any) -> MultiSensorConfig:
    """The same robot with a LiDAR, a radar, an IMU, a range-Doppler map and a bird's eye view."""
    level = SetAbstractionConfig(points=4, radius_m=4.0, neighbors=4, widths=(8,))
    defaults: dict[str, Any] = {
        "clouds": {"lidar": CLOUD, "radar": TARGETS}, "sequences": {"imu": IMU}, "maps": ("doppler",),
        "calibrated": ("left",),
        "sensors": {
            "lidar": PointCloudConfig(levels=(level,), global_widths=(8,), output_dim=8, output="both"),
            "radar": RadarConfig(widths=(8,), output_dim=8),
            "imu": IMUConfig(layers=1, output_dim=8),
            "doppler": RadarConfig(form="range_doppler", widths=(8,), output_dim=8),
        },
        "bev": BEVConfig(grid=GridConfig(x_m=(0.0, 8.0), y_m=(-4.0, 4.0), resolution_m=1.0), width=8, depth_bins=4,
                         depth_m=(1.0, 8.0), patch=4, output_dim=8),
        "bev_clouds": ("lidar",), "mounts": {"left": FRONT, "lidar": (0.0, 0.0, 1.5, 0.0, 0.0, 0.0, 1.0)},
        "fusion": CrossModalConfig(layers=1, heads=2),
    }  # fmt: skip
    plain = vla_config()
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name != "type"}
    return MultiSensorConfig(**{**values, **defaults, **changes})


def fake(config: VLAConfig, batch: int = 4, seed: int = 0) -> ModelInputs:
    """A batch of noise in which everything is there."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def rows(count: int, width: int) -> Masked:
        return Masked(noise(batch, count, width), there(batch, count))

    def there(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=torch.bool)

    size = config.vision.size
    ticks = config.history - 1
    tokens = torch.randint(2, config.vocab_size, (batch, 3), generator=random)
    plain: dict[str, Any] = {
        "images": {name: torch.rand(batch, 3, *size, generator=random) for name in config.cameras},
        "image_mask": {name: there(batch) for name in config.cameras},
        "state": noise(batch, config.state_dim), "state_mask": there(batch),
        "tokens": tokens, "token_mask": there(batch, 3),
    }  # fmt: skip
    if ticks:
        plain["history"] = ModelInputs(
            images={}, image_mask={}, tokens=tokens[:, None].expand(-1, ticks, -1),
            state=noise(batch, ticks, config.state_dim), state_mask=there(batch, ticks),
        )  # fmt: skip
    if isinstance(config, MultiSensorConfig):
        camera = torch.tensor([[4.0, 0.0, 3.5], [0.0, 4.0, 3.5], [0.0, 0.0, 1.0]])
        plain["clouds"] = {name: rows(6, len(columns)) for name, columns in config.clouds.items()}
        plain["sequences"] = {name: rows(5, len(columns)) for name, columns in config.sequences.items()}
        plain["maps"] = {name: Masked(noise(batch, 2, 4, 6), there(batch)) for name in config.maps}
        plain["intrinsics"] = {name: Masked(camera.expand(batch, 3, 3), there(batch)) for name in config.calibrated}
    return ModelInputs(**plain)


def chunk(config: VLAConfig, batch: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Actions (B, H, A) in [-1, 1] and a mask that leaves out the last step of the first row."""
    random = torch.Generator().manual_seed(seed)
    actions = 2 * torch.rand(batch, config.horizon, config.action_dim, generator=random) - 1
    mask = torch.ones(batch, config.horizon, dtype=torch.bool)
    mask[0, -1] = False
    return actions, mask


def chunk_of(model: Any, inputs: ModelInputs) -> Tensor:
    """What the model predicts with the noise of one seed."""
    predicted: Tensor = model.eval().predict(inputs, torch.Generator().manual_seed(3))
    return predicted
