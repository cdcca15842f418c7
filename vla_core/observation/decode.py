"""From serialized message to value: pixels, a vector in the contract's order, or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_core.contract import Action, Stream
from vla_core.errors import choices
from vla_core.observation.image import compressed_to_rgb, raw_to_rgb
from vla_core.observation.messages import MessageError, deserialize

Value = np.ndarray | str
Decoder = Callable[[Any, Stream], Value]


def _named_values(message: Any, stream: Stream | Action) -> np.ndarray:
    """Entries ``stream.names`` of a ``sensor_msgs/JointState``, (len(names),) float64."""
    values = np.asarray(getattr(message, stream.field or "position"))
    if len(values) != len(message.name):
        raise MessageError(f"{stream.topic}: {len(message.name)} names but {len(values)} values in {stream.field!r}")
    if tuple(message.name) == stream.names:  # the usual case costs no search
        return values
    index = {name: i for i, name in enumerate(message.name)}
    absent = [name for name in stream.names if name not in index]
    if absent:
        raise MessageError(f"{stream.topic}: no entry {', '.join(absent)}; the message has: {choices(index)}")
    return values[[index[name] for name in stream.names]]


# Extend by assigning a function to a type name: DECODERS["my_msgs/msg/Tactile"] = decode_tactile
DECODERS: dict[str, Decoder] = {
    "sensor_msgs/msg/Image": lambda message, stream: raw_to_rgb(message),
    "sensor_msgs/msg/CompressedImage": lambda message, stream: compressed_to_rgb(message),
    "sensor_msgs/msg/JointState": _named_values,
    "std_msgs/msg/String": lambda message, stream: str(message.data),
}


def decode(stream: Stream, data: bytes | memoryview) -> Value:
    """Decode one message of ``stream``; raises :class:`MessageError` naming the topic.

    Images become (H, W, 3) uint8 RGB, ``JointState`` a float64 vector in the contract's order, ``String`` text.
    """
    if stream.type not in DECODERS:
        raise MessageError(f"{stream.topic}: no decoder for {stream.type!r}; choices: {choices(DECODERS)}")
    try:
        return DECODERS[stream.type](deserialize(stream.type, data), stream)
    except MessageError as error:
        text = str(error)
        raise MessageError(text if text.startswith(stream.topic) else f"{stream.topic}: {text}") from None


def decode_action(action: Action, data: bytes | memoryview) -> np.ndarray:
    """The command in a message of the contract's action topic, (len(action.names),) float64 in its units."""
    if action.type != "sensor_msgs/msg/JointState":
        raise MessageError(f"{action.topic}: commands of type {action.type!r} cannot be read; "
                           "choices: sensor_msgs/msg/JointState")  # fmt: skip
    return _named_values(deserialize(action.type, data), action)
