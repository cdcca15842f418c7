"""The model of vehicles and machines with many sensors: cameras, clouds, IMU and a bird's eye view, fused.

Shapes: B batch, K cameras, C columns, D width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.auxiliary import AuxiliaryConfig, AuxiliaryHead, auxiliary_loss
from vla_core.model.fusion.sensor_fusion import FUSION_REGISTRY, CrossModalConfig, build_fusion
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.sensor import SENSOR_REGISTRY, build_sensor
from vla_core.model.sensor.bev import BEVConfig, BEVEncoder, Cameras, CloudColumns, PointSet
from vla_core.model.tokens import Tokens, masked_mean
from vla_core.model.vla.base import MODEL_REGISTRY
from vla_core.model.vla.vla_model import PARTS, VLAConfig, VLAModel, VLARecipe, _values

MAP_CHANNELS = 2  # the value, and whether there is one
Pose = tuple[float, float, float, float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class MultiSensorRecipe(VLARecipe):
    """The free choices of :class:`MultiSensorConfig`; sensors, columns and cameras follow from the dataset.

    ``sensors``     an encoder for each cloud, sequence or map, by the stream's name
    ``bev``         the bird's eye view, of the cameras whose calibration is seen and of ``bev_clouds``
    ``bev_merged``  clouds of the same columns that are one of ``bev_clouds`` together, by its name: radars all round
    ``conditioned`` the instruction, the state and ``guides`` modulate the stages of ``bev``
    ``guides``      streams of ``sensors`` that say, as the instruction does, what to look for
    ``summary``     the readout tokens begin as a summary of the fused tokens, the instruction, the state and
                    ``guides``: a way to the head that needs no attention to be learned first
    ``auxiliary``   what a camera shows, in a word: learned beside the action, from what the dataset says was true, and
                    told to the head. By the name of the truth (``vla_core.data.happened``)
    ``fusion``      of ``vision``, the streams of ``sensors`` and ``bev``
    ``mounts``      where a sensor is in the robot's base frame, by stream: x, y, z in m and the quaternion x, y, z, w;
                    of a camera its optical frame. The bird's eye view needs those of its sources
    """

    type: Literal["multi_sensor_vla"] = "multi_sensor_vla"  # type: ignore[assignment]
    sensors: dict[str, Annotated[Any, SENSOR_REGISTRY]] = field(default_factory=dict)
    bev: BEVConfig | None = None
    bev_clouds: tuple[str, ...] = ()
    bev_merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    conditioned: bool = False
    guides: tuple[str, ...] = ()
    summary: bool = False
    auxiliary: dict[str, AuxiliaryConfig] = field(default_factory=dict)
    fusion: Annotated[Any, FUSION_REGISTRY] = field(default_factory=CrossModalConfig)
    mounts: dict[str, Pose] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, pose in self.mounts.items():
            if abs(math.hypot(*pose[3:]) - 1) > 1e-3:
                raise ConfigError(f"mounts.{name}: expected a quaternion of unit length, found {list(pose[3:])}")
        if self.bev is None and self.bev_clouds:
            raise ConfigError(f"bev_clouds: found {choices(self.bev_clouds)}, but no bev")
        unused = [name for name in self.bev_merged if name not in self.bev_clouds]
        if unused:
            raise ConfigError(f"bev_merged.{unused[0]}: expected one of bev_clouds: {choices(self.bev_clouds)}")
        if self.conditioned and not (self.bev and self.bev.stages):
            raise ConfigError("conditioned: needs a bev with stages, which the instruction modulates")
        if self.guides and not (self.conditioned or self.summary):
            raise ConfigError("guides: have nothing to guide; expected conditioned or summary")

    def members(self, cloud: str) -> tuple[str, ...]:
        """The streams of one of ``bev_clouds``."""
        return self.bev_merged.get(cloud, (cloud,))

    def config(self, **sizes: Any) -> MultiSensorConfig:
        """The whole model configuration for a dataset."""
        return MultiSensorConfig(**_values(self), **sizes)


@dataclass(frozen=True, kw_only=True)
class MultiSensorConfig(MultiSensorRecipe, VLAConfig):
    """What :class:`MultiSensorVLA` is built from: by stream the columns of clouds and sequences; ``maps``; the cameras
    whose calibration is seen.

    ``own_sensors`` are the streams that a module of the caller's own encodes.
    """

    clouds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sequences: dict[str, tuple[str, ...]] = field(default_factory=dict)
    maps: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    own_sensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras:
            raise ConfigError("cameras: expected at least one")
        streams = {*self.clouds, *self.sequences, *self.maps}
        for name in (*self.sensors, *self.own_sensors):
            if name not in streams or (name in self.sensors and name in self.own_sensors):
                raise ConfigError(f"sensors.{name}: no such stream that is left to encode; the observation has "
                                  f"{choices(streams)}")  # fmt: skip
        above = [name for cloud in self.bev_clouds for name in self.members(cloud)]
        unknown = [name for name in above if name not in self.clouds]
        if unknown:
            raise ConfigError(f"bev_clouds: no cloud {unknown[0]!r}; choices: {choices(self.clouds)}")
        for cloud, names in self.bev_merged.items():
            if len({self.clouds[name] for name in names}) != 1:
                found = "; ".join(f"{name}: {', '.join(self.clouds[name])}" for name in names)
                raise ConfigError(f"bev_merged.{cloud}: expected clouds of the same columns, found {found}")
        for name in self.guides:
            if name not in self.sensors and name not in self.own_sensors:
                raise ConfigError(f"guides: no encoder of a stream {name!r}; choices: "
                                  f"{choices([*self.sensors, *self.own_sensors])}")  # fmt: skip
        if self.bev is not None and not (self.calibrated or self.bev_clouds):
            raise ConfigError("bev: nothing to see from above; expected calibrated cameras or bev_clouds")
        unmounted = [name for name in self.bev_sources if name not in self.mounts]
        if unmounted:
            raise ConfigError(f"mounts: lack {choices(unmounted)}, which the bev places by it")
        used = {*self.sensors, *self.own_sensors, *above}
        for name, head in self.auxiliary.items():
            if head.camera not in self.cameras:
                raise ConfigError(f"auxiliary.{name}.camera: no camera {head.camera!r}; choices: "
                                  f"{choices(self.cameras)}")  # fmt: skip
        unused = [name for name in streams if name not in used]
        if unused or (self.calibrated and self.bev is None):
            raise ConfigError(f"sensors: nothing encodes {choices(unused or ['calibrations'])}; name an encoder, or "
                              "leave it out of the observation")  # fmt: skip

    @property
    def bev_sources(self) -> tuple[str, ...]:
        """Streams that the bird's eye view is made of."""
        clouds = (name for cloud in self.bev_clouds for name in self.members(cloud))
        return (*self.calibrated, *clouds) if self.bev else ()


