"""The folder of an exported policy: whole or nothing, checked when it is loaded, and a policy like any other."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.cli import main
from vla_core.config import ConfigError
from vla_core.evaluation.open_loop import replay
from vla_core.evaluation.parity import InputLog, compare
from vla_core.evaluation.plan import EvaluationError, member
from vla_core.export import exporter
from vla_core.export.exporter import ExportOptions, export
from vla_core.export.feed import ExportError, Port
from vla_core.export.policy import ExportedPolicy
from vla_core.export.record import read_record
from vla_core.model.inputs import ModelInputs
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import CheckpointPolicy, PolicyError

from . import toy_world
from .exported import asked, check_alike, policy
from .helpers import START, STEP, stream_messages, write_bag

SCRIPT = ExportOptions(kind="torchscript")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported policy that nobody changes."""
    place = tmp_path_factory.mktemp("export") / "graph"
    export(policy("flow"), place, SCRIPT, fingerprint="0123456789ab")
    return place


@pytest.fixture
def copied(graph: Path, tmp_path: Path) -> Path:
    """The same to be changed."""
    import shutil

    shutil.copytree(graph, tmp_path / "graph")
    return tmp_path / "graph"


def test_the_folder_tells_all(graph: Path) -> None:
    assert sorted(file.name for file in graph.iterdir()) == [
        "contract.yaml", "export.json", "policy.pt", "statistics.json", "tokenizer.json",
    ]  # fmt: skip
    data = json.loads((graph / "export.json").read_text())
    assert (data["format"], data["kind"], data["precision"]) == ("vla_ros_export_v1", "torchscript", "fp32")
    assert data["checkpoint"] == "0123456789ab" and data["policy"]["model"]["type"] == "mini_vla"
    assert data["inputs"][0] == {"name": "image.camera", "dtype": "uint8", "shape": [1, 6, 8, 3]}
    assert data["agreement"]["observations"] == 8 and 0 <= data["agreement"]["max_error"] < 1e-5
    assert data["outputs"] == [{"name": "actions", "dtype": "float64", "shape": [4, 2]}]
    found = load_policy(graph)
    assert isinstance(found, ExportedPolicy) and found.source == str(graph)
    assert found.fingerprint == data["files"]["policy.pt"][:12] and found.horizon == 4
    assert found.execution == policy().config.execution and found.spec == policy().config.observation


def damage(path: Path, name: str) -> None:
    """Change one bit in the middle."""
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the record."""
    data = json.loads((path / "export.json").read_text())
    change(data)
    (path / "export.json").write_text(json.dumps(data))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the graph": (lambda p: damage(p, "policy.pt"), "damaged or changed .* policy.pt; export it again"),
    "a bit of the statistics": (lambda p: damage(p, "statistics.json"), "damaged or changed .* statistics.json"),
    "no graph": (lambda p: (p / "policy.pt").unlink(), "not a whole exported policy: policy.pt missing"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "not a whole exported policy: tokenizer.json missing"),
    "no JSON": (lambda p: (p / "export.json").write_text("{"), "export.json: not valid JSON"),
    "a list": (lambda p: (p / "export.json").write_text("[]"), "has format 'list', expected 'vla_ros_export_v1'"),
    "another format": (lambda p: edit(p, lambda d: d.update(format="v9")), "has format 'v9', expected"),
    "another kind": (
        lambda p: edit(p, lambda d: d.update(kind="gguf")),
        "kind: expected one of onnx, .*, found 'gguf'",
    ),
    "an unknown key": (lambda p: edit(p, lambda d: d.update(speed=3)), "speed: unknown key"),
    "the hash of the graph": (lambda p: edit(p, lambda d: d["files"].pop("policy.pt")), "files lack policy.pt"),
    "a file elsewhere": (lambda p: edit(p, lambda d: d["files"].update({"../x": "0"})), r"'\.\./x' is no name of a"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_as_it_was_written_does_not_load(copied: Path, case: str) -> None:
    change, message = BROKEN[case]
    change(copied)
    with pytest.raises((ExportError, ConfigError), match=message):
        load_policy(copied)


def test_a_foreign_graph_is_refused(copied: Path) -> None:
    """One that the record's hash fits, but that torch does not read."""
    import hashlib

    (copied / "policy.pt").write_bytes(b"no graph")
    edit(copied, lambda d: d["files"].update({"policy.pt": hashlib.sha256(b"no graph").hexdigest()}))
    with pytest.raises(ExportError, match=r"policy.pt: no TorchScript graph that this torch reads"):
        load_policy(copied)


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy("mlp")
    before = tmp_path / "graph"
    export(made, before, SCRIPT)
    whole = {file.name: file.read_bytes() for file in before.iterdir()}
    real = exporter.write_graph

    def wrong(checkpoint: Any, path: Path, options: ExportOptions) -> None:
        other = policy("mlp")
        with torch.no_grad():
            other.model.head.net[-1].bias += 0.01
        real(other, path, options)

    monkeypatch.setattr(exporter, "write_graph", wrong)
    for place in (before, tmp_path / "new"):
        with pytest.raises(ExportError, match=r"differs from the checkpoint by up to .* at most 0.0001; nothing was"):
            export(made, place, SCRIPT)
    assert {file.name: file.read_bytes() for file in before.iterdir()} == whole, "the older one stays"
    assert os.listdir(tmp_path) == ["graph"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="mine: exists and is no exported policy"):
        export(made, tmp_path / "mine", SCRIPT)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(["float32", "int64", "bool"]))
