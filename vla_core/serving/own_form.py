"""Observations as vla_ros's own clients send them: nothing is lost, and what is missing is told.

A message is a mapping of flat keys; docs/serving.md lists them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.model.inputs import Remembers
from vla_core.observation.builder import Observation, ObservationSpec, Window
from vla_core.observation.calibration import Calibration
from vla_core.runtime.chunk import Continuation
from vla_core.serving.fields import Fields, MessageFormError, cloud, picture

PROTOCOL = 1
OWN = "vla_ros"  # the key that tells the protocol, in observations and in a server's metadata
MAX_STAMP_NS = 2**63
CALIBRATION = {"intrinsics": (3, 3), "distortion": (None,), "rectification": (3, 3), "projection": (3, 4)}


class OwnForm:
    """What vla_ros's own clients send: the observation as it was built, and the plan that it continues.

    A stream that is masked is named in ``missing`` and has no key of its own. Of past ticks a model that remembers
    the state alone is sent no more than that.
    """

    def __init__(
        self, contract: RobotContract, spec: ObservationSpec, horizon: int, remembers: Remembers = "everything"
    ) -> None:  # fmt: skip
        self._contract, self._horizon = contract, horizon
        self._now = dataclasses.replace(spec, history=1, clouds=_still(spec))
        self._past = self._now
        if remembers == "state":
            self._past = ObservationSpec(state=spec.state, instruction=spec.instruction)
        self._ticks = spec.history - 1

    def write(self, observation: Observation, continues: Continuation | None = None) -> dict[str, Any]:
        """The message of an observation."""
        message: dict[str, Any] = {OWN: PROTOCOL}
        self._write_tick(message, "", observation, self._now)
        for number, tick in enumerate(observation.history):
            self._write_tick(message, f"history/{number}/", tick, self._past)
        if continues is not None:
            for f in dataclasses.fields(continues):
                message[f"continues/{f.name}"] = getattr(continues, f.name)
        return message

    def read(self, message: Any) -> tuple[Observation, Continuation | None]:
        """The observation of a message, and the plan that it continues; raises :class:`MessageFormError`."""
        fields = Fields(message)
        version = fields.take(OWN)
        if version != PROTOCOL:
            raise MessageFormError(f"{OWN}: found {str(version)[:40]}, expected {PROTOCOL}: use the same version here "
                                   "and there")  # fmt: skip
        past = tuple(self._read_tick(fields, f"history/{k}/", self._past) for k in range(self._ticks))
        observation = self._read_tick(fields, "", self._now, past)
        continues = self._read_continuation(fields) if "continues/actions" in fields else None
        fields.done()
        return observation, continues

    def _write_tick(self, message: dict[str, Any], at: str, tick: Observation, spec: ObservationSpec) -> None:
        uses = list(spec.uses())
        missing = sorted({name for _, name, _ in uses if not tick.present.get(name, True)})
        message |= {f"{at}stamp_ns": tick.stamp_ns, f"{at}missing": missing}
        if spec.state:
            message[f"{at}state"] = tick.state
        for place, name, kind in uses:
            if name in missing or place.startswith("state"):
                continue
            if place == "instruction":
                message[f"{at}prompt"] = tick.instruction
            elif place.startswith("sequences"):
                window = tick.sequences[name]
                message |= {f"{at}{_key(place)}/values": window.values, f"{at}{_key(place)}/mask": window.mask}
            elif kind == "calibration":
                message |= _calibration_fields(f"{at}{_key(place)}", tick.calibrations[_last(place)])
            else:
                message[f"{at}{_key(place)}"] = getattr(tick, place.split(".")[0])[name]

    def _read_tick(
        self, fields: Fields, at: str, spec: ObservationSpec, past: tuple[Observation, ...] = ()
    ) -> Observation:  # fmt: skip
        uses = list(spec.uses())
        known = list(dict.fromkeys(name for _, name, _ in uses))
        missing = fields.names(f"{at}missing", known)
        parts: dict[str, dict[str, Any]] = {
            place: {} for place in ("images", "clouds", "sequences", "maps", "calibrations")
        }
        instruction = ""
        for place, name, _ in uses:
            if name in missing or place.startswith("state"):
                continue
            if place == "instruction":
                instruction = fields.text(f"{at}prompt")
            else:
                group = place.split(".")[0]
                parts[group][_last(place)] = self._read_value(fields, f"{at}{_key(place)}", group, name, spec, place)
        width = sum(len(self._contract.stream(name).names) for name in spec.state)
        state = fields.array(f"{at}state", ("float32",), (width,)) if spec.state else np.zeros(0, dtype=np.float32)
        return Observation(
            stamp_ns=fields.whole(f"{at}stamp_ns", -MAX_STAMP_NS if at else 0, MAX_STAMP_NS), state=state,
            instruction=instruction, ages_ns={}, present={name: name not in missing for name in known}, history=past,
            **parts,
        )  # fmt: skip

    def _read_value(
        self, fields: Fields, key: str, group: str, name: str, spec: ObservationSpec, place: str
    ) -> Any:  # fmt: skip
        if group == "images":
            return picture(fields, key, spec, name)
        if group == "calibrations":
            size = spec.images[_last(place)]
            return _read_calibration(fields, key, size.height, size.width)
        if group == "maps":
            return fields.array(key, ("u", "i", "f"), (None, None))
        stream = self._contract.stream(name)
        if group == "clouds":
            return cloud(fields, key, len(stream.names), spec.clouds[name].max_points)
        length = stream.window_length
        values = fields.array(f"{key}/values", ("float32",), (length, len(stream.names)))
        return Window(values, fields.array(f"{key}/mask", ("bool",), (length,)))

    def _read_continuation(self, fields: Fields) -> Continuation:
        rows, width = self._horizon, len(self._contract.action_names)
        actions = fields.array("continues/actions", ("float64",), (rows, width))
        weights = fields.array("continues/weights", ("float64",), (rows,))
        if not np.isfinite(actions).all():
            raise MessageFormError("continues/actions: found numbers that are not finite")
        if not ((weights >= 0) & (weights <= 1)).all():
            raise MessageFormError("continues/weights: expected numbers from 0 to 1")
        found = Continuation(
            actions, weights, fields.whole("continues/frozen", 0, rows + 1), fields.number("continues/max_guidance"),
            fields.number("continues/spread"),
        )  # fmt: skip
        if found.spread == 0:
            raise MessageFormError("continues/spread: found 0, expected a positive number")
        return found


def _still(spec: ObservationSpec) -> dict[str, Any]:
    """The clouds of ticks that stand alone: the builder has moved them already."""
    return {name: dataclasses.replace(cloud, ego_motion=None) for name, cloud in spec.clouds.items()}


def _key(place: str) -> str:
    """``images.front`` as ``images/front``."""
    return place.replace(".", "/", 1)


def _last(place: str) -> str:
    return place.split(".", 1)[1]


def _calibration_fields(key: str, found: Calibration) -> dict[str, Any]:
    numbers = {f"{key}/{name}": getattr(found, name) for name in CALIBRATION}
    return {**numbers, f"{key}/model": found.model, f"{key}/frame_id": found.frame_id}


def _read_calibration(fields: Fields, key: str, height: int, width: int) -> Calibration:
    numbers = {name: fields.array(f"{key}/{name}", ("float64",), shape) for name, shape in CALIBRATION.items()}
    return Calibration(
        height=height, width=width, model=fields.text(f"{key}/model"), frame_id=fields.text(f"{key}/frame_id"),
        **numbers,
    )  # fmt: skip
