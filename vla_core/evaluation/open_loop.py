"""Open-loop replay: what the policy would have done at every tick of a recorded bag, against what was done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError
from vla_core.data.episodes import Commands, replay_ticks, replayed
from vla_core.observation.builder import ObservationBuilder, Unobserved
from vla_core.runtime.core import PolicyCore


@dataclass(frozen=True)
class Replay:
    """Over N ticks: predicted chunks (N, H, A), recorded actions (N, H, A), where they are known (N, H), in units."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    half_range: np.ndarray
    stamps_ns: np.ndarray
    predicted: np.ndarray
    recorded: np.ndarray
    known: np.ndarray

    def error(self) -> np.ndarray:
        """Absolute error (N, H, A); NaN where nothing was recorded."""
        return np.where(self.known[..., None], np.abs(self.predicted - self.recorded), np.nan)

    def figures(self) -> dict[str, Any]:
        """Mean absolute errors: overall as a share of each action's half range, per action and per horizon step."""
        error = self.error()
        share = error / self.half_range
        return {
            "ticks": len(self.stamps_ns),
            "mae": float(np.nanmean(share)),
            "mae_per_action": {
                name: {"mae": float(np.nanmean(error[..., i])), "unit": self.units[i]}
                for i, name in enumerate(self.names)
            },
            "mae_per_step": [
                float(np.nanmean(share[:, k])) if self.known[:, k].any() else None for k in range(share.shape[1])
            ],
        }


def replay(path: Path, core: PolicyCore) -> Replay:
    """Replay one bag through the node's core, predicting at every control tick."""
    contract = core.contract
    summary = bags.info(path)
    if not summary.whole:
        raise BagError(f"{path}: {summary.note}")
    if bags.CONTRACT_KEY in summary.metadata:
        contract.check_same(summary.contract, "the checkpoint", str(path))
        contract = contract.with_topics_of(summary.contract)
    builder = ObservationBuilder(contract, core.policy.spec)
    needed = {stream.topic: stream.type for stream in builder.streams.values()}
    needed |= {action.topic: action.type for action in contract.actions.values()}
    bags.require_topics(summary, needed)
    horizon = core.policy.horizon
    steps = 1 if contract.plans else horizon
    commands = Commands((), contract, ahead_ns=steps * contract.step_ns)
    stamps, predicted, recorded, known = [], [], [], []
    for tick_ns in replay_ticks(replayed(path, builder, commands), builder, core.buffer, commands):
        try:
            chunk = core.predict(tick_ns)  # each tick for itself: nothing is executed that could be continued
        except Unobserved:
            continue
        truth = _truth(commands, tick_ns, len(chunk.actions), contract)
        blank = np.full(len(contract.action_names), np.nan)
        stamps.append(tick_ns)
        predicted.append(chunk.actions)
        recorded.append(np.stack([blank if value is None else value for value in truth]))
        known.append([value is not None for value in truth])
    if not stamps or not np.any(known):
        raise BagError(f"{path}: no tick has both an observation and a command")
    half_range = (contract.action_high - contract.action_low) / 2
    return Replay(contract.action_names, contract.action_units, half_range, np.array(stamps), np.stack(predicted),
                  np.stack(recorded), np.array(known))  # fmt: skip


def _truth(commands: Commands, tick_ns: int, rows: int, contract: RobotContract) -> list[np.ndarray | None]:
    """What was recorded for each row of a chunk: the commands of its instants, or the tick's own plan."""
    if not contract.plans:
        return [commands.at(tick_ns + k * contract.step_ns) for k in range(rows)]
    plan = commands.at(tick_ns)
    found: list[np.ndarray | None] = [] if plan is None else list(plan[:rows])
    return found + [None] * (rows - len(found))
