"""Every head as a TorchScript graph says what the checkpoint says, of observations that no exporter saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.export.feed import check, feed
from vla_core.export.graph import PolicyGraph, draws_of
from vla_core.model.action_head.draws import Draw, DrawLog, GivenDraws, category, draw, normal
from vla_core.model.graph import as_graph
from vla_core.model.recurrence import gru
from vla_core.model.sensor import bev, lidar_encoder, radar_encoder
from vla_core.observation.builder import Observation
from vla_core.runtime.policy import CheckpointPolicy, noise_seed

from .exported import HEADS, asked, check_alike, exported, policy
from .helpers import pixels
from .whole_models import one_thread  # noqa: F401 - a fixture


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_a_graph(tmp_path: Path, name: str) -> None:
    made = policy(name)
    found = exported(tmp_path / "graph", made, "torchscript")
    assert found.record.agreement.max_error < 1e-5, "float32 rounds near 1e-7"
    check_alike(made, found, asked())


def test_noise_comes_from_seed_and_stamp(tmp_path: Path) -> None:
    made = policy("ddpm, v")
    found = exported(tmp_path / "graph", made, "torchscript")
    (seen, *_) = asked()
    other = dataclasses.replace(seen, stamp_ns=seen.stamp_ns + 1)
    assert not np.allclose(found.predict(seen).actions, found.predict(other).actions)
    found.seed = 4
    assert np.allclose(found.predict(seen).actions, CheckpointPolicy(made, seed=4).predict(seen).actions, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    state=st.lists(st.floats(-1e3, 1e3, width=32) | st.just(float("nan")), min_size=2, max_size=2),
    text=st.text("lift dropé ", max_size=30), camera=st.booleans(), said=st.booleans(), stamp=st.integers(0, 2**62),
)  # fmt: skip
def test_the_function_is_the_policy(state: list[float], text: str, camera: bool, said: bool, stamp: int) -> None:
    """Before any exporter touches it: preprocessing, masks, noise and un-normalization, of whatever is missing."""
    made = MADE
    graph = PolicyGraph(made, draws_of(made))
    seen = Observation(
        stamp, {"camera": pixels(3)} if camera else {}, np.array(state, np.float32), text if said else "", {},
        present={"task": said, "camera": camera},
    )  # fmt: skip
    given = feed(seen, graph.spec, made.contract, made.tokenizer)
    given["noise"] = draw(graph.draws, torch.Generator().manual_seed(noise_seed(0, stamp))).numpy()
    with torch.no_grad():
        found = graph(*map(torch.from_numpy, check(given, graph.ports))).numpy()
    assert np.allclose(found, CheckpointPolicy(made).predict(seen).actions, rtol=1e-5, atol=1e-6)


MADE = policy("flow")


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), kinds=st.integers(2, 40))
def test_categories_from_given_noise_are_those_that_torch_draws(seed: int, rows: int, kinds: int) -> None:
    weights = torch.rand(rows, kinds, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    drawn = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    noise = draw([Draw(kind="exponential", shape=(rows, kinds))], torch.Generator().manual_seed(seed))
    assert torch.equal(category(weights, GivenDraws(noise)), drawn)


def test_what_is_drawn_is_written_down_and_drawn_again() -> None:
    log = DrawLog()
    first = normal((2, 3), log, torch.float32, torch.device("cpu"))
    category(torch.ones(4, 2), log)
    assert log.draws == [Draw(kind="normal", shape=(2, 3)), Draw(kind="exponential", shape=(4, 2))]
    again = draw(log.draws, torch.Generator().manual_seed(log.initial_seed()))
    given = GivenDraws(again)
    assert torch.equal(given.take((2, 3)), first) and given.take((4, 2)).shape == (4, 2)
    with pytest.raises(ValueError, match="draws more than the 14 numbers"):
        given.take((1,))


def test_bits(tmp_path: Path) -> None:
    """bfloat16 has 8 bits of mantissa and int8 256 steps: errors of that size, and no larger."""
    made = policy("mlp")
    for precision, least, most in (("bf16", 1e-5, 0.05), ("int8", 1e-5, 0.1)):
        found = exported(tmp_path / precision, made, "torchscript", precision=precision)
        assert least < found.record.agreement.max_error < most
        assert found.record.agreement.bound == most and found.record.precision == precision
        check_alike(made, found, asked(), tolerance=most)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), points=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_what_a_graph_computes_otherwise_is_the_same(seed: int, points: int, rows: int, columns: int) -> None:
    """Inverses, distances, places on a map and a GRU, beside torch's own."""
    random = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, 3, 3, generator=random) + 3 * torch.eye(3)
    a, b = torch.randn(1, points, 3, generator=random), torch.randn(1, rows, 3, generator=random)
    part, words = torch.nn.GRU(3, 4, batch_first=True), torch.randn(1, points, 3, generator=random)
    expected = (torch.linalg.inv(matrices), torch.cdist(a, b), radar_encoder.coordinates(rows, columns), part(words)[0])
    with as_graph(), torch.no_grad():
        found = (bev.inverse(matrices), lidar_encoder.distances(a, b),
                 radar_encoder._counted(torch.zeros(1, rows, columns, 2)), gru(part, words))  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
