"""Observations to embeddings, by the encoders of the policies: cameras, the state and any other sensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.inputs import ModelInputs
from vla_core.model.sensor.base import build_sensor
from vla_core.model.sensor.state_encoder import StateEncoderMLP
from vla_core.model.tokens import Tokens, masked_mean
from vla_core.model.vlm.vision_encoder import build_vision_encoder


class ObservationEncoder(nn.Module):
    """:class:`ModelInputs` with leading dimensions (B,) or (B, T) to embeddings (B, E) or (B, T, E).

    Each camera, the state and each stream of ``sensors`` has an encoder and a projection of its own; their sum goes
    through a layer. What is missing adds a learned vector instead, so that black is not taken for unseen.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.output_dim = config, config.embed
        self.cameras = nn.ModuleDict({_key(name): build_vision_encoder(config.vision) for name in config.cameras})
        self.sensors = nn.ModuleDict(
            {_key(name): build_sensor(part, input_dim=config.columns(name)) for name, part in config.sensors.items()}
        )
        self.state = StateEncoderMLP(state_dim=config.state_dim, d_model=config.embed) if config.state_dim else None
        widths = {f"camera {name}": self._image_width(name) for name in config.cameras}
        widths |= {f"sensor {name}": _width(self.sensors[_key(name)]) for name in config.sensors}
        self.project = nn.ModuleDict({_key(part): nn.Linear(width, config.embed) for part, width in widths.items()})
        parts = [*widths, *(("state",) if config.state_dim else ())]
        self.missing = nn.ParameterDict({_key(part): nn.Parameter(torch.zeros(config.embed)) for part in parts})
        self.norm = nn.LayerNorm(config.embed)
        self.mix = nn.Linear(config.embed, config.embed)

    def forward(self, inputs: ModelInputs) -> Tensor:
        steps = inputs.state_mask.dim() == 2
        if steps:
            batch = tuple(inputs.state_mask.shape)
            inputs = inputs.map(lambda tensor: tensor.flatten(0, 1))
        embedding = self.mix(F.silu(self.norm(self._sum(inputs))))
        return embedding.unflatten(0, batch) if steps else embedding

    def _sum(self, inputs: ModelInputs) -> Tensor:
        found = []
        for name in self.config.cameras:
            if name not in inputs.images:
                raise VlaError(f"model inputs lack the camera {name!r}; cameras given: {choices(inputs.images)}")
            mask = inputs.image_mask[name]
            tokens: Tokens = self.cameras[_key(name)](inputs.images[name], mask)
            there = tokens._replace(values=torch.where(tokens.mask[..., None], tokens.values, 0.0))
            pooled = there.values.flatten(1) if self.config.pooling == "flatten" else masked_mean(there)
            found.append(self._part(f"camera {name}", pooled, mask))
        for name in self.config.sensors:
            sensed = inputs.sensor(name)
            if sensed is None:
                raise VlaError(f"model inputs lack the sensor {name!r}")
            tokens = self.sensors[_key(name)](sensed.values, sensed.mask)
            found.append(self._part(f"sensor {name}", masked_mean(tokens), tokens.mask.any(dim=1)))
        if self.state is not None:
            found.append(torch.where(inputs.state_mask[:, None], self.state(inputs.state), self.missing["state"]))
        return torch.stack(found).sum(dim=0)

    def _part(self, part: str, values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, None], self.project[_key(part)](values), self.missing[_key(part)])

    def _image_width(self, name: str) -> int:
        encoder: Any = self.cameras[_key(name)]
        return int(encoder.output_dim * (encoder.tokens_per_image if self.config.pooling == "flatten" else 1))


def _width(encoder: Any) -> int:
    return int(encoder.output_dim)


def _key(name: str) -> str:
    """Modules cannot have a dot in their name, streams can."""
    return name.replace(".", "__")
