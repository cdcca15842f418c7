"""Which of a contract's streams a published policy is given, named by the user or the only ones there are."""

from __future__ import annotations

from collections.abc import Sequence

from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.observation.decode import kinds


def cameras_of(contract: RobotContract, asked: Sequence[str]) -> tuple[str, ...]:
    """The image streams ``asked``, or the contract's only one; raises :class:`VlaError` with the choices."""
    return tuple(asked) or (_only(contract, "image", "--cameras"),)


def instruction_of(contract: RobotContract, asked: str | None) -> str:
    """The text stream ``asked``, or the contract's only one; raises :class:`VlaError` with the choices."""
    return asked or _only(contract, "text", "--instruction")


def _only(contract: RobotContract, kind: str, option: str) -> str:
    found = [name for name, stream in contract.observations.items() if kind in kinds(stream.type)]
    if len(found) != 1:
        raise VlaError(f"{option}: the contract {contract.name} has {len(found)} streams of kind {kind}; name what the "
                       f"model is to see; choices: {choices(found)}")  # fmt: skip
    return found[0]
