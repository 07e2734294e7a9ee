"""Conditions when a model is sampled: the user's, drawn from kept rows, masks, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.dataset import DataSet
from fewstep.data.sources import as_data
from fewstep.generator import Config
from fewstep.generator.conditions import KEPT_ROWS, draw_conditions, kept_conditions
from fewstep.networks.adapter import Adapter

SHAPE = (4, 2)


class Toward(nn.Module):
    """The exact velocity of data that are the observation, repeated: ``(obs - x) / (1 - t)``, in the order (t, x)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, time: Tensor, sample: Tensor, obs: Tensor) -> Tensor:
        return self.gain * (obs[:, None] - sample) / (1 - time).clamp(min=1e-4)[:, None, None]


def adapted(**declared: Any) -> Adapter:
    if "mask" in declared:
        return Adapter(Toward(), lambda m, x, t, obs, mask: m(t, x, obs), **declared)
    return Adapter(Toward(), lambda m, x, t, obs: m(t, x, obs), **declared)


def data(rows: int = 50) -> DataSet:
    """Ragged sequences; row k has the observation (k, -k) and 1 + k % 4 valid steps."""
    k = np.arange(rows)
    obs = np.stack([k, -k], 1).astype("f4")
    mask = np.arange(4)[None] < 1 + k[:, None] % 4
    x = np.where(mask[..., None], obs[:, None], np.nan).astype("f4")
    return as_data({"x": x, "obs": obs, "mask": mask}, conditions=["obs", "mask"], mask="mask", layout="sequence",
                   scale="none")  # fmt: skip


def config(**fields: Any) -> Config:
    return Config(shape=SHAPE, conditions={"obs": (2,), "mask": (4,)}, mask="mask", **fields)


def test_given_conditions_reach_the_network_and_padding_stays_zero() -> None:
    obs = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    model = fs.Generator(adapted(mask="mask"), shape=SHAPE)
    x = model.sample(cond={"obs": obs, "mask": mask}, steps=64)
    wanted = obs[:, None].expand(2, 4, 2) * mask[..., None]
    torch.testing.assert_close(x, wanted, atol=0.02, rtol=0)
    assert torch.equal(x[0, 2:], torch.zeros(2, 2))


def test_conditions_are_drawn_together_from_the_kept_rows() -> None:
    kept = kept_conditions(data(), ("obs", "mask"))
    assert len(kept["obs"]) == min(KEPT_ROWS, len(data().train))
    drawn = draw_conditions(config(), "model", kept, 500, None, None, seed=3)
    lengths = 1 + drawn["obs"][:, 0].long() % 4
    assert torch.equal(drawn["mask"].sum(1), lengths)  # a row's mask comes with its observation
    assert len(lengths.unique()) == 4
    again = draw_conditions(config(), "model", kept, 20, None, None, seed=3)
    assert torch.equal(again["obs"], drawn["obs"][:20])
    assert not torch.equal(draw_conditions(config(), "model", kept, 20, None, None, seed=4)["obs"], again["obs"])


