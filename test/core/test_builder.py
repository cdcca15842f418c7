"""Observations at a tick: what is seen, and why nothing is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.config import ConfigError
from vla_core.contract import RobotContract, Stream
from vla_core.observation import decode as decode_module
from vla_core.observation.builder import ImageSize, ObservationBuilder, ObservationSpec, Unobserved
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_core.observation.messages import Message, image, joint_state

from .helpers import CONTRACT, JOINTS, MS, SPEC, START, STEP, arm, camera, pixels, task, with_stream


def filled(builder: ObservationBuilder, *messages: Message) -> MemoryBuffer:
    names = {stream.topic: name for name, stream in builder.streams.items()}
    buffer = builder.make_buffer()
    for message in messages:
        buffer.add(names[message.topic], message.stamp_ns, message.data)
    return buffer


def test_an_observation_holds_the_newest_of_each_stream_at_the_tick() -> None:
    builder = ObservationBuilder(CONTRACT, SPEC)
    buffer = filled(
        builder, task(START, "lift it"), camera(START, 1), camera(START + 40 * MS, 2),
        arm(START + 30 * MS, 0.3, 3), arm(START + 40 * MS, 0.4, 4), arm(START + 50 * MS, 0.5, 5),
    )  # fmt: skip
    seen = builder.build(buffer, START + 49 * MS)
    np.testing.assert_array_equal(seen.images["camera"], pixels(2))
    assert seen.state.dtype == np.float32
    np.testing.assert_array_equal(seen.state, np.array([0.4, 4], np.float32))
    assert seen.instruction == "lift it" and seen.stamp_ns == START + 49 * MS
    assert seen.ages_ns == {"camera": 9 * MS, "arm": 9 * MS, "task": 49 * MS}
    earlier = builder.build(buffer, START + 39 * MS)
    np.testing.assert_array_equal(earlier.images["camera"], pixels(1))
    assert earlier.state[1] == 3


def test_every_stream_that_is_missing_or_stale_is_a_reason_with_its_topic() -> None:
    builder = ObservationBuilder(CONTRACT, SPEC)
    with pytest.raises(Unobserved) as caught:
        builder.build(filled(builder, arm(START, 0.0)), START + 60 * MS)
    reasons = {reason.split(" ")[0]: reason for reason in caught.value.reasons}
    assert set(reasons) == {"camera", "arm", "task"}
    assert "cam/raw" in reasons["camera"] and "nothing received" in reasons["camera"]
    assert "task" in reasons["task"] and "nothing received" in reasons["task"]
    assert "arm/state" in reasons["arm"] and "0.060 s old" in reasons["arm"] and "limit 0.05 s" in reasons["arm"]
    assert all(reason in str(caught.value) for reason in reasons.values())


def test_the_limit_itself_is_not_stale_and_a_nanosecond_more_is() -> None:
    builder = ObservationBuilder(CONTRACT, ObservationSpec(state=("arm",)))
    buffer = filled(builder, arm(START, 1.0))
    assert builder.build(buffer, START + 50 * MS).state[0] == 1
    with pytest.raises(Unobserved):
        builder.build(buffer, START + 50 * MS + 1)
    with pytest.raises(Unobserved, match="nothing received"):
        builder.build(buffer, START - 1)


def test_state_is_joined_in_the_order_of_the_spec() -> None:
    grip = Stream(topic="grip", type=JOINTS, rate_hz=100.0, max_age_s=0.05, field="effort", names=("g",), units=("N",))
    contract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "grip": grip})
    data = joint_state(START, ("g",), "effort", np.array([9.0]))
    for names, expected in ((("arm", "grip"), [1, 2, 9]), (("grip", "arm"), [9, 1, 2])):
        builder = ObservationBuilder(contract, ObservationSpec(state=names))
        buffer = filled(builder, arm(START, 1, 2), Message("grip", JOINTS, START, data))
        assert builder.build(buffer, START).state.tolist() == expected


def test_due_lists_what_is_still_to_come() -> None:
    builder = ObservationBuilder(CONTRACT, SPEC)
    assert set(builder.due(builder.make_buffer(), START)) == {"camera", "arm", "task"}
    buffer = filled(builder, task(START, "x"), camera(START, 1), arm(START, 0))
    assert builder.due(buffer, START) == []
    # A 100 Hz arm is due once a period less half a control step is over; a 25 Hz camera likewise.
    assert builder.due(buffer, START + 5 * MS - 1) == []
    assert builder.due(buffer, START + 5 * MS) == ["arm"]
    assert builder.due(buffer, START + 35 * MS - 1) == ["arm"]
    assert set(builder.due(buffer, START + 35 * MS)) == {"camera", "arm"}
    buffer.add("arm", START + STEP, arm(START + STEP, 0).data)
    assert builder.due(buffer, START + STEP) == []
    assert builder.due(buffer, START + 10_000 * STEP) == ["camera", "arm"], "a latched stream is never late"


def test_a_sensor_faster_than_the_control_is_not_always_late() -> None:
    """400 Hz against ticks of 10 ms: a newer message is expected half a sensor's period after the last."""
    contract = with_stream("arm", rate_hz=400.0)
    builder = ObservationBuilder(contract, ObservationSpec(state=("arm",)))
    buffer = filled(builder, arm(START, 0))
    assert builder.due(buffer, START) == [] and builder.due(buffer, START + 1_250_000 - 1) == []
    assert builder.due(buffer, START + 1_250_000) == ["arm"]


