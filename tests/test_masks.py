"""Padded rows: likelihood, diagnosis and tuning of valid entries against closed forms and unpadded networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.diagnostics.masks import mask_name, valid_entries, without_padding
from fewstep.diagnostics.stiffness import eigenvalues
from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Guided
from fewstep.networks.adapter import Adapter

LENGTHS = torch.tensor([1, 4, 2, 3, 4, 2])
VALID = (torch.arange(4) < LENGTHS[:, None]).double()  # (6, 4)
COND = {"valid": VALID}


class Mixing(nn.Module):
    """``x_i' = w_i x_i + c sum_j x_j``: without a mask every padded entry moves all others."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        rates = torch.tensor([-0.5, 0.4, 0.1, -0.2], dtype=torch.float64)[:size]
        self.rates = nn.Parameter(rates)
        self.c = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.rates * x + self.c * x.sum(1, keepdim=True)


def rows(seed: int, num: int = 6, size: int = 4) -> Tensor:
    return torch.randn(num, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(x1: Tensor) -> Tensor:
    """Log-density of the valid entries: x(1) = e^A z with A of the first n entries is N(0, e^A e^A^T)."""
    net, found = Mixing(), []
    for x, n in zip(x1, LENGTHS.tolist(), strict=True):
        a = torch.matrix_exp(torch.diag(net.rates[:n]) + net.c).detach()
        found.append(torch.distributions.MultivariateNormal(x.new_zeros(n), a @ a.T).log_prob(x[:n]))
    return torch.stack(found)


def junk(x: Tensor, value: float) -> Tensor:
    return torch.where(VALID[: len(x)] == 1, x, value)


@pytest.mark.parametrize("kind", ["adapter", "guided", "plain"])
@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan])
def test_the_likelihood_of_padded_rows_is_that_of_their_valid_entries(kind: str, padding: float) -> None:
    adapter = Adapter(Mixing(), mask="valid")
    v: Any = {"adapter": adapter, "guided": Guided(CountedField(adapter), 1.0, {"valid": None}), "plain": Mixing()}[
        kind
    ]
    mask = "valid" if kind == "plain" else None
    x1 = rows(0)
    found = fs.log_likelihood(v, junk(x1, padding), cond=COND, steps=20, mask=mask)
    torch.testing.assert_close(found.log_prob, truth(x1), rtol=0, atol=1e-6)
    assert found.valid is not None
    assert found.valid.tolist() == LENGTHS.tolist()
    bits = -truth(x1) / LENGTHS / math.log(2) + 7  # 8-bit values on [-1, 1]
    torch.testing.assert_close(found.bits_per_dim(2 / 256), bits, rtol=0, atol=1e-5)
    assert found.nats_per_dim_error == pytest.approx(float((truth(x1) / LENGTHS).std()) / math.sqrt(6), abs=1e-6)
    assert found.converged
    assert found.round_trip is not None
    assert found.round_trip < 1e-6
    assert float(found.x0[VALID == 0].abs().max()) == 0.0


def test_the_estimated_divergence_sees_valid_entries_alone_and_chunks_keep_their_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fewstep.diagnostics import jacobian_trace

    x1, v = rows(1), Adapter(Mixing(), mask="valid")
    given: dict[str, Any] = {"cond": COND, "steps": 10, "divergence": "hutchinson", "probes": 64}
    found = fs.log_likelihood(v, junk(x1, 3.0), **given)
    assert found.probe_error is not None
    assert float(((found.log_prob - truth(x1)).abs() / found.probe_error.clamp_min(1e-6)).max()) < 4
    assert float((found.log_prob[0] - truth(x1)[0]).abs()) < 1e-5  # one valid entry: no cross terms, no variance
    monkeypatch.setattr(jacobian_trace, "ROWS", 128)  # two samples at a time
    cut = fs.log_likelihood(v, x1, **given)
    torch.testing.assert_close(cut.log_prob, found.log_prob, rtol=0, atol=1e-10)


