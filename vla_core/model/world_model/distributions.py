"""What a world model's numbers are drawn from: latents with their KL divergence, and values as two-hot bins.

Hafner et al. 2023, "Mastering Diverse Domains through World Models" (DreamerV3); the Gaussian latent and KL balancing
are those of Hafner et al. 2019 and 2020 (PlaNet, DreamerV2).

Shapes: P parameters of a latent (what a network answers), Z entries of its sample, G groups of C classes, K bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one


def symlog(values: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): the identity near 0, a logarithm far from it."""
    return values.sign() * values.abs().log1p()


def symexp(values: Tensor) -> Tensor:
    """The inverse of :func:`symlog`."""
    return values.sign() * values.abs().expm1()


def two_hot(values: Tensor, bins: Tensor) -> Tensor:
    """Weights (..., K) on ``bins`` (K,), ascending, whose mean is ``values`` (...): at most two are not 0, neighbours.

    What lies beyond the bins gets the outermost one.
    """
    values = values.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, values.contiguous(), right=True).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    share = (values - low) / (high - low)
    weights = torch.zeros(*values.shape, len(bins), dtype=values.dtype, device=values.device)
    weights.scatter_(-1, (above - 1)[..., None], (1 - share)[..., None])
    weights.scatter_(-1, above[..., None], share[..., None])
    return weights


