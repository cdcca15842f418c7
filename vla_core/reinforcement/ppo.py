"""PPO (Schulman et al. 2017, "Proximal policy optimization algorithms") on the Gaussian head of a policy, held to the
imitation policy that it starts from by a KL term.

Written out in one file in the manner of CleanRL, not with TorchRL: what an action is here (the executed rows of a
chunk, observed through the robot's own path) would have to be wrapped into its environments and tensor dictionaries,
and the wrapping would be longer than the algorithm.

**A chunk is one action**: its R executed rows are drawn together, their log-densities added, and the next decision
comes R control steps later (a semi-Markov process: Sutton, Precup and Singh 1999). Discounts are per control step, so
that how many rows are executed changes nothing about what is worth doing.

Shapes: B decisions, R executed rows, A entries of an action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError
from vla_core.model.inputs import ModelInputs
from vla_core.model.tokens import masked_mean
from vla_core.observation.batch import collate, with_floats
from vla_core.reinforcement.chunks import ChunkNormal, Exploration, context_of, distribution
from vla_core.reinforcement.rollouts import Episode


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The algorithm's numbers.

    ``episodes``        of one iteration
    ``epochs``          passes over an iteration's decisions, in batches of ``batch_size``
    ``clip``            of the probability ratio, 1 - clip to 1 + clip
    ``discount``, ``trace``  gamma per control step and lambda per decision, of the generalized advantage estimate
    ``kl``              weight of KL(policy || imitation policy), per decision
    ``target_kl``       an iteration ends where a batch's mean KL to the policy that drew its chunks is larger
    ``entropy``         weight of the entropy
    ``value_epochs``    passes of the critic over an iteration; in the first ``warm_up`` iterations it learns alone
    ``train``           the ``head`` alone, or ``all`` of the model
    """

    episodes: int = 24
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 3e-5
    value_learning_rate: float = 1e-3
    clip: float = 0.2
    discount: float = 0.99
    trace: float = 0.95
    kl: float = 0.002
    target_kl: float = 0.2
    entropy: float = 0.0
    gradient_clip: float = 0.5
    value_epochs: int = 20
    warm_up: int = 2
    train: Literal["head", "all"] = "all"

    def __post_init__(self) -> None:
        for name in ("episodes", "epochs", "batch_size", "value_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "value_learning_rate", "clip", "target_kl", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        for name in ("kl", "entropy", "warm_up"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a number from 0 on, found {getattr(self, name)}")


class Returns(NamedTuple):
    """Of each decision (B,) float32: how much better than expected, and what the critic is to learn."""

    advantages: Tensor
    targets: Tensor


def macro_rewards(rewards: np.ndarray, begins: np.ndarray, discount: float) -> np.ndarray:
    """Discounted sums (K,) of ``rewards`` (T,) from each decision to the next one."""
    ends = [*begins[1:], len(rewards)]
    return np.array([
        float(rewards[begin:end] @ discount ** np.arange(end - begin)) for begin, end in zip(begins, ends, strict=True)
    ])  # fmt: skip


def advantages(rewards: np.ndarray, lengths: np.ndarray, values: np.ndarray, discount: float, trace: float,
               ) -> np.ndarray:  # fmt: skip
    """Generalized advantage estimates (K,) (Schulman et al. 2016, eq. 16) of decisions that last several steps.

    Args:
        rewards: (K,) discounted sums over each decision's own steps.
        lengths: (K,) control steps of each.
        values: (K + 1,) of the states, the last one of what comes after all of them: 0 after an end.
    """
    found = np.zeros(len(rewards))
    ahead = 0.0
    for k in reversed(range(len(rewards))):
        further = discount ** lengths[k]
        surprise = rewards[k] + further * values[k + 1] - values[k]
        ahead = found[k] = surprise + further * trace * ahead
    return found