def test_a_message_is_decoded_once_however_many_ticks_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"image": 0, "arm": 0}
    image_decoder = decode_module.DECODERS["sensor_msgs/msg/Image"]
    arm_decoder = decode_module.DECODERS[JOINTS]

    def count_image(message: object, stream: Stream) -> decode_module.Value:
        count["image"] += 1
        return image_decoder(message, stream)

    def count_arm(message: object, stream: Stream) -> decode_module.Value:
        count["arm"] += 1
        return arm_decoder(message, stream)

    monkeypatch.setitem(decode_module.DECODERS, "sensor_msgs/msg/Image", count_image)
    monkeypatch.setitem(decode_module.DECODERS, JOINTS, count_arm)
    builder = ObservationBuilder(CONTRACT, SPEC)
    buffer = filled(builder, task(START, "x"))
    seen = []
    for k in range(8):
        stamp = START + k * STEP
        if k % 4 == 0:
            buffer.add("camera", stamp, camera(stamp, k).data)
        buffer.add("arm", stamp, arm(stamp, k).data)
        seen.append(builder.build(buffer, stamp))
    assert count == {"image": 2, "arm": 8}
    np.testing.assert_array_equal(seen[3].images["camera"], pixels(0))
    np.testing.assert_array_equal(seen[4].images["camera"], pixels(4))


def test_equal_stamps_of_two_episodes_do_not_share_a_decoded_message() -> None:
    builder = ObservationBuilder(CONTRACT, ObservationSpec(state=("arm",)))
    assert builder.build(filled(builder, arm(START, 1)), START).state[0] == 1
    assert builder.build(filled(builder, arm(START, 2)), START).state[0] == 2


def test_images_are_resized_to_the_spec_and_a_vector_is_no_picture() -> None:
    spec = ObservationSpec(images={"camera": ImageSize(height=3, width=2)})
    builder = ObservationBuilder(CONTRACT, spec)
    flat = np.full((6, 8, 3), 50, np.uint8)
    buffer = filled(builder, Message("cam/raw", "sensor_msgs/msg/Image", START, image(START, flat)))
    assert builder.build(buffer, START).images["camera"].tolist() == flat[:3, :2].tolist()
    with pytest.raises(ConfigError, match=r"^observation\.images\.arm: .*on arm/state: is no image but vector"):
        ObservationBuilder(CONTRACT, ObservationSpec(images={"arm": ImageSize(height=3, width=2)}))


def test_a_stream_the_contract_lacks_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"'lidar'.*arm, camera, task"):
        ObservationBuilder(CONTRACT, ObservationSpec(state=("lidar",)))


