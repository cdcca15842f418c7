"""Observations as openpi's clients send them: a key a picture, a state and a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.observation.builder import Observation, ObservationSpec, Window
from vla_core.observation.image import resize
from vla_core.serving.fields import Fields, MessageFormError, cloud, picture

WRISTS = ("wrist", "hand", "gripper")  # words in the name of a camera that is one


class OpenpiForm:
    """What openpi's clients send: one key a picture, a state and a prompt; nothing may be missing.

    ``keys`` names the key of a stream, of the whole ``state`` or of the ``prompt``; what it does not name has the
    first of its usual keys that a message has. ``ignore`` are keys that clients send and the policy does not see.
    Pictures of another size are refused, unless they may be ``resized`` as the robot's own are: a policy that never
    saw borders must not get any.
    """

    def __init__(
        self, contract: RobotContract, spec: ObservationSpec, keys: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (), resized: bool = False,
    ) -> None:  # fmt: skip
        self._contract, self._spec = contract, spec
        self._ignore, self._resized = tuple(ignore), resized
        self.refusal = ""  # why no message of this form can be an observation
        beyond = [place for place in spec.extras if place == "history" or place.startswith("calibrations")]
        if beyond:
            self.refusal = (f"the policy sees {', '.join(beyond)}, for which openpi's messages have no keys; send "
                            "vla_ros's own form, as its policy_node does")  # fmt: skip
        usual = _usual_keys(spec)
        given = {"prompt" if name == spec.instruction else name: key for name, key in (keys or {}).items()}
        for name in given:
            if name not in usual:
                raise VlaError(f"keys: the policy sees no {name!r}; choices: {choices(usual)}")
        self._keys = usual | {name: (key,) for name, key in given.items()}
        self._named = frozenset(given)

    def read(self, message: Any, stamp_ns: int) -> Observation:
        """The observation of a message that arrived at ``stamp_ns``; raises :class:`MessageFormError`."""
        if self.refusal:
            raise MessageFormError(self.refusal)
        fields, spec, streams = Fields(message), self._spec, self._contract
        for key in self._ignore:
            if key in fields:
                fields.take(key)
        observation = Observation(
            stamp_ns=stamp_ns,
            images={n: self._picture(fields, n) for n in spec.images},
            state=self._state(fields),
            instruction=fields.text(self._key(fields, "prompt")) if spec.instruction else "",
            ages_ns={},
            clouds={
                n: cloud(fields, self._key(fields, n), len(streams.stream(n).names), seen.max_points)
                for n, seen in spec.clouds.items()
            },
            sequences={n: self._window(fields, n) for n in spec.sequences},
            maps={n: fields.array(self._key(fields, n), ("u", "i", "f"), (None, None)) for n in spec.maps},
            present={name: True for _, name, _ in spec.uses()},
        )
        fields.done("the policy does not see it; leave it out, or name it in --ignore")
        return observation

    def write(self, observation: Observation) -> dict[str, Any]:
        """The message of an observation, for a server that is not vla_ros's; nothing may be missing."""
        absent = [name for name, there in observation.present.items() if not there]
        if self.refusal or absent:
            raise MessageFormError(self.refusal or f"{', '.join(absent)}: missing, and openpi's messages cannot say so")
        spec = self._spec
        message: dict[str, Any] = {self._keys[n][0]: observation.images[n] for n in spec.images}
        if spec.state:
            message |= self._state_fields(observation.state)
        if spec.instruction:
            message[self._keys["prompt"][0]] = observation.instruction
        message |= {self._keys[n][0]: observation.clouds[n] for n in spec.clouds}
        message |= {self._keys[n][0]: observation.sequences[n].values for n in spec.sequences}
        message |= {self._keys[n][0]: observation.maps[n] for n in spec.maps}
        return message

    def _key(self, fields: Fields, name: str) -> str:
        usual = self._keys[name]
        for key in usual:
            if key in fields:
                return key
        raise MessageFormError(f"{usual[0]}: missing, for {name}; expected {' or '.join(usual)}; keys given: "
                               f"{fields.told}; --keys {name}=KEY names another")  # fmt: skip

    def _picture(self, fields: Fields, name: str) -> np.ndarray:
        key = self._key(fields, name)
        if not self._resized:
            return picture(fields, key, self._spec, name)
        pixels = fields.array(key, ("uint8",), (None, None, 3))
        if not pixels.size:
            raise MessageFormError(f"{key}: found a picture of shape {pixels.shape}")
        size = self._spec.images[name]
        return resize(pixels, size.height, size.width)

    def _state(self, fields: Fields) -> np.ndarray:
        spec = self._spec
        if not spec.state:
            return np.zeros(0, dtype=np.float32)
        widths = {name: len(self._contract.stream(name).names) for name in spec.state}
        if self._is_whole(fields):
            key = self._key(fields, "state")
            return fields.array(key, ("float32", "float64"), (sum(widths.values()),)).astype(np.float32)
        parts = [
            fields.array(self._key(fields, name), ("float32", "float64"), (width,)) for name, width in widths.items()
        ]
        return np.concatenate(parts).astype(np.float32)

    def _is_whole(self, fields: Fields) -> bool:
        """Whether the state comes under one key, and not stream by stream."""
        if "state" in self._named or self._by_stream:
            return not self._by_stream
        return not all(any(key in fields for key in self._keys[name]) for name in self._spec.state)

    @property
    def _by_stream(self) -> bool:
        """Whether keys were named for the state's streams one by one."""
        return bool(self._named.intersection(self._spec.state) - {"state"})

    def _state_fields(self, state: np.ndarray) -> dict[str, Any]:
        if not self._by_stream:
            return {self._keys["state"][0]: state}
        ends = np.cumsum([len(self._contract.stream(name).names) for name in self._spec.state])[:-1]
        parts = np.split(state, ends)
        return {self._keys[name][0]: part for name, part in zip(self._spec.state, parts, strict=True)}

    def _window(self, fields: Fields, name: str) -> Window:
        stream = self._contract.stream(name)
        shape = (stream.window_length, len(stream.names))
        values = fields.array(self._key(fields, name), ("float32", "float64"), shape).astype(np.float32)
        return Window(values, np.ones(len(values), dtype=bool))


def _usual_keys(spec: ObservationSpec) -> dict[str, tuple[str, ...]]:
    """Per stream, for the whole state and for the prompt: the keys that openpi's examples and their like use."""
    names = [name for place, name, kind in spec.uses() if kind not in ("calibration", "text")]
    keys: dict[str, tuple[str, ...]] = {name: (f"observation/{name}", name) for name in names}
    wrists = [name for name in spec.images if any(word in name for word in WRISTS)]
    others = [name for name in spec.images if name not in wrists]
    for name in spec.images:
        usual = [*keys[name], f"observation/{name}_image", f"images/{name}", f"observation/images/{name}"]
        if others[:1] == [name] or (not others and wrists[:1] == [name]):
            usual.append("observation/image")
        if wrists[:1] == [name]:
            usual.append("observation/wrist_image")
        keys[name] = tuple(dict.fromkeys(usual))
    if spec.state:
        keys["state"] = ("observation/state", "state")
    if spec.instruction:
        keys["prompt"] = ("prompt",)
    return keys
