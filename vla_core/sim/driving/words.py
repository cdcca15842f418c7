"""What a navigator says, in several wordings, and when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_core.sim.driving.layout import Instruction

# No wording stands for two meanings.
WORDS: dict[str, tuple[str, ...]] = {
    "left": (
        "turn left at the next crossing",
        "take the next left",
        "at the crossing, turn left",
        "go left at the next junction",
    ),
    "right": (
        "turn right at the next crossing",
        "take the next right",
        "at the crossing, turn right",
        "go right at the next junction",
    ),
    "straight": (
        "go straight on at the next crossing",
        "drive straight over the crossing",
        "at the crossing, go straight on",
        "continue straight ahead at the next junction",
    ),
    "exit 1": ("take the first exit at the roundabout", "at the roundabout, take the first exit"),
    "exit 2": ("take the second exit at the roundabout", "at the roundabout, take the second exit"),
    "exit 3": ("take the third exit at the roundabout", "at the roundabout, take the third exit"),
    "stop behind": ("stop behind the bus", "pull up behind the bus", "halt behind the bus", "wait behind the bus"),
    "overtake": ("overtake the bus", "pass the bus", "drive past the bus", "go around the bus"),
    "follow": ("follow the road", "keep following the road", "stay on this road", "drive on along the road"),
}
OTHERS = {
    "left": ("right", "straight"),
    "right": ("left", "straight"),
    "straight": ("left", "right"),
    "exit 1": ("exit 2", "exit 3"),
    "exit 2": ("exit 1", "exit 3"),
    "exit 3": ("exit 1", "exit 2"),
    "stop behind": ("overtake",),
    "overtake": ("stop behind",),
}
FREE_M = 8.0  # of way without a decision that are worth words of their own


def say(meaning: str, rng: np.random.Generator) -> str:
    """One of the wordings of a meaning."""
    words = WORDS[meaning]
    return words[int(rng.integers(len(words)))]


def meaning_of(text: str) -> str:
    """What a wording means."""
    return next(meaning for meaning, words in WORDS.items() if text in words)


def opposed(text: str, choice: int) -> str | None:
    """A wording that asks for something else in the same place; None where there is nothing else to ask for."""
    meaning = meaning_of(text)
    if meaning not in OTHERS:
        return None
    others = OTHERS[meaning]
    words = WORDS[others[choice % len(others)]]
    return words[WORDS[meaning].index(text) % len(words)]


def navigated(decisions: Sequence[tuple[str, float, float]], rng: np.random.Generator) -> tuple[Instruction, ...]:
    """What a navigator says: each decision (meaning, station where its junction begins, and ends) well before its
    junction until it is passed, "follow the road" between them.
    """
    said, free = [], 0.0
    for meaning, begins, ends in decisions:
        notice = max(begins - float(rng.uniform(34.0, 46.0)), free)
        if notice - free > FREE_M:
            said.append(Instruction(from_s=free, text=say("follow", rng)))
        else:
            notice = free
        said.append(Instruction(from_s=notice, text=say(meaning, rng)))
        free = ends + 2.0
    said.append(Instruction(from_s=free, text=say("follow", rng)))
    return tuple(said)
