"""SmolVLA's numbers are LeRobot's, whatever is padded, masked, batched or guided; faster layers change none of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from test.core import published_smolvla as published
from test.core.published_smolvla import part, reference
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model import fast
from vla_core.model.action_head.draws import DrawLog, EachRow, GivenDraws, draw
from vla_core.model.action_head.guidance import ChunkPrefix, ChunkPrefixes, guidance_scale
from vla_core.model.graph import as_graph
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.smolvla import SmolVLA, SmolVLAConfig, SmolVLARecipe
from vla_core.model.vla.smolvla_config import FlowSampling
from vla_core.model.vla.smolvla_vision import PictureTokens
from vla_core.model.vlm.lora import LoRAConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(tmp_path_factory.mktemp("smolvla") / "policy")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> SmolVLARecipe:
    return SmolVLARecipe(pretrained=str(folder), horizon=6, image_size=64)


def build(recipe: SmolVLARecipe) -> SmolVLA:
    return SmolVLA(recipe.config(cameras=("front", "wrist"), state_dim=3, action_dim=4, vocab_size=257)).eval()


@pytest.fixture(scope="module")
def model(recipe: SmolVLARecipe) -> SmolVLA:
    return build(recipe)


@pytest.fixture(scope="module")
def inputs(recipe: SmolVLARecipe) -> ModelInputs:
    tokenizer = SmolVLA.tokenizer(recipe)
    found = published.inputs(tokenizer)
    assert torch.equal(found.tokens, reference()["found/tokens"])  # LeRobot's own, newline and padding included
    return found


def steps(model: SmolVLA, count: int) -> SmolVLA:
    head = dataclasses.replace(model.config.head, inference_steps=count)
    model._config = dataclasses.replace(model.config, head=head)
    return model


def row(inputs: ModelInputs, i: int) -> ModelInputs:
    return inputs.map(lambda tensor: tensor[i : i + 1])


NOISE = part("given/")["noise"]


@pytest.mark.parametrize("count", [10, 3])
def test_the_actions_are_lerobots(model: SmolVLA, inputs: ModelInputs, count: int) -> None:
    """16 layers, every second one attending to itself, two cameras of other sizes and one that is empty; two rows of
    different length, together and each by itself."""
    expected = reference()[f"found/normalized_{count}"]
    steps(model, count)
    assert expected.abs().mean() > 0.5
    torch.testing.assert_close(model.sample(inputs, NOISE)[..., :4], expected, atol=1e-4, rtol=0)
    for i in range(2):
        alone = model.sample(row(inputs, i), NOISE[i : i + 1])[..., :4]
        torch.testing.assert_close(alone, expected[i : i + 1], atol=1e-4, rtol=0)
    with as_graph():
        torch.testing.assert_close(model.sample(inputs, NOISE)[..., :4], expected, atol=1e-4, rtol=0)
    steps(model, 10)


def test_the_loss_is_lerobots(model: SmolVLA, inputs: ModelInputs) -> None:
    given = part("given/")
    target = F.pad(given["target"], (0, 28))
    known = torch.ones(2, 6, dtype=torch.bool)
    found = model.velocity_loss(inputs, target, known, given["loss_noise"], given["time"])
    assert found.item() == pytest.approx(reference()["found/loss"].item(), abs=1e-5)
    # Past the end of an episode LeRobot's loss goes on; here what stands there has no influence.
    known[1, 4:] = False
    target[1, 4:] = math.nan
    assert math.isfinite(model.loss(inputs, target[..., :4], known, torch.Generator().manual_seed(1)).item())


def test_the_times_of_training_are_those_of_the_paper(model: SmolVLA, inputs: ModelInputs,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """0.999 Beta(1.5, 1) + 0.001, against the distribution function."""
    seen: list[Tensor] = []
    monkeypatch.setattr(model, "velocity_loss", lambda i, a, m, noise, t: seen.append(t) or t.sum())
    many = inputs.map(lambda tensor: tensor[:1].expand(2000, *tensor.shape[1:]))
    model.loss(many, torch.zeros(2000, 6, 4), torch.ones(2000, 6, dtype=torch.bool), torch.Generator().manual_seed(0))
    times = (seen[0].sort().values - 0.001) / 0.999
    share = (torch.arange(2000) + 0.5) / 2000
    assert (times.clamp(0, 1) ** 1.5 - share).abs().max() < 0.04  # Kolmogorov and Smirnov, 0.1 %


def test_what_is_masked_has_no_part(model: SmolVLA, inputs: ModelInputs) -> None:
    """Whatever stands in an absent camera, state or word, alone and in a batch; a camera left out is one masked."""
    absent = dataclasses.replace(
        inputs, image_mask={**inputs.image_mask, "wrist": torch.tensor([False, True])},
        state_mask=torch.tensor([True, False]),
    )  # fmt: skip
    other = dataclasses.replace(
        absent, state=absent.state * torch.tensor([[1.0], [5.0]]),
        tokens=torch.where(absent.token_mask, absent.tokens, 7),
        images={**inputs.images, "wrist": inputs.images["wrist"] * torch.tensor([0.0, 1.0])[:, None, None, None]},
    )  # fmt: skip
    found = model.sample(absent, NOISE)
    torch.testing.assert_close(model.sample(other, NOISE), found, atol=1e-5, rtol=0)
    for i in range(2):
        torch.testing.assert_close(model.sample(row(other, i), NOISE[i : i + 1]), found[i : i + 1], atol=1e-4, rtol=0)
    assert (found - model.sample(inputs, NOISE)).abs().amax(dim=(1, 2)).min() > 1e-2
    nothing = dataclasses.replace(
        inputs, image_mask={name: torch.tensor([False, True]) for name in inputs.images},
        token_mask=inputs.token_mask & torch.tensor([[False], [True]]), state_mask=torch.tensor([False, True]),
    )  # fmt: skip
    for seen in (nothing, row(nothing, 0)):
        assert model.sample(seen, NOISE[: len(seen.tokens)]).isfinite().all()


def test_it_looks_and_listens(model: SmolVLA, inputs: ModelInputs) -> None:
    one = row(inputs, 0)
    found = model.sample(one, NOISE[:1])
    for name in inputs.images:
        black, white = (model.sample(dataclasses.replace(one, images={**one.images, name: fill(one.images[name])}),
                                     NOISE[:1]) for fill in (torch.zeros_like, torch.ones_like))  # fmt: skip
        assert (black - white).abs().max() > 1e-2
    said = dataclasses.replace(one, tokens=one.tokens.flip(1))
    assert (model.sample(said, NOISE[:1]) - found).abs().max() > 1e-2
    assert (model.sample(dataclasses.replace(one, state=one.state + 1), NOISE[:1]) - found).abs().max() > 1e-2


def test_a_prefix_is_continued(model: SmolVLA, inputs: ModelInputs) -> None:
    """The frozen rows are the plan's, weights of 0 change nothing, and a step is the paper's, written out."""
    plan = torch.linspace(-1, 1, 24).view(6, 4)
    weights = torch.tensor([1.0, 1.0, 0.6, 0.2, 0.0, 0.0])
    plain = model.predict(inputs, torch.Generator().manual_seed(3))
    prefix = ChunkPrefix(actions=plan, weights=weights, frozen=2, max_guidance=5.0)
    guided = model.predict(inputs, torch.Generator().manual_seed(3), prefix)
    assert torch.equal(guided[:, :2], plan[:2].expand(2, -1, -1))
    assert ((guided - plan)[:, 2] ** 2).sum() < ((plain - plan)[:, 2] ** 2).sum()
    free = dataclasses.replace(prefix, weights=torch.zeros(6), frozen=0)
    torch.testing.assert_close(model.predict(inputs, torch.Generator().manual_seed(3), free), plain, atol=1e-4, rtol=0)
    both = ChunkPrefixes((prefix, None))
    mixed = model.predict(inputs, torch.Generator().manual_seed(3), both)
    torch.testing.assert_close(mixed[0], guided[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-4, rtol=0)

    # One Euler step from t = 1 is the clean estimate x - v moved by noise * min(beta, …) times the pull.
    steps(model, 1)
    x = NOISE.clone().requires_grad_()
    clean = x - model._velocity(model._expert(model.remember(inputs), 6), x, model._time(torch.ones(1))[:, None])
    error = weights[:, None] * (F.pad(plan, (0, 28)) - clean)
    (pull,) = torch.autograd.grad(clean, x, error.detach())
    expected = (clean + guidance_scale(0.0, 1.0, 5.0) * pull).detach()
    found = model.sample(inputs, NOISE, dataclasses.replace(prefix, frozen=0))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    steps(model, 10)


def test_noise_is_drawn_once_and_by_row(model: SmolVLA, inputs: ModelInputs) -> None:
    log = DrawLog()
    model.predict(inputs, log.manual_seed(5))
    assert [each.shape for each in log.draws] == [(2, 6, 32)]
    given = draw(log.draws, torch.Generator().manual_seed(5))
    expected = model.predict(inputs, torch.Generator().manual_seed(5))
    assert torch.equal(model.predict(inputs, GivenDraws(given)), expected)
    rows = model.predict(inputs, EachRow([torch.Generator().manual_seed(i) for i in (8, 9)]))
    alone = model.predict(row(inputs, 1), torch.Generator().manual_seed(9))
    torch.testing.assert_close(rows[1:], alone, atol=1e-4, rtol=0)


def test_pictures_are_fitted_from_the_bottom_right() -> None:
    """Padded above and left with black, which is -1; a picture of the right size is scaled alone."""
    fit = PictureTokens(8).fit
    picture = torch.rand(1, 3, 2, 4)
    found = fit(picture)
    assert torch.equal(found[..., :4, :], torch.full((1, 3, 4, 8), -1.0))
    expected = F.interpolate(picture, size=(4, 8), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(found[..., 4:, :], expected)
    whole = torch.rand(1, 3, 8, 8)
    assert torch.equal(fit(whole), whole * 2 - 1)
    with pytest.raises(VlaError, match=r"found \(3, 8, 8\), expected \(B, 3, height, width\)"):
        fit(whole[0])


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_fast_layers_give_torchs_numbers(activation: fast.Activation) -> None:
    layer, x = nn.Linear(24, 40, bias=activation != "silu"), torch.randn(2, 5, 24)
    with torch.no_grad():
        found = fast.linear(layer, x, activation)
        plain = layer(x)
        query, key, value = torch.randn(3, 4, 6, 8)
        attended = fast.attention(query, key, value)
    expected = {"none": plain, "gelu": F.gelu(plain, approximate="tanh"), "silu": F.silu(plain)}[activation]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)
    assert fast.linear(layer, x, activation).requires_grad  # where something is differentiated, torch's own


@pytest.mark.parametrize("trained", ["expert", "all", "lora"])
def test_what_is_trained(recipe: SmolVLARecipe, inputs: ModelInputs, trained: str) -> None:
    """Gradients arrive at all that is trained and at nothing else; adapters start without effect and merge."""
    model = build(dataclasses.replace(recipe, trained=trained, lora=LoRAConfig(r=2, alpha=4)))
    expected = reference()["found/normalized_10"]
    torch.testing.assert_close(model.sample(inputs, NOISE)[..., :4], expected, atol=1e-4, rtol=0)
    if trained == "lora":
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.05)
    model.train()
    known = torch.ones(2, 6, dtype=torch.bool)
    model.loss(inputs, torch.zeros(2, 6, 4), known, torch.Generator().manual_seed(0)).backward()
    names = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
    places = {"vision_model", "connector", "text_model", "lm_expert", "state_proj", "action_in_proj"}
    reached = {place for place in places if any(place in name for name in names)}
    left = {"expert": {"vision_model", "connector", "text_model"}, "all": {"vision_model"},
            "lora": {"vision_model", "connector"}}[trained]  # fmt: skip
    assert reached == places - left
    if trained == "lora":
        adapted = model.eval().sample(inputs, NOISE)
        again = SmolVLA(from_dict(SmolVLAConfig, to_dict(model.config)))
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again.eval().sample(inputs, NOISE), adapted, atol=1e-5, rtol=0)
        model.merge_lora()
        assert not any("lora" in name for name in model.state_dict())
        torch.testing.assert_close(model.sample(inputs, NOISE), adapted, atol=1e-4, rtol=0)
        assert (adapted[..., :4] - expected).abs().max() > 1e-3


def test_a_frozen_language_model_trains_the_state_as_an_open_one(recipe: SmolVLARecipe, inputs: ModelInputs) -> None:
    """The gradient of the state's projection, which passes the frozen layers, and that with recomputed activations."""
    known, gradients = torch.ones(2, 6, dtype=torch.bool), []
    for trained, recompute in (("expert", False), ("all", False), ("expert", True)):
        model = build(dataclasses.replace(recipe, trained=trained)).train()
        if recompute:
            model.enable_gradient_checkpointing()
        model.loss(inputs, torch.zeros(2, 6, 4), known, torch.Generator().manual_seed(0)).backward()
        gradients.append(model.state_proj.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-4)


