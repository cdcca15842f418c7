"""What is in a bag, and what of it will make trouble: gaps, jitter, late and stuck sensors, topics of no use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vla_core.contract import NANOSECONDS, Action, RobotContract, Stream
from vla_core.data import bag as bags
from vla_core.data.bag import BagInfo, DamagedBag
from vla_core.data.recording import DROPPED_KEY
from vla_core.inspect.bag_page import sections
from vla_core.inspect.report import Report, Section, Table, aligned, listed, size
from vla_core.inspect.timing import LEAST, MS, OTHER_CLOCK_NS, PERIODS, SILENT, Timing, measure
from vla_core.inspect.tracks import Track, collect, streams_of
from vla_core.observation.messages import Message

SLOW, FAST = 0.8, 1.5  # shares of the contract's rate
STUCK_NS = NANOSECONDS
AHEAD_NS = 20_000_000
BLACK, FLAT = 3.0, 1.0  # mean and standard deviation of pixels
TOPICS_NOTE = ("Jitter is the 95th percentile of how far an interval is from the median; latency the 95th percentile "
               "from a message's stamp to its receipt.")  # fmt: skip


def inspect_bag(path: Path, contract: RobotContract | None = None, pictures: bool = True) -> Report:
    """Read a bag once and report; ``contract`` stands in for one that the bag does not hold."""
    bag = bags.info(path)
    seconds = (bag.end_ns - bag.start_ns) / NANOSECONDS
    total = sum(bag.counts.values())
    report = Report("bag", str(path), f"{total} messages, {seconds:.2f} s, {size(bag.bytes)}")
    report.figures = {"duration": f"{seconds:.1f} s", "messages": str(total), "size": size(bag.bytes)}
    report.tiles = [(f"{seconds:.2f} s", "duration"), (f"{total:,}", "messages"), (size(bag.bytes), "on disk"),
                    (str(len(bag.topics)), "topics")]  # fmt: skip
    if not bag.whole:
        report.lines.append(f"NOT WHOLE: {bag.note}")
        report.lines += [f"{topic}  {kind}  {bag.counts[topic]}" for topic, kind in sorted(bag.topics.items())]
        report.warnings.append(f"not whole: {bag.note}")
        return report
    if bags.CONTRACT_KEY in bag.metadata:
        contract = bag.contract
    messages = _until_damage(bags.read(path), report.warnings)
    tracks = dict(sorted(collect(bag, messages, contract).items()))
    timings = {topic: measure(track, bag, _declared(contract, topic)) for topic, track in tracks.items()}
    _describe(report, bag, contract, tracks, timings)
    report.warnings += _dropped(bag)
    for topic in tracks:
        report.warnings += _doubts(tracks[topic], timings[topic], bag, contract)
    if contract is not None:
        report.warnings += _misfits(contract, bag)
    if pictures:
        report.sections += sections(tracks, timings, seconds)
    return report


def _until_damage(messages: Iterator[Message], warnings: list[str]) -> Iterator[Message]:
    """The messages that can be read; what then cannot is a warning."""
    try:
        yield from messages
    except DamagedBag as error:
        warnings.append(error.cause)


def _declared(contract: RobotContract | None, topic: str) -> Mapping[str, Stream | Action]:
    return {} if contract is None else streams_of(contract, topic)


def _describe(report: Report, bag: BagInfo, contract: RobotContract | None, tracks: Mapping[str, Track],
              timings: Mapping[str, Timing]) -> None:  # fmt: skip
    head = ("topic", "type", "messages", "Hz", "jitter ms", "longest ms", "latency ms", "size")
    rows = []
    for topic in tracks:
        track, timing = tracks[topic], timings[topic]
        several = len(timing.intervals_ms) > 0
        late = f"{np.percentile(timing.latencies_ms, 95):.1f}" if len(timing.latencies_ms) else ""
        rows.append((
            topic, track.type, str(track.count), f"{timing.rate_hz:.2f}" if several else "",
            f"{timing.jitter_ms:.1f}" if several else "", f"{timing.longest_ms:.1f}" if several else "", late,
            size(sum(track.sizes)),
        ))  # fmt: skip
    table = Table(head, rows)
    report.lines += aligned(table)
    facts = [(key, value) for key, value in bag.metadata.items() if key != bags.CONTRACT_KEY]
    facts += [(track.topic, ", ".join(f"{count} {state}" for state, count in track.marks.items()))
              for track in tracks.values() if track.marks]  # fmt: skip
    if contract is not None:
        facts.append(("contract", f"{contract.name}, {contract.rate_hz:g} Hz"))
        report.tiles.append((contract.name, f"contract, {contract.rate_hz:g} Hz"))
    report.lines += [f"{key}: {value}" for key, value in facts]
    report.sections.append(Section("Topics", TOPICS_NOTE, table))
    if facts:
        report.sections.append(Section("Metadata", table=Table(("key", "value"), facts)))


def _dropped(bag: BagInfo) -> list[str]:
    """What the recorder says that it could not write."""
    try:
        counts = json.loads(bag.metadata.get(DROPPED_KEY, "{}"))
        lost = [f"{topic} {count}" for topic, count in counts.items()]
    except (ValueError, AttributeError):  # somebody else's key of the same name
        return []
    return [f"messages that the recorder dropped: {listed(lost)}"] if lost else []


def _misfits(contract: RobotContract, bag: BagInfo) -> list[str]:
    """What the contract asks for and the bag does not have."""
    found = []
    needed = {stream.topic: (name, stream.type) for name, stream in contract.observations.items()}
    needed |= {action.topic: (f"action {name}", action.type) for name, action in contract.actions.items()}
    for topic, (name, kind) in needed.items():
        if topic not in bag.topics:
            found.append(f"{name}: no topic {topic} of the contract {contract.name}")
        elif bag.topics[topic] != kind:
            found.append(f"{name}: {topic} holds {bag.topics[topic]}, the contract {contract.name} says {kind}")
        elif not bag.counts[topic]:
            found.append(f"{name}: {topic} has no messages")
    return found


def _doubts(track: Track, timing: Timing, bag: BagInfo, contract: RobotContract | None) -> list[str]:
    """The warnings of one topic."""
    declared = _declared(contract, track.topic)
    streams = [one for one in declared.values() if isinstance(one, Stream)]
    found = []
    if track.bad:
        found.append(f"{track.bad} messages cannot be used, the first because: {track.bad_cause}")
    if timing.gaps:
        longest = max(timing.gaps, key=lambda gap: gap[1] - gap[0])
        times = listed([f"{begin:.2f} s" for begin, _ in timing.gaps])
        found.append(f"{_count(len(timing.gaps), 'gap')}, the longest {longest[1] - longest[0]:.2f} s; from {times} on")
    found += _edges(timing, bag)
    if timing.duplicates:
        found.append(f"{timing.duplicates} of {track.count} messages have the stamp of the one before")
    if timing.backwards:
        found.append(f"{timing.backwards} of {track.count} messages are stamped before the one that came before them")
    if timing.period_ms and track.count >= LEAST and timing.rate_hz:
        share = timing.rate_hz * timing.period_ms / 1000
        if not SLOW <= share <= FAST:
            found.append(f"{timing.rate_hz:.1f} Hz, where the contract expects {1000 / timing.period_ms:g}")
    found += _clock_doubts(track, timing, streams)
    found += _content_doubts(track, timing, contract, streams)
    return [f"{track.topic}: {line}" for line in found]


def _edges(timing: Timing, bag: BagInfo) -> list[str]:
    """A stream with a rate that begins long after the bag, or ends long before it."""
    if timing.period_ms is None or len(timing.seconds) < LEAST:
        return []
    duration = (bag.end_ns - bag.start_ns) / NANOSECONDS
    limit = max(1.0, PERIODS * timing.period_ms / 1000)
    first, last = float(timing.seconds.min()), float(timing.seconds.max())
    found = [f"begins {first:.2f} s after the bag"] if first > limit else []
    return [*found, *([f"ends {duration - last:.2f} s before the bag"] if duration - last > limit else [])]


def _clock_doubts(track: Track, timing: Timing, streams: Sequence[Stream]) -> list[str]:
    """What the time from stamp to receipt says."""
    late = timing.latencies_ms
    if not len(late):
        return []
    middle = float(np.median(late))
    if abs(middle) * MS > OTHER_CLOCK_NS:
        side = "before" if middle > 0 else "after"
        return [f"stamps are {abs(middle) / 1000:.4g} s {side} the time of receipt: another clock"]
    found = []
    ahead = int((late < -AHEAD_NS / MS).sum())
    if ahead and streams:
        found.append(f"{ahead} of {track.count} messages are stamped up to {-late.min():.0f} ms after their receipt: "
                     "clocks that differ")  # fmt: skip
    ages = [one.max_age_ns for one in streams if one.max_age_ns]
    p95 = float(np.percentile(late, 95))
    if ages and p95 * MS > min(ages):
        found.append(f"arrives {p95:.0f} ms after its stamp (95th percentile), later than its max_age_s of "
                     f"{min(ages) / NANOSECONDS:g}: the robot would refuse it")  # fmt: skip
    return found


def _content_doubts(
    track: Track, timing: Timing, contract: RobotContract | None, streams: Sequence[Stream]
) -> list[str]:
    """Sensors that are stuck, and cameras that see nothing."""
    found = []
    count, begin, end = track.repeated
    sensor = any(one.rate_hz for one in streams) if contract is not None else track.stamped
    if sensor and track.type not in SILENT and count >= LEAST and end - begin >= STUCK_NS:
        what = "the same picture" if track.shots else "the same values"
        since = (begin - timing.zero_ns) / NANOSECONDS
        found.append(f"{what} for {(end - begin) / NANOSECONDS:.2f} s from {since:.2f} s on: stuck, or nothing moved")
    black = [shot for shot in track.shots if shot.mean < BLACK]
    flat = [shot for shot in track.shots if shot.mean >= BLACK and shot.spread < FLAT]
    for kind, shots in (("black", black), ("of a single colour", flat)):
        if shots:
            first = (shots[0].stamp_ns - timing.zero_ns) / NANOSECONDS
            found.append(f"{len(shots)} of {len(track.shots)} pictures that were looked at are {kind}, the first at "
                         f"{first:.2f} s")  # fmt: skip
    return found


def _count(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"
