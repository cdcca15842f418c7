"""What makes a dataset doubtful: checks on arrays that know nothing of files. Each returns one line a finding.

Legend: N frames, D entries of a feature, E episodes; ``starts`` (E + 1,) are the first frames of the episodes, and N.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from vla_core.inspect.report import listed, number

TINY = 0.01  # a standard deviation below the default of normalization.floor
IQRS = 5.0  # beyond q01 or q99: 9 deviations of a normal distribution
FEW = 3  # distinct values of an entry that is a switch, which jumps and stays at its ends by nature
JUMPS, OFTEN = 2.0, 0.3  # times the usual largest step, in a share of the episodes
SATURATED = 0.2  # share of frames at a limit
SHORT, LONG = 0.2, 5.0  # times the median length
HOLES = 0.05  # share of steps that are missing


def not_finite(feature: str, names: Sequence[str], values: np.ndarray) -> list[str]:
    """Entries of ``values`` (N, D) that are NaN or infinite somewhere."""
    bad = ~np.isfinite(values)
    found = [f"{name} at {count}" for name, count in zip(names, bad.sum(axis=0), strict=True) if count]
    return [f"{feature}: not finite: {listed(found)} of {len(values)} frames"] if found else []


def spread(feature: str, names: Sequence[str], values: np.ndarray, starts: np.ndarray) -> list[str]:
    """Entries that never move, hardly move, have collapsed quantiles, or values far outside of the others."""
    still, tiny, collapsed, far = [], [], [], []
    for i, name in enumerate(names):
        column = values[:, i]
        rows = np.flatnonzero(np.isfinite(column))
        column = column[rows].astype(np.float64)
        if not len(column):
            continue
        q01, q25, q75, q99 = np.quantile(column, [0.01, 0.25, 0.75, 0.99])
        if np.ptp(column) == 0:
            still.append(f"{name} ({number(column[0])})")
            continue
        if column.std() < TINY:
            tiny.append(f"{name} ({number(column.std())})")
        if q01 == q99:
            collapsed.append(f"{name} ({number(q01)} in 98 % of the frames, {number(column.min())} to "
                             f"{number(column.max())} in all)")  # fmt: skip
            continue
        beyond = np.maximum(column - q99, q01 - column)
        outside = int((beyond > max(IQRS * (q75 - q25), q99 - q01)).sum())
        if outside:
            worst = int(beyond.argmax())
            where = _place(rows[worst], starts)
            far.append(f"{name} at {outside} frames, the worst {number(column[worst])} in {where}, where 98 % are "
                       f"{number(q01)} to {number(q99)}")  # fmt: skip
    kinds = {
        "never moves": still, f"standard deviation below {TINY:g}": tiny,
        "collapsed quantiles, normalize it by min_max or not at all": collapsed, "outliers": far,
    }  # fmt: skip
    return [f"{feature}: {kind}: {listed(found)}" for kind, found in kinds.items() if found]


def episodes(lengths: np.ndarray, columns: Mapping[str, np.ndarray], starts: np.ndarray) -> list[str]:
    """Episodes that are much shorter or longer than the others, in which nothing moves, or that are there twice."""
    found = []
    middle = float(np.median(lengths))
    for kind, odd in (("short", lengths < SHORT * middle), ("long", lengths > LONG * middle)):
        if odd.any():
            named = [f"{i} ({lengths[i]} frames)" for i in np.flatnonzero(odd)]
            found.append(f"unusually {kind} episodes, where the median is {middle:g} frames: {listed(named)}")
    for feature, values in columns.items():
        flat = [str(i) for i, part in enumerate(_parts(values, starts))
                if len(part) > 1 and not np.ptp(part, axis=0).any()]  # fmt: skip
        if flat:
            found.append(f"{feature} never changes in {_episodes(flat)}")
    digests: dict[bytes, list[str]] = {}
    for i in range(len(lengths)):
        whole = [np.ascontiguousarray(values[starts[i] : starts[i + 1]]).tobytes() for values in columns.values()]
        digests.setdefault(hashlib.sha256(b"".join(whole)).digest(), []).append(str(i))
    twice = [" and ".join(same) for same in digests.values() if len(same) > 1]
    return [*found, *([f"the same numbers in episodes {listed(twice)}"] if twice else [])]


def jumps(feature: str, names: Sequence[str], values: np.ndarray, starts: np.ndarray) -> list[str]:
    """Entries that jump where many episodes begin or end: a command of before or after, or padding."""
    places = {"beginning": [], "end": []}  # type: dict[str, list[str]]
    inside = [part for part in _parts(values, starts) if len(part) >= 4]
    if not inside:
        return []
    steps = [np.abs(np.diff(part.astype(np.float64), axis=0)) for part in inside]
    usual = np.quantile(np.concatenate([step[1:-1] for step in steps]), 0.99, axis=0)
    reach = np.ptp(values.astype(np.float64), axis=0)
    edges = {"beginning": np.stack([step[0] for step in steps]), "end": np.stack([step[-1] for step in steps])}
    for i, name in enumerate(names):
        if len(np.unique(values[:, i])) <= FEW:
            continue
        for place, step in edges.items():
            odd = step[:, i] > max(JUMPS * usual[i], 0.2 * reach[i])
            if odd.mean() >= OFTEN:
                places[place].append(f"{name} by {number(float(np.median(step[odd, i])))} in {odd.sum()}")
    return [f"{feature} jumps at the {place} of episodes: {listed(found)} of {len(inside)} episodes"
            for place, found in places.items() if found]  # fmt: skip


def limits(names: Sequence[str], values: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[str]:
    """Actions (N, D) beyond the contract's limits (D,), or at one of them for much of the time."""
    beyond, saturated = [], []
    for i, name in enumerate(names):
        column, margin = values[:, i], 1e-3 * (high[i] - low[i])
        outside = int(((column < low[i] - margin) | (column > high[i] + margin)).sum())
        if outside:
            beyond.append(f"{name} at {outside} frames, {number(column.min())} to {number(column.max())} where "
                          f"{number(low[i])} to {number(high[i])} are allowed")  # fmt: skip
        share = float(((column <= low[i] + margin) | (column >= high[i] - margin)).mean())
        if share > SATURATED and len(np.unique(column)) > FEW:
            saturated.append(f"{name} at {100 * share:.0f} % of the frames")
    found = [f"action: beyond the contract's limits: {listed(beyond)}"] if beyond else []
    return [*found, *([f"action: saturated at the contract's limits: {listed(saturated)}"] if saturated else [])]


