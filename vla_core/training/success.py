"""A classifier of success: from what is seen at a tick whether the task is done, learned from how episodes ended."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset
from vla_core.data.sequences import ends
from vla_core.model.inputs import ModelInputs
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.world_model.embedding import ObservationEncoder
from vla_core.observation.normalizer import Normalizer
from vla_core.training.faults import TrainingError
from vla_core.training.running import step_seed


class SuccessClassifier(nn.Module):
    """An observation encoder and one logit; ``config`` is that of a world model, whose encoders it has too."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = ObservationEncoder(config)
        self.logit = nn.Sequential(nn.SiLU(), nn.Linear(config.embed, config.hidden), nn.SiLU(),
                                   nn.Linear(config.hidden, 1))  # fmt: skip

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits (B,)."""
        logits: Tensor = self.logit(self.encoder(inputs))[..., 0]
        return logits


def train_classifier(data: Dataset, normalizer: Normalizer, config: Any, *, steps: int = 400, batch: int = 64,
                     seed: int = 0) -> SuccessClassifier:  # fmt: skip
    """Half of each batch are last frames of episodes that succeeded, half are any other frames.

    Raises :class:`TrainingError` where no episode succeeded, or none of the frames shows anything else.
    """
    positive = np.flatnonzero(ends(data, ("succeeded",)))
    negative = np.setdiff1d(np.arange(data.frames), positive)
    if not len(positive) or not len(negative):
        raise TrainingError(f"{data.name}: {len(positive)} of {len(data.episodes)} episodes succeeded; a classifier of "
                            "success needs some, and frames of before")  # fmt: skip
    torch.manual_seed(seed)
    model = SuccessClassifier(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    batches = Batches(data, 1, normalizer, WordTokenizer())
    labels = torch.cat([torch.ones(batch // 2), torch.zeros(batch - batch // 2)])
    for step in range(steps):
        rng = np.random.default_rng(step_seed(seed, step))
        rows = np.concatenate([rng.choice(positive, batch // 2), rng.choice(negative, batch - batch // 2)])
        loss = F.binary_cross_entropy_with_logits(model(batches.inputs(rows)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def classified(model: SuccessClassifier, data: Dataset, normalizer: Normalizer, batch: int = 512) -> np.ndarray:
    """The probability of success at each frame (N,) float32."""
    batches = Batches(data, 1, normalizer, WordTokenizer())
    parts = [model(batches.inputs(np.arange(first, min(first + batch, data.frames)))).sigmoid()
             for first in range(0, data.frames, batch)]  # fmt: skip
    return torch.cat(parts).numpy()
