"""LeRobot itself, in a process of its own environment (see ``lerobot_env.py``); it imports nothing of this package.

Each line of standard input is a request in JSON, and each line of standard output that begins with ``{`` an answer.

``{"do": "check", "folder", "expected"}``   opens a dataset and compares every item with the arrays of an .npz file
``{"do": "convert", "folder"}``             turns a dataset from v2.1 into v3.0 in place, with LeRobot's own converter
``{"do": "append", "folder", "frames"}``     records an episode into a dataset; frame i has i in every number
``{"do": "open", "folder", …}``             opens a dataset and its shuffled DataLoader
``{"do": "load", "batches": n}``            takes n batches from it: seconds, items and peak memory
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():  # torchvision's packages are built for CUDA, and look for operators of such a torch
    missing = torch.library.Library("torchvision", "DEF")
    missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.datasets.lerobot_dataset import LeRobotDataset

TOLERANCE = 1.0 / 255  # of a video's pixel: two decoders of one file


def check(folder: str, expected: str) -> dict[str, Any]:
    """Compare every item, the statistics and a window with what this package wrote."""
    wanted = np.load(expected)
    dataset = LeRobotDataset("made/here", root=folder)
    different: dict[str, int] = {}
    tasks = [str(task) for task in wanted["task"]]
    for row in range(len(dataset)):
        item = dataset[row]
        for key in wanted.files:
            if key.startswith(("stats/", "task")):
                continue
            due, found = wanted[key][row], item[key].numpy()
            if key in dataset.meta.camera_keys:
                found, due = found.transpose(1, 2, 0), due.astype(np.float32) / 255
                off = 0.0 if key in dataset.meta.image_keys else TOLERANCE
                same = found.shape == due.shape and float(np.abs(found - due).max()) <= off
            else:
                same = found.dtype == due.dtype and np.array_equal(found.reshape(due.shape), due)
            different[key] = different.get(key, 0) + (not same)
        different["task"] = different.get("task", 0) + (item["task"] != tasks[row])
    statistics = 0
    for key in (key for key in wanted.files if key.startswith("stats/")):
        _, feature, name = key.split("/")
        found = np.asarray(dataset.meta.stats[feature][name], dtype=float)
        statistics += not np.allclose(found, wanted[key], rtol=1e-6, atol=1e-9)
    return {"frames": len(dataset), "different": different, "statistics": statistics, "windows": windows(dataset)}


def windows(dataset: Any) -> int:
    """Windows of four actions that are not those of the rows, over all rows."""
    fps = dataset.fps
    wide = LeRobotDataset("made/here", root=dataset.root, delta_timestamps={"action": [i / fps for i in range(4)]})
    actions = np.stack([dataset.hf_dataset[row]["action"].numpy() for row in range(len(dataset))])
    episodes = np.array([int(dataset.hf_dataset[row]["episode_index"]) for row in range(len(dataset))])
    wrong = 0
    for row in range(len(dataset)):
        last = int(np.flatnonzero(episodes == episodes[row])[-1])
        steps = np.arange(row, row + 4)
        item = wide[row]
        same = np.array_equal(item["action"].numpy(), actions[np.minimum(steps, last)])
        wrong += not (same and np.array_equal(item["action_is_pad"].numpy(), steps > last))
    return wrong


def convert(folder: str) -> dict[str, Any]:
    """LeRobot's converter, which puts the old folder aside."""
    from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

    path = Path(folder)
    convert_dataset(path.name, root=str(path.parent), push_to_hub=False)
    return {"folder": folder}


def append(folder: str, frames: int) -> dict[str, Any]:
    """Go on recording where this package ended."""
    dataset = LeRobotDataset("made/here", root=folder)
    dataset.episode_buffer = dataset.create_episode_buffer()
    recorded = {key: of for key, of in dataset.features.items() if "index" not in key and key != "timestamp"}
    for index in range(frames):
        values = {key: np.full(of["shape"], index, "uint8" if of["dtype"] in ("image", "video") else of["dtype"])
                  for key, of in recorded.items()}  # fmt: skip
        dataset.add_frame({**values, "task": "appended"})
    dataset.save_episode()
    dataset.finalize()
    return {"frames": len(LeRobotDataset("made/here", root=folder))}


class Loading:
    """A shuffled DataLoader over a dataset, without end."""

    def __init__(self, folder: str, batch_size: int, workers: int, horizon: int, seed: int = 0) -> None:
        fps = LeRobotDataset("made/here", root=folder).fps
        dataset = LeRobotDataset("made/here", root=folder,
                                 delta_timestamps={"action": [i / fps for i in range(horizon)]})  # fmt: skip
        self.loader = torch.utils.data.DataLoader(
            dataset, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        self.batches = iter(self.loader)

    def load(self, batches: int) -> dict[str, Any]:
        """Take batches."""
        items, start = 0, time.perf_counter()
        for _ in range(batches):
            try:
                batch = next(self.batches)
            except StopIteration:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            items += len(batch["action"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "items": items, "peak_mb": self._peak_mb()}

    def _peak_mb(self) -> float:
        """The most that this process and its present workers had resident, MB; what they share counts in each."""
        workers = getattr(self.batches, "_workers", [])
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in ("self", *(worker.pid for worker in workers))]
        return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in statuses) / 1024


def main() -> None:
    """Answer requests until standard input ends."""
    loading: Loading | None = None
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        if kind == "open":
            loading = Loading(**request)
            answer: dict[str, Any] = {}
        elif kind == "load":
            assert loading is not None
            answer = loading.load(**request)
        else:
            answer = {"check": check, "convert": convert, "append": append}[kind](**request)
        print(json.dumps({"done": kind, **answer}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
