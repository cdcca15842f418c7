"""``python -m test.benchmarks.model_memory PRESET ours|plain``: the peak memory of one process, as a line of JSON.

Of ``predict``, then of ``predict`` and a training step, in MB above what the libraries took before there was a model.
"""

from __future__ import annotations

import json
import sys

import torch

from test.benchmarks.framework import peak_mb
from test.benchmarks.model_presets import CASES, chunk_of, inputs_of, make, make_plain, predict, train


def main(preset: str, side: str) -> None:
    """Measure one side of a preset."""
    torch.set_num_threads(1)
    case = CASES[preset]
    before = peak_mb()
    model = {"ours": make, "plain": make_plain}[side](case).eval()
    predict(model, inputs_of(case))
    predicted = peak_mb()
    train(model.train(), inputs_of(case, case.train_batch), *chunk_of(case, case.train_batch))
    print(json.dumps({"predict": predicted - before, "train": peak_mb() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