def test_without_a_mask_padding_counts_as_data() -> None:
    found = fs.log_likelihood(Mixing(), rows(0), steps=20)
    assert found.valid is None
    assert float((found.log_prob - truth(rows(0))).abs().max()) > 1


@pytest.mark.parametrize("length", [1, 3])
def test_a_diagnosis_of_padded_rows_equals_that_of_the_unpadded_network(length: int) -> None:
    class Short(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            net = Mixing()
            return net.rates[:length] * x + net.c * x.sum(1, keepdim=True) + 0 * t[:, None]

    x0 = rows(2, 80)
    cond = {"valid": (torch.arange(4) < length).double().expand(80, 4)}
    padded = torch.where(cond["valid"] == 1, x0, math.nan)
    found = fs.diagnose(Adapter(Mixing(), mask="valid"), padded, cond=cond, nodes=8)
    plain = fs.diagnose(Short(), x0[:, :length], nodes=8)
    assert found.straightness > 5e-5
    others = ("dimensions", "solver", "nfe", "derivatives", "weighted_error")  # signs are drawn by shape
    for name in plain.as_dict().keys() - others:
        np.testing.assert_allclose(found.as_dict()[name], plain.as_dict()[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_what_stands_at_padded_entries_has_no_effect_on_a_diagnosis_and_a_tuning() -> None:
    v, x0 = Adapter(Mixing(), mask="valid"), rows(3, 96)
    cond = {"valid": VALID.repeat(16, 1)}
    other = torch.where(cond["valid"] == 1, x0, 50.0)
    one, two = (fs.diagnose(v, x, cond=cond, nodes=8).as_dict() for x in (x0, other))
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value) if name not in ("solver", "derivatives") else None
    tuned = [fs.tune(v, x, cond=cond, calls=2, kind="fitted") for x in (x0, other)]
    assert (tuned[0].error, tuned[0].spread) == (tuned[1].error, tuned[1].spread)


def test_eigenvalues_of_padded_matrices_are_those_of_their_blocks() -> None:
    """A multiple of the identity closes the span at once, and nilpotent parts give complex pairs."""
    matrices = torch.zeros(3, 5, 5, dtype=torch.float64)
    matrices[0, :2, :2] = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    matrices[1] = 3 * torch.eye(5)
    matrices[1, 3:] = 0.0
    matrices[2, 4, 4] = -2.0
    valid = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]]) == 1
    found = eigenvalues(lambda q: torch.einsum("bij,bj->bi", matrices, q), rows(4, 3, 5), valid=valid)
    assert found.shape == (3, 5)
    parts = [sorted({(round(z.real, 9), round(z.imag, 9)) for z in row.tolist()}) for row in found]
    assert parts[0] == [(1.0, round(-math.sqrt(6), 9)), (1.0, round(math.sqrt(6), 9))]
    assert parts[1:] == [[(3.0, 0.0)], [(-2.0, 0.0)]]


def test_masks_are_found_through_wrappers_and_mistakes_are_named() -> None:
    v = Adapter(Mixing(), mask="valid")
    assert mask_name(CountedField(Guided(v, 2.0))) == "valid"
    assert mask_name(Adapter(Mixing())) is mask_name(Mixing()) is None
    x = rows(0)
    assert valid_entries(x[..., None], {"m": VALID}, "m").shape == (6, 4, 1)
    assert without_padding(x, {}, None) is x
    for cond, words in (
        ({}, "unknown condition 'valid'"),
        ({"valid": 1}, "must be a tensor"),
        ({"valid": VALID / 2}, "other values than 0"),
        ({"valid": VALID * 0}, "without any valid entry"),
        ({"valid": VALID[:, :3]}, "does not fit"),
    ):
        with pytest.raises(UserError, match=words):
            fs.log_likelihood(v, x, cond=cond)
        with pytest.raises(UserError, match=words):
            fs.diagnose(v, x, cond=cond)
