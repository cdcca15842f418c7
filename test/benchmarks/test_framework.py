"""The benchmarks' own arithmetic, their files, and that they leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.benchmarks import __main__ as command
from test.benchmarks.framework import BenchmarkError, Row, Settings, compared, measured, number, run_suite
from test.benchmarks.period import period_errors
from test.benchmarks.processes import Processes
from test.benchmarks.sensing import RUNS, Sample, cpu_windows

positive = st.floats(0.01, 1e6)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_a_ratio_is_the_median_of_the_pairs_ratios(pairs: list[tuple[float, float]]) -> None:
    row = compared("x", "ms", pairs, "peer")
    ratios = sorted(a / b for a, b in pairs)
    assert row.ratio == pytest.approx(statistics.median(ratios))
    assert row.value == pytest.approx(statistics.median(a for a, _ in pairs))
    assert row.peer_value == pytest.approx(statistics.median(b for _, b in pairs))
    assert row.spread == (ratios[0], ratios[-1]) and row.runs == len(pairs)


def test_a_goal_speaks_of_the_ratio_or_of_the_value() -> None:
    assert compared("x", "ms", [(3.0, 2.0)], "peer", "<= 1.5").met
    assert not compared("x", "ms", [(3.1, 2.0)], "peer", "<= 1.5").met
    assert measured("x", "messages", [0], "== 0").met
    assert not measured("x", "messages", [1], "== 0").met
    assert measured("x", "1", [0.9], ">= 0.8").met
    assert measured("x", "1", [0.9]).met is None
    with pytest.raises(BenchmarkError, match="'at most 2' cannot be read"):
        _ = measured("x", "1", [1.0], "at most 2").met


@pytest.mark.parametrize(
    ("pairs", "words"),
    [([], "finite"), ([(float("nan"), 1.0)], "finite"), ([(1.0, 0.0)], "positive"), ([(1.0, float("inf"))], "peer p")],
)
def test_what_is_no_measurement_is_refused(pairs: list[tuple[float, float]], words: str) -> None:
    with pytest.raises(BenchmarkError, match=words):
        compared("x", "ms", pairs, "p")


def test_numbers_have_three_digits() -> None:
    assert [number(v) for v in (0.0, 0.01234, 1.234, 12.34, 1234.4, -1.5)] == [
        "0", "0.0123", "1.23", "12.3", "1234", "-1.50",
    ]  # fmt: skip


def good(settings: Settings) -> Iterator[Row]:
    yield compared("a", "ms", [(2.0, 1.0), (4.0, 1.0)], "peer", "<= 1.3")
    yield measured("b", "MB", [600.0 if settings.long else 60.0])


def broken(settings: Settings) -> Iterator[Row]:
    yield measured("c", "ms", [1.0])
    raise BenchmarkError("the probe saw nothing")


def test_the_file_has_what_it_promises(tmp_path: Path) -> None:
    report = run_suite("toy", {"good": good, "broken": broken}, Settings(long=True))
    data = json.loads(report.save(tmp_path / "bench").read_text("utf-8"))
    assert (tmp_path / "bench" / "toy.json").is_file()
    assert {"suite", "machine", "versions", "rows"} <= set(data)
    assert data["suite"] == "toy" and data["machine"]["cores"] == os.cpu_count()
    assert data["versions"]["numpy"] == np.__version__
    fields = {"name", "value", "unit", "peer", "peer_value", "ratio", "runs", "spread", "goal"}
    assert all(set(row) == fields for row in data["rows"])
    assert data["rows"][0] == {
        "name": "a", "value": 3.0, "unit": "ms", "peer": "peer", "peer_value": 1.0, "ratio": 3.0, "runs": 2,
        "spread": [2.0, 4.0], "goal": "<= 1.3",
    }  # fmt: skip
    assert data["rows"][1]["value"] == 600.0 and data["rows"][1]["ratio"] is None
    assert data["failed"] == {"broken": "the probe saw nothing"}


def test_only_what_could_not_be_measured_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {"good": good}
    monkeypatch.setattr(command, "load_suite", lambda name, only: suite)
    arguments = ["robot", "--out", str(tmp_path)]
    assert command.main(arguments) == 0, "a missed goal is no failure"
    assert "<= 1.3 missed" in capsys.readouterr().out
    suite["broken"] = broken
    assert command.main(arguments) == 1
    assert "the probe saw nothing" in capsys.readouterr().out


def test_an_unknown_suite_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["flying"]) == 1
    assert "no suite 'flying'; choices: data, driving, model, policy, robot, serve, world" in capsys.readouterr().err


def test_period_errors_of_a_timer_that_was_late_once() -> None:
    stamps = np.arange(300) * 10_000_000
    stamps[200] += 3_000_000
    times = np.stack([stamps, stamps + 500_000], axis=1)
    errors = period_errors(times)
    assert len(errors["stamp"]) == 199, "the first second is not counted"
    assert sorted(errors["stamp"])[-3:] == pytest.approx([0.0, 3.0, 3.0])
    assert errors["arrival"] == pytest.approx(errors["stamp"])


def test_cpu_windows_end_with_the_load() -> None:
    at = np.arange(0.0, 8.0 + RUNS * 4.0)  # 8 s of settling at three times the share
    used = np.where(at < 8.0, 0.6 * at, 0.6 * 8.0 + 0.2 * (at - 8.0))
    samples = [Sample(float(t), float(u), float(u / 2), 0) for t, u in zip(at - at[0], used, strict=True)]
    windows = cpu_windows(samples, 3.0)
    assert len(windows) == RUNS
    assert np.asarray(windows) == pytest.approx(np.tile([20.0, 10.0], (RUNS, 1)))
    with pytest.raises(BenchmarkError, match="too short"):
        cpu_windows(samples[:3], 3.0)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


SLEEPER = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"


def test_a_failure_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match="stopped midway"), Processes(tmp_path) as group:
        pids = [group.start(f"sleeper_{i}", "sleeper").process.pid for i in range(2)]
        raise BenchmarkError("stopped midway")
    assert all(gone(pid) for pid in pids)


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "dying.py").write_text("import sys; print('no such camera'); sys.exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Processes(tmp_path) as group:
        waited = group.start("waited", "sleeper")
        group.start("dying", "dying")
        with pytest.raises(BenchmarkError, match="dying ended with status 3: no such camera"):
            group.finish(waited, 30.0)


def test_a_killed_parent_takes_its_processes_along(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    program = (
        "import pathlib, sys, time\n"
        "from test.benchmarks.processes import Processes\n"
        f"with Processes(pathlib.Path({str(tmp_path)!r})) as group:\n"
        "    print(group.start('sleeper', 'sleeper').process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(child)
