"""LeRobot's own SmolVLA, in a process of its environment (see ``lerobot_env.py``); it imports nothing of this package.

Each line of standard input is a request in JSON, and each line of standard output that begins with ``{`` an answer.

``{"do": "build", "folder", "vlm", "record", …}``   a policy of random weights in float32, saved in LeRobot's layout
``{"do": "inputs", "file"}``                        what it is asked from now on; already normalized
``{"do": "chunk"}``                                 one chunk: seconds, and seconds of the processor
``{"do": "answer", "file"}``                        the last chunk
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "references"))

import lerobot_smolvla as reference
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from safetensors.torch import load_file, save_file


class Peer:
    """The policy and what it is asked."""

    def build(self, folder: str, vlm: str, record: dict[str, Any], cameras: list[str], state: int, action: int,
              side: int) -> dict[str, Any]:  # fmt: skip
        reference.write_vision_language(Path(vlm), record)
        size = record["vision_config"]["image_size"]
        shapes = {"observation.state": (state,), **{f"observation.images.{n}": (3, side, side) for n in cameras}}
        kinds = {3: FeatureType.VISUAL, 1: FeatureType.STATE}
        config = reference.policy_config(
            vlm, chunk_size=50, n_action_steps=50, resize_imgs_with_padding=(size, size),
            input_features={key: PolicyFeature(kinds[len(shape)], shape) for key, shape in shapes.items()},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        )  # fmt: skip
        torch.manual_seed(0)
        self.policy = SmolVLAPolicy(config).eval()
        reference.randomize(self.policy, 1)
        one = {"mean": torch.zeros(1), "std": torch.ones(1)}
        statistics = {key: {name: value.expand(width).clone() for name, value in one.items()}
                      for key, width in (("observation.state", state), ("action", action))}  # fmt: skip
        for part in (self.policy, *make_smolvla_pre_post_processors(config, statistics)):
            part.save_pretrained(Path(folder))
        return {"parameters": sum(p.numel() for p in self.policy.parameters())}

    def inputs(self, file: str) -> dict[str, Any]:
        given = load_file(file)
        self.noise = given.pop("noise")
        mask = given["observation.language.attention_mask"].bool()
        self.batch = {**given, "observation.language.attention_mask": mask}
        return {}

    def chunk(self) -> dict[str, Any]:
        began, busy = time.perf_counter(), time.process_time()
        self.last = self.policy.predict_action_chunk(dict(self.batch), noise=self.noise)
        return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - busy}

    def answer(self, file: str) -> dict[str, Any]:
        save_file({"actions": self.last.contiguous()}, file)
        return {}


def main() -> None:
    reference.prepare()
    torch.set_num_threads(1)
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        print("\n" + json.dumps(getattr(peer, request.pop("do"))(**request)), flush=True)


if __name__ == "__main__":
    main()
