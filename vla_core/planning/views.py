"""One observation for two models that see different parts of it."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.observation.builder import Observation, ObservationSpec


def joined(first: ObservationSpec, second: ObservationSpec) -> ObservationSpec:
    """What both see together; raises :class:`ConfigError` where they want a stream in two forms."""
    for place in ("images", "clouds", "calibrations"):
        mine, other = getattr(first, place), getattr(second, place)
        for name in mine:
            if name in other and mine[name] != other[name]:
                raise ConfigError(f"observation.{place}.{name}: {mine[name]} of one model and {other[name]} of the "
                                  "other; both see the same, so train them with the same")  # fmt: skip
    if first.instruction and second.instruction and first.instruction != second.instruction:
        raise ConfigError(f"observation.instruction: {first.instruction!r} and {second.instruction!r}")
    return ObservationSpec(
        images={**first.images, **second.images},
        state=tuple(dict.fromkeys([*first.state, *second.state])),
        instruction=first.instruction or second.instruction,
        clouds={**first.clouds, **second.clouds},
        sequences=tuple(dict.fromkeys([*first.sequences, *second.sequences])),
        maps=tuple(dict.fromkeys([*first.maps, *second.maps])),
        calibrations={**first.calibrations, **second.calibrations},
        history=max(first.history, second.history),
    )


def seen_by(
    observation: Observation, whole: ObservationSpec, part: ObservationSpec, contract: RobotContract
) -> Observation:
    """What a model of the spec ``part`` sees of an observation of the spec ``whole``, which has all of it."""
    if part == whole:
        return observation
    ends = np.cumsum([0, *(len(contract.stream(name).names) for name in whole.state)])
    columns = [np.arange(ends[i], ends[i + 1]) for i in map(whole.state.index, part.state)]
    chosen = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
    past = observation.history[len(observation.history) - (part.history - 1) :] if part.history > 1 else ()
    names = {name for _, name, _ in part.uses()}
    return dataclasses.replace(
        observation,
        images={name: pixels for name, pixels in observation.images.items() if name in part.images},
        state=observation.state[chosen],
        instruction=observation.instruction if part.instruction else "",
        clouds={name: rows for name, rows in observation.clouds.items() if name in part.clouds},
        sequences={name: rows for name, rows in observation.sequences.items() if name in part.sequences},
        maps={name: cells for name, cells in observation.maps.items() if name in part.maps},
        calibrations={name: c for name, c in observation.calibrations.items() if name in part.calibrations},
        present={name: there for name, there in observation.present.items() if name in names},
        history=tuple(seen_by(tick, _tick(whole), _tick(part), contract) for tick in past),
    )


def _tick(spec: ObservationSpec) -> ObservationSpec:
    """The spec of one of its past ticks."""
    clouds = {name: dataclasses.replace(cloud, ego_motion=None) for name, cloud in spec.clouds.items()}
    return dataclasses.replace(spec, history=1, clouds=clouds)