def test_inputs_of_another_shape_or_type_never_reach_a_graph(shape: list[int], dtype: str) -> None:
    port = Port(name="tokens", dtype="int64", shape=(1, "words"))
    value = np.zeros(shape, dtype)
    if dtype == "int64" and len(shape) == 2 and shape[0] == 1:
        port.check(value)
    else:
        with pytest.raises(ExportError, match=r"tokens: found .*, the graph takes int64 \[1, 'words'\]"):
            port.check(value)


def test_it_continues_no_plan(graph: Path) -> None:
    found = load_policy(graph)
    with pytest.raises(ConfigError, match=r"execution.strategy: found 'rtc'.*'flow in a graph' cannot be guided"):
        PolicyCore(found, dataclasses.replace(found.execution, strategy="rtc"))
    with pytest.raises(PolicyError, match="cannot continue an older plan"):
        found.predict(asked()[0], object())  # type: ignore[arg-type]
    made = policy("flow")
    guided = dataclasses.replace(made.config.execution, strategy="rtc")
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, execution=guided))
    with pytest.raises(ExportError, match=r"found 'rtc', which guides .*--execution strategy=blend"):
        export(made, graph.parent / "guided", SCRIPT)


def test_precisions_that_an_engine_lacks_are_named() -> None:
    with pytest.raises(ExportError, match=r"int4: torchscript on this machine .* int4 has: onnx"):
        ExportOptions(kind="torchscript", precision="int4")
    with pytest.raises(ExportError, match="bf16: onnx on this machine"):
        ExportOptions(kind="onnx", precision="bf16")
    with pytest.raises(ConfigError, match="--format: found 'gguf'"):
        ExportOptions(kind="gguf")  # type: ignore[arg-type]


def test_tensorrt_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not there, where it is
    with pytest.raises(ExportError, match=r"tensorrt is not installed .* pip install tensorrt, on a machine"):
        export(policy(), tmp_path / "graph", ExportOptions(kind="tensorrt"))
    assert not list(tmp_path.iterdir())


def test_its_inputs_are_those_of_the_checkpoint(graph: Path) -> None:
    """What is logged for parity: a run of the graph can be compared with one of the checkpoint, bit by bit."""
    seen = asked()
    mine, theirs = load_policy(graph).inputs(seen), CheckpointPolicy(policy("flow")).inputs(seen)
    assert isinstance(mine, ModelInputs)
    assert torch.equal(mine.state, theirs.state) and torch.equal(mine.tokens, theirs.tokens)
    assert torch.equal(mine.images["camera"], theirs.images["camera"])


