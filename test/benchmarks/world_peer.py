"""A plain PyTorch RSSM of DreamerV3's kind and of the same size, as one writes it from the paper: the peer.

Nothing is projected ahead of the loop: each tick concatenates what its layers read, posterior and prior are computed
tick by tick, and latents are drawn by ``torch.distributions``. Its work is otherwise that of ``vla_core``: the same
sizes, number of parameters, losses and optimizer, on the same batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import OneHotCategoricalStraightThrough, kl_divergence
from torch.distributions.independent import Independent

from vla_core.model.world_model import WorldBatch, WorldModel
from vla_core.model.world_model.distributions import two_hot_loss


class PlainRSSM(nn.Module):
    """The recurrent model of ``config`` (an ``RSSMConfig`` with a categorical latent)."""

    def __init__(self, config: Any, action_dim: int, embed_dim: int) -> None:
        super().__init__()
        deter, hidden = config.deter, config.hidden
        self.groups, self.classes = config.latent.groups, config.latent.classes
        self.deter, self.unimix = deter, config.latent.unimix
        stoch = self.groups * self.classes
        self.inputs = nn.Sequential(nn.Linear(stoch + action_dim, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU())
        self.gates = nn.Sequential(nn.Linear(hidden + deter, 3 * deter, bias=False), nn.LayerNorm(3 * deter))
        self.prior = nn.Sequential(nn.Linear(deter, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU(),
                                   nn.Linear(hidden, stoch))  # fmt: skip
        self.posterior = nn.Sequential(nn.Linear(deter + embed_dim, hidden, bias=False), nn.LayerNorm(hidden),
                                       nn.SiLU(), nn.Linear(hidden, stoch))  # fmt: skip
        self.initial = nn.Parameter(torch.zeros(deter))

    def distribution(self, logits: Tensor) -> Independent:
        """The latent's, with its uniform share."""
        probabilities = logits.unflatten(-1, (self.groups, self.classes)).softmax(-1)
        probabilities = (1 - self.unimix) * probabilities + self.unimix / self.classes
        return Independent(OneHotCategoricalStraightThrough(probs=probabilities), 1)

    def advance(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """The next deterministic state."""
        x = self.inputs(torch.cat([stoch, action], -1))
        reset, candidate, update = self.gates(torch.cat([x, deter], -1)).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter

    def observe(self, embeddings: Tensor, previous: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, T, F) and the logits of posterior and prior."""
        batch = len(first)
        start = torch.tanh(self.initial).expand(batch, -1)
        deter, stoch = start, embeddings.new_zeros(batch, self.groups * self.classes)
        features, posteriors, priors = [], [], []
        for t in range(first.shape[1]):
            keep = 1 - first[:, t, None].float()
            deter, stoch = keep * deter + (1 - keep) * start, keep * stoch
            deter = self.advance(deter, stoch, keep * previous[:, t])
            priors.append(self.prior(deter))
            posteriors.append(self.posterior(torch.cat([deter, embeddings[:, t]], -1)))
            stoch = self.distribution(posteriors[-1]).rsample().flatten(-2)
            features.append(torch.cat([deter, stoch], -1))
        return torch.stack(features, 1), torch.stack(posteriors, 1), torch.stack(priors, 1)

    def imagine(self, deter: Tensor, stoch: Tensor, actions: Tensor) -> Tensor:
        """Features (B, H, F), latents drawn."""
        features = []
        for k in range(actions.shape[1]):
            deter = self.advance(deter, stoch, actions[:, k])
            stoch = self.distribution(self.prior(deter)).sample().flatten(-2)
            features.append(torch.cat([deter, stoch], -1))
        return torch.stack(features, 1)


class PlainWorld(nn.Module):
    """The plain model between the same encoder, decoders and heads, which are ``other``'s own classes."""

    def __init__(self, other: WorldModel) -> None:
        super().__init__()
        made = WorldModel(other.config)
        self.config = other.config
        self.encoder, self.state, self.reward, self.continuation = (
            made.encoder,
            made.state,
            made.reward,
            made.continuation,
        )
        self.images = made.images
        self.rssm = PlainRSSM(other.config.rssm, other.config.action_dim, other.config.embed)

    def loss(self, batch: WorldBatch) -> Tensor:
        """The same losses."""
        features, posterior, prior = self.rssm.observe(self.encoder(batch.inputs), batch.previous, batch.first)
        total = torch.zeros(())
        for name in self.config.cameras:
            picture = self.images[name](features)
            total = total + (picture - batch.inputs.images[name]).square().sum((-3, -2, -1)).mean()
        if self.state is not None:
            total = total + (self.state(features) - batch.inputs.state).square().sum(-1).mean()
        head: Any = self.reward
        total = total + two_hot_loss(head.net(features), batch.rewards, head.bins).mean()
        logits = self.continuation(features)[..., 0]
        total = total + F.binary_cross_entropy_with_logits(logits, batch.continues)
        balance, of = self.config.kl, self.rssm.distribution
        dynamics = kl_divergence(of(posterior.detach()), of(prior)).clamp(min=balance.free_nats)
        representation = kl_divergence(of(posterior), of(prior.detach())).clamp(min=balance.free_nats)
        return total + (balance.dynamics * dynamics + balance.representation * representation).mean()
