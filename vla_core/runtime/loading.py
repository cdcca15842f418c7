"""A policy by the place where it is."""

from __future__ import annotations

from pathlib import Path

from vla_core import hub
from vla_core.runtime.policy import CheckpointPolicy, Policy


def load_policy(place: Path | str, seed: int = 0, dataset: str | None = None) -> Policy:
    """The policy of a checkpoint folder or of the hub's repository ``user/name``.

    ``seed`` is that of its sampling noise; ``dataset`` as :meth:`Checkpoint.load` takes it.
    """
    return CheckpointPolicy.load(hub.local_folder(place), seed, dataset, source=str(place))
