"""Does a policy look at its pictures and listen to its instruction? Asked of the policy as it runs, without any data.

A published model whose pictures get lost on the way (a wrong version, a wrong key) answers everything alike, and looks
healthy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vla_core.errors import VlaError
from vla_core.model.vlm.text_encoder import RESERVED, WordTokenizer
from vla_core.observation.builder import Observation, ObservationBuilder
from vla_core.runtime.policy import CheckpointPolicy, Policy

SENTENCES = ("open the drawer", "push the red block to the left", "pick up the cup", "stop and move back")
GREY = 128
REPEATED = 10.0  # times the difference between two equal questions, which is 0 where nothing is random


class SelfCheckError(VlaError):
    """A policy that ignores one of its inputs."""


@dataclass(frozen=True)
class SelfCheck:
    """What changed the actions: ``changes`` has the largest change of an entry, as a share of its half range."""

    changes: dict[str, float]
    not_checked: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One for each input."""
        found = [f"{what}: changes the actions by up to {share:.3g} of their half range"
                 for what, share in self.changes.items()]  # fmt: skip
        return [*found, *(f"{what}: not checked, {why}" for what, why in self.not_checked.items())]


def self_check(policy: Policy) -> SelfCheck:
    """Ask ``policy`` the same with other pictures, camera by camera, and with another instruction.

    First a black picture against a white one, then noise; an input is ignored if no answer differs from the first.
    Raises :class:`SelfCheckError` naming what is ignored.
    """
    blank = ObservationBuilder(policy.contract, policy.spec).blank()
    grey = {name: np.full_like(pixels, GREY) for name, pixels in blank.images.items()}
    asked = dataclasses.replace(blank, images=grey, instruction=_sentences(policy)[0])
    half_range = (policy.contract.action_high - policy.contract.action_low) / 2

    def answer(observation: Observation) -> np.ndarray:
        return policy.predict(observation).actions / half_range

    noise = float(np.abs(answer(asked) - answer(asked)).max())
    changes, ignored, not_checked = {}, [], {}
    for what, questions in _questions(policy, asked):
        first = answer(next(questions))
        differences = (float(np.abs(answer(other) - first).max()) for other in questions)
        changes[what] = next((change for change in differences if change > REPEATED * noise), 0.0)
        if not changes[what]:
            ignored.append(what)
    if policy.spec.instruction and len(_sentences(policy)) < 2:
        not_checked["instruction"] = "its tokenizer knows fewer than two words"
    if not policy.spec.images:
        not_checked["pictures"] = "it sees none"
    if ignored:
        raise SelfCheckError(f"{policy.source or 'the policy'}: self-check: ignored: {', '.join(ignored)}; whatever "
                             "stands there, the actions are the same; is it the right checkpoint?")  # fmt: skip
    return SelfCheck(changes, not_checked)


def _questions(policy: Policy, asked: Observation) -> Iterator[tuple[str, Iterator[Observation]]]:
    """Each input with the observations that differ in it alone."""
    for name in policy.spec.images:
        yield f"camera {name}", _pictured(asked, name)
    sentences = _sentences(policy)
    if policy.spec.instruction and len(sentences) > 1:
        yield "instruction", (dataclasses.replace(asked, instruction=text) for text in sentences)


def _pictured(asked: Observation, name: str) -> Iterator[Observation]:
    """Black, white and two kinds of noise in the camera ``name``."""
    shape = asked.images[name].shape
    draw = np.random.default_rng(0)
    for pixels in (np.zeros(shape), np.full(shape, 255), draw.integers(0, 256, shape), draw.integers(0, 256, shape)):
        yield dataclasses.replace(asked, images={**asked.images, name: pixels.astype(np.uint8)})


def _sentences(policy: Policy) -> tuple[str, ...]:
    """What to say: plain sentences, or words that a tokenizer of words was fitted to."""
    if isinstance(policy, CheckpointPolicy) and isinstance(policy.checkpoint.tokenizer, WordTokenizer):
        words = policy.checkpoint.tokenizer.to_dict()["words"][len(RESERVED) :]
        return tuple(words) or ("",)
    return SENTENCES
