"""The load that benchmarks publish: as many messages as it says, when it says, and decodable."""

from __future__ import annotations

import argparse

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from test.benchmarks import load
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import VlaError
from vla_core.observation.messages import deserialize, header_stamp_ns


@given(st.lists(st.sampled_from([1.0, 10.0, 30.0, 33.3, 200.0]), max_size=8), st.floats(0, 3))
def test_every_sensor_keeps_its_rate_and_alike_ones_are_spread(rates: list[float], seconds: float) -> None:
    found = list(load.schedule(rates, seconds))
    assert [due for due, _ in found] == sorted(due for due, _ in found)
    for i, rate in enumerate(rates):
        alike = [j for j, other in enumerate(rates) if other == rate]
        phase = round(NANOSECONDS / rate * alike.index(i) / len(alike))
        expected = [phase + round(NANOSECONDS * k / rate) for k in range(round(rate * seconds))]
        assert [due for due, sensor in found if sensor == i] == expected


def test_a_jpeg_has_its_size_and_decodes() -> None:
    encoded = load.jpeg(320, 240, 30_000)
    assert len(encoded) == 30_000
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert picture.shape == (240, 320, 3) and picture.std() > 20
    with pytest.raises(VlaError, match="no JPEG of 320x240 fits 100 bytes"):
        load.jpeg(320, 240, 100)


def test_the_command_line_makes_the_sensors_and_their_contract() -> None:
    options = load.parse(
        ["--cameras", "2x64x48@30", "--raw-cameras", "1x32x24@5", "--lidars", "1x100@10", "--imus", "3@200",
         "--joints", "1x7@100", "--jpeg-bytes", "9000", "--point-bytes", "22"]
    )  # fmt: skip
    sensors = load.sensors_of(options)
    assert [(s.topic, s.rate_hz) for s in sensors] == [
        ("camera_0/image", 30), ("camera_1/image", 30), ("raw_0/image", 5), ("lidar_0/points", 10),
        ("imu_0/data", 200), ("imu_1/data", 200), ("imu_2/data", 200), ("joints_0/state", 100),
    ]  # fmt: skip
    contract = RobotContract.from_yaml(yaml.safe_dump(load.contract(sensors)))
    assert {s.topic: s.type for s in contract.observations.values() if not s.latched} == {
        s.topic: s.type for s in sensors
    }
    cloud = deserialize(sensors[3].type, sensors[3].template)
    assert cloud.point_step == 22 and len(cloud.data) == 2200 and [f.offset for f in cloud.fields][-2:] == [16, 18]
    for sensor in sensors:
        data = bytearray(sensor.template)
        load.STAMP.pack_into(data, load.STAMP_OFFSET, 7, 8)
        assert header_stamp_ns(sensor.type, data) == 7 * NANOSECONDS + 8
    pixels = deserialize(sensors[2].type, sensors[2].template).data
    assert pixels.shape == (32 * 24 * 3,) and np.ptp(pixels) > 200


@pytest.mark.parametrize("text", ["5x1280x720", "5x1280@30", "0x64x48@30", "axbxc@d"])
def test_a_wrong_number_of_numbers_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentTypeError)):
        load.parse(["--cameras", text])
    assert "expected positive numbers as in 5x1280x720@30" in capsys.readouterr().err
