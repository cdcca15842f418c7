"""The observation at a tick: what a model may see, built the same way on the robot and from a bag.

``ObservationBuilder`` is the only place where streams become model inputs. The live node, the converter, the
evaluator and the replay all use it on a :class:`~vla_core.observation.memory_buffer.MemoryBuffer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, RobotContract, Stream
from vla_core.errors import VlaError
from vla_core.observation.calibration import Calibration, blank_calibration
from vla_core.observation.decode import Value, decode, is_kind
from vla_core.observation.ego_motion import decode_pose, interpolate_pose, move, relative
from vla_core.observation.image import resize
from vla_core.observation.memory_buffer import DEFAULT_MAX_BYTES, DEFAULT_MAX_MESSAGES, MemoryBuffer
from vla_core.observation.point_cloud import subsample
from vla_core.observation.sampling import Picked, ahead_ns, behind_ns, bracket, newest, pick, reach_ns
from vla_core.observation.spec import CloudSpec as CloudSpec
from vla_core.observation.spec import ImageSize as ImageSize
from vla_core.observation.spec import ObservationSpec as ObservationSpec
from vla_core.observation.spec import check_spec
from vla_core.observation.vector import blend, quaternions

NO_LIMIT_NS = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Window:
    """The newest samples of a vector, oldest first: ``values`` (L, C) float32, ``mask`` (L,) bool.

    L is the stream's ``window_length``; where there are fewer samples, the first rows are 0 and masked.
    """

    values: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Observation:
    """What the robot saw at ``stamp_ns``.

    ``images`` (H, W, 3) uint8 RGB, ``state`` (S,) float32, ``clouds`` (N, C) float32 in the sensor's frame,
    ``sequences`` windows of vectors, ``maps`` (H, W) as the sensor sends them, ``calibrations`` of the resized images,
    by the image's name. ``ages_ns`` is the time from each sample to the tick, negative where it is later (past and
    offline ticks).

    ``present`` tells of every stream that is seen whether it is there. What is not is left out of its dictionary, and
    is NaN in ``state``. ``history`` holds the past ticks, oldest first, each one control step before the next; the
    last one is one step before this observation.
    """

    stamp_ns: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    ages_ns: dict[str, int]
    clouds: dict[str, np.ndarray] = field(default_factory=dict)
    sequences: dict[str, Window] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    present: dict[str, bool] = field(default_factory=dict)
    history: tuple[Observation, ...] = ()


class Unobserved(VlaError):
    """No observation can be built at this tick; ``reasons`` has one line per stream that is missing or stale."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass
class _Tick:
    """Which messages make the observation at ``at_ns``, and where the clouds are moved from and to."""

    at_ns: int
    picked: dict[str, Picked] = field(default_factory=dict)
    moves: dict[str, tuple[Picked, Picked]] = field(default_factory=dict)  # cloud to odometry there and now


