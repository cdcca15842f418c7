"""`vla inspect` as typed: checkpoints, several at once, and the page, which needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from vla_core.cli import main
from vla_core.inspect import describe, inspect
from vla_core.inspect.checkpoint import inspect_checkpoint
from vla_core.inspect.page import page
from vla_core.inspect.report import Report, Section, Table, aligned, is_number, listed, overview
from vla_core.observation.normalizer import Normalization, Normalizer, entry_names

from .helpers import CONTRACT, SPEC, checkpoint, episodes, stream_messages, write_bag, write_dataset

Fails = Callable[..., str]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bags, a dataset and a checkpoint of the toy robot in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_bag(tmp_path / "bags" / "one", stream_messages(40))
    write_bag(tmp_path / "bags" / "two", stream_messages(30, seed=1))
    write_dataset(tmp_path / "set", episodes())
    checkpoint().save(tmp_path / "policy")
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


class Page(HTMLParser):
    """What a browser would make of a page: its text, its pictures, and what it would load from elsewhere."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.pictures, self.elsewhere, self.tags = "", [], [], []  # type: ignore[var-annotated]
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            if key == "src" and value and value.startswith("data:image/"):
                data = np.frombuffer(base64.b64decode(value.partition(",")[2]), np.uint8)
                self.pictures.append(cv2.imdecode(data, cv2.IMREAD_COLOR))
            elif key in ("src", "href") and value and not value.startswith("#"):
                self.elsewhere.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_page_for_everything(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "bags", "set", "policy", "--html", "pages/all.html"]) == 0
    out = capsys.readouterr().out
    assert "bags/one" in out and "mini_vla" in out and out.strip().endswith("pages/all.html")
    shown = Page((made / "pages" / "all.html").read_text())
    assert not shown.elsewhere and "script" not in shown.tags
    assert all(picture is not None and picture.std() > 1 for picture in shown.pictures)
    assert len(shown.pictures) >= 2 * 4 + 4 + 1
    for words in ("Overview", "bags/one", "bags/two", "cam/raw", "Timeline", "observation.images.camera", "lift it",
                  "image_encoder", "rad/s", "2 episodes, 35 frames"):  # fmt: skip
        assert words in shown.text, words


def test_what_is_shown_is_escaped(made: Path) -> None:
    evil = [dataclasses.replace(e, instruction="<script>alert('x')</script> & co") for e in episodes()]
    write_dataset(made / "evil", evil)
    content = page(inspect([made / "evil"]))
    assert "<script>" not in content
    assert "<script>alert('x')</script> & co" in Page(content).text


