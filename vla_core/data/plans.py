"""Trajectories as labels: a dataset keeps the H rows of a tick's plan one after the other in a vector (H * A)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from vla_core.commands import decode
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import CONTRACT_KEY, BagError
from vla_core.observation.messages import MessageError


def plan_names(contract: RobotContract, rows: int) -> tuple[str, ...]:
    """Names of the entries of a plan: ``x@0.5s`` is the x of the row half a second after the tick."""
    step_s = contract.chunk_step_ns / NANOSECONDS
    return tuple(f"{name}@{k * step_s:.9g}s" for k in range(rows) for name in contract.action_names)


def rows_recorded(paths: Sequence[Path], contract: RobotContract) -> int | None:
    """Rows H of the first plan in ``paths``; None for a contract without plans, or where no bag has one."""
    if not contract.plans:
        return None
    action = next(iter(contract.actions.values()))
    for path in paths:
        try:
            info = bags.info(path)
            own = info.contract if CONTRACT_KEY in info.metadata else contract
            topic = next(iter(own.actions.values())).topic
            with closing(bags.read(path, {topic})) as messages:
                first = next(iter(messages), None)
            if first is not None:
                return len(decode(action, first.data))
        except (BagError, MessageError):  # told where the bag is converted
            continue
    return None


def check_rows(action: np.ndarray, rows: int | None, where: str) -> None:
    """Raise :class:`BagError` unless a tick's ``action`` (H, A) has as many rows as the other plans of the dataset."""
    if rows is not None and len(action) != rows:
        raise BagError(f"{where}: the trajectory has {len(action)} rows, expected {rows} as the first of these bags "
                       "has; a dataset holds plans of one length, so convert the others by themselves")  # fmt: skip
