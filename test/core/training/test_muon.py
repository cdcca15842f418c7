"""Muon beside torch's own, the singular value decomposition, and AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.config import ConfigError, from_dict
from vla_core.training.muon import Muon, hidden_matrices, orthogonal
from vla_core.training.options import Training
from vla_core.training.trainer import train

from ..helpers import dataset
from ..whole_models import one_thread as one_thread
from .toy_run import toy_recipe


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 40), columns=st.integers(1, 300), size=st.floats(-6, 3), seed=st.integers(0, 99))
def test_a_matrix_is_turned_into_its_rotation(rows: int, columns: int, size: float, seed: int) -> None:
    """By the decomposition: the same singular vectors, and values that are all about 1, however large it was."""
    matrix = random(rows, columns, seed=seed) * 10**size
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    turned = u.mT @ orthogonal(matrix).double() @ v.mT
    plain = values > 0.02 * values[0]  # what is nearly singular has not quite grown to 1 after five rounds
    found = turned.diagonal()[plain]
    assert ((found > 0.6) & (found < 1.25)).all()
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-2


def test_nothing_is_made_of_a_gradient_of_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(4, 9)), torch.zeros(4, 9))


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 5) -> list[Tensor]:
    for step in range(count):
        for place, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + place)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_matrices_go_where_those_of_torchs_muon_go(shape: tuple[int, int]) -> None:
    """It iterates in bfloat16, on the matrix instead of its Gram matrix."""
    own, peer = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
    start = random(*shape)
    group = {"params": [own], "lr": 0.02, "weight_decay": 0.1, "matrices": True}
    torchs = torch.optim.Muon([peer], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    (found,), (expected,) = steps(Muon([group]), [own]), steps(torchs, [peer])
    assert (found - expected).norm() < 0.02 * (expected - start).norm()


def test_a_kernel_is_a_matrix_with_a_row_for_each_channel_it_makes() -> None:
    kernel, matrix = nn.Parameter(random(16, 8, 3, 3)), nn.Parameter(random(16, 8, 3, 3).flatten(1))

    def after(parameter: nn.Parameter) -> Tensor:
        optimizer = Muon([{"params": [parameter], "matrices": True, "lr": 0.1}])
        for step in range(3):
            parameter.grad = random(16, 8, 3, 3, seed=step).view(parameter.shape)
            optimizer.step()
        return parameter.detach().flatten(1)

    assert torch.equal(after(kernel), after(matrix))


def test_all_else_is_adamws_and_what_has_no_gradient_stays() -> None:
    def made(kind: Any, matrices: bool) -> list[Tensor]:
        first, second = nn.Parameter(random(3, 4)), nn.Parameter(random(5))
        groups: list[dict[str, Any]] = [
            {"params": [first], "lr": 0.1, "weight_decay": 0.3}, {"params": [second], "lr": 0.02, "weight_decay": 0.0},
        ]  # fmt: skip
        still = nn.Parameter(random(16, 16))
        if matrices:
            groups.append({"params": [still], "lr": 0.1, "weight_decay": 0.5, "matrices": True})
        found = steps(kind(groups), [first, second])
        assert torch.equal(still, random(16, 16))
        return found

    own, peer = made(Muon, True), made(lambda groups: torch.optim.AdamW(groups, fused=True), False)
    assert all(torch.equal(a, b) for a, b in zip(own, peer, strict=True))


def test_matrices_are_the_wide_weights_of_linear_layers_and_convolutions() -> None:
    model = nn.ModuleDict({
        "first": nn.Conv2d(3, 32, 3), "narrow": nn.Linear(8, 64), "conv": nn.Conv2d(32, 16, 3),
        "norm": nn.LayerNorm(64), "words": nn.Embedding(100, 32), "lstm": nn.LSTM(32, 32), "linear": nn.Linear(64, 16),
    })  # fmt: skip
    assert hidden_matrices(model) == {"first.weight", "conv.weight", "linear.weight"}


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    def weights(steps: int, folder: Path | None, resume: bool = False) -> dict[str, Tensor]:
        recipe = toy_recipe(steps=steps, schedule="constant", optimizer="muon", ema_decay=0.9, save_every=4)
        return train(recipe, dataset(), folder=folder, resume=resume).checkpoint.model.state_dict()

    first, longer = weights(4, tmp_path), weights(9, tmp_path, resume=True)
    unbroken, adamw = weights(9, None), toy_recipe(steps=9, schedule="constant", ema_decay=0.9)
    assert all(torch.equal(longer[name], unbroken[name]) for name in unbroken)
    assert any(not torch.equal(longer[name], first[name]) for name in unbroken)
    other = train(adamw, dataset()).checkpoint.model.state_dict()
    assert any(not torch.equal(other[name], unbroken[name]) for name in unbroken)


def test_shards_of_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer: muon needs whole matrices; choices with fsdp: adamw"):
        from_dict(Training, {"optimizer": "muon", "distributed": "fsdp"})
