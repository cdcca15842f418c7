"""Side tables: an observation that is written and read back is bit for bit what the builder gave."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.contract import RobotContract
from vla_core.data.episodes import replay_ticks
from vla_core.data.side import PastTicks, Seen, SideError, SideRows, decode_png, encode_png, past_table, side_table
from vla_core.observation.builder import Observation, ObservationBuilder, ObservationSpec, Unobserved
from vla_core.observation.messages import Message

from .helpers import MS, STEP
from .test_multi_sensor import MANY, SPEC, assert_equal, changed, recording


def observed(contract: RobotContract, spec: ObservationSpec, recorded: list[Message]) -> list[Observation]:
    builder = ObservationBuilder(contract, spec)
    buffer = builder.make_buffer()
    found = []
    for tick in replay_ticks(recorded, builder, buffer):
        try:
            found.append(builder.build(buffer, tick))
        except Unobserved:
            continue
    return found


def stored(table: pa.Table) -> pa.Table:
    """The table through a parquet file, as a dataset keeps it."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=7)
    return pq.read_table(sink)


def tables(seen: list[Observation], contract: RobotContract, spec: ObservationSpec) -> tuple[pa.Table, pa.Table | None]:
    past = PastTicks(spec)
    history = [past.add(observation) for observation in seen]
    rows = past_table(past.fresh, contract, spec) if spec.history > 1 else None
    return side_table(seen, contract, spec, history), rows


def standard(observation: Observation, spec: ObservationSpec) -> Seen:
    """What LeRobot's own columns hold of a frame: something finite in every entry, a picture in every camera."""
    images = {
        name: observation.images.get(name, np.zeros((size.height, size.width, 3), np.uint8))
        for name, size in spec.images.items()
    }
    return Seen(
        images, np.where(np.isnan(observation.state), np.float32(0), observation.state), observation.instruction
    )


SPECS = {
    "everything": SPEC,
    "no motion": dataclasses.replace(
        SPEC, clouds={"lidar": dataclasses.replace(SPEC.clouds["lidar"], ego_motion=None)}, history=2
    ),
    "no history": dataclasses.replace(
        SPEC, clouds={"lidar": dataclasses.replace(SPEC.clouds["lidar"], ego_motion=None)}, history=1
    ),
    "held alone": ObservationSpec(state=("arm",), images=SPEC.images, history=3),
}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(sorted(SPECS)), st.booleans())
def test_what_is_stored_is_what_the_builder_gave(seed: int, offline: bool, name: str, gaps: bool) -> None:
    rng = np.random.default_rng(seed)
    recorded = recording(rng, 300 * MS)
    contract, spec = dataclasses.replace(MANY, offline=offline), SPECS[name]
    if gaps:  # every sensor may be missing, and falls silent now and then
        streams = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in MANY.observations.items()}
        contract = dataclasses.replace(contract, observations=streams)
        silent = {topic: int(rng.integers(60, 200)) * MS for topic in {m.topic for m in recorded}}
        first = recorded[0].stamp_ns
        recorded = [m for m in recorded if m.topic == "task"
                    or not 0 <= m.stamp_ns - first - silent[m.topic] < 120 * MS]  # fmt: skip
    seen = observed(contract, spec, recorded)
    assert len(seen) > 10
    frames, past = tables(seen, contract, spec)
    rows = SideRows(stored(frames), None if past is None else stored(past), contract, spec)
    assert len(rows) == len(seen)
    for row, observation in enumerate(seen):
        assert_equal(rows.observation(row, lambda i: standard(seen[i], spec)), observation)


def test_only_what_is_no_frame_has_a_row_of_its_own() -> None:
    """Held streams look the same from every later tick: their past is the frames themselves, but for the first."""
    spec = SPECS["held alone"]
    seen = observed(MANY, spec, recording(np.random.default_rng(1), 300 * MS))
    past = PastTicks(spec)
    places = [past.add(observation) for observation in seen]
    assert len(past.fresh) == 2, "the ticks before the first frame"
    assert places[0] == [-1, -2] and places[1] == [-2, 0]
    assert places[2:] == [[row - 2, row - 1] for row in range(2, len(seen))]


def test_a_past_tick_that_two_frames_saw_alike_is_stored_once() -> None:
    seen = observed(MANY, SPEC, recording(np.random.default_rng(2), 300 * MS))
    past = PastTicks(SPEC)
    asked = sum(len(past.add(observation)) for observation in seen)
    stamps = {(o.stamp_ns, o.ages_ns["lidar"], o.clouds["lidar"].tobytes()) for o in past.fresh if "lidar" in o.clouds}
    assert 0 < len(past.fresh) < asked
    assert len(stamps) > len(seen) / 2, "clouds that are moved are new at every tick"


def test_frames_of_another_spec_are_refused() -> None:
    spec = SPECS["no history"]
    seen = observed(MANY, spec, recording(np.random.default_rng(3), 200 * MS))
    frames = side_table(seen, MANY, spec).drop_columns(["cloud.lidar"])
    with pytest.raises(SideError, match=r"no cloud\.lidar; it has: age_ns\.arm"):
        SideRows(frames, None, MANY, spec)


def test_history_that_points_nowhere_is_named() -> None:
    spec = SPECS["held alone"]
    seen = observed(MANY, spec, recording(np.random.default_rng(4), 200 * MS))
    frames, _ = tables(seen, MANY, spec)
    with pytest.raises(SideError, match="row 0 of vla_ros/past, which is not there"):
        SideRows(frames, None, MANY, spec).observation(0, lambda i: standard(seen[i], spec))


def test_pictures_survive_as_they_are() -> None:
    rng = np.random.default_rng(5)
    for shape in ((1, 1, 3), (6, 8, 3), (33, 70, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(decode_png(encode_png(pixels)), pixels)
    with pytest.raises(SideError, match="a picture of 3 bytes does not decode"):
        decode_png(b"png")


def test_a_masked_window_and_a_short_one_differ() -> None:
    contract = changed("imu", missing="mask")
    spec = ObservationSpec(state=("arm",), sequences=("imu",))
    recorded = [m for m in recording(np.random.default_rng(6), 300 * MS)]
    start = recorded[0].stamp_ns
    recorded = [m for m in recorded if m.topic != "imu" or not 8 * STEP < m.stamp_ns - start < 20 * STEP]
    seen = observed(contract, spec, recorded)
    assert {len(o.sequences) for o in seen} == {0, 1}
    assert any(not o.sequences["imu"].mask.all() for o in seen if o.sequences)
    frames, _ = tables(seen, contract, spec)
    rows = SideRows(stored(frames), None, contract, spec)
    for row, observation in enumerate(seen):
        assert_equal(rows.observation(row, lambda i: standard(seen[i], spec)), observation)