class ObservationBuilder:
    """Samples a buffer at a tick, and refuses or masks what is missing or older than its contract allows.

    A stream with ``missing: refuse`` that is not there makes :meth:`build` raise :class:`Unobserved`, one with
    ``mask`` is absent from the observation, unless it is one of the contract's ``any_of`` and all of them that the spec
    sees are missing: that is refused too. In the history, what is before a stream's first message since the
    episode's start is masked, whatever the contract says: there was nothing to see.
    """

    def __init__(self, contract: RobotContract, spec: ObservationSpec) -> None:
        self.contract = contract
        self.spec = spec
        self.streams: dict[str, Stream] = {name: contract.stream(name) for name in spec.names}
        check_spec(spec, contract)
        self.by_topic: dict[str, list[str]] = {}  # one topic may hold several streams, as joint_states does
        for name, stream in self.streams.items():
            self.by_topic.setdefault(stream.topic, []).append(name)
        self._kinds = {name: (place, kind) for place, name, kind in spec.uses()}
        self._seen = tuple(name for _, name, _ in spec.uses())
        self._any_of = tuple(name for name in contract.any_of if name in self._seen)
        self._quaternions = {
            name: quaternions(stream.names) for name, stream in self.streams.items() if stream.sampling == "interpolate"
        }
        self._decoded: dict[tuple[str, str, int], tuple[bytes, Value]] = {}
        self._used: dict[tuple[str, str, int], tuple[bytes, Value]] = {}

    @property
    def lookahead_ns(self) -> int:
        """How far beyond a tick messages are seen; 0 unless the contract is offline."""
        if not self.contract.offline:
            return 0
        odometry = [reach_ns(self.streams[c.ego_motion]) for c in self.spec.clouds.values() if c.ego_motion]
        return max(map(ahead_ns, self.streams.values()), default=0) + max(odometry, default=0)

    def make_buffer(self, max_bytes: int = DEFAULT_MAX_BYTES) -> MemoryBuffer:
        """A buffer for the streams of the spec, each as long as the oldest sample that may be asked for, twice."""
        spans = {name: 2 * max(self._behind_ns(name), NANOSECONDS // 2) + self.lookahead_ns for name in self.streams}
        most = max((spans[name] * (stream.rate_hz or 0.0) for name, stream in self.streams.items()), default=0.0)
        return MemoryBuffer(
            self.streams,
            latched=[name for name, stream in self.streams.items() if stream.latched],
            span_ns=spans,
            max_bytes=max_bytes,
            max_messages=max(DEFAULT_MAX_MESSAGES, math.ceil(2 * most / NANOSECONDS)),
        )

    def _behind_ns(self, name: str) -> int:
        """How far behind the newest tick the oldest message of a stream may be asked for."""
        moved = [cloud for cloud, seen in self.spec.clouds.items() if seen.ego_motion == name]  # at a cloud's stamp
        behind = behind_ns(self.streams[name]) + max((behind_ns(self.streams[cloud]) for cloud in moved), default=0)
        return behind + (self.spec.history - 1) * self.contract.step_ns

    def due(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """Streams of which a newer message is still to be expected at ``at_ns``, by their rates.

        Empty when the observation at ``at_ns`` is all there. Half a control period is allowed for, or half of the
        sensor's where that is shorter, since stamps of different sensors do not fall on one grid. Nobody waits for a
        masked stream that is missing already.
        """
        late = []
        for name, stream in self.streams.items():
            sample = buffer.sample(name, at_ns)
            silent = sample is None or (stream.max_age_ns is not None and at_ns - sample[0] > stream.max_age_ns)
            if silent and stream.missing == "mask":
                continue
            period_ns = stream.period_ns or 0
            slack_ns = min(self.contract.step_ns, period_ns) // 2
            if sample is None or (period_ns and at_ns - sample[0] >= period_ns - slack_ns):
                late.append(name)
        return late

    def build(self, buffer: MemoryBuffer, at_ns: int) -> Observation:
        """The observation at ``at_ns``; raises :class:`Unobserved` with every reason."""
        ticks, refused, _ = self._pick(buffer, at_ns)
        if refused:
            raise Unobserved(refused)
        self._used = {}
        past = tuple(self._observe(tick) for tick in reversed(ticks[1:]))
        observation = self._observe(ticks[0], past)
        self._decoded = self._used  # what no tick holds any more is forgotten
        return observation

    def absent(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """One line per stream for which the observation at ``at_ns`` is refused; decodes nothing."""
        return self._pick(buffer, at_ns)[1]

    def lost(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """One line per stream that may not be missing and whose newest message at ``at_ns`` is older than its limit.

        Between ticks this is what may end a plan: how close to a *tick* a message must be (``tolerance_s``) says
        nothing about the instants in between.
        """
        lines = []
        for name, stream in self.streams.items():
            found = newest(buffer, name, stream, at_ns)
            if stream.missing == "refuse" and isinstance(found, str):
                lines.append(f"{name} ({stream.topic}): {found}")
        blind = {}
        for name in self._any_of:
            found = newest(buffer, name, self.streams[name], at_ns)
            if isinstance(found, str):
                blind[name] = f"{name} ({self.streams[name].topic}): {found}"
        if self._any_of and len(blind) == len(self._any_of):
            lines.append(self._blind(blind))
        return lines

    def masked(self, buffer: MemoryBuffer, at_ns: int) -> list[str]:
        """One line per stream that is masked at ``at_ns`` since it is missing or stale; decodes nothing."""
        return self._pick(buffer, at_ns)[2]

    def blank(self) -> Observation:
        """An observation of zeros in the form of real ones, for warm-ups."""
        spec, streams = self.spec, self.streams
        infos = {image: spec.images[image] for image in spec.calibrations}

        def at(stamp_ns: int, past: tuple[Observation, ...] = ()) -> Observation:
            return Observation(
                stamp_ns=stamp_ns,
                images={n: np.zeros((s.height, s.width, 3), dtype=np.uint8) for n, s in spec.images.items()},
                state=np.zeros(sum(len(streams[name].names) for name in spec.state), dtype=np.float32),
                instruction="",
                ages_ns={},
                clouds={n: np.zeros((c.max_points, len(streams[n].names)), np.float32) for n, c in spec.clouds.items()},
                sequences={name: self._window(name, []) for name in spec.sequences},
                maps={name: np.zeros((1, 1), dtype=np.float32) for name in spec.maps},
                calibrations={name: blank_calibration(size.height, size.width) for name, size in infos.items()},
                present=dict.fromkeys(self._seen, True),
                history=past,
            )

        return at(0, tuple(at(-k * self.contract.step_ns) for k in range(spec.history - 1, 0, -1)))

    def _pick(self, buffer: MemoryBuffer, at_ns: int) -> tuple[list[_Tick], list[str], list[str]]:
        """The ticks, newest first, and a line per stream that is refused and per stream that is masked."""
        until_ns = NO_LIMIT_NS if self.contract.offline else at_ns
        ticks = [_Tick(at_ns - k * self.contract.step_ns) for k in range(self.spec.history)]
        missing: dict[str, str] = {}
        for tick in ticks:
            for name in self._seen:
                if tick.at_ns < at_ns and self._before_start(buffer, name, tick.at_ns):
                    continue
                found = pick(buffer, name, self.streams[name], tick.at_ns, until_ns)
                if isinstance(found, Picked):
                    tick.picked[name] = found
                else:
                    self._miss(missing, name, found, at_ns - tick.at_ns)
        for name, cloud in self.spec.clouds.items():
            if cloud.ego_motion:
                self._pick_moves(buffer, name, cloud.ego_motion, ticks, until_ns, missing)
        refused = [line for name, line in missing.items() if self.streams[name].missing == "refuse"]
        if self._any_of and not any(name in ticks[0].picked for name in self._any_of):
            refused.append(self._blind(missing))
        masked = [line for name, line in missing.items() if self.streams[name].missing == "mask"]
        return ticks, refused, masked

    def _blind(self, missing: dict[str, str]) -> str:
        """Why none of ``any_of`` is there."""
        return f"any_of: at least one must be there of {'; '.join(missing[name] for name in self._any_of)}"

    def _pick_moves(self, buffer: MemoryBuffer, name: str, odometry: str, ticks: list[_Tick], until_ns: int,
                    missing: dict[str, str]) -> None:  # fmt: skip
        """Find odometry at the stamps of past clouds and of the newest; without it a past cloud is missing too."""
        newest = ticks[0].picked.get(name)
        now_ns = newest.stamp_ns if newest else ticks[0].at_ns
        now = bracket(buffer, odometry, self.streams[odometry], now_ns, until_ns)
        for tick in ticks[1:]:
            if name not in tick.picked or tick.picked[name].stamp_ns == now_ns:
                continue  # nothing to move, or it is seen from where it was taken
            then_ns = tick.picked[name].stamp_ns
            then = bracket(buffer, odometry, self.streams[odometry], then_ns, until_ns)
            if isinstance(now, Picked) and isinstance(then, Picked):
                tick.moves[name] = then, now
                continue
            del tick.picked[name]
            if isinstance(now, str) or not self._before_start(buffer, odometry, then_ns):
                why = now if isinstance(now, str) else str(then)
                self._miss(missing, odometry, f"{why} for the clouds of {name}", ticks[0].at_ns - tick.at_ns)

    def _before_start(self, buffer: MemoryBuffer, name: str, at_ns: int) -> bool:
        first_ns = buffer.first_ns(name)
        return not self.streams[name].latched and first_ns is not None and at_ns < first_ns

    def _miss(self, missing: dict[str, str], name: str, why: str, before_ns: int) -> None:
        past = f", {before_ns / NANOSECONDS:.3f} s before the tick" if before_ns else ""
        missing.setdefault(name, f"{name} ({self.streams[name].topic}): {why}{past}")

    def _observe(self, tick: _Tick, past: tuple[Observation, ...] = ()) -> Observation:
        spec, picked = self.spec, tick.picked
        infos = {image: name for image, name in spec.calibrations.items() if name in picked}
        state = [self._vector(name, picked.get(name)) for name in spec.state]
        text = self._single(spec.instruction, picked) if spec.instruction in picked else ""
        return Observation(
            stamp_ns=tick.at_ns,
            images={name: np.asarray(self._single(name, picked)) for name in spec.images if name in picked},
            state=np.concatenate(state) if state else np.zeros(0, dtype=np.float32),
            instruction=str(text),
            ages_ns={name: tick.at_ns - found.stamp_ns for name, found in picked.items()},
            clouds={name: self._cloud(name, tick) for name in spec.clouds if name in picked},
            sequences={name: self._window(name, picked[name].messages) for name in spec.sequences if name in picked},
            maps={name: np.asarray(self._single(name, picked)) for name in spec.maps if name in picked},
            calibrations={image: self._calibration(image, name, picked) for image, name in infos.items()},
            present={name: name in picked for name in self._seen},
            history=past,
        )

    def _single(self, name: str, picked: dict[str, Picked]) -> Value:
        return self._value(name, *picked[name].messages[0])

    def _vector(self, name: str, found: Picked | None) -> np.ndarray:
        if found is None:
            return np.full(len(self.streams[name].names), np.nan, dtype=np.float32)
        values = [np.asarray(self._value(name, *message)) for message in found.messages]
        if len(values) == 1:
            return values[0].astype(np.float32)
        return blend(values[0], values[1], found.weight, self._quaternions[name]).astype(np.float32)

    def _window(self, name: str, messages: list[tuple[int, bytes]]) -> Window:
        stream = self.streams[name]
        values = np.zeros((stream.window_length, len(stream.names)), dtype=np.float32)
        start = stream.window_length - len(messages)
        for row, message in enumerate(messages, start):
            values[row] = np.asarray(self._value(name, *message))
        return Window(values, np.arange(stream.window_length) >= start)

    def _cloud(self, name: str, tick: _Tick) -> np.ndarray:
        points = np.asarray(self._single(name, tick.picked))
        if name not in tick.moves:
            return points
        cloud = self.spec.clouds[name]
        then, now = (self._pose(str(cloud.ego_motion), found) for found in tick.moves[name])
        return move(points, self.streams[name].names, relative(then, now, np.array(cloud.mount)))

    def _pose(self, odometry: str, found: Picked) -> np.ndarray:
        poses = [np.asarray(self._once("pose", odometry, *message, decode_pose)) for message in found.messages]
        return poses[0] if len(poses) == 1 else interpolate_pose(poses[0], poses[1], found.weight)

    def _calibration(self, image: str, name: str, picked: dict[str, Picked]) -> Calibration:
        found, size = self._single(name, picked), self.spec.images[image]
        assert isinstance(found, Calibration), "_value checks it"
        return found.scaled(size.height, size.width)

    def _value(self, name: str, stamp_ns: int, data: bytes) -> Value:
        """The value of a message in the form of the spec."""
        return self._once("value", name, stamp_ns, data, lambda stream, data: self._decode(name, stream, data))

    def _decode(self, name: str, stream: Stream, data: bytes) -> Value:
        value = decode(stream, data)
        place, kind = self._kinds[name]
        if not is_kind(value, kind, stream):
            found = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ConfigError(f"observation.{place}: {stream.topic} sends {found}, not a {kind}")
        if kind == "image":
            size = self.spec.images[name]
            return resize(np.asarray(value), size.height, size.width)
        if kind == "cloud":
            return subsample(np.asarray(value), self.spec.clouds[name].max_points)
        return value

    def _once(self, what: str, name: str, stamp_ns: int, data: bytes,
              decoder: Callable[[Stream, bytes], Value]) -> Value:  # fmt: skip
        """Decode a message once, however many ticks hold it."""
        key = what, name, stamp_ns
        entry = self._used.get(key) or self._decoded.get(key)
        if entry is None or entry[0] is not data:
            entry = data, decoder(self.streams[name], data)
        self._used[key] = entry
        return entry[1]
