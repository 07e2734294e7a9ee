"""Counted and guided velocity fields."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import CountedField, Guided, as_field


def conditional(x: Tensor, t: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
    """Linear in the condition, so that guidance has a closed form."""
    shift = x.new_zeros(len(x)) if label is None else label.to(x.dtype)
    extra = torch.zeros_like(x) if context is None else context
    return -x + (t * shift)[:, None] + extra


X, T, LABEL = (
    torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
    torch.full((4,), 0.5),
    torch.arange(1, 5),
)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 2.5, 7.0])
def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_field(scale: float) -> None:
    v = Guided(conditional, scale)(X, T, label=LABEL)
    v0, vc = conditional(X, T), conditional(X, T, LABEL)
    torch.testing.assert_close(v, v0 + scale * (vc - v0))


def test_guiding_between_two_gaussians_guides_the_score_alike() -> None:
    """score = (t v - x) / (1 - t) is affine in v with weights that sum to one: it obeys the same formula."""
    wide, narrow = closed_form.gaussian(torch.zeros(2), 1.5), closed_form.gaussian(torch.ones(2), 0.5)

    def v(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return wide.velocity(x, t) if label is None else narrow.velocity(x, t)

    x, w = X.double(), 3.0
    t = T.double()
    guided = Guided(v, w)(x, t, label=LABEL)
    score = (t[:, None] * guided - x) / (1 - t[:, None])
    expected = wide.score(x, t) + w * (narrow.score(x, t) - wide.score(x, t))
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize(("scale", "calls"), [(0.0, 1), (1.0, 1), (0.5, 2), (3.0, 2), (-2.0, 2)])
def test_a_guided_call_counts_its_network_calls(scale: float, calls: int) -> None:
    seen: list[Tensor | None] = []

    def v(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        seen.append(label)
        return x

    field = Guided(v, scale)
    field(X, T, label=LABEL)
    field(X, T, label=LABEL)
    assert field.calls == len(seen) == 2 * calls
    if scale == 0:
        assert seen == [None, None]


def test_conditions_that_null_does_not_name_reach_both_calls() -> None:
    context = torch.ones_like(X)
    v = Guided(conditional, 2.0)(X, T, label=LABEL, context=context)
    torch.testing.assert_close(v, Guided(conditional, 2.0)(X, T, label=LABEL) + context)


def test_null_says_what_replaces_the_condition() -> None:
    null = {"context": 3 * torch.ones_like(X)}
    v = Guided(conditional, 2.0, null)(X, T, context=torch.ones_like(X))
    torch.testing.assert_close(v, -X + 3 + 2 * (1 - 3) * torch.ones_like(X))


@pytest.mark.parametrize(
    ("null", "cond"),
    [(None, {}), (None, {"label": None}), (None, {"context": torch.ones_like(X)}), ({}, {"label": LABEL})],
)
def test_guidance_without_a_condition_to_leave_out_is_refused(
    null: dict[str, object] | None, cond: dict[str, Tensor]
) -> None:
    """Both calls would be equal, and the guidance silently none."""
    with pytest.raises(UserError, match=r"guidance 2\.0 needs a condition to leave out"):
        Guided(conditional, 2.0, null)(X, T, **cond)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match="guidance scale must be a finite number"):
        Guided(conditional, scale)


def test_as_field_counts_a_callable_and_leaves_a_field_alone() -> None:
    counted = as_field(conditional)
    assert isinstance(counted, CountedField)
    for _ in range(3):
        assert torch.equal(counted(X, T, label=LABEL), conditional(X, T, LABEL))
    assert counted.calls == 3
    guided = Guided(conditional, 2.0)
    assert as_field(guided) is guided
    assert as_field(counted) is counted


def test_guidance_changes_neither_the_condition_nor_the_start() -> None:
    cond = {"label": LABEL}
    before = X.clone()
    solution = fs.solve(Guided(conditional, 2.0), X, solver="heun", steps=2, cond=cond)
    assert cond == {"label": LABEL}
    assert torch.equal(X, before)
    assert solution.nfe == 8