def holes(stamps_ns: np.ndarray, starts: np.ndarray, step_ns: int) -> list[str]:
    """Episodes in whose true stamps (N,) many steps are missing."""
    odd = []
    for i, part in enumerate(_parts(stamps_ns, starts)):
        due = round(int(part[-1] - part[0]) / step_ns) + 1
        if due - len(part) > HOLES * due:
            odd.append(f"{i} ({due - len(part)} of {due})")
    return [f"steps are missing, where a tick had no observation or no command: episodes {listed(odd)}"] if odd else []


def stored(feature: str, found: Mapping[str, np.ndarray], values: np.ndarray) -> list[str]:
    """Statistics that the dataset states and that its rows (N, D) do not have."""
    exact = values.astype(np.float64)
    truth = {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0), "std": exact.std(0)}
    scale = np.maximum(np.ptp(exact, axis=0), 1e-6 * np.abs(exact).max() + 1e-12)
    wrong = []
    for name in (name for name in truth if name in found):
        said = np.asarray(found[name], np.float64).ravel()
        if said.shape != truth[name].shape or (np.abs(said - truth[name]) > 1e-3 * scale).any():
            wrong.append(name)
    return [f"{feature}: {', '.join(wrong)} in the dataset's statistics are not those of its rows"] if wrong else []


def runs(same: Sequence[bool]) -> tuple[int, int]:
    """First frame and length of the longest run of pictures that are the same as the one before."""
    best, begin = (0, 1), 0
    for i, is_same in enumerate(same):
        begin = begin if is_same else i
        if i - begin + 1 > best[1]:
            best = (begin, i - begin + 1)
    return best


def _parts(values: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    return [values[begin:end] for begin, end in itertools.pairwise(starts.tolist())]


def _place(frame: int, starts: np.ndarray) -> str:
    episode = int(np.searchsorted(starts, frame, side="right")) - 1
    return f"episode {episode}, frame {frame - starts[episode]}"


def _episodes(found: Sequence[str]) -> str:
    return f"episode{'s' * (len(found) > 1)} {listed(found)}"
