"""VLAModel: learns, comes back from its config, sees what is there and nothing else, and keeps its instruction."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.inputs import ModelInputs
from vla_core.model.tokens import masked_mean
from vla_core.model.vla import MODEL_REGISTRY, MiniVLA, MiniVLAConfig, VLAModel, VLARecipe, build_model
from vla_core.model.vlm import AttentionPoolingConfig, MLPProjectorConfig, PerceiverConfig, TinyGRUConfig
from vla_core.model.vlm.vision_encoder import TinyCNNConfig

from .whole_models import HORIZON, LLM, chunk, chunk_of, fake, vla_config
from .whole_models import one_thread as one_thread

PROJECTORS = {
    "mlp": MLPProjectorConfig(),
    "attention_pooling": AttentionPoolingConfig(num_queries=2, num_heads=2),
    "perceiver": PerceiverConfig(num_latents=2, num_layers=1, num_heads=2),
}
HEADS = sorted(ACTION_HEAD_REGISTRY)


def again(model: VLAModel) -> VLAModel:
    """The model that a checkpoint would give: the config as plain data, the weights by name."""
    tag = model.config.type
    config = from_dict(MODEL_REGISTRY[tag].Config, to_dict(model.config))
    assert config == model.config
    built: VLAModel = build_model(config)
    built.load_state_dict(model.state_dict(), strict=True)
    return built.eval()


def train(model: VLAModel, inputs: ModelInputs, steps: int = 60) -> list[float]:
    actions, mask = chunk(model.config, len(inputs.tokens))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    model.train()
    for step in range(steps):
        loss = model.loss(inputs, actions, mask, torch.Generator().manual_seed(step % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_head_and_projector_learns_one_batch_and_comes_back(head: str, projector: str) -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(projector=PROJECTORS[projector], head=ACTION_HEAD_REGISTRY[head].Config()))
    inputs = fake(model.config)
    losses = train(model, inputs)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert torch.equal(chunk_of(again(model), inputs), chunk_of(model, inputs))


@pytest.mark.parametrize("context", ["readout", "all"])
def test_a_language_model_of_transformers_learns_with_adapters_and_comes_back(context: str) -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(language=LLM, context=context))
    model.enable_lora(r=2, alpha=4)
    model.enable_gradient_checkpointing()
    model.freeze("vision")
    inputs = fake(model.config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model, inputs)
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora" in name for name in moved)
    assert not [n for n in moved if n.startswith("vision.") or (n.startswith("language.") and "lora" not in n)]
    assert model.config.language.lora.r == 2 and model.config.language.gradient_checkpointing
    back = again(model)
    assert torch.equal(chunk_of(back, inputs), chunk_of(model, inputs))
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, back)]
    assert trainable[0] == trainable[1] and not any(n.startswith("vision.") for n in trainable[1])


def test_adapters_thaw_what_was_frozen_and_a_frozen_language_model_still_recomputes() -> None:
    model = VLAModel(vla_config(language=LLM))
    for part in ("language", "head"):
        model.freeze(part)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith(("language.", "head.")))
    model.train()
    assert model.language.training and not model.head.training
    model.enable_lora(r=2, alpha=4)
    assert model.config.frozen == ("head",)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again(model).named_parameters() if p.requires_grad} == expected
    assert any("lora" in n for n in expected)


def test_a_frozen_language_model_reads_an_instruction_once_in_training() -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(language=LLM, frozen=("language",))).train()
    inputs = fake(model.config)
    actions, mask = chunk(model.config, len(inputs.tokens))
    model.loss(inputs, actions, mask).backward()
    looked_up = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert 0 < model.prefix_table.computed <= len(inputs.tokens)
    model.zero_grad()
    model.language.config = dataclasses.replace(model.language.config, gradient_checkpointing=True)  # computes anew
    assert not model.language.repeats
    model.loss(inputs, actions, mask).backward()
    anew = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert looked_up.keys() == anew.keys() and not any(name.startswith("language.") for name in anew)
    for name, gradient in anew.items():
        torch.testing.assert_close(looked_up[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_without_cameras_there_is_no_vision_to_build_or_to_train() -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(cameras=(), history=1))
    assert not [name for name, _ in model.named_parameters() if name.startswith(("vision", "projector", "camera"))]
    inputs = fake(model.config)
    losses = train(model, inputs)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert torch.equal(chunk_of(again(model), inputs), chunk_of(model, inputs))
    with pytest.raises(ConfigError, match="no part 'vision'; choices: head, language, state"):
        model.freeze("vision")


def absent(inputs: ModelInputs, what: str, filler: float) -> ModelInputs:
    """The same batch without ``what`` in row 0, and ``filler`` in its place."""

    def gone(mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(mask[:1]), mask[1:]])

    def filled(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(values[:1], filler), values[1:]])

    if what in inputs.images:
        return dataclasses.replace(
            inputs, images={**inputs.images, what: filled(inputs.images[what])},
            image_mask={**inputs.image_mask, what: gone(inputs.image_mask[what])},
        )  # fmt: skip
    if what == "state":
        return dataclasses.replace(inputs, state=filled(inputs.state), state_mask=gone(inputs.state_mask))
    if what == "instruction":
        assert inputs.token_mask is not None
        word = torch.full_like(inputs.tokens[:1], 2 + int(abs(filler)) if filler == filler else 2)
        return dataclasses.replace(inputs, tokens=torch.cat([word, inputs.tokens[1:]]),
                                   token_mask=gone(inputs.token_mask))  # fmt: skip
    assert inputs.history is not None
    return dataclasses.replace(inputs, history=absent(inputs.history, "state", filler))


@pytest.mark.parametrize("language", [TinyGRUConfig(d_model=16), LLM], ids=["gru", "llm"])
@pytest.mark.parametrize("what", ["left", "right", "state", "instruction", "history"])
def test_what_is_masked_has_no_influence_and_what_is_there_has(language: Any, what: str) -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(language=language, projector=MLPProjectorConfig()))
    inputs = fake(model.config)
    chunks = [chunk_of(model, absent(inputs, what, filler)) for filler in (0.0, 5.0, float("nan"))]
    assert torch.equal(chunks[0], chunks[1]) and torch.equal(chunks[0], chunks[2])
    whole = chunk_of(model, inputs)
    assert not torch.allclose(whole[0], chunks[0][0], atol=1e-5)
    torch.testing.assert_close(whole[1:], chunks[0][1:], atol=1e-5, rtol=1e-4)


def test_with_nothing_there_the_chunk_is_still_one() -> None:
    model = VLAModel(vla_config())
    inputs = fake(model.config)
    for what in ("left", "right", "state", "instruction", "history"):
        inputs = absent(inputs, what, float("nan"))
    assert chunk_of(model, inputs).isfinite().all()


@pytest.mark.parametrize("language", [TinyGRUConfig(d_model=16), LLM], ids=["gru", "llm"])
def test_the_instruction_is_computed_once_for_a_control_loop(language: Any) -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config(language=language)).eval()
    steps = [fake(model.config, batch=1, seed=seed) for seed in range(5)]
    steps = [dataclasses.replace(step, tokens=steps[0].tokens) for step in steps]
    cached = [model.encode(step) for step in steps]
    assert model.prefix_cache.computed == 1
    model.train()
    for kept, step in zip(cached, steps, strict=True):
        torch.testing.assert_close(kept.values, model.encode(step).values, atol=1e-5, rtol=1e-5)
    assert model.prefix_cache.computed == 1, "training goes without"
    model.eval()
    other = model.encode(dataclasses.replace(steps[0], tokens=steps[0].tokens.flip(1) % 5 + 2))
    assert model.prefix_cache.computed == 2
    assert not torch.allclose(other.values, cached[0].values, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3), history=st.integers(1, 4), cameras=st.integers(1, 3), state=st.integers(0, 3),
    context=st.sampled_from(["readout", "all"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_all_sizes(batch: int, history: int, cameras: int, state: int, context: str, dtype: torch.dtype) -> None:
    names = tuple(f"c{i}" for i in range(cameras))
    history = history if state else 1
    model = VLAModel(vla_config(cameras=names, history=history, state_dim=state, context=context)).to(dtype)
    inputs = fake(model.config, batch)
    predicted = chunk_of(model, inputs)
    assert predicted.shape == (batch, HORIZON, 2) and predicted.dtype == torch.float32 and predicted.isfinite().all()
    loss = model.train().loss(inputs, *chunk(model.config, batch))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("context", ["readout", "all"])
def test_a_language_model_of_half_precision_with_a_head_of_full(head: str, context: str) -> None:
    language = dataclasses.replace(LLM, dtype="bfloat16")
    model = VLAModel(vla_config(language=language, context=context, head=ACTION_HEAD_REGISTRY[head].Config()))
    inputs = fake(model.config)
    loss = model.train().loss(inputs, *chunk(model.config))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    predicted = chunk_of(model, inputs)
    assert predicted.dtype == torch.float32 and predicted.isfinite().all()


@pytest.mark.parametrize("head", ["flow", "diffusion"])
@pytest.mark.parametrize("denoiser", ["mlp", "transformer"])
def test_a_chunk_continues_an_older_one(head: str, denoiser: str) -> None:
    """Real-time chunking: the rows that are given are in the sample, and the others follow."""
    torch.manual_seed(0)
    model = VLAModel(vla_config(context="all", head=ACTION_HEAD_REGISTRY[head].Config(denoiser=denoiser))).eval()
    inputs = fake(model.config, batch=1)
    given = torch.full((HORIZON, 2), 0.3)
    prefix = ChunkPrefix(actions=given, weights=torch.tensor([1.0, 1.0, 0.5, 0.0]), frozen=2, max_guidance=5.0)
    chunks = [model.predict(inputs, torch.Generator().manual_seed(0), p) for p in (prefix, None)]
    torch.testing.assert_close(chunks[0][0, :2], given[:2])
    assert not torch.allclose(chunks[0][0, 2:], chunks[1][0, 2:])


@pytest.mark.parametrize("head", HEADS)
def test_mini_vla_learns_with_every_head_and_comes_back(head: str) -> None:
    torch.manual_seed(0)
    config = MiniVLAConfig(
        cameras=("left", "right"), state_dim=3, action_dim=2, horizon=HORIZON, vocab_size=10, d_model=16,
        vision=TinyCNNConfig(d_model=16, channels=(8, 8)), head=ACTION_HEAD_REGISTRY[head].Config(),
    )  # fmt: skip
    model: Any = MiniVLA(config)
    inputs = fake(vla_config())
    losses = train(model, inputs)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert torch.equal(chunk_of(again(model), inputs), chunk_of(model, inputs))


def test_the_instruction_may_come_last() -> None:
    model = VLAModel(vla_config(language=TinyGRUConfig(d_model=16, injected="before_text"), context="all"))
    assert chunk_of(model, fake(model.config)).isfinite().all() and model.prefix_cache.computed == 0


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = VLAModel(vla_config()).eval()
    inputs = fake(model.config, batch=3)
    together = model.encode(inputs)
    for row in range(3):
        alone = model.encode(inputs.map(lambda tensor, row=row: tensor[row : row + 1]))
        torch.testing.assert_close(masked_mean(alone)[0], masked_mean(together)[row], atol=1e-5, rtol=1e-4)


def test_a_recipe_is_free_of_sizes_and_becomes_a_config() -> None:
    config = vla_config()
    sizes = {"cameras", "state_dim", "action_dim", "vocab_size", "history"}
    choices = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in sizes}
    recipe = VLARecipe(**choices)
    assert recipe.config(**{name: getattr(config, name) for name in sizes}) == config


WRONG = {
    "cameras: expected at least one where no state is seen": {"cameras": (), "state_dim": 0},
    r"memory\.max_len: expected at least .* 9 ticks, found 4": {"history": 9},
    "history: .*the observation has none": {"state_dim": 0},
    "readout_tokens: expected at least 1": {"readout_tokens": 0},
    "action_dim: expected at least 1": {"action_dim": 0},
    "vocab_size: expected at least 2": {"vocab_size": 1},
    "context: .* found 'before_text'; choices: all": {"language": TinyGRUConfig(d_model=16, injected="before_text")},
    "head: expected the settings of one of .*flow": {"head": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_config_that_cannot_work(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vla_config(**WRONG[message])


def test_errors_name_what_is_there() -> None:
    model = VLAModel(vla_config())
    with pytest.raises(
        ConfigError, match="no part 'wheels'; choices: head, language, memory, projector, state, vision"
    ):
        model.freeze("wheels")
    with pytest.raises(VlaError, match="'tiny_gru' takes no adapters"):
        VLAModel(vla_config()).enable_lora()
    inputs = fake(model.config)
    with pytest.raises(VlaError, match=r"lack the camera 'right'.*: left"):
        VLAModel(vla_config()).predict(dataclasses.replace(inputs, images={"left": inputs.images["left"]}))
    with pytest.raises(VlaError, match="lack the history of 2 past ticks"):
        VLAModel(vla_config()).predict(dataclasses.replace(inputs, history=None))
