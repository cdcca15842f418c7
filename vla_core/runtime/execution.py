"""How chunks become commands: the strategy and its numbers, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import choices

Strategy = Literal["receding", "ensemble", "blend", "rtc"]
SoftMask = Literal["exponential", "linear", "ones"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Of each chunk the first ``steps`` rows run before the next inference is due, or ``period_s`` where it is given.

    ``period_s``             the next inference is due so many seconds after the newest chunk's observation; None is
                             after ``steps`` rows. Vehicles plan anew at every tick, though their rows are further apart
    ``strategy``             ``receding``: the newest chunk alone;
                             ``ensemble``: the weighted mean of all chunks that cover the tick, ACT's (Zhao et al.
                             2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware");
                             ``blend``: a linear cross-fade from the old plan to the new chunk;
                             ``rtc``: the newest chunk, sampled so that it continues the old one (Black, Galliker and
                             Levine 2025, "Real-Time Execution of Action Chunking Flow Policies"); diffusion and flow
                             heads only
    ``ensemble_decay``       m of ACT's weights exp(-m i); i = 0 is the oldest chunk
    ``blend_steps``          steps of the cross-fade, from the tick at which the new chunk takes over
    ``max_guidance``         bound on RTC's guidance weight, the paper's beta
    ``spread``               standard deviation that RTC takes the normalized actions of one observation to have; 1 is
                             the paper's, a smaller one holds a policy that is sure of itself closer to the old plan
    ``soft_mask``            how RTC's weights fall from 1 after the frozen rows to 0 at the end of the old plan:
                             ``exponential`` (the paper's), ``linear``, or not at all (``ones``)
    ``guided_steps``         RTC's soft mask ends this many rows after the frozen ones; None guides all rows that the
                             old plan has (the paper's choice), a few rows leave the later ones free to correct it
    ``delay_window``         RTC expects the longest delay of this many last chunks
    ``initial_delay_steps``  the delay that RTC expects before it has measured one
    """

    strategy: Strategy = "receding"
    steps: int = 4
    period_s: float | None = None
    ensemble_decay: float = 0.01
    blend_steps: int = 4
    max_guidance: float = 5.0
    spread: float = 1.0
    soft_mask: SoftMask = "exponential"
    guided_steps: int | None = None
    delay_window: int = 10
    initial_delay_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "blend_steps", "delay_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.initial_delay_steps < 0:
            raise ConfigError(f"initial_delay_steps: expected at least 0, found {self.initial_delay_steps}")
        for name in ("ensemble_decay", "max_guidance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected a number from 0 on, found {getattr(self, name)}")
        if self.period_s is not None and not 0 < self.period_s < float("inf"):
            raise ConfigError(f"period_s: expected null or a positive time, found {self.period_s}")
        if self.guided_steps is not None and self.guided_steps < 1:
            raise ConfigError(f"guided_steps: expected null or at least 1, found {self.guided_steps}")
        if not 0 < self.spread < float("inf"):
            raise ConfigError(f"spread: expected a positive number, found {self.spread}")

    @property
    def period_ns(self) -> int | None:
        """``period_s`` in nanoseconds."""
        return None if self.period_s is None else round(NANOSECONDS * self.period_s)

    def interval_ns(self, row_ns: int) -> int:
        """Time from one chunk's observation to the next one's, of chunks whose rows are ``row_ns`` apart."""
        return self.steps * row_ns if self.period_ns is None else self.period_ns

    def changed(self, values: Mapping[str, Any]) -> Execution:
        """This execution with plain ``values``, such as a node's parameters; strict as a file is."""
        return from_dict(Execution, {**to_dict(self), **values}, "execution")

    def check_contract(self, contract: RobotContract) -> None:
        """Raise :class:`ConfigError` unless the actions of ``contract`` can be executed so.

        Plans in the robot's own frame cannot be mixed row by row: each is seen from elsewhere.
        """
        if contract.plans and self.strategy != "receding":
            raise ConfigError(
                f"execution.strategy: found {self.strategy!r}, but the trajectories of {contract.name!r} are in the "
                "robot's own frame, which has moved from one to the next; choices: receding"
            )
        following, interval_ns = contract.following, self.interval_ns(contract.chunk_step_ns)
        if following is not None and interval_ns > NANOSECONDS * following.timeout_s:
            raise ConfigError(
                f"execution: a trajectory every {interval_ns / NANOSECONDS:g} s, but {contract.name!r} brakes where "
                f"none comes for following.timeout_s ({following.timeout_s:g}); set execution.period_s, to "
                f"{contract.step_ns / NANOSECONDS:g} for one at every tick"
            )

    def check(self, horizon: int, head: Any) -> None:
        """Raise :class:`ConfigError` unless chunks of ``horizon`` rows of the head with config ``head`` allow it."""
        if self.steps > horizon:
            raise ConfigError(f"execution.steps: expected at most model.horizon ({horizon}), found {self.steps}")
        if self.strategy == "rtc" and not getattr(head, "guidable", False):
            sampler = f" with the sampler {head.sampler!r}" if hasattr(head, "sampler") else ""
            raise ConfigError(
                f"execution.strategy: found 'rtc', which guides the sampling; the head {head.type!r}{sampler} cannot "
                f"be guided; choices for it: {choices(set(STRATEGIES) - {'rtc'})}; heads that can be guided: "
                "diffusion (samplers ddim, ddpm), flow"
            )
        if self.strategy != "receding" and self.steps == horizon:
            raise ConfigError(
                f"execution.steps: {self.strategy} needs chunks that overlap, expected at most model.horizon - 1 "
                f"({horizon - 1}), found {self.steps}; or take the strategy receding"
            )
