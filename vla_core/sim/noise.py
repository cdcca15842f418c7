"""Bursts of disturbance on what a robot executes, so that recorded data holds states beside the expert's way, and how
it comes back from them (DART, Laskey et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import Action
from vla_core.errors import choices


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Bursts of disturbance on what is executed.

    ``scale`` is the largest disturbance of an entry as a share of half its range, ``share`` the share of ticks that are
    disturbed, ``steps`` the shortest and the longest burst. Within a burst the disturbance is constant, drawn
    uniformly: an average over independent ticks would cancel itself. ``entries`` names those that are disturbed, empty
    all of them; of these ``lowered`` are only ever made smaller: a car that waits must not be pushed past a red light,
    but one that was held up shows how the expert speeds up again. ``episodes`` is the share of episodes that have
    bursts.
    """

    scale: float = 0.5
    share: float = 0.3
    steps: tuple[int, int] = (4, 12)
    entries: tuple[str, ...] = ()
    lowered: tuple[str, ...] = ()
    episodes: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 2:
            raise ConfigError(f"noise.scale: expected above 0 and at most 2, found {self.scale}")
        if not 0 < self.share < 1:
            raise ConfigError(f"noise.share: expected between 0 and 1, found {self.share}")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ConfigError(f"noise.steps: expected 1 <= shortest <= longest, found {self.steps}")
        if not 0 < self.episodes <= 1:
            raise ConfigError(f"noise.episodes: expected above 0 and at most 1, found {self.episodes}")


class Disturbance:
    """The bursts of one episode on commands of ``action``; without ``noise`` there are none.

    ``rng`` is its own: the world must give the same episode with and without noise.
    """

    def __init__(self, noise: Noise | None, action: Action, rng: np.random.Generator) -> None:
        if noise is not None:
            _check_names("entries", noise.entries, action.names, action.topic)
            _check_names("lowered", noise.lowered, noise.entries or action.names, "noise.entries")
        self._rng = rng
        self._low, self._high = np.asarray(action.low), np.asarray(action.high)
        self._left = 0
        self._value = np.zeros(len(self._low))
        drawn = noise is not None and (noise.episodes == 1 or rng.random() < noise.episodes)
        self._noise = noise if drawn else None
        chosen = noise.entries if noise and noise.entries else action.names
        self._chosen = np.array([name in chosen for name in action.names])
        self._lowered = np.array([bool(noise and name in noise.lowered) for name in action.names])

    def on(self, values: np.ndarray) -> np.ndarray:
        """What is executed instead of ``values`` (A,), within the action's bounds."""
        noise = self._noise
        if noise is None:
            return values
        if self._left == 0 and self._rng.random() < _burst_rate(noise):
            self._left = int(self._rng.integers(noise.steps[0], noise.steps[1] + 1))
            half = (self._high - self._low) / 2
            drawn = self._rng.uniform(-1, 1, len(half))
            self._value = noise.scale * half * np.where(self._lowered, -abs(drawn), drawn) * self._chosen
        if self._left == 0:
            return values
        self._left -= 1
        return np.clip(values + self._value, self._low, self._high)


def _check_names(field: str, names: tuple[str, ...], possible: tuple[str, ...], where: str) -> None:
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise ConfigError(f"noise.{field}: no {', '.join(unknown)} in {where}; choices: {choices(possible)}")


def _burst_rate(noise: Noise) -> float:
    """Chance that a burst begins at an undisturbed tick, so that ``share`` of all ticks are disturbed."""
    length = sum(noise.steps) / 2
    return noise.share / (length * (1 - noise.share) + noise.share)
