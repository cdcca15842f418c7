"""A policy as one function of tensors: preprocessing, model and un-normalization, for exporters to write down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_core.checkpoint import Checkpoint
from vla_core.export.feed import ExportError, Port, feed, ports
from vla_core.model.action_head.draws import Draw, DrawLog, GivenDraws
from vla_core.model.graph import as_graph
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.vlm.text_encoder import PAD
from vla_core.observation.batch import collate
from vla_core.observation.builder import ObservationBuilder
from vla_core.observation.normalizer import Normalizer

EXAMPLE_WORDS = 11


class PolicyGraph(nn.Module):
    """The inputs of ``ports``, in their order, to the chunk (H, A) in the contract's units.

    ``exact``: normalization in float64, as :class:`Normalizer` computes, and a chunk of float64; False: all in
    float32, for engines that have no other.
    """

    def __init__(self, checkpoint: Checkpoint, draws: Sequence[Draw], exact: bool = True) -> None:
        super().__init__()
        check_exportable(checkpoint)
        config = checkpoint.config
        self.model = checkpoint.model
        self.spec = config.observation
        self.draws = tuple(draws)
        noise = sum(int(np.prod(draw.shape)) for draw in draws)
        self.ports = ports(self.spec, checkpoint.contract, noise)
        self.wide = torch.float64 if exact else torch.float32
        self.scaling = _Scaling(checkpoint.normalizer, config.model.horizon, self.wide)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs."""
        return tuple(port.name for port in self.ports)

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        generator = GivenDraws(given["noise"]) if self.draws else None
        with as_graph():
            normalized = self.model.predict(self.inputs(given), generator)[0]
        chunk: Tensor = self.scaling.unnormalize(normalized)
        return chunk

    def inputs(self, given: dict[str, Tensor]) -> ModelInputs:
        """What the model takes, of what the robot gives: as ``observation.batch`` makes it, in tensors."""
        spec = self.spec
        tokens = given["tokens"]
        state, state_mask = self._state(given.get("state"), tokens.new_zeros(1, 0, dtype=torch.float32))
        past = given.get("history.state")
        history = None
        if past is not None:
            before, before_mask = self._state(past, past)
            history = ModelInputs(
                images={}, image_mask={}, state=before, state_mask=before_mask,
                tokens=tokens.new_zeros(*past.shape[:2], 1),
            )  # fmt: skip
        return ModelInputs(
            images={name: _picture(given[f"image.{name}"]) for name in spec.images},
            image_mask={name: given[f"image_mask.{name}"] for name in spec.images},
            state=state, state_mask=state_mask,
            tokens=tokens, token_mask=given["token_mask"],
            clouds={name: self._rows("cloud", name, given) for name in spec.clouds},
            sequences={name: self._rows("sequence", name, given) for name in spec.sequences},
            maps={name: self._map(name, given) for name in spec.maps},
            intrinsics={
                name: Masked(given[f"intrinsics.{name}"], given[f"intrinsics_mask.{name}"])
                for name in spec.calibrations
            },
            history=history,
        )  # fmt: skip

    def _state(self, state: Tensor | None, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized, 0 where it is missing, and the mask of the whole."""
        if state is None:
            return absent, absent.new_ones(1, dtype=torch.bool)
        missing = state.isnan()
        return torch.where(missing, 0.0, self.scaling.normalize("state", state)), ~missing.any(dim=-1)

    def _rows(self, kind: str, name: str, given: dict[str, Tensor]) -> Masked:
        values = given[f"{kind}.{name}"]
        mask = given[f"{kind}_mask.{name}"] & values.isfinite().all(dim=-1)
        return Masked(torch.where(mask[..., None], self.scaling.normalize(name, values), 0.0), mask)

    def _map(self, name: str, given: dict[str, Tensor]) -> Masked:
        values, mask = given[f"map.{name}"], given[f"map_mask.{name}"]
        there = values.isfinite() & mask[:, None, None]
        normalized = torch.where(there, self.scaling.normalize(name, values[..., None])[..., 0], 0.0)
        return Masked(torch.stack([normalized, there.to(normalized.dtype)], dim=1), mask)


class _Scaling(nn.Module):
    """The numbers of a :class:`Normalizer` as constants of a graph."""

    def __init__(self, normalizer: Normalizer, horizon: int, wide: torch.dtype) -> None:
        super().__init__()
        self._limits: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._wide = wide
        for name in ("state", "action", *normalizer.columns):
            shift, scale = (part[:horizon] if part.ndim == 2 else part for part in normalizer.affine(name))
            self._pairs[name] = torch.tensor(shift, dtype=wide), torch.tensor(scale, dtype=wide)
            limit = normalizer.limit(name)
            if limit is not None:
                self._limits[name] = torch.tensor(limit, dtype=wide)

    def normalize(self, name: str, values: Tensor) -> Tensor:
        shift, scale = self._pairs[name]
        normalized = (values.to(self._wide) - shift) / scale
        if name in self._limits:
            normalized = normalized.clamp(-self._limits[name], self._limits[name])
        return normalized.to(torch.float32)

    def unnormalize(self, actions: Tensor) -> Tensor:
        shift, scale = self._pairs["action"]
        return actions.to(self._wide) * scale + shift


def check_exportable(checkpoint: Checkpoint) -> None:
    """Raise :class:`ExportError` for a policy that is no function of fixed inputs."""
    config = checkpoint.config
    if config.execution.strategy == "rtc":
        raise ExportError("execution.strategy: found 'rtc', which guides each sampling by its gradient, and a graph "
                          "has none; choices: blend, ensemble, receding (--execution strategy=blend)")  # fmt: skip
    if getattr(getattr(config.model, "language", None), "injected", None) == "placeholder":
        raise ExportError("model.language.injected: found 'placeholder', whose places in the words a graph does not "
                          "know before; choices: after_text, before_text")  # fmt: skip
    if config.observation.history > 1 and getattr(checkpoint.model, "remembers", "everything") != "state":
        raise ExportError(f"observation.history: the model {config.model.type!r} remembers pictures and sensors of "
                          "past ticks, and only states of them are exported")  # fmt: skip


def draws_of(checkpoint: Checkpoint) -> tuple[Draw, ...]:
    """What the head draws for one answer; a model of one horizon always draws the same."""
    blank = ObservationBuilder(checkpoint.contract, checkpoint.config.observation).blank()
    inputs = collate([blank], checkpoint.normalizer, checkpoint.tokenizer, checkpoint.config.observation,
                     remembers=getattr(checkpoint.model, "remembers", "everything"))  # fmt: skip
    log = DrawLog()
    with torch.no_grad(), as_graph():
        checkpoint.model.predict(inputs, log)
    return tuple(log.draws)


def example(checkpoint: Checkpoint, graph: PolicyGraph, observation: Any) -> tuple[Tensor, ...]:
    """Tensors that the graph takes, of one observation.

    Of an unusual number of words: an exporter takes equal sizes for the same one.
    """
    config = checkpoint.config
    arrays = feed(observation, config.observation, checkpoint.contract, checkpoint.tokenizer)
    missing = ((0, 0), (0, max(0, EXAMPLE_WORDS - arrays["tokens"].shape[1])))
    pad = getattr(checkpoint.tokenizer, "pad_id", PAD)
    arrays["tokens"] = np.pad(arrays["tokens"], missing, constant_values=pad)
    arrays["token_mask"] = np.pad(arrays["token_mask"], missing, constant_values=False)
    count = next((port.shape[0] for port in graph.ports if port.name == "noise"), 0)
    generator = torch.Generator().manual_seed(0)
    noise = {"noise": torch.rand(int(count), generator=generator).numpy()}
    return tuple(torch.from_numpy(np.ascontiguousarray({**arrays, **noise}[port.name])) for port in graph.ports)


def free_sizes(ports: Sequence[Port]) -> tuple[dict[int, Any] | None, ...]:
    """Of each input the dimensions that are free, as torch.export takes them."""
    return tuple(
        {i: torch.export.Dim(size.replace(" ", "_")) for i, size in enumerate(port.shape) if isinstance(size, str)}
        or None
        for port in ports
    )


def output_ports(checkpoint: Checkpoint, exact: bool = True) -> tuple[Port, ...]:
    """The outputs of a policy's graph."""
    shape = (checkpoint.config.model.horizon, len(checkpoint.contract.action_names))
    return (Port(name="actions", dtype="float64" if exact else "float32", shape=shape),)


def _picture(pixels: Tensor) -> Tensor:
    """(1, H, W, 3) uint8 to (1, 3, H, W) float32 in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0