def test_no_more_layers_than_needed_are_computed(model: SmolVLA, inputs: ModelInputs,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The prefix once for a chunk, however many Euler steps; an absent camera not at all."""
    calls: list[int] = []
    encode = PictureTokens._encode
    monkeypatch.setattr(PictureTokens, "_encode", lambda self, m, x: calls.append(len(x)) or encode(self, m, x))
    one = row(inputs, 0)
    model.sample(one, NOISE[:1])
    absent = dataclasses.replace(one, image_mask={**one.image_mask, "wrist": torch.tensor([False])})
    model.sample(absent, NOISE[:1])
    assert calls == [2, 1]


def test_what_does_not_fit_is_named(recipe: SmolVLARecipe, model: SmolVLA, inputs: ModelInputs) -> None:
    long = dataclasses.replace(inputs, tokens=torch.ones(2, 49, dtype=torch.int64), token_mask=None)
    with pytest.raises(VlaError, match="found 49 tokens, the policy reads at most 48"):
        model.sample(long, NOISE)
    with pytest.raises(VlaError, match="lack the camera 'wrist' or its mask; cameras given: front"):
        model.sample(dataclasses.replace(inputs, images={"front": inputs.images["front"]}), NOISE)
    for changes, message in (
        ({"layers": 15}, r"model.layers: found 15, but 16 in .*policy, whose weights are asked for"),
        ({"image_size": 512}, "model.image_size: found 512, but 64"),
        ({"max_action_dim": 16}, "model.max_action_dim: found 16, but 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(dataclasses.replace(recipe, **changes))
    for changes, message in (
        ({"expert_layers": 3}, "expert_layers: expected null or a divisor of layers"),
        ({"expert_layers": 8}, "expert_layers: found 8 for 16 layers: LeRobot does not run those"),
        ({"expert_width": 1.5}, "expert_width: expected more than 0"),
        ({"architecture": {"scale_factor": 2}}, "architecture: comes with the pretrained weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(recipe, **changes)
    with pytest.raises(ConfigError, match=r"action_dim: expected 1 to max_action_dim \(32\), found 33"):
        recipe.config(cameras=("front",), state_dim=3, action_dim=33, vocab_size=257)
    with pytest.raises(ConfigError, match="inference_steps: expected at least 1"):
        FlowSampling(inference_steps=0)
    with pytest.raises(VlaError, match="tokenizer: has 300 ids, the model 260"):
        SmolVLA(recipe.config(cameras=("front",), state_dim=3, action_dim=4, vocab_size=300))