class MultiSensorVLA(VLAModel):
    """As :class:`VLAModel`, with all sensors fused before the language model reads them.

    The chunk is a trajectory where the contract's action is one: a row a waypoint. A sensor that is missing is masked
    and adds nothing.

    ``sensor_encoders`` are the caller's own, by stream: modules with an attribute ``output_dim`` whose forward takes
    values and mask, as in ``model.inputs``, and gives ``Tokens``, (B, D) or (B, N, D). A checkpoint holds their
    weights and the caller builds them again: ``Checkpoint.load(path, sensor_encoders={...})``.
    """

    Config: type[Any] = MultiSensorConfig
    Recipe: type[Any] = MultiSensorRecipe
    sees: tuple[str, ...] = (*VLAModel.sees, "clouds", "sequences", "maps", "calibrations")
    parts: tuple[str, ...] = (*PARTS, "sensors", "bev", "fusion")
    _config: MultiSensorConfig

    def __init__(self, config: MultiSensorConfig, sensor_encoders: Mapping[str, nn.Module] | None = None) -> None:
        own = dict(sensor_encoders or {})
        if own and not config.own_sensors:
            kept = {name: part for name, part in config.sensors.items() if name not in own}
            config = _replace(config, sensors=kept, own_sensors=tuple(own))
        if set(own) != set(config.own_sensors):
            raise VlaError(f"sensor_encoders: found {choices(own)}, but the model was made with modules of its user's "
                           f"own for {choices(config.own_sensors)}; build them and hand them over")  # fmt: skip
        super().__init__(_replace(config, frozen=()))
        encoders: dict[str, nn.Module] = {
            name: build_sensor(part, input_dim=_input_dim(config, name)) for name, part in config.sensors.items()
        }
        encoders.update(own)
        for name, encoder in encoders.items():
            if not isinstance(getattr(encoder, "output_dim", None), int):
                raise VlaError(f"sensor_encoders.{name}: {type(encoder).__name__} has no output_dim, the width of its "
                               "tokens")  # fmt: skip
        self.sensors = nn.ModuleDict(encoders)
        widths: dict[str, Any] = {name: encoder.output_dim for name, encoder in encoders.items()}
        self.widen = nn.ModuleDict({name: nn.Linear(width, self.width) for name, width in widths.items()})
        known = self.language.output_dim + (1 + len(config.guides)) * self.width
        self.condition = nn.Linear(known, self.width) if config.conditioned or config.summary else None
        self.auxiliary = self._auxiliary(config)
        parts = 2 + len(self.auxiliary)  # of what the summary is made
        self.summary = nn.Linear(parts * self.width, self.readout.numel()) if config.summary else None
        self.bev = self._bev(config)
        if self.bev is not None:
            self.widen["bev"] = nn.Linear(self.bev.output_dim, self.width)
        modalities = ("vision", *self.sensors, *(() if self.bev is None else ("bev",)))
        self.fusion = build_fusion(config.fusion, modalities=modalities, d_model=self.width)
        self._config = config
        self._freeze_parts()

    def see(self, inputs: ModelInputs) -> list[Tokens]:
        return self._scene(inputs)[0]

    def loss(
        self, inputs: ModelInputs, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None,
        truths: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`VLAModel.loss`; plus that of the auxiliary heads, about ``truths`` (B,) int64, where given."""
        seen, logits = self._scene(inputs)
        loss: Tensor = self.head.loss(self.read(inputs, seen), actions, mask, generator)
        if not truths:
            return loss
        there = {name: inputs.image_mask[head.camera] for name, head in self._config.auxiliary.items()}
        return loss + auxiliary_loss(self._config.auxiliary, logits, there, truths)

    @torch.no_grad()
    def tell(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Return the probabilities (B, C) of every auxiliary head's classes."""
        return {name: logits.softmax(dim=-1) for name, logits in self._scene(inputs)[1].items()}

    def _scene(self, inputs: ModelInputs) -> tuple[list[Tokens], dict[str, Tensor]]:
        """The tokens that the language model reads, and the auxiliary heads' logits."""
        images, mask = self.images(inputs)
        seen = self.vision(images, mask)
        parts = {"vision": self.project(seen, mask)}
        told, logits = self._told(parts["vision"].values, mask)
        parts.update({name: self._sense(name, encoder, inputs) for name, encoder in self.sensors.items()})
        if self.bev is not None:
            cameras, clouds = self._cameras(seen, images, mask, inputs), self._clouds(inputs)
            above = self.bev(cameras, clouds, self.known(inputs) if self._config.conditioned else None)
            parts["bev"] = Tokens(self.widen["bev"](above.values), above.mask)
        return [self.fusion(parts), *self.own(inputs), *told], logits

    def _told(self, vision: Tensor, mask: Tensor) -> tuple[list[Tokens], dict[str, Tensor]]:
        """What the auxiliary heads make of the vision tokens (B, K Q, D): a token each, and its logits."""
        cameras = vision.unflatten(1, (mask.shape[1], -1))
        told, logits = [], {}
        for name, head in self.auxiliary.items():
            place = self._config.cameras.index(self._config.auxiliary[name].camera)
            logits[name], token = head(cameras[:, place], mask[:, place])
            told.append(token)
        return told, logits

    def _sense(self, name: str, encoder: nn.Module, inputs: ModelInputs) -> Tokens:
        values, mask = _given(inputs.sensor(name), name)
        out = encoder(values, mask)
        if isinstance(out, Tensor):
            out = out[:, None] if out.dim() == 2 else out
            there = mask.flatten(1).any(dim=1) if mask.dim() > 1 else mask
            out = Tokens(out, there[:, None].expand(out.shape[:2]))
        widen = self.widen[name]
        # A user's encoder may make NaN of what is masked.
        values = torch.where(out.mask[..., None], out.values, 0.0)
        return Tokens(widen(values.to(next(widen.parameters()).dtype)), out.mask)

    def _cameras(self, seen: Tokens, images: Tensor, mask: Tensor, inputs: ModelInputs) -> Cameras | None:
        names = self._config.calibrated
        if not names or self._config.bev is None:
            return None
        picked = [self._config.cameras.index(name) for name in names]
        size = (images.shape[-2], images.shape[-1])
        if self._config.bev.cameras == "ground":
            features = images[:, picked]
        else:
            count = self.vision.tokens_per_image
            maps = seen.values.unflatten(1, (mask.shape[1], count))[:, picked]  # (B, K, h w, C)
            features = maps.transpose(2, 3).unflatten(3, token_grid(count, size))
        known = [_given(inputs.intrinsics.get(name), name) for name in names]
        intrinsics = torch.stack([k.values for k in known], dim=1)
        poses = [self._pose(name, inputs) for name in names]
        there = torch.stack([k.mask & p.mask for k, p in zip(known, poses, strict=True)], dim=1) & mask[:, picked]
        return Cameras(features, intrinsics, torch.stack([p.values for p in poses], dim=1), there, size)

    def _clouds(self, inputs: ModelInputs) -> dict[str, list[PointSet]]:
        config = self._config
        return {cloud: [self._points(name, inputs) for name in config.members(cloud)] for cloud in config.bev_clouds}

    def _points(self, name: str, inputs: ModelInputs) -> PointSet:
        values, mask = _given(inputs.clouds.get(name), name)
        pose = self._pose(name, inputs)
        place = torch.where(pose.mask[:, None, None], pose.values, torch.eye(4, device=values.device))
        return PointSet(values, mask & pose.mask[:, None], place)

    def ask(self, inputs: ModelInputs, seen: list[Tokens]) -> Tensor:
        learned = super().ask(inputs, seen)
        if self.summary is None:
            return learned
        told = [token.values[:, 0] for token in seen[len(seen) - len(self.auxiliary) :]]
        scene = torch.cat([masked_mean(seen[0]), self.known(inputs), *told], dim=-1)
        return learned + self.summary(scene).view_as(learned)

    def known(self, inputs: ModelInputs) -> Tensor:
        """What was said, how the robot moves and what the guides tell (B, D), 0 where that is missing."""
        assert self.condition is not None
        said = masked_mean(self.language(inputs.tokens, mask=inputs.token_mask, cache=self._cache(inputs)))
        moving = said.new_zeros(len(said), self.width)
        if self.state is not None:
            moving = masked_mean(self.state(inputs.state, inputs.state_mask))
        told = [masked_mean(self._sense(name, self.sensors[name], inputs)) for name in self._config.guides]
        return self.condition(torch.cat([said, moving, *told], dim=-1)).relu()

    def _pose(self, name: str, inputs: ModelInputs) -> Masked:
        if name in inputs.extrinsics:
            return inputs.extrinsics[name]
        batch = len(inputs.tokens)
        # Made here: a buffer would be rounded with the weights.
        mount = pose_matrix(self._config.mounts[name]).to(inputs.tokens.device)
        return Masked(mount.expand(batch, 4, 4), torch.ones(batch, dtype=torch.bool, device=mount.device))

    def _auxiliary(self, config: MultiSensorConfig) -> nn.ModuleDict:
        return nn.ModuleDict({name: AuxiliaryHead(part, width=self.width) for name, part in config.auxiliary.items()})

    def _bev(self, config: MultiSensorConfig) -> BEVEncoder | None:
        if config.bev is None:
            return None
        columns = {}
        for name in config.bev_clouds:
            names = config.clouds[config.members(name)[0]]
            if names[:2] != ("x", "y"):
                raise ConfigError(
                    f"bev_clouds: {name} has the columns {list(names)}, expected x, y and perhaps z first"
                )
            columns[name] = CloudColumns(columns=len(names), has_height=names[2:3] == ("z",))
        camera_dim = 3 if config.bev.cameras == "ground" else self.vision.output_dim
        return BEVEncoder(
            config.bev, camera_dim=camera_dim if config.calibrated else None, clouds=columns,
            condition_dim=self.width if config.conditioned else None,
        )  # fmt: skip


def pose_matrix(pose: Pose) -> Tensor:
    """The matrix (4, 4) float32 of x, y, z in m and a unit quaternion x, y, z, w."""
    x, y, z, qx, qy, qz, qw = pose
    norm = math.hypot(qx, qy, qz, qw)
    a, b, c, w = qx / norm, qy / norm, qz / norm, qw / norm
    return torch.tensor([
        [1 - 2 * (b * b + c * c), 2 * (a * b - c * w), 2 * (a * c + b * w), x],
        [2 * (a * b + c * w), 1 - 2 * (a * a + c * c), 2 * (b * c - a * w), y],
        [2 * (a * c - b * w), 2 * (b * c + a * w), 1 - 2 * (a * a + b * b), z],
        [0.0, 0.0, 0.0, 1.0],
    ])  # fmt: skip


def token_grid(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of ``count`` tokens of a picture of ``size`` (height, width): cells as square as can be."""
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] * size[1] / (pair[1] * size[0]))))


def _input_dim(config: MultiSensorConfig, name: str) -> int:
    return MAP_CHANNELS if name in config.maps else len(config.clouds.get(name) or config.sequences[name])


def _given(found: Masked | None, name: str) -> Masked:
    if found is None:
        raise VlaError(f"model inputs lack {name!r}; a sensor that is missing is given as masked")
    return found


def _replace(config: MultiSensorConfig, **changes: Any) -> MultiSensorConfig:
    return MultiSensorConfig(**{**_values(config), **changes})


MODEL_REGISTRY["multi_sensor_vla"] = MultiSensorVLA