def test_one_row_serves_all_samples() -> None:
    given = {"obs": torch.tensor([1.0, 2.0]), "mask": torch.ones(1, 4)}
    drawn = draw_conditions(config(), "model", {}, 7, given, None, seed=0)
    assert drawn["obs"].shape == (7, 2)
    assert bool((drawn["obs"] == given["obs"]).all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"obs": torch.zeros(3, 2)}, "'mask' is missing"),
        ({"obs": torch.zeros(3, 5), "mask": torch.ones(3, 4)}, r"'obs' has shape \(3, 5\)"),
        ({"obs": torch.zeros(2, 2), "mask": torch.ones(3, 4)}, r"need \(3, 2\)"),
        ({"obs": torch.zeros(3, 2), "mask": torch.ones(3, 4), "text": torch.ones(3)}, "takes no condition 'text'"),
        (None, "no rows of them are kept"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(given: Mapping[str, Tensor] | None, message: str) -> None:
    with pytest.raises(fs.UserError, match=message):
        draw_conditions(config(), "model", {}, 3, given, None, seed=0)


def test_labels_are_drawn_with_the_other_conditions_and_given_beside_them() -> None:
    kept = {"label": torch.arange(6), "obs": torch.arange(6.0)[:, None]}
    both = Config(shape=(1,), conditions={"obs": (1,)}, class_weights=(1 / 6,) * 6)
    drawn = draw_conditions(both, "model", kept, 100, None, None, seed=0)
    assert torch.equal(drawn["label"].float(), drawn["obs"][:, 0])
    given = draw_conditions(both, "model", kept, 2, {"obs": torch.zeros(2, 1)}, [3, 5], seed=0)
    assert given["label"].tolist() == [3, 5]
    with pytest.raises(fs.UserError, match="'label' is missing"):
        draw_conditions(both, "model", kept, 2, {"obs": torch.zeros(2, 1)}, None, seed=0)
    with pytest.raises(fs.UserError, match="give one of them"):
        draw_conditions(both, "model", kept, 2, {"obs": torch.zeros(2, 1), "label": torch.zeros(2)}, 3, seed=0)


def test_a_trained_model_draws_its_conditions_by_the_law_of_the_data(tmp_path: Path) -> None:
    model = fs.train("flow_matching", network=adapted(mask="mask"), data=data(), out=tmp_path / "m", samples=256,
                     batch_size=64, check=False, quiet=True)  # fmt: skip
    draw = model.draw(200, steps=2)
    lengths = 1 + draw.cond["obs"][:, 0].long() % 4
    assert torch.equal(draw.cond["mask"].sum(1), lengths)
    padding = ~draw.cond["mask"].bool()
    assert bool((draw.x[padding] == 0).all())
    assert bool((draw.x0[padding] == 0).all())
    loaded = fs.load(tmp_path / "m", module=adapted(mask="mask"))
    assert torch.equal(loaded.sample(5, steps=2), model.sample(5, steps=2))
    assert set(model.inner.state_dict()) == {"gain"}
    with pytest.raises(fs.UserError, match=r"module=make\(\)"):
        fs.load(tmp_path / "m", module=adapted)  # type: ignore[arg-type]


@pytest.mark.parametrize("named", [True, False])
def test_a_mask_is_named_in_the_data_and_in_the_network_or_in_none(named: bool, tmp_path: Path) -> None:
    obs = np.random.default_rng(0).normal(size=(20, 2)).astype("f4")
    rows = {"x": np.repeat(obs[:, None], 4, 1), "obs": obs, "mask": np.ones((20, 4))}
    there = as_data(rows, conditions=["obs", "mask"], mask="mask" if named else None, layout="sequence", scale="none")
    net = Adapter(Toward(), lambda m, x, t, obs, mask: m(t, x, obs), mask=None if named else "mask")
    with pytest.raises(fs.UserError, match="name it in both"):
        fs.train("flow_matching", network=net, data=there, out=tmp_path / "m", samples=64, quiet=True)


def test_a_network_of_the_users_own_takes_labels_when_their_number_is_known() -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return torch.zeros_like(x) if label is None else label[:, None].to(x) - x * 0

    with pytest.raises(fs.UserError, match="classes=10"):
        fs.Generator(Labelled(), shape=(1,)).sample(2, label=3)
    with pytest.raises(fs.UserError, match="classes=10"):
        fs.Generator(Labelled(), shape=(1,)).sample(2, guidance=2.0)
    model = fs.Generator(Labelled(), shape=(1,), classes=10)
    x0 = torch.zeros(2, 1)
    assert model.sample(noise=x0, label=3, steps=1).flatten().tolist() == [3.0, 3.0]
    assert model.sample(noise=x0, label=3, steps=1, guidance=2.0).flatten().tolist() == [6.0, 6.0]


def test_guidance_of_an_adapter_uses_its_null_and_its_combination() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return c.expand_as(x)

    call = lambda m, x, t, c: m(x, t, c)  # noqa: E731
    cond = {"c": torch.full((1, 1), 3.0)}
    x0 = torch.zeros(1, 1)
    with pytest.raises(fs.UserError, match="what replaces a condition"):
        fs.Generator(Adapter(Shift(), call), shape=(1,)).sample(noise=x0, cond=cond, guidance=2.0, steps=1)
    plain = fs.Generator(Adapter(Shift(), call, null={"c": 1.0}), shape=(1,))
    assert plain.sample(noise=x0, cond=cond, guidance=2.0, steps=1).item() == 5.0  # 1 + 2 (3 - 1)
    other = Adapter(Shift(), call, null={"c": torch.tensor([1.0])}, combine=lambda v0, vc, w: vc * w + v0)
    assert fs.Generator(other, shape=(1,)).sample(noise=x0, cond=cond, guidance=2.0, steps=1).item() == 7.0