def test_of_many_the_overview_and_the_warnings_are_told(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(9):
        recorded = stream_messages(60)
        if k == 4:
            recorded = [m for m in recorded if m.topic != "cam/raw"]
        write_bag(made / "many" / f"bag_{k}", recorded)
    (file,) = (made / "many" / "bag_7").glob("*.mcap")
    file.write_bytes(b"")
    assert main(["inspect", "many"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["what", "path", "warnings", "duration", "messages", "size"]
    assert [line.split()[2] for line in lines[1:10]] == ["0", "0", "0", "0", "1", "0", "0", "1", "0"]
    assert "many/bag_4: camera: no topic cam/raw of the contract toy" in out and "many/bag_7: " in out
    assert "arm/state" not in out


def test_mistakes_are_one_line(made: Path, fails: Fails) -> None:
    assert "nowhere: no such" in fails("inspect", "nowhere")
    (made / "toy.yaml").write_text("x")
    assert "toy.yaml: neither" in fails("inspect", "toy.yaml")
    (made / "empty").mkdir()
    assert "empty: no bag, dataset or checkpoint here" in fails("inspect", "empty")
    assert "'nobody'; choices: " in fails("inspect", "bags", "--contract", "nobody")
    assert "--out: belongs to --sensitivity" in fails("inspect", "bags", "--out", "x.json")
    assert "--sensitivity: is of one checkpoint" in fails("inspect", "policy", "policy", "--sensitivity", "set")
    assert "--sensitivity: is of one" in fails("inspect", "policy", "--sensitivity", "set", "--html", "x.html")
    (made / "policy" / "statistics.json").unlink()
    assert "statistics.json missing" in fails("inspect", "policy")
    assert main(["inspect", "policy", "set"]) == 0, "of several, one that cannot be read does not hide the others"


def test_a_checkpoint_in_order(made: Path) -> None:
    text = describe(made / "policy")
    for words in ("mini_vla, ", "contract: toy, 100 Hz", "acts: shoulder [rad/s], elbow [rad/s]", "head: mlp",
                  "chunk: 4 steps of 10 ms, 2 executed", "normalization: state mean_std, action min_max",
                  "warnings:\n    none"):  # fmt: skip
        assert words in text
    sections = {section.title: section for section in inspect_checkpoint(made / "policy").sections}
    actions = sections["Actions"].table
    assert actions is not None
    rows = [dict(zip(actions.head, row, strict=True)) for row in actions.rows]
    assert [(row["entry"], row["-1"], row["0"], row["1"]) for row in rows] == [
        ("shoulder", "-1", "0", "1"), ("elbow", "-2", "0", "2")
    ]  # fmt: skip
    parts = sections["Parts"].table
    assert parts is not None
    total = sum(int(row[1].replace(",", "")) for row in parts.rows)
    assert total == sum(p.numel() for p in checkpoint().model.parameters())


def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path: Path) -> None:
    policy = checkpoint()
    with torch.no_grad():
        policy.model.head.net[0].bias[3] = float("inf")
    options = Normalization(state="mean_std", action="quantile", entries={"state.elbow": "none"})
    numbers = {"mean": [0.1, 0.2], "std": [1e-4, 2.0], "min": [-1.0, -2.0], "max": [1.5, 2.0], "q01": [-1.0, 0.0],
               "q99": [1.0, 0.0]}  # fmt: skip
    normalizer = Normalizer(options, {"state": numbers, "action": numbers}, names=entry_names(SPEC, CONTRACT))
    config = dataclasses.replace(policy.config, normalization=options)
    dataclasses.replace(policy, config=config, normalizer=normalizer).save(tmp_path / "policy")
    weights, tiny, collapsed, beyond = [
        line for line in inspect_checkpoint(tmp_path / "policy").warnings if "outliers" not in line
    ]
    assert weights == "weights that are not finite: head.net.0.bias"
    assert "std of arm.shoulder (0.0001) is below" in tiny
    assert "q01 and q99 of elbow are equal though it moves" in collapsed
    assert beyond == "action: demonstrations beyond the contract's limits: shoulder (-1 to 1.5)"


def test_training_and_evaluation_are_shown_where_they_are(made: Path) -> None:
    assert "Training" not in [section.title for section in inspect_checkpoint(made / "policy").sections]
    with SummaryWriter(str(made / "policy.training" / "tensorboard")) as writer:
        for step in range(1, 50):
            writer.add_scalar("train/loss", 1 / step, step)
        writer.add_scalar("validation/loss", 0.3, 49)
    run = {"success_rate": 0.8, "success_ci95": [0.6, 0.9], "trials": 20, "delay_steps": 1,
           "execution": {"strategy": "blend"}}  # fmt: skip
    (made / "policy" / "evaluation.json").write_text(json.dumps({"task": "lift", "runs": [run]}))
    mixture = {"kitchen": checkpoint().normalizer.statistics}
    (made / "policy" / "dataset_statistics.json").write_text(json.dumps(mixture))
    report = inspect_checkpoint(made / "policy")
    sections = {section.title: section for section in report.sections}
    assert len(sections["Training"].pictures) == 1
    table = sections["Evaluation"].table
    assert table is not None
    assert list(table.rows) == [("lift", "blend, chunks 1 steps late", "0.80 (0.60 to 0.90)", "20")]
    assert "success 0.80 (0.60 to 0.90) over 20 episodes of lift" in "\n".join(report.lines)
    assert sections["Statistics of kitchen"].table is not None and "statistics of: kitchen" in report.lines


def test_tables_stand_in_columns() -> None:
    table = Table(("name", "count"), [("a", "1"), ("long name", "1234")])
    assert aligned(table) == ["name       count", "a              1", "long name   1234"]
    numbers = ("", "1", "-2.5", "1e-05", "3 %", "1.2 MB", "0.80 (0.60 to 0.90)", "1,234", "nan")
    assert all(map(is_number, numbers))
    assert not any(map(is_number, ("10 steps of 12.5 ms", "a", "v3.0", "-", "1 to 2")))
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more" and listed(["a"]) == "a"


def test_long_tables_are_folded_and_numbers_stand_right() -> None:
    short, long = Table(("a", "b"), [("x", "1")]), Table(("a",), [(str(k),) for k in range(30)])
    report = Report("bag", "here", "", sections=[Section("short", table=short), Section("long", table=long)])
    content = page([report])
    assert content.count("<details>") == 1 and "Table of 30 rows" in content
    assert "<th>a<th class=n>b" in content and "<td>x<td class=n>1" in content
    assert overview([report, report]).rows == [("bag", "here", "0")] * 2
    doubtful = Report("bag", "there", "", warnings=["odd"])
    content = page([report, doubtful])
    assert content.count("<tr class=doubt>") == 1 and "1 of 2 have warnings" in content