@pytest.mark.parametrize("age", [0.01, 3.0])
def test_the_buffer_reaches_as_far_back_as_the_oldest_allowed_sample(age: float) -> None:
    slow = dataclasses.replace(CONTRACT.observations["camera"], rate_hz=0.5, max_age_s=age)
    contract: RobotContract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "camera": slow})
    builder = ObservationBuilder(contract, ObservationSpec(images=SPEC.images, state=("arm",)))
    limit = round(age * 1e9)
    end = START + limit
    buffer = filled(builder, camera(START, 1), camera(end + 1, 2), arm(end, 0))
    assert builder.build(buffer, end).ages_ns["camera"] == limit


# --- any_of ---------------------------------------------------------------------------------------------------------

EYES = ("camera", "arm", "grip")


def seeing(any_of: tuple[str, ...], sees: tuple[str, ...]) -> ObservationBuilder:
    """A robot whose streams may each be masked but for one of ``any_of``, and a policy that sees ``sees``."""
    grip = Stream(topic="grip", type=JOINTS, rate_hz=100.0, max_age_s=0.05, field="effort", names=("g",), units=("N",))
    streams = {name: dataclasses.replace(stream, missing="refuse" if stream.latched else "mask")
               for name, stream in {**CONTRACT.observations, "grip": grip}.items()}  # fmt: skip
    contract = dataclasses.replace(CONTRACT, observations=streams, any_of=any_of)
    images = {"camera": SPEC.images["camera"]} if "camera" in sees else {}
    state = tuple(name for name in ("arm", "grip") if name in sees)
    return ObservationBuilder(contract, ObservationSpec(images=images, state=state, instruction="task"))


@given(
    st.lists(st.sampled_from(EYES), unique=True), st.lists(st.sampled_from(EYES), unique=True),
    st.dictionaries(st.sampled_from(EYES), st.integers(0, 200)), st.integers(100, 200),
)  # fmt: skip
def test_one_of_those_that_must_see_is_enough(
    any_of: list[str], sees: list[str], came: dict[str, int], now: int
) -> None:
    """Against the rule in words: of the streams that are named and seen one is young enough, or there are none."""
    builder = seeing(tuple(any_of), tuple(sees))
    buffer = builder.make_buffer()
    buffer.add("task", START, task(START, "go").data)
    limits = {"camera": 100, "arm": 50, "grip": 50}
    for name, at in came.items():
        if name in sees:
            stamp_ns = START + at * MS
            data = joint_state(stamp_ns, ("g",), "effort", np.array([9.0]))
            message = {"camera": camera(stamp_ns, 1).data, "arm": arm(stamp_ns, 1.0).data, "grip": data}[name]
            buffer.add(name, stamp_ns, message)
    there = {name for name in sees if name in came and 0 <= now - came[name] <= limits[name]}
    needed = set(any_of) & set(sees)
    at_ns = START + now * MS
    if needed and not needed & there:
        with pytest.raises(Unobserved) as caught:
            builder.build(buffer, at_ns)
        (line,) = caught.value.reasons
        assert line.startswith("any_of: at least one must be there of ")
        assert all(f"{name} ({builder.streams[name].topic}): " in line for name in needed)
        assert builder.absent(buffer, at_ns) == [line] and len(builder.lost(buffer, at_ns)) == 1
    else:
        seen = builder.build(buffer, at_ns)
        assert {name for name in sees if seen.present[name]} == there
        assert builder.absent(buffer, at_ns) == builder.lost(buffer, at_ns) == []


def test_a_long_window_of_one_stream_keeps_no_pictures_of_another() -> None:
    """Each stream reaches as far back as it may be asked for, twice; eight seconds of pictures are of no use."""
    contract = with_stream("arm", sampling="window", window_s=8.0)
    builder = ObservationBuilder(contract, dataclasses.replace(SPEC, state=(), sequences=("arm",)))
    stamps = [START + k * 100 * MS for k in range(200)]
    buffer = filled(builder, task(START, "lift it"), *(camera(t, 1) for t in stamps), *(arm(t, 0.1, 1) for t in stamps))
    held = {name: buffer.statistics(name).messages for name in ("camera", "arm")}
    assert held["arm"] == 2 * 80 + 1 and held["camera"] <= 20
