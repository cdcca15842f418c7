"""A LeRobot policy's statistics, wherever its version put them.

The new layout has them beside the processors, the old one among the weights. Either may hold groups, as
``so100.buffer.action``, that LeRobot's processors do not look for: it then normalizes nothing, without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vla_core.errors import VlaError, choices
from vla_core.model.vla.smolvla_source import STATISTICS, Repository, read_json
from vla_core.observation.normalizer import REQUIRED, Mode, Statistics, StatisticsError

FEATURES = {"state": "observation.state", "action": "action"}
MODES: dict[str, Mode] = {"MEAN_STD": "mean_std", "MIN_MAX": "min_max", "QUANTILES": "quantile", "IDENTITY": "none"}
_FEATURE = re.compile(r"(?:(?P<group>.+?)[._])??(?:buffer[._])?(?P<feature>observation[._]state|action)")
_KEPT = ("mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99")

Groups = dict[str, dict[str, dict[str, Tensor]]]  # group, "" for the policy's own -> state or action -> name -> (D,)


def modes_of(found: Repository) -> dict[str, Mode]:
    """How ``state`` and ``action`` are normalized; raises where pictures are, or in a way that is not known."""
    declared = found.values.get("normalization_mapping")
    for _, step in _normalizers(found):
        declared = step["config"].get("norm_map", declared)
    if not declared:
        raise VlaError(f"{found.name}: config.json has no normalization_mapping")
    if declared.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise VlaError(f"{found.name}: normalizes pictures by {declared['VISUAL']}, expected IDENTITY")
    modes: dict[str, Mode] = {}
    for feature, kind in (("state", "STATE"), ("action", "ACTION")):
        mode = declared.get(kind, "IDENTITY")
        if mode not in MODES:
            raise VlaError(f"{found.name}: normalizes {kind} by {mode!r}; choices: {choices(MODES)}")
        modes[feature] = MODES[mode]
    return modes


def statistics_of(found: Repository, modes: Mapping[str, Mode], asked: str | None,
                  widths: Mapping[str, int]) -> Statistics:  # fmt: skip
    """What ``modes`` need of the group ``asked``, or of the policy's own, or of the JSON file ``asked``.

    Raises :class:`StatisticsError` with the keys that are there; nothing is taken for identity.
    """
    if asked is not None and Path(asked).is_file():
        where, groups = asked, {asked: _from_json(Path(asked))}
    else:
        where, groups = found.name, _groups(found)
    if asked is not None and asked not in groups:
        raise StatisticsError(f"{where}: no group of statistics {asked!r}; choices: {_named(groups)}")
    chosen = groups.get(asked or "", {})
    own: Statistics = {}
    for feature, mode in modes.items():
        there = chosen.get(feature, {})
        absent = [name for name in REQUIRED[mode] if name not in there]
        if absent:
            others = f"; choose one with --statistics: {_named(groups)}" if asked is None and set(groups) - {""} else ""
            raise StatisticsError(f"{where}: no {' and '.join(absent)} of {FEATURES[feature]!r} for {mode}; there are: "
                                  f"{_listed(groups)}{others}")  # fmt: skip
        own[feature] = {name: value.flatten().tolist() for name, value in there.items()
                        if value.numel() == widths[feature] or name in REQUIRED[mode]}  # fmt: skip
        for name in REQUIRED[mode]:
            value = there[name]
            if value.numel() != widths[feature] or not torch.isfinite(value).all():
                raise StatisticsError(f"{where}: {name} of {FEATURES[feature]!r}: found {value.flatten().tolist()}, "
                                      f"expected {widths[feature]} finite numbers")  # fmt: skip
    return own


def _groups(found: Repository) -> Groups:
    """All statistics of state and action that the policy carries."""
    groups: Groups = {}
    for file, step in _normalizers(found):
        if "state_file" not in step:
            continue
        try:
            tensors = load_file(found.folder / step["state_file"])
        except (SafetensorError, OSError) as error:
            raise VlaError(f"{found.folder}/{step['state_file']}, named by {file}: cannot be read: {error}") from None
        _sort(groups, tensors)
    if not groups:
        _sort(groups, {_stripped(name): value for name, value in found.tensors.items() if name.startswith(STATISTICS)})
    return groups


def _sort(groups: Groups, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        feature, _, name = key.rpartition(".")
        match = _FEATURE.fullmatch(feature)
        if match and name in _KEPT:
            short = "action" if match["feature"] == "action" else "state"
            groups.setdefault(match["group"] or "", {}).setdefault(short, {})[name] = value.to(torch.float32)


def _stripped(name: str) -> str:
    return next(name.removeprefix(prefix) for prefix in STATISTICS if name.startswith(prefix))


def _normalizers(found: Repository) -> list[tuple[str, dict[str, Any]]]:
    """The steps that normalize, each with the file that names it."""
    steps = []
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if (found.folder / file).is_file():
            for step in read_json(found.folder / file).get("steps", []):
                if step.get("registry_name") in ("normalizer_processor", "unnormalizer_processor"):
                    steps.append((file, step))
    return steps


def _from_json(path: Path) -> dict[str, dict[str, Tensor]]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    for feature, key in FEATURES.items():
        known = values.get(key, values.get(feature, {}))
        found[feature] = {name: torch.tensor(known[name], dtype=torch.float32) for name in _KEPT if name in known}
    return found


def _listed(groups: Groups) -> str:
    keys = [".".join(filter(None, [group, FEATURES[feature], name]))
            for group, features in groups.items() for feature, names in features.items() for name in names]  # fmt: skip
    return choices(keys) if keys else "none"


def _named(groups: Groups) -> str:
    return choices(group for group in groups if group) if set(groups) - {""} else "none"
