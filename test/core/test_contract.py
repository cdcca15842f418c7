"""The contract: the shipped one, its text form, and which differences between two are allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from vla_core.contract import ContractError, RobotContract
from vla_core.errors import VlaError

from .helpers import CONTRACT, with_action, with_stream

SHIPPED = Path(__file__).parents[2] / "config" / "robots" / "metaworld_sawyer.yaml"


def test_the_shipped_contract_says_what_its_file_says() -> None:
    contract = RobotContract.load(SHIPPED)
    raw = yaml.safe_load(SHIPPED.read_text())
    assert contract.step_ns == 12_500_000
    assert set(contract.observations) == set(raw["observations"])
    for name, stream in contract.observations.items():
        given = raw["observations"][name]
        assert (stream.topic, stream.type) == (given["topic"], given["type"])
        assert list(stream.names) == given.get("names", [])
        assert stream.latched == given.get("latched", False)
        assert stream.max_age_ns == (None if stream.latched else round(given["max_age_s"] * 1e9))
    assert list(contract.action_high) == raw["actions"]["hand"]["high"]
    assert contract.actions["hand"].safe == ("zero", "zero", "zero", "hold")


@pytest.mark.parametrize("contract", [RobotContract.load(SHIPPED), CONTRACT], ids=["shipped", "toy"])
def test_yaml_round_trip(contract: RobotContract) -> None:
    assert RobotContract.from_yaml(contract.to_yaml()) == contract


def test_odd_texts_survive_yaml() -> None:
    odd = dataclasses.replace(CONTRACT, name="no", description="yes: 'µ' # 1e3\nsecond line")
    assert RobotContract.from_yaml(odd.to_yaml()) == odd


def test_another_topic_is_the_same_contract() -> None:
    remapped = with_stream("arm", topic="left/arm/state")
    remapped = dataclasses.replace(
        remapped, actions={"arm": dataclasses.replace(remapped.actions["arm"], topic="left/command")}
    )
    CONTRACT.check_same(remapped, "here", "there")
    joined = CONTRACT.with_topics_of(remapped)
    assert joined == remapped
    assert joined.observations["camera"].topic == CONTRACT.observations["camera"].topic


def test_a_robot_may_have_sensors_that_a_policy_has_never_seen() -> None:
    blind = dataclasses.replace(CONTRACT, observations={"arm": CONTRACT.observations["arm"]})
    blind.check_same(CONTRACT, "the checkpoint", "robot.yaml")
    robot = dataclasses.replace(CONTRACT, safety=dataclasses.replace(CONTRACT.safety, sensors=("arm", "camera")))
    joined = blind.with_topics_of(robot)
    assert set(joined.observations) == {"arm"} and joined.safety.sensors == ("arm",)


@pytest.mark.parametrize(
    ("other", "path", "sides"),
    [
        (with_stream("arm", max_age_s=0.5), "observations.arm.max_age_s", ("0.05", "0.5")),
        (with_stream("arm", units=("rad", "deg")), "observations.arm.units", ("'rad', 'rad'", "'rad', 'deg'")),
        (dataclasses.replace(CONTRACT, rate_hz=50.0), "rate_hz", ("100.0", "50.0")),
        (
            with_action(high=(1.0, 3.0)),
            "actions.arm.high",
            ("[1.0, 2.0]", "[1.0, 3.0]"),
        ),
        (
            dataclasses.replace(CONTRACT, observations={"arm": CONTRACT.observations["arm"]}),
            "observations.camera",
            ("sensor_msgs/msg/Image", "nothing"),
        ),
    ],
)
def test_a_disagreement_names_the_place_and_both_sides(other: RobotContract, path: str, sides: tuple[str, str]) -> None:
    with pytest.raises(ContractError) as caught:
        CONTRACT.check_same(other, "the checkpoint", "robot.yaml")
    text = str(caught.value)
    assert f" {path}:" in text
    mine, theirs = text.split("the checkpoint has ")[1].split("robot.yaml has ")
    assert sides[0] in mine and sides[1] in theirs


def test_an_unknown_stream_lists_those_there_are() -> None:
    with pytest.raises(ContractError, match=r"'lidar'.*arm, camera, task"):
        CONTRACT.stream("lidar")


def broken(change: str, value: object) -> str:
    data = yaml.safe_load(CONTRACT.to_yaml())
    *parents, leaf = change.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("observations.arm.rate_hz", 0, "observations.arm.rate_hz"),
        ("observations.arm.max_age_s", None, "observations.arm.rate_hz"),
        ("observations.arm.reliabilty", "reliable", "observations.arm.reliabilty: unknown key"),
        ("observations.arm.reliability", "sometimes", r"observations.arm.reliability: .*best_effort, reliable"),
        ("observations.arm.units", ["rad"], r"observations.arm.units: .*\(2\), found 1"),
        ("actions.arm.low", [1.0, -2.0], "actions.arm.low: shoulder"),
        ("actions.arm.safe", ["zero", "fly"], r"actions.arm.safe\[1\]: .*hold, zero.*'fly'"),
    ],
)
def test_a_bad_contract_names_the_place(change: str, value: object, message: str) -> None:
    with pytest.raises(ContractError, match=f"^robot.yaml: {message}") as caught:
        RobotContract.from_yaml(broken(change, value), "robot.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0, -80, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["rate_hz", "observations.arm.rate_hz"])
def test_a_rate_that_is_no_rate_is_refused_at_load(where: str, rate: float) -> None:
    with pytest.raises(ContractError, match="rate_hz"):
        RobotContract.from_yaml(broken(where, rate))


def test_text_that_is_no_mapping_is_refused() -> None:
    for text in ("", "[1, 2]", "a: [", "a: b: c"):
        with pytest.raises(VlaError) as caught:
            RobotContract.from_yaml(text, "robot.yaml")
        assert "robot.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "other"), [("reliability", "reliable"), ("type", "sensor_msgs/msg/Imu")])
def test_streams_of_one_topic_are_one_subscription(key: str, other: str) -> None:
    """ROS 2 keeps QoS overrides by topic, and a topic has one type."""
    arm = CONTRACT.observations["arm"]
    both = {**CONTRACT.observations, "fingers": dataclasses.replace(arm, names=("f",), units=("m",))}
    assert dataclasses.replace(CONTRACT, observations=both).observations["fingers"].topic == arm.topic
    both["fingers"] = dataclasses.replace(arm, **{key: other})
    with pytest.raises(VlaError, match=rf"observations.fingers.{key}: shares {arm.topic} with arm"):
        dataclasses.replace(CONTRACT, observations=both)
