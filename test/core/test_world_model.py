"""The world model: distributions against closed forms and torch's, the RSSM against a plain loop, learning, folders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from test.core.helpers import CONTRACT
from vla_core.checkpoint import CheckpointError
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.sensor import IMUConfig
from vla_core.model.vlm import TinyCNNEncoderConfig
from vla_core.model.world_model import (
    RSSM,
    CategoricalLatentConfig,
    GaussianLatentConfig,
    KLBalance,
    RSSMConfig,
    State,
    TwoHotConfig,
    WorldBatch,
    WorldModel,
    WorldModelConfig,
    WorldModelRecipe,
)
from vla_core.model.world_model.distributions import (
    balanced_kl,
    build_latent,
    symexp,
    symlog,
    two_hot,
    two_hot_loss,
    two_hot_mean,
)
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.world_checkpoint import WorldCheckpoint, WorldConfig, world_normalizer, world_sizes

LATENTS = [GaussianLatentConfig(size=5), CategoricalLatentConfig(groups=3, classes=4)]
A, E = 2, 6


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Matrices of a few columns are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def rssm(latent: Any) -> RSSM:
    model = RSSM(RSSMConfig(deter=8, hidden=10, latent=latent), action_dim=A, embed_dim=E)
    torch.nn.init.normal_(model.initial_deter)  # what training makes of it
    return model


# -- symlog and two-hot ------------------------------------------------------------------------------------------------


@given(st.floats(-1e4, 1e4, width=32))
def test_symlog_and_its_inverse(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float64)
    assert float(symlog(value)) == pytest.approx(math.copysign(math.log(1 + abs(x)), x))
    assert float(symexp(symlog(value))) == pytest.approx(x, rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(-2e4, 2e4, width=32), min_size=1, max_size=5))
def test_a_two_hot_code_has_two_neighbours_whose_mean_is_the_value(values: list[float]) -> None:
    bins = TwoHotConfig(bins=31, reach=10.0).places(torch.float64)
    code = two_hot(torch.tensor(values, dtype=torch.float64), bins)
    for row, value in zip(code, values, strict=True):
        used = torch.nonzero(row).flatten().tolist()
        assert len(used) <= 2 and float(row.sum()) == pytest.approx(1) and bool((row >= 0).all())
        assert len(used) == 1 or used[1] == used[0] + 1
        assert float((row * bins).sum()) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_a_value_beyond_the_bins_gets_the_outermost_one() -> None:
    bins = TwoHotConfig(bins=5, reach=1.0).places()
    assert two_hot(torch.tensor([1e6, -1e6]), bins).tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]


def test_the_mean_of_a_flat_distribution_is_zero_and_that_of_a_two_hot_code_the_value() -> None:
    bins = TwoHotConfig(bins=63, reach=15.0).places()
    assert float(two_hot_mean(torch.full((63,), 0.7), bins)) == 0.0
    values = torch.tensor([-1000.0, -1.5, 0.0, 0.3, 27.0, 4000.0])
    logits = two_hot(values, bins).log()  # -inf where the code is 0
    torch.testing.assert_close(two_hot_mean(logits, bins), values, rtol=1e-4, atol=1e-4)


def test_the_two_hot_loss_is_the_cross_entropy_of_torch_with_soft_labels_and_least_at_the_code_itself() -> None:
    bins = TwoHotConfig(bins=9, reach=3.0).places()
    logits, values = torch.randn(4, 9), torch.tensor([-2.0, 0.1, 0.0, 5.0])
    expected = torch.nn.functional.cross_entropy(logits, two_hot(values, bins), reduction="none")
    torch.testing.assert_close(two_hot_loss(logits, values, bins), expected)
    best = two_hot_loss(two_hot(values, bins).clamp(min=1e-12).log(), values, bins)
    assert bool((best <= expected).all())


# -- latents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", LATENTS)
def test_the_kl_divergence_is_torchs(config: Any) -> None:
    latent = build_latent(config)
    p, q = torch.randn(7, latent.parameters), torch.randn(7, latent.parameters)
    expected = kl_divergence(latent.distribution(p), latent.distribution(q))
    torch.testing.assert_close(latent.kl(p, q), expected)
    torch.testing.assert_close(latent.kl(p, p), torch.zeros(7), atol=1e-6, rtol=0)


def test_the_kl_of_one_gaussian_entry_is_the_closed_form() -> None:
    latent = build_latent(GaussianLatentConfig(size=1, min_std=0.1))
    p, q = torch.tensor([[0.3, 0.5]]), torch.tensor([[-1.0, 2.0]])
    (m1, s1), (m2, s2) = ((float(x) for x in latent.moments(v)) for v in (p, q))
    expected = math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    assert float(latent.kl(p, q)) == pytest.approx(expected, rel=1e-5)


def test_a_fresh_gaussian_has_unit_deviation_and_a_categorical_its_uniform_share() -> None:
    gaussian = build_latent(GaussianLatentConfig(size=3, min_std=0.1))
    torch.testing.assert_close(gaussian.moments(torch.zeros(6))[1], torch.ones(3))
    categorical = build_latent(CategoricalLatentConfig(groups=1, classes=4, unimix=0.04))
    sure = categorical.probabilities(torch.tensor([100.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(sure[0], torch.tensor([0.97, 0.01, 0.01, 0.01]))


@pytest.mark.parametrize("config", LATENTS)
def test_samples_follow_the_distribution_and_repeat_with_their_generator(config: Any) -> None:
    latent = build_latent(config)
    parameters = torch.randn(latent.parameters).expand(20_000, -1)
    drawn = latent.sample(parameters, torch.Generator().manual_seed(3))
    mean = latent.distribution(parameters[0]).mean.flatten()
    torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.03, rtol=0)
    assert torch.equal(drawn, latent.sample(parameters, torch.Generator().manual_seed(3)))


def test_the_gradient_of_a_categorical_sample_is_that_of_its_probabilities() -> None:
    latent = build_latent(CategoricalLatentConfig(groups=2, classes=3))
    logits = torch.randn(6, requires_grad=True)
    weights = torch.randn(6)
    sample = latent.sample(logits, torch.Generator().manual_seed(0))
    assert sorted(set(sample.detach().round(decimals=5).tolist())) == [0.0, 1.0]
    (straight,) = torch.autograd.grad((sample * weights).sum(), logits)
    (expected,) = torch.autograd.grad((latent.probabilities(logits).flatten() * weights).sum(), logits)
    torch.testing.assert_close(straight, expected)


def test_balanced_kl_weighs_two_terms_and_stops_at_the_free_nats() -> None:
    latent = build_latent(GaussianLatentConfig(size=2))
    p = torch.randn(3, 4, requires_grad=True)
    q = torch.randn(3, 4, requires_grad=True)
    loss, seen = balanced_kl(latent, p, q, KLBalance(dynamics=0.8, representation=0.2, free_nats=0.0))
    torch.testing.assert_close(loss, seen)  # the weights sum to 1, and both terms have the same value
    from_p, from_q = torch.autograd.grad(loss.sum(), (p, q))
    plain_p, plain_q = torch.autograd.grad(latent.kl(p, q).sum(), (p, q))
    torch.testing.assert_close(from_p, 0.2 * plain_p)
    torch.testing.assert_close(from_q, 0.8 * plain_q)
    loss, _ = balanced_kl(latent, p, q, KLBalance(dynamics=1.0, representation=0.1, free_nats=1e3))
    torch.testing.assert_close(loss, torch.full((3,), 1100.0))
    assert all(not bool(g.any()) for g in torch.autograd.grad(loss.sum(), (p, q)))


# -- the recurrent model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_step(model: RSSM, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """One step in the words of the paper, row by row: the new state and the prior's parameters."""
    deters, priors = [], []
    for h, z, a in zip(deter, stoch, action, strict=True):
        x = model.from_stoch.weight @ z + model.from_action.weight @ a
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * model.input_norm.weight + model.input_norm.bias
        x = x * torch.sigmoid(x)
        g = model.cell.gates.weight @ torch.cat([x, h])
        g = (g - g.mean()) / (g.var(correction=0) + 1e-5).sqrt() * model.cell.norm.weight + model.cell.norm.bias
        reset, candidate, update = g.split(len(h))
        u = 1 / (1 + torch.exp(1 - update))
        new = u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h
        deters.append(new)
        priors.append(model.prior(new))
    return torch.stack(deters), torch.stack(priors)


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_imagination_is_the_plain_recursion(latent: Any) -> None:
    model = rssm(latent)
    start, actions = model.initial(3), torch.randn(3, 5, A)
    found = model.imagine(start, actions, sample=False)
    deter, stoch = start.deter, start.stoch
    for k in range(5):
        deter, parameters = plain_step(model, deter, stoch, actions[:, k])
        stoch = model.latent.mode(parameters)
        torch.testing.assert_close(found.deter[:, k], deter, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.parameters[:, k], parameters, atol=1e-5, rtol=1e-4)
    stepped = start
    for k in range(5):
        stepped = model.step(stepped, actions[:, k], sample=False)
    torch.testing.assert_close(found.map(lambda x: x[:, -1]), stepped)


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_imagining_from_a_posterior_is_observing_step_by_step_where_the_latent_is_determined(latent: Any) -> None:
    """A posterior that looks at nothing but the deterministic state, with the prior's weights, is the prior."""
    model = rssm(latent)
    model.posterior_embed.weight.zero_()
    model.posterior_deter.weight.copy_(model.prior[0].weight)
    model.posterior.load_state_dict({f"{k - 1}.{n}": p for k in (1, 3) for n, p in model.prior[k].state_dict().items()})
    embeddings, actions = torch.randn(4, 9, E), torch.randn(4, 9, A)
    first = torch.zeros(4, 9, dtype=torch.bool)
    first[:, 0] = True
    observed = model.observe(embeddings, actions, first, sample=False)
    begin = observed.states.map(lambda x: x[:, 2])
    torch.testing.assert_close(
        model.imagine(begin, actions[:, 3:], sample=False), observed.states.map(lambda x: x[:, 3:]),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_a_mask_of_beginnings_is_as_good_as_episodes_apart(latent: Any) -> None:
    model = rssm(latent)
    embeddings, actions = torch.randn(1, 7, E), torch.randn(1, 7, A)
    first = torch.tensor([[True, False, False, True, False, False, False]])
    joined = model.observe(embeddings, actions, first, sample=False)
    for begin, end in ((0, 3), (3, 7)):
        alone = model.observe(embeddings[:, begin:end], actions[:, begin:end], first[:, begin:end], sample=False)
        torch.testing.assert_close(joined.states.map(lambda x, b=begin, e=end: x[:, b:e]), alone.states)
        torch.testing.assert_close(joined.prior[:, begin:end], alone.prior)
    # The action before a beginning is of no account, whatever stands there.
    actions[:, 3] = 1e6
    torch.testing.assert_close(model.observe(embeddings, actions, first, sample=False), joined)


@torch.no_grad()
def test_rows_of_a_batch_begin_when_they_do_and_a_state_is_carried_on() -> None:
    model = rssm(LATENTS[1])
    embeddings, actions = torch.randn(3, 6, E), torch.randn(3, 6, A)
    first = torch.zeros(3, 6, dtype=torch.bool)
    first[:, 0], first[1, 2] = True, True
    whole = model.observe(embeddings, actions, first, sample=False)
    for row in range(3):
        alone = model.observe(embeddings[[row]], actions[[row]], first[[row]], sample=False).states
        torch.testing.assert_close(whole.states.map(lambda x, r=row: x[[r]]), alone)
    half = model.observe(embeddings[:, :3], actions[:, :3], first[:, :3], sample=False).states.map(lambda x: x[:, -1])
    rest = model.observe(embeddings[:, 3:], actions[:, 3:], first[:, 3:], half, sample=False)
    torch.testing.assert_close(rest.states, whole.states.map(lambda x: x[:, 3:]))
    one = model.update(half, actions[:, 3], embeddings[:, 3], sample=False)
    torch.testing.assert_close(one.states, whole.states.map(lambda x: x[:, 3]))


def test_the_prior_is_trained_by_what_was_seen_and_shapes_are_checked() -> None:
    model = rssm(LATENTS[0])
    first = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(VlaError, match=r"embeddings \(2, 3, 5\)"):
        model.observe(torch.randn(2, 3, 5), torch.randn(2, 3, A), first)
    found = model.observe(torch.randn(2, 3, E), torch.randn(2, 3, A), first)
    model.latent.kl(found.states.parameters.detach()[:, :1], found.prior[:, :1]).sum().backward()
    # The first tick's prior knows nothing of what is seen then.
    assert bool(model.prior[0].weight.grad.any()) and not bool(model.posterior_embed.weight.grad.any())


def test_a_row_repeated_is_that_many_rows() -> None:
    state = State(torch.arange(6.0).reshape(2, 3), torch.zeros(2, 1), torch.zeros(2, 1))
    assert state.repeat(2).deter.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert state.features.shape == (2, 4)


# -- the whole model ---------------------------------------------------------------------------------------------------


def config(**changes: Any) -> WorldModelConfig:
    recipe = WorldModelRecipe(
        rssm=RSSMConfig(deter=16, hidden=16, latent=LATENTS[1]), embed=16, hidden=16, channels=(8, 8),
        vision=TinyCNNEncoderConfig(image_size=8, output_dim=8, channels=(8,)), **changes,
    )  # fmt: skip
    return recipe.config(cameras=("front.left",), state_dim=3, action_dim=A)


def batch(rows: int, ticks: int) -> WorldBatch:
    there = torch.ones(rows, ticks, dtype=torch.bool)
    first = torch.zeros(rows, ticks, dtype=torch.bool)
    first[:, 0] = True
    inputs = ModelInputs(
        images={"front.left": torch.rand(rows, ticks, 3, 8, 8)}, state=torch.randn(rows, ticks, 3),
        tokens=torch.zeros(rows, ticks, 1, dtype=torch.int64), image_mask={"front.left": there.clone()},
        state_mask=there.clone(),
    )  # fmt: skip
    return WorldBatch(inputs, torch.randn(rows, ticks, A), torch.randn(rows, ticks), torch.ones(rows, ticks), first,
                      there.clone())  # fmt: skip


def test_the_loss_trains_every_parameter_and_is_the_sum_of_its_parts() -> None:
    model, given_batch = WorldModel(config()), batch(3, 4)
    given_batch.inputs.image_mask["front.left"][0, 0] = False
    given_batch.inputs.state_mask[1, 1] = False
    loss, parts = model.loss(given_batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    expected = sum(float(value) for name, value in parts.items() if name != "kl")
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(parts) == {"image/front.left", "state", "reward", "continue", "kl_loss", "kl"}


def test_what_is_padding_or_missing_has_no_influence() -> None:
    model, whole = WorldModel(config()).eval(), batch(2, 5)
    whole.mask[1, 3:] = False
    whole.inputs.image_mask["front.left"][0, 2] = False
    whole.inputs.state_mask[0, 1] = False
    before, _ = model.loss(whole, torch.Generator().manual_seed(0))
    whole.inputs.images["front.left"][1, 3:] = 0.123
    whole.inputs.images["front.left"][0, 2] = 0.9
    whole.inputs.state[0, 1] = 77.0
    whole.rewards[1, 3:], whole.continues[1, 3:] = 1e3, 0.0
    after, _ = model.loss(whole, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_shapes_of_what_others_use() -> None:
    model, seen = WorldModel(config()).eval(), batch(2, 5)
    observed = model.observe(seen.inputs, seen.previous, seen.first, sample=False)
    assert model.divergence(observed).shape == (2, 5) and bool((model.divergence(observed) >= 0).all())
    one = model.encode(seen.inputs.map(lambda x: x[:, 0]))
    torch.testing.assert_close(one, observed.states.map(lambda x: x[:, 0]))
    two = model.encode(seen.inputs.map(lambda x: x[:, 1]), seen.previous[:, 1], one)
    torch.testing.assert_close(two, observed.states.map(lambda x: x[:, 1]))
    ahead = model.imagine(two, torch.randn(2, 7, A), generator=torch.Generator().manual_seed(1))
    assert model.predict_rewards(ahead).shape == model.predict_continues(ahead).shape == (2, 7)
    assert float(model.predict_rewards(ahead).abs().max()) == 0.0  # the head begins at 0
    decoded = model.decode(ahead)
    assert decoded.images["front.left"].shape == (2, 7, 3, 8, 8) and decoded.state.shape == (2, 7, 3)


def test_another_sensor_is_seen_by_its_own_encoder() -> None:
    recipe = WorldModelRecipe(embed=16, hidden=16, sensors={"imu": IMUConfig()}, rssm=RSSMConfig(deter=8, hidden=8))
    sizes: dict[str, Any] = {
        "state_dim": 2,
        "action_dim": A,
        "sequences": {"imu": ("wx", "wy", "wz", "ax", "ay", "az")},
    }
    model = WorldModel(recipe.config(**sizes)).eval()
    there = torch.ones(2, 3, dtype=torch.bool)
    window = Masked(torch.randn(2, 3, 5, 6), torch.ones(2, 3, 5, dtype=torch.bool))
    inputs = ModelInputs(images={}, state=torch.randn(2, 3, 2), tokens=torch.zeros(2, 3, 1, dtype=torch.int64),
                         image_mask={}, state_mask=there, sequences={"imu": window})  # fmt: skip
    with torch.no_grad():
        seen = model.embed(inputs)
        moved = model.embed(dataclasses.replace(inputs, sequences={"imu": Masked(window.values + 1, window.mask)}))
        none = Masked(window.values, torch.zeros_like(window.mask))
        blind = model.embed(dataclasses.replace(inputs, sequences={"imu": none}))
        still = model.embed(dataclasses.replace(inputs, sequences={"imu": Masked(none.values * 9, none.mask)}))
    assert seen.shape == (2, 3, 16) and not torch.allclose(seen, moved)
    torch.testing.assert_close(blind, still)
    with pytest.raises(ConfigError, match="sensors: encoders for imu, but the observation has lidar"):
        recipe.config(state_dim=2, action_dim=A, clouds={"lidar": ("x", "y", "z")})


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"channels: 2 layers need pictures whose sides are multiples of 4"):
        WorldModelRecipe(channels=(8, 8), vision=TinyCNNEncoderConfig(image_size=10)).config(
            cameras=("a",), state_dim=0, action_dim=1
        )
    with pytest.raises(ConfigError, match="nothing to see"):
        WorldModelRecipe().config(state_dim=0, action_dim=1)
    with pytest.raises(ConfigError, match="bins: expected an odd number"):
        TwoHotConfig(bins=4)
    with pytest.raises(ConfigError, match=r"rssm.latent.type: found 'beta', expected one of categorical, gaussian"):
        from_dict(WorldModelRecipe, {"rssm": {"latent": {"type": "beta"}}})
    assert from_dict(WorldModelConfig, to_dict(config())) == config()


@pytest.mark.parametrize("latent", [GaussianLatentConfig(size=4), CategoricalLatentConfig(groups=4, classes=8)])
def test_the_model_learns_a_toy_world_to_nearly_no_error(latent: Any) -> None:
    """Six places on a ring, steps of -1, 0 or 1, a reward at one of them; imagined eight ticks ahead from four seen."""
    recipe = WorldModelRecipe(rssm=RSSMConfig(deter=32, hidden=32, latent=latent), embed=32, hidden=32, layers=1,
                              reward=TwoHotConfig(bins=21, reach=2.0), state_scale=30.0)  # fmt: skip
    model, rng, steps, rate = WorldModel(recipe.config(state_dim=2, action_dim=1)), np.random.default_rng(0), 250, 1e-2

    def draw(rows: int, ticks: int) -> WorldBatch:
        moves = rng.integers(-1, 2, (rows, ticks))
        moves[:, 0] = 0
        place = (rng.integers(0, 6, (rows, 1)) + moves.cumsum(axis=1)) % 6
        angle = torch.from_numpy(place * np.pi / 3).float()
        there, first = torch.ones(rows, ticks, dtype=torch.bool), torch.zeros(rows, ticks, dtype=torch.bool)
        first[:, 0] = True
        inputs = ModelInputs(images={}, state=torch.stack([angle.cos(), angle.sin()], dim=-1), image_mask={},
                             tokens=torch.zeros(rows, ticks, 1, dtype=torch.int64), state_mask=there)  # fmt: skip
        return WorldBatch(inputs, torch.from_numpy(moves).float()[..., None], torch.from_numpy(place == 0).float(),
                          torch.ones(rows, ticks), first, there)  # fmt: skip

    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss, _ = model.loss(draw(16, 8), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    test, seen = draw(64, 12), 4
    with torch.no_grad():
        inputs = test.inputs.map(lambda x: x[:, :seen])
        states = model.observe(inputs, test.previous[:, :seen], test.first[:, :seen], sample=False).states
        ahead = model.imagine(states.map(lambda x: x[:, -1]), test.previous[:, seen:], sample=False)
        error = float((model.decode(ahead).state - test.inputs.state[:, seen:]).square().mean())
        kept = float((test.inputs.state[:, seen - 1 : seen] - test.inputs.state[:, seen:]).square().mean())
        rewards = float((model.predict_rewards(ahead) - test.rewards[:, seen:]).abs().mean())
    assert error < 0.03 * kept, (error, kept)
    assert rewards < 0.02, rewards


# -- the folder --------------------------------------------------------------------------------------------------------

STATISTICS = {name: {"min": [-1.0, -2.0], "max": [1.0, 2.0], "mean": [0.0, 0.1], "std": [0.5, 1.0], "q01": [-1.0, -2.0],
                     "q99": [1.0, 2.0], "count": [9.0]} for name in ("state", "action")}  # fmt: skip


def world() -> WorldCheckpoint:
    spec = ObservationSpec(state=("arm",))
    recipe = WorldModelRecipe(rssm=RSSMConfig(deter=8, hidden=8, latent=LATENTS[1]), embed=8, hidden=8)
    made = WorldConfig(model=recipe.config(**world_sizes(spec, CONTRACT)), observation=spec,
                       normalization=Normalization(action="min_max"), surprise=(1.5, 2.5))  # fmt: skip
    return WorldCheckpoint(config=made, model=WorldModel(made.model).eval(), contract=CONTRACT,
                           normalizer=world_normalizer(made, STATISTICS, CONTRACT))  # fmt: skip


def test_a_folder_gives_the_same_model_back(tmp_path: Any) -> None:
    made = world()
    made.save(tmp_path / "world")
    found = WorldCheckpoint.load(tmp_path / "world")
    assert found.config == made.config and found.contract == CONTRACT
    actions = torch.randn(3, 4, A)
    with torch.no_grad():
        torch.testing.assert_close(found.model.imagine(found.model.initial(3), actions, sample=False),
                                   made.model.imagine(made.model.initial(3), actions, sample=False),
                                   rtol=0, atol=0)  # fmt: skip
    found.save(tmp_path / "world")  # an older one is replaced
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="exists and is no world model"):
        made.save(tmp_path / "other")


def test_a_damaged_folder_is_refused_with_what_is_wrong(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"not a world model: config.json, .* missing; found: no such folder"):
        WorldCheckpoint.load(tmp_path / "nothing")
    world().save(tmp_path / "world")
    file = tmp_path / "world" / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"deter": 8', '"deter": 9'))
    with pytest.raises(CheckpointError, match=r"weights do not fit config.json.*rssm"):
        WorldCheckpoint.load(tmp_path / "world")
    file.write_text(text.replace('"action_dim": 2', '"action_dim": 3'))
    with pytest.raises(CheckpointError, match=r"model.action_dim is 3, but 2 by the observation and the contract"):
        WorldCheckpoint.load(tmp_path / "world")
    file.write_text(text.replace("vla_ros_world_v1", "vla_ros_checkpoint_v1"))
    with pytest.raises(CheckpointError, match="has format 'vla_ros_checkpoint_v1'"):
        WorldCheckpoint.load(tmp_path / "world")


def test_what_a_world_model_cannot_see_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave instruction, history and calibrations out"):
        world_sizes(ObservationSpec(state=("arm",), instruction="task"), CONTRACT)