def returns(episode: Episode, values: np.ndarray, discount: float, trace: float) -> np.ndarray:
    """Advantages of the decisions that can be judged: (K,), or (K - 1,) where the time was up.

    There the last decision only tells what the state is worth, by ``values`` (K,) of all decisions' states: a limit of
    time is no end of the world (Pardo et al. 2018, "Time limits in reinforcement learning").
    """
    sums = macro_rewards(episode.rewards, episode.begins, discount)
    lengths = np.diff([*episode.begins, episode.steps])
    if not episode.ended:
        return advantages(sums[:-1], lengths[:-1], values, discount, trace)
    return advantages(sums, lengths, np.append(values, 0.0), discount, trace)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped surrogate objective, negated (eq. 7): mean of -min(r A, clip(r, 1 - c, 1 + c) A), all (B,)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


class Critic(nn.Module):
    """Worth (B,) of a state by what the imitation policy makes of it and by the numbers themselves.

    It sees the context of the frozen imitation policy, which does not change while the policy learns.
    """

    def __init__(self, context_dim: int, state_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        last = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(
            nn.Linear(context_dim + state_dim, hidden_dim), nn.Tanh(),
            nn.Linear(hidden_dim, hidden_dim), nn.Tanh(),
            last,
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        worth: Tensor = self.net(features)[:, 0]
        return worth


@dataclass(frozen=True)
class Figures:
    """Of one iteration; a decision's KL is in nats."""

    decisions: int
    policy_loss: float
    value_loss: float
    explained_variance: float
    kl_step: float
    kl_imitation: float
    clipped: float
    entropy: float
    epochs: int

    def scalars(self) -> dict[str, float]:
        """For logs."""
        return {f"reinforce/{name}": float(value) for name, value in vars(self).items()}


class Learner:
    """The policy, its critic and their optimizers; :meth:`update` learns from an iteration's episodes."""

    def __init__(self, checkpoint: Checkpoint, options: PPO, exploration: Exploration, seed: int = 0) -> None:
        self.checkpoint, self.options, self._exploration = checkpoint, options, exploration
        # Without dropout: the policy that is judged must be the one that acted.
        self.model = checkpoint.model.eval()
        self._imitation = copy.deepcopy(self.model).requires_grad_(False)
        self._rows = checkpoint.config.execution.steps
        self._generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.critic = Critic(self.model.head.context_dim, checkpoint.config.model.state_dim)
        self.model.requires_grad_(False)
        trained = self.model.head if options.train == "head" else self.model
        trained.requires_grad_(True)
        self._parameters = [p for p in trained.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr=options.learning_rate, eps=1e-5)
        self._value_optimizer = torch.optim.Adam(self.critic.parameters(), lr=options.value_learning_rate)
        self.iterations = 0

    def weights(self) -> dict[str, Tensor]:
        """Of the policy now."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def update(self, episodes: Sequence[Episode]) -> Figures:
        """Learn from episodes that the policy of these very weights has made."""
        options = self.options
        batch = self._batch(episodes)
        kept, judged = self._judge(episodes, self._values(batch.features))
        explained = _explained(judged, self._values(batch.features)[kept])
        value_loss = self._learn_values(batch.features[kept], judged.targets)
        with torch.no_grad():
            before = self._distributions(batch.inputs)
            imitation = self._distributions(batch.inputs, self._imitation)
        self.iterations += 1
        losses, clipped, epochs = [0.0], [0.0], 0
        if self.iterations > options.warm_up:
            losses, clipped, epochs = self._improve(batch, kept, judged, before, imitation)
        with torch.no_grad():
            after = self._distributions(batch.inputs)
            return Figures(
                len(kept), float(np.mean(losses)), value_loss, explained, float(after.kl(before).mean()),
                float(after.kl(imitation).mean()), float(np.mean(clipped)), float(after.entropy().mean()), epochs,
            )  # fmt: skip

    def _improve(self, batch: _Batch, kept: Tensor, judged: Returns, before: ChunkNormal, imitation: ChunkNormal,
                 ) -> tuple[list[float], list[float], int]:  # fmt: skip
        """Epochs of the clipped objective, until the policy is ``target_kl`` away; losses, clipped shares, epochs."""
        options = self.options
        advantage = (judged.advantages - judged.advantages.mean()) / (judged.advantages.std() + 1e-8)
        drawn_log_prob = before.log_prob(batch.chunks)
        losses: list[float] = []
        clipped: list[float] = []
        for epoch in range(options.epochs):
            for part in torch.randperm(len(kept), generator=self._generator).split(options.batch_size):
                index = kept[part]
                now = self._distribution(batch.inputs, index)
                if float(now.kl(before.at(index)).detach().mean()) > options.target_kl:
                    return losses, clipped, epoch
                ratio = (now.log_prob(batch.chunks[index]) - drawn_log_prob[index]).exp()
                loss = clipped_loss(ratio, advantage[part], options.clip)
                loss = loss + options.kl * now.kl(imitation.at(index)).mean() - options.entropy * now.entropy().mean()
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self._parameters, options.gradient_clip)
                self._optimizer.step()
                losses.append(loss.item())
                clipped.append(((ratio - 1).abs() > options.clip).float().mean().item())
        return losses, clipped, options.epochs

    def _learn_values(self, features: Tensor, targets: Tensor) -> float:
        loss = torch.zeros(())
        for _ in range(self.options.value_epochs):
            for index in torch.randperm(len(features), generator=self._generator).split(self.options.batch_size):
                loss = 0.5 * (self.critic(features[index]) - targets[index]).square().mean()
                self._value_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._value_optimizer.step()
        return loss.item()

    def _judge(self, episodes: Sequence[Episode], values: Tensor) -> tuple[Tensor, Returns]:
        """Indices (B,) of the decisions that can be judged, and what is said of them."""
        options, kept, found, start = self.options, [], [], 0
        for episode in episodes:
            count = len(episode.chunks)
            own = values[start : start + count].double().numpy()
            found.append(returns(episode, own, options.discount, options.trace))
            kept.append(start + torch.arange(len(found[-1])))
            start += count
        advantage = torch.from_numpy(np.concatenate(found)).float()
        index = torch.cat(kept)
        return index, Returns(advantage, advantage + values[index])

    @torch.no_grad()
    def _values(self, features: Tensor) -> Tensor:
        return torch.cat([self.critic(part) for part in features.split(4096)])

    def _batch(self, episodes: Sequence[Episode]) -> _Batch:
        observations = [observation for episode in episodes for observation in episode.observations]
        checkpoint = self.checkpoint
        inputs = collate(observations, checkpoint.normalizer, checkpoint.tokenizer, checkpoint.config.observation,
                         floats=False, remembers=getattr(self.model, "remembers", "everything"))  # fmt: skip
        chunks = torch.from_numpy(np.concatenate([episode.chunks for episode in episodes]))
        features = []
        with torch.no_grad():
            for index in torch.arange(len(observations)).split(1024):
                part = _at(inputs, index)
                context = masked_mean(context_of(self._imitation, part)).float()
                features.append(torch.cat([context, part.state.float()], dim=1))
        return _Batch(inputs, chunks, torch.cat(features))

    def _distribution(self, inputs: ModelInputs, index: Tensor, model: Any = None) -> ChunkNormal:
        model = model or self.model
        return distribution(model, context_of(model, _at(inputs, index)), self._rows, self._exploration)

    def _distributions(self, inputs: ModelInputs, model: Any = None) -> ChunkNormal:
        """Of all decisions."""
        parts = [self._distribution(inputs, index, model) for index in torch.arange(len(inputs.state)).split(1024)]
        mean, log_std = torch.cat([part.mean for part in parts]), torch.cat([part.log_std for part in parts])
        return ChunkNormal(mean, log_std, self._exploration.correlation)


class _Batch(NamedTuple):
    """All decisions of an iteration: inputs with pictures as bytes, chunks (B, R, A), the critic's features (B, F)."""

    inputs: ModelInputs
    chunks: Tensor
    features: Tensor


def _at(inputs: ModelInputs, index: Tensor) -> ModelInputs:
    return with_floats(inputs.map(lambda tensor: tensor[index]))


def _explained(judged: Returns, values: Tensor) -> float:
    """Share of the targets' variance that the critic knew."""
    variance = judged.targets.var()
    return float(1 - (judged.targets - values).var() / variance) if variance > 0 else 0.0