@dataclass(frozen=True, kw_only=True)
class TwoHotConfig:
    """``bins`` from symexp(-``reach``) to symexp(``reach``), equally spaced in symlog; an odd number has one at 0."""

    bins: int = 63
    reach: float = 10.0

    def __post_init__(self) -> None:
        if self.bins < 3 or self.bins % 2 == 0:
            raise ConfigError(f"bins: expected an odd number from 3 on, found {self.bins}")
        if not 0 < self.reach <= 80:
            raise ConfigError(f"reach: expected above 0 and at most 80, found {self.reach}")

    def places(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The bins (K,), antisymmetric bit for bit."""
        half = symexp(torch.linspace(0, self.reach, self.bins // 2 + 1, dtype=torch.float64))[1:]
        return torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half]).to(dtype)


def two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """The mean (...) of the categorical ``logits`` (..., K) over antisymmetric ``bins`` (K,).

    Bins are summed in pairs, so that a flat distribution has the mean 0 and not what large numbers leave when they
    cancel.
    """
    probabilities = logits.softmax(dim=-1)
    odd = probabilities - probabilities.flip(-1)
    middle = len(bins) // 2
    return (odd[..., middle:] * bins[middle:]).sum(dim=-1)


def two_hot_loss(logits: Tensor, values: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy (...) of ``logits`` (..., K) with the two-hot code of ``values`` (...)."""
    return -(two_hot(values, bins) * logits.log_softmax(dim=-1)).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class GaussianLatentConfig:
    """``size`` independent normal entries; the standard deviation is ``min_std`` + softplus, about 1 at the start."""

    type: Literal["gaussian"] = "gaussian"
    size: int = 32
    min_std: float = 0.1

    def __post_init__(self) -> None:
        at_least_one(self, "size")
        if not 0 < self.min_std < 1:
            raise ConfigError(f"min_std: expected between 0 and 1, found {self.min_std}")


@dataclass(frozen=True, kw_only=True)
class CategoricalLatentConfig:
    """``groups`` one-hot entries of ``classes``; ``unimix`` is the share of the uniform distribution in each."""

    type: Literal["categorical"] = "categorical"
    groups: int = 16
    classes: int = 16
    unimix: float = 0.01

    def __post_init__(self) -> None:
        at_least_one(self, "groups", "classes")
        if not 0 <= self.unimix < 1:
            raise ConfigError(f"unimix: expected 0 to below 1, found {self.unimix}")


class GaussianLatent:
    """A diagonal normal distribution; parameters are mean and raw standard deviation, P = 2 Z."""

    Config = GaussianLatentConfig

    def __init__(self, config: GaussianLatentConfig) -> None:
        self.config = config
        self.size, self.parameters = config.size, 2 * config.size
        self._shift = math.log(math.expm1(1.0 - config.min_std))

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (..., Z)."""
        mean, raw = parameters.chunk(2, dim=-1)
        return mean, F.softplus(raw + self._shift) + self.config.min_std

    def distribution(self, parameters: Tensor) -> Distribution:
        """The same in the terms of torch."""
        return Independent(Normal(*self.moments(parameters)), 1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(..., Z), differentiable in the parameters (the reparameterization trick)."""
        mean, std = self.moments(parameters)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + std * noise

    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely sample (..., Z)."""
        return self.moments(parameters)[0]

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) in nats, over all entries."""
        (mean_p, std_p), (mean_q, std_q) = self.moments(p), self.moments(q)
        ratio = std_p / std_q
        return (0.5 * (ratio.square() + ((mean_p - mean_q) / std_q).square() - 1) - ratio.log()).sum(dim=-1)


class CategoricalLatent:
    """Groups of one-hot vectors with straight-through gradients; parameters are logits, P = Z = G C."""

    Config = CategoricalLatentConfig

    def __init__(self, config: CategoricalLatentConfig) -> None:
        self.config = config
        self.size = self.parameters = config.groups * config.classes

    def probabilities(self, parameters: Tensor) -> Tensor:
        """(..., G, C), with the uniform share in them."""
        found = parameters.unflatten(-1, (self.config.groups, self.config.classes)).softmax(dim=-1)
        return (1 - self.config.unimix) * found + self.config.unimix / self.config.classes

    def distribution(self, parameters: Tensor) -> Distribution:
        """The same in the terms of torch."""
        return Independent(OneHotCategorical(probs=self.probabilities(parameters)), 1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(..., Z); the gradient is that of the probabilities (Bengio et al. 2013, straight through)."""
        probabilities = self.probabilities(parameters)
        # The smallest of independent exponential times p^-1 is class i with chance p_i: faster than multinomial.
        times = torch.empty_like(probabilities).exponential_(generator=generator)
        return self._one_hot((probabilities.detach() / times).argmax(dim=-1), probabilities)

    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely sample (..., Z)."""
        probabilities = self.probabilities(parameters)
        return self._one_hot(probabilities.argmax(dim=-1), probabilities)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) in nats, over all groups."""
        log_p, log_q = self._log(p), self._log(q)
        return (log_p.exp() * (log_p - log_q)).sum(dim=(-2, -1))

    def _log(self, parameters: Tensor) -> Tensor:
        if self.config.unimix == 0:
            return parameters.unflatten(-1, (self.config.groups, self.config.classes)).log_softmax(dim=-1)
        return self.probabilities(parameters).log()

    def _one_hot(self, chosen: Tensor, probabilities: Tensor) -> Tensor:
        hot = F.one_hot(chosen, self.config.classes).to(probabilities.dtype)
        if probabilities.requires_grad:
            hot = hot + probabilities - probabilities.detach()
        return hot.flatten(-2)


Latent = GaussianLatent | CategoricalLatent
LATENT_REGISTRY: dict[str, type[Any]] = {"gaussian": GaussianLatent, "categorical": CategoricalLatent}
LatentConfig = Annotated[Any, LATENT_REGISTRY]


def build_latent(config: Any) -> Latent:
    """The latent that is registered under ``config.type``."""
    if config.type not in LATENT_REGISTRY:
        raise VlaError(f"no latent {config.type!r} registered; choices: {choices(LATENT_REGISTRY)}")
    latent: Latent = LATENT_REGISTRY[config.type](config)
    return latent


@dataclass(frozen=True, kw_only=True)
class KLBalance:
    """How the KL divergence of posterior and prior is trained.

    ``dynamics``        weight of the term that moves the prior to the posterior
    ``representation``  weight of the term that moves the posterior to the prior
    ``free_nats``       below so many nats a tick neither is trained: what it costs to see the unforeseeable
    """

    dynamics: float = 1.0
    representation: float = 0.1
    free_nats: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dynamics", "representation", "free_nats"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected a number from 0 on, found {getattr(self, name)}")


def balanced_kl(latent: Latent, posterior: Tensor, prior: Tensor, balance: KLBalance) -> tuple[Tensor, Tensor]:
    """The loss (...) and the divergence itself (...), without gradient, of parameters (..., P).

    DreamerV3, eq. 5: each term is clipped from below at the free nats.
    """
    dynamics = latent.kl(posterior.detach(), prior)
    representation = latent.kl(posterior, prior.detach())
    loss = balance.dynamics * dynamics.clamp(min=balance.free_nats)
    loss = loss + balance.representation * representation.clamp(min=balance.free_nats)
    return loss, dynamics.detach()
