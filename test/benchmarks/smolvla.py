"""SmolVLA's chunk beside LeRobot's own code: the same weights, inputs and noise, in turns, one thread each.

``python -m test.benchmarks.smolvla [smolvla-500m|smolvla-256m|tiny] [chunks] [cameras] [the Python of LeRobot]``
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from test.benchmarks import lerobot_env
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.smolvla import SmolVLA, SmolVLARecipe
from vla_core.model.vla.smolvla_config import BACKBONES

PEER = Path(__file__).with_name("smolvla_peer.py")
STATE, ACTION, WORDS = 6, 6, 12
MODELS = {"smolvla-500m": "smolvlm2-500m", "smolvla-256m": "smolvlm2-256m"}


class Ours:
    """Our model with a folder's weights; a call makes one chunk: seconds, and seconds of the processor."""

    def __init__(self, folder: Path, vlm: str, cameras: list[str], given: dict[str, torch.Tensor]) -> None:
        recipe = SmolVLARecipe(pretrained=str(folder), vlm=vlm, **_structure(folder))
        vocabulary = json.loads((Path(vlm) / "config.json").read_text())["text_config"]["vocab_size"]
        sizes = {"state_dim": STATE, "action_dim": ACTION, "vocab_size": vocabulary}
        self.model = SmolVLA(recipe.config(cameras=tuple(cameras), **sizes)).eval()
        there = torch.ones(1, dtype=torch.bool)
        self.inputs = ModelInputs(
            images={name: given[f"observation.images.{name}"] for name in cameras},
            image_mask=dict.fromkeys(cameras, there), state=given["observation.state"], state_mask=there,
            tokens=given["observation.language.tokens"], token_mask=given["observation.language.attention_mask"].bool(),
        )  # fmt: skip
        self.noise = given["noise"]

    def __call__(self) -> tuple[float, float]:
        began, busy = time.perf_counter(), time.process_time()
        self.last = self.model.sample(self.inputs, self.noise)
        return time.perf_counter() - began, time.process_time() - busy


def compare(model: str = "smolvla-500m", chunks: int = 5, cameras: int = 1, side: int = 256,
            python: Path | None = None) -> dict[str, Any]:  # fmt: skip
    """Seconds a chunk of both, in turns, and how far their actions are apart; ``side`` of the pictures in pixels.

    ``cpu`` are seconds of the processor, which a busy machine changes less: each has one thread.
    """
    torch.set_num_threads(1)
    names = [f"camera{i}" for i in range(cameras)]
    with tempfile.TemporaryDirectory() as place:
        folder, vlm, file = Path(place) / "policy", str(Path(place) / "vlm"), Path(place) / "given.safetensors"
        peer = _Peer(python or lerobot_env.python(policies=True), Path(place) / "peer.log")
        with peer:
            size = peer.ask("build", folder=str(folder), vlm=vlm, record=_record(model), cameras=names, state=STATE,
                            action=ACTION, side=side)["parameters"]  # fmt: skip
            given = _inputs(names, side, vlm)
            save_file(given, file)
            peer.ask("inputs", file=str(file))
            ours = Ours(folder, vlm, names, given)
            ours(), peer.ask("chunk")
            mine, other = [], []
            for _ in range(chunks):
                mine.append(ours())
                asked = peer.ask("chunk")
                other.append((asked["seconds"], asked["cpu_s"]))
            peer.ask("answer", file=str(file))
        theirs = load_file(file)["actions"]
    found: dict[str, Any] = {"model": model, "parameters": size, "cameras": cameras, "chunks": chunks}
    for column, what in enumerate(("wall", "cpu")):
        own, peers = [pair[column] for pair in mine], [pair[column] for pair in other]
        found[f"ours_{what}_s"], found[f"lerobot_{what}_s"] = statistics.median(own), statistics.median(peers)
        found[f"ours_{what}_min_s"], found[f"lerobot_{what}_min_s"] = min(own), min(peers)
        found[f"times_faster_{what}"] = statistics.median(b / a for a, b in zip(own, peers, strict=True))
    found["largest_difference"] = float((ours.last[..., :ACTION] - theirs).abs().max())
    return found | {"mean_action": float(theirs.abs().mean())}


class _Peer:
    """LeRobot's process."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=lerobot_env.environment(log.parent, threads=1),
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"LeRobot ended: {Path(self._log.name).read_text().strip().splitlines()[-1:]}")

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


def _record(model: str) -> dict[str, Any]:
    """What LeRobot reads a vision-language model's structure from."""
    known = BACKBONES[MODELS.get(model, "smolvlm2-256m")].architecture
    vision = {"model_type": "smolvlm_vision", **known["vision_config"]}
    text = {"pad_token_id": 2, **known["text_config"]}
    if model == "tiny":
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                 "intermediate_size": 128, "vocab_size": 300}  # fmt: skip
    return {**known, "model_type": "smolvlm", "vision_config": vision, "text_config": text}


def _structure(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())
    return {"image_size": values["resize_imgs_with_padding"][0], "layers": values["num_vlm_layers"]}


def _inputs(cameras: list[str], side: int, vlm: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        **{f"observation.images.{name}": torch.rand(1, 3, side, side, generator=draw) for name in cameras},
        "observation.state": torch.randn(1, STATE, generator=draw),
        "observation.language.tokens": torch.randint(0, 256, (1, WORDS), generator=draw),
        "observation.language.attention_mask": torch.ones(1, WORDS, dtype=torch.int64),
        "noise": torch.randn(1, 50, 32, generator=draw),
    }


if __name__ == "__main__":
    words = sys.argv[1:] + [None] * 4  # type: ignore[list-item]
    found = compare(words[0] or "smolvla-500m", int(words[1] or 5), int(words[2] or 1),
                    python=Path(words[3]) if words[3] else None)  # fmt: skip
    print(json.dumps(found, indent=1))