def test_replay_and_parity(graph: Path, tmp_path: Path) -> None:
    """A bag through the graph, and what it was given against what the bag gives."""
    bag = write_bag(tmp_path / "bag", stream_messages(20))
    core = PolicyCore(load_policy(graph))
    found = replay(bag, core)
    expected = replay(bag, PolicyCore(CheckpointPolicy(policy("flow"))))
    assert len(found.predicted) > 10 and np.abs(found.predicted - expected.predicted).max() < 1e-4
    log = InputLog()
    core.forget()
    for message in stream_messages(20):
        for name in core.builder.by_topic.get(message.topic, ()):
            core.buffer.add(name, message.stamp_ns, message.data)
    for k in (5, 9):
        chunk = core.predict(START + k * STEP)
        assert core.last_observation is not None
        log.add(core.last_observation, chunk)
    log.save(tmp_path / "inputs.safetensors", core.policy)
    same = compare(tmp_path / "inputs.safetensors", bag, load_policy(graph))
    assert (same.compared, same.inputs_max_abs_diff, same.chunks_max_abs_diff) == (2, 0.0, 0.0)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a checkpoint, and the toy's world installed."""
    monkeypatch.chdir(tmp_path)
    policy("ddpm, v").save(tmp_path / "checkpoint")
    with toy_world.installed(tmp_path / "site", monkeypatch):
        yield tmp_path


def test_the_command_and_the_evaluation(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As typed: export with success in simulation; then the same episodes with checkpoint and graph, step by step."""
    options = ["--format", "torchscript", "--out", "graph", "--task", "toy:lift", "--episodes", "3",
               "--seed", "0"]  # fmt: skip
    assert main(["export", "checkpoint", *options]) == 0
    told = capsys.readouterr().out
    assert "graph: torchscript in fp32" in told and "success on toy:lift, 3 episodes: checkpoint" in told
    record = read_record(world / "graph")
    assert record.success is not None and record.success.checkpoint == record.success.graph
    results = []
    for place in ("checkpoint", "graph"):
        common = ["--task", "toy:lift", "--episodes", "4", "--seed", "0"]
        assert main(["evaluate", place, *common, "--out", f"{place}.json"]) == 0
        results.append(json.loads(Path(f"{place}.json").read_text()))
    ran = [[(e["seed"], e["success"], e["steps"]) for e in found["runs"][0]["episodes"]] for found in results]
    assert ran[0] == ran[1] and len(ran[0]) == 4
    rough = [[e["roughness"] for e in found["runs"][0]["episodes"]] for found in results]
    assert np.allclose(rough[0], rough[1], rtol=1e-4)
    assert main(["evaluate", "--repeat", "graph.json"]) == 0 and "identical" in capsys.readouterr().out
    damage(world / "graph", "policy.pt")
    assert main(["evaluate", "--repeat", "graph.json"]) == 1
    assert "damaged or changed since it was exported" in capsys.readouterr().err


def test_commands_that_make_no_sense_are_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--format", "torchscript", "--opset", "20"): "--opset: belongs to onnx and tensorrt",
        ("--format", "onnx", "--opset", "9"): "--opset: found 9, expected at least 18",
        ("--format", "lerobot", "--precision", "int8"): "--precision: belongs to graphs",
        ("--format", "torchscript", "--execution", "stepz=1"): "execution.stepz: unknown key",
        ("--format", "torchscript", "--bound", "-1"): "--bound: expected a positive number, found -1.0",
    }
    for options, message in cases.items():
        assert main(["export", "checkpoint", *options, "--out", "graph"]) == 1
        assert message in capsys.readouterr().err
    assert not (world / "graph").exists()
    with pytest.raises(EvaluationError, match="not a checkpoint"):
        member("site")


def test_the_members_of_an_evaluation_know_their_graph(graph: Path) -> None:
    found = member(str(graph))
    assert found.fingerprint == load_policy(graph).fingerprint and found.folder() == graph
    assert set(found.files) == {"contract.yaml", "policy.pt", "statistics.json", "tokenizer.json"}
    check_alike(policy("flow"), ExportedPolicy.load(graph), asked())
    with pytest.raises(ValueError, match="its statistics in its graph; export the checkpoint with --dataset"):
        load_policy(graph, dataset="other")
