"""What a world model knows of the robot's world now, from observations and from what was commanded in between."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import torch

from vla_core.model.world_model import State
from vla_core.observation.builder import Observation
from vla_core.world_checkpoint import WorldCheckpoint

REMEMBERED = 4096  # commands; what an inference that takes long may have to catch up with
LONGEST = 256  # ticks between two observations; after a longer time the world is looked at anew


class Tracker:
    """The posterior state at the newest observation.

    Between two observations the state follows what was commanded, tick by tick, and the new observation corrects it.
    An episode's first observation, one from before the last, and one a long time after it, begin anew.

    ``surprise`` is the divergence of posterior and prior as a share of what held-out episodes hardly ever exceed, the
    mean over the last ``surprise_window`` observations: above 1 the model does not know what it sees.
    """

    def __init__(self, world: WorldCheckpoint) -> None:
        self.world = world
        self.step_ns = world.contract.step_ns
        self._window: deque[float] = deque(maxlen=world.config.surprise_window)
        self._commands: deque[tuple[int, np.ndarray]] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()  # commands come from the control clock's thread
        self._state: State | None = None
        self._stamp_ns = 0
        self._episodes = 0  # counts up: what was seen of another episode is not kept, however late it is computed

    def forget(self) -> None:
        """Another episode begins."""
        with self._lock:
            self._episodes += 1
            self._state = None
            self._commands.clear()
            self._window.clear()

    def commanded(self, at_ns: int, values: np.ndarray) -> None:
        """Note a command (A,) in the contract's units."""
        with self._lock:
            self._commands.append((at_ns, np.asarray(values, dtype=np.float64)))

    @property
    def surprise(self) -> float | None:
        """None until the window is full, and where no limit was learned."""
        return float(np.mean(self._window)) if len(self._window) == self._window.maxlen else None

    @torch.inference_mode()
    def see(self, observation: Observation) -> State:
        """The state (1, ...) at ``observation``, which is one of the world model's spec."""
        world, model = self.world, self.world.model
        embedding = model.embed(world.inputs([observation]))
        stamp_ns = observation.stamp_ns
        with self._lock:
            state, since_ns, episode = self._state, self._stamp_ns, self._episodes
            commands = list(self._commands)
        ticks = round((stamp_ns - since_ns) / self.step_ns)
        if state is None or not 1 <= ticks <= LONGEST:
            self._window.clear()
            first = torch.ones(1, dtype=torch.bool)
            action = torch.zeros(1, model.config.action_dim)
            seen = model.rssm.update(model.initial(1), action, embedding, first, sample=False)
        else:
            rows = world.normalizer.normalize("action", self._between(commands, since_ns, ticks))
            actions = torch.from_numpy(rows)[:, None]  # (ticks, 1, A)
            for k in range(ticks - 1):
                state = model.rssm.step(state, actions[k], sample=False)
            seen = model.rssm.update(state, actions[-1], embedding, sample=False)
            limits = world.config.surprise
            if limits:
                nats = float(model.rssm.latent.kl(seen.states.parameters, seen.prior))
                self._window.append(nats / limits[min(ticks, len(limits)) - 1])
        with self._lock:
            if episode != self._episodes:
                return seen.states
            self._state, self._stamp_ns = seen.states, stamp_ns
            while self._commands and self._commands[0][0] < stamp_ns - self.step_ns:
                self._commands.popleft()
        return seen.states

    def _between(self, commands: list[tuple[int, np.ndarray]], since_ns: int, ticks: int) -> np.ndarray:
        """What was in force (ticks, A) at ``since_ns`` and at each tick after it; what was not commanded is safe."""
        contract = self.world.contract
        last: np.ndarray | None = None
        rows, place = [], 0
        for tick in range(ticks):
            end_ns = since_ns + (tick + 1) * self.step_ns
            while place < len(commands) and commands[place][0] < end_ns:
                last = commands[place][1]
                place += 1
            fresh = last is not None and place > 0 and end_ns - commands[place - 1][0] <= 2 * self.step_ns
            safe = contract.safe_values(last)
            rows.append(last if fresh else np.zeros(len(contract.action_names)) if safe is None else safe)
        return np.stack(rows)  # type: ignore[arg-type]
