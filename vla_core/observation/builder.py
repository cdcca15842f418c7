"""The observation at a tick: what a model may see, built the same way on the robot and from a bag.

``ObservationBuilder`` is the only place where streams become model inputs. The live node, the converter, the
evaluator and the replay all use it on a :class:`~vla_core.observation.memory_buffer.MemoryBuffer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, RobotContract, Stream
from vla_core.errors import VlaError
from vla_core.observation.decode import Value, decode
from vla_core.observation.image import resize
from vla_core.observation.memory_buffer import MemoryBuffer


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """Model resolution of a camera, pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ConfigError(f"height: expected at least 1x1 pixels, found {self.width}x{self.height}")


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """Which observations of the contract a policy sees: cameras, vectors joined in this order, and the instruction."""

    images: dict[str, ImageSize] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    instruction: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All streams that are needed."""
        text = (self.instruction,) if self.instruction else ()
        return (*self.images, *self.state, *text)


@dataclass(frozen=True)
class Observation:
    """What the robot saw at ``stamp_ns``: images (H, W, 3) uint8 RGB, state (S,) float32, the instruction."""

    stamp_ns: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    ages_ns: dict[str, int]


class Unobserved(VlaError):
    """No observation can be built at this tick; ``reasons`` has one line per stream that is missing or stale."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class ObservationBuilder:
    """Samples a buffer at a tick and refuses when a stream is missing or older than its contract allows."""

    def __init__(self, contract: RobotContract, spec: ObservationSpec) -> None:
        self.contract = contract
        self.spec = spec
        self.streams: dict[str, Stream] = {name: contract.stream(name) for name in spec.names}
        self.by_topic: dict[str, list[str]] = {}  # one topic may hold several streams, as joint_states does
        for name, stream in self.streams.items():
            self.by_topic.setdefault(stream.topic, []).append(name)
        self._decoded: dict[str, tuple[int, bytes, Value]] = {}

    def make_buffer(self) -> MemoryBuffer:
        """A buffer for the streams of the spec."""
        ages = [stream.max_age_ns or 0 for stream in self.streams.values()]
        return MemoryBuffer(
            self.streams,
            latched=[name for name, stream in self.streams.items() if stream.latched],
            span_ns=2 * max([*ages, NANOSECONDS // 2]),
        )

    def due(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """Streams of which a newer message is still to be expected at ``at_ns``, by their rates.

        Empty when the observation at ``at_ns`` is all there. Half a control period is allowed for, since stamps of
        different sensors do not fall on one grid.
        """
        slack_ns = self.contract.step_ns // 2
        late = []
        for name, stream in self.streams.items():
            sample = buffer.sample(name, at_ns)
            if sample is None or (stream.period_ns and at_ns - sample[0] >= stream.period_ns - slack_ns):
                late.append(name)
        return late

    def build(self, buffer: MemoryBuffer, at_ns: int) -> Observation:
        """The observation at ``at_ns``; raises :class:`Unobserved` with every reason."""
        samples, reasons = self._samples(buffer, at_ns)
        if reasons:
            raise Unobserved(reasons)
        values = {name: self._value(name, stamp_ns, data) for name, (stamp_ns, data) in samples.items()}
        ages = {name: at_ns - stamp_ns for name, (stamp_ns, _) in samples.items()}
        state = [np.asarray(values[name], dtype=np.float32) for name in self.spec.state]
        return Observation(
            stamp_ns=at_ns,
            images={name: np.asarray(values[name]) for name in self.spec.images},
            state=np.concatenate(state) if state else np.zeros(0, dtype=np.float32),
            instruction=str(values[self.spec.instruction]) if self.spec.instruction else "",
            ages_ns=ages,
        )

    def absent(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """One line per stream that is missing or stale at ``at_ns``; decodes nothing."""
        return self._samples(buffer, at_ns)[1]

    def _samples(self, buffer: MemoryBuffer, at_ns: int) -> tuple[dict[str, tuple[int, bytes]], list[str]]:
        """``(stamp_ns, message)`` of each stream that may be used at ``at_ns``, and why the others may not."""
        samples: dict[str, tuple[int, bytes]] = {}
        reasons = []
        for name, stream in self.streams.items():
            sample = buffer.sample(name, at_ns)
            if sample is None:
                reasons.append(f"{name} ({stream.topic}): nothing received")
            elif stream.max_age_ns is not None and at_ns - sample[0] > stream.max_age_ns:
                age_s = (at_ns - sample[0]) / NANOSECONDS
                reasons.append(f"{name} ({stream.topic}): {age_s:.3f} s old, limit {stream.max_age_s} s")
            else:
                samples[name] = sample
        return samples, reasons

    def _value(self, name: str, stamp_ns: int, data: bytes) -> Value:
        """Decode a message once, however many ticks hold it."""
        cached = self._decoded.get(name)
        if cached and cached[0] == stamp_ns and cached[1] is data:
            return cached[2]
        value = decode(self.streams[name], data)
        if name in self.spec.images:
            size = self.spec.images[name]
            if isinstance(value, str) or value.ndim != 3:
                raise ConfigError(f"observation.images.{name}: {self.streams[name].type} is not a camera")
            value = resize(value, size.height, size.width)
        self._decoded[name] = (stamp_ns, data, value)
        return value
