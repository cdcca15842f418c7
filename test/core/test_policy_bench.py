"""`vla bench policy`: every way answers alike, takes its turn, and what cannot run is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_core.cli import main
from vla_core.config import ConfigError
from vla_core.evaluation.policy_bench import BenchOptions, bench, find_policy, table

from .exported import policy


def test_ways_are_measured_in_turns(tmp_path: Path) -> None:
    options = BenchOptions(ways=("eager", "torchscript", "torchscript int8"), rounds=3, calls=4)
    record = bench(policy("flow"), options, "toy")
    assert [row["way"] for row in record["rows"]] == list(options.ways) and record["refused"] == {}
    eager, graph, small = record["rows"]
    for row in record["rows"]:
        assert row["calls"] == 12 and len(row["round_ms"]) == 3
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p99_ms"] and row["memory_mb"] > 50
        assert row["control_hz"] == pytest.approx(1e3 * 2 / row["p99_ms"]), "two rows of each chunk are executed"
        assert row["speedup"] == pytest.approx(eager["p50_ms"] / row["p50_ms"])
    assert eager["max_error"] == 0 and graph["max_error"] < 1e-5 < small["max_error"]
    lines = table(record)
    assert len(lines) == 5 and lines[3].startswith("| torchscript | ")
    assert len({line.count("|") for line in lines}) == 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    policy("mlp").save(tmp_path / "checkpoint")
    words = ["bench", "policy", "checkpoint", "--way", "eager", "torchscript", "--rounds", "1", "--calls", "2"]
    assert main([*words, "--json", "out.json"]) == 0
    assert "| eager | " in capsys.readouterr().out
    record = json.loads(Path("out.json").read_text())
    assert record["policy"] == "checkpoint" and record["head"] == "mlp" and len(record["rows"]) == 2
    assert main(["bench", "policy", "nowhere"]) == 1
    assert "nowhere: not a checkpoint" in capsys.readouterr().err


def test_presets_are_policies() -> None:
    tiny = find_policy("tiny")
    assert tiny.config.model.type == "vla" and tiny.contract.name == "metaworld_sawyer"
    assert np.isfinite(tiny.normalizer.unnormalize("action", np.ones((8, 4)))).all()
    with pytest.raises(ConfigError, match="no way 'gguf'; choices: compiled, eager"):
        BenchOptions(ways=("eager", "gguf"))
    with pytest.raises(ConfigError, match="expected eager among them"):
        BenchOptions(ways=("onnx",))
