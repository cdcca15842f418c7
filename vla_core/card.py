"""The card of a checkpoint or dataset on a hub: a README.md made of what its own files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vla_core.contract import RobotContract
from vla_core.errors import VlaError


def write(folder: Path, kind: str, repo_id: str, evaluation: Path | None = None) -> str:
    """The text of the card of the checkpoint or dataset ``folder``; ``evaluation`` as ``vla evaluate`` wrote it."""
    if kind == "model":
        return _of_checkpoint(folder, repo_id, read_json(evaluation or folder / "evaluation.json"))
    return _of_dataset(folder, repo_id)


def dataset_version(folder: Path) -> str:
    """The format version of a LeRobot dataset, such as v3.0."""
    info = read_json(folder / "meta" / "info.json")
    if not isinstance(info, dict) or not isinstance(info.get("codebase_version"), str):
        raise VlaError(f"{folder}/meta/info.json: no codebase_version; is this a LeRobot dataset?")
    return str(info["codebase_version"])


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlaError(f"{path}: not valid JSON: {error}") from None


def success_rows(evaluation: Any) -> list[tuple[str, str, str, str]]:
    """(task, what was run, success with its 95 % interval, episodes) of each run in the file of ``vla evaluate``.

    Of a run over several tasks each of them follows.
    """
    rows = []
    for run in evaluation.get("runs") or [] if isinstance(evaluation, Mapping) else []:
        execution = run.get("execution") or {}
        how = f"{execution.get('strategy', '')}, chunks {run.get('delay_steps', 0)} steps late"
        tasks = run.get("tasks") or []
        for figures in (run, *(tasks if len(tasks) > 1 else ())):
            if figures.get("success_rate") is None:
                continue
            low, high = figures["success_ci95"]
            success = f"{figures['success_rate']:.2f} ({low:.2f} to {high:.2f})"
            rows.append((str(figures.get("task") or evaluation.get("task") or ""), how, success,
                         str(figures["trials"])))  # fmt: skip
    return rows


def _of_checkpoint(folder: Path, repo_id: str, evaluation: Any) -> str:
    config = read_json(folder / "config.json")
    contract = RobotContract.load(folder / "contract.yaml")
    model, provenance = config["model"], dict(config.get("provenance") or {})
    mixture = read_json(folder / "dataset_statistics.json") or {}
    observation = config["observation"]
    inputs = [(name, f"camera, {size['width']}x{size['height']} RGB") for name, size in observation["images"].items()]
    for place in ("state", "clouds", "sequences", "maps"):
        for name in observation.get(place) or ():
            stream = contract.stream(name)
            units = [f"{n} [{u}]" for n, u in zip(stream.names, stream.units, strict=True)]
            inputs.append((name, f"{stream.type}: {', '.join(units)}" if units else stream.type))
    if observation.get("instruction"):
        inputs.append((observation["instruction"], "instruction in words"))
    actions = [
        (name, unit, f"{low:g} to {high:g}")
        for name, unit, low, high in zip(
            contract.action_names, contract.action_units, contract.action_low, contract.action_high, strict=True
        )
    ]
    sections = [
        _front({"library_name": "vla_ros", "pipeline_tag": "robotics", "tags": ["robotics", "vla_ros", "ros2"]}),
        f"# {repo_id}",
        f"A robot policy for the contract `{contract.name}` at {contract.rate_hz:g} Hz: a `{model['type']}` model with "
        f"a `{model['head']['type']}` action head, which answers with chunks of {model['horizon']} actions.",
        "## What it sees\n\n" + _table(("stream", "what"), inputs),
        "## What it commands\n\n" + _table(("entry", "unit", "limits"), actions),
    ]
    rows = success_rows(evaluation)
    if rows:
        sections.append("## Evaluation\n\n" + _table(("task", "execution", "success, 95 % interval", "episodes"), rows))
    facts = [*provenance.items(), *((f"statistics of {name}", "in dataset_statistics.json") for name in mixture)]
    if facts:
        sections.append("## Where it comes from\n\n" + _table(("", ""), facts))
    sections.append(f"""## Use

```bash
vla inspect {repo_id}
ros2 run vla_ros policy_node --ros-args -p checkpoint:={repo_id}
```

```python
from vla_core.runtime.policy import CheckpointPolicy

policy = CheckpointPolicy.load("{repo_id}")
```

`contract.yaml` says which topics it needs, with types, units, rates and ages; a robot that differs is refused.""")
    return "\n\n".join(sections) + "\n"


def _of_dataset(folder: Path, repo_id: str) -> str:
    info = read_json(folder / "meta" / "info.json")
    own = read_json(folder / "vla_ros" / "dataset.json")
    features = [(f"`{name}`", str(feature.get("dtype")), "x".join(map(str, feature.get("shape") or ())))
                for name, feature in info.get("features", {}).items()]  # fmt: skip
    contract = (own or {}).get("contract", {}).get("name")
    origin = f" It was converted from ROS 2 bags of the robot `{contract}`." if contract else ""
    front = {
        "library_name": "vla_ros", "task_categories": ["robotics"], "tags": ["LeRobot", "vla_ros"],
        "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}],
    }  # fmt: skip
    sections = [
        _front(front),
        f"# {repo_id}",
        f"A LeRobotDataset {info['codebase_version']}: {info.get('total_episodes')} episodes, "
        f"{info.get('total_frames')} frames at {info.get('fps')} Hz, robot `{info.get('robot_type')}`.{origin}",
        "## Features\n\n" + _table(("feature", "type", "shape"), features),
        f"""## Use

```bash
vla inspect {repo_id}
vla train mini_vla --dataset {repo_id} --out checkpoint
```

```python
from lerobot.datasets.lerobot_dataset import LeRobotDataset

dataset = LeRobotDataset("{repo_id}")
```""",
    ]
    return "\n\n".join(sections) + "\n"


def _front(data: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False)}---"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
