"""Tables against the schedulers of diffusers, each on the scheduler's own noise levels.

Their sigma is our 1 - t, their velocity noise minus data. Single precision inside the schedulers sets the
tolerance. Where they differ by a defect of theirs, the defect is what is tested: when it goes, the test says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.flow.paths import expand_time

diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
STEPS = [2, 3, 5, 10, 20]


def field(x: Tensor, t: Tensor) -> Tensor:
    s = expand_time(t, x)
    return torch.tanh(x.roll(1, -1) * (1 + s)) - 0.5 * x + s**2


def start() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def theirs(scheduler: Any, steps: int) -> tuple[Tensor, tuple[float, ...]]:
    """The scheduler's end point and its noise levels as our times; the network sees those, not rounded timesteps."""
    scheduler.set_timesteps(steps)
    times = tuple((1.0 - scheduler.sigmas.double()).tolist())
    x = start().float()
    for t, timestep in zip(times, scheduler.timesteps, strict=False):
        v = field(x.double(), torch.full((len(x),), t, dtype=torch.float64))
        x = scheduler.step(-v.float(), timestep, x).prev_sample
    return x.double(), times


def gap(scheduler: Any, solver: str, steps: int) -> float:
    x, times = theirs(scheduler, steps)
    return float((fs.solve(field, start(), solver=solver, grid=times).x - x).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_agrees_on_its_own_noise_levels(order: int, steps: int, shift: float) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, solver_order=order, solver_type="bh2", flow_shift=shift)
    assert gap(scheduler, f"unipc{order}", steps) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_dpm2m_agrees_on_its_own_noise_levels(steps: int, shift: float) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=2, flow_shift=shift)
    assert gap(scheduler, "dpm++2m", steps) < 1e-6


@pytest.mark.parametrize("steps", [3, 5, 10])
def test_dpm3m_agrees_with_the_reference_form_which_lacks_a_factor_two(steps: int) -> None:
    """Their D2 is (D10 - D11) / (r0 + r1), half of the h^2 m'' that its weight is made for: order two, not three."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=3)
    assert gap(scheduler, "dpm++3m-reference", steps) < 1e-6
    if steps > 3:  # with three steps, orders one, two and one, no second difference is formed
        assert gap(scheduler, "dpm++3m", steps) > 1e-4


@pytest.mark.parametrize("steps", [10, 20])
def test_bh1_of_unipc_is_not_a_number_there_and_finite_here(steps: int) -> None:
    """Into sigma = 0 the step h is infinite, and B = -h times the (zero) correction is not a number; bh2 is finite."""
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, solver_order=2, solver_type="bh1")
    x, times = theirs(scheduler, steps)
    assert bool(x.isnan().all())
    ours = fs.solve(field, start(), solver="unipc2-bh1", grid=times).x
    assert float((ours - fs.solve(field, start(), solver="rk4", steps=100).x).abs().max()) < 0.2


@pytest.mark.parametrize("steps", [4, 10])
def test_dpm_flow_grids_start_short_of_noise(steps: int) -> None:
    """Their first noise level is .999, so a constant field is missed by .001 of itself; from 0 to 1 it is exact."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=2)
    _, times = theirs(scheduler, steps)
    assert times[0] == pytest.approx(1e-3, abs=1e-6)
    one = torch.ones(1, 2, dtype=torch.float64)
    missed = 1 - fs.solve(lambda x, t: one, 0 * one, solver="dpm++2m", grid=times).x
    torch.testing.assert_close(missed, times[0] * one)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_deis_repeats_its_last_noise_level_and_never_arrives(steps: int) -> None:
    scheduler = diffusers.DEISMultistepScheduler(**FLOW)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().numpy()
    assert sigmas[-1] == sigmas[-2] > 0
    assert np.all(np.diff(sigmas[:-1]) < 0)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_and_heun_agree_on_their_own_noise_levels(steps: int) -> None:
    """Their Heun divides by the next noise level, .001 at the end, in single precision: four digits are left.

    Its last step, into sigma = 0, is Euler's.
    """
    x, times = theirs(diffusers.FlowMatchEulerDiscreteScheduler(), steps)
    torch.testing.assert_close(x, fs.solve(field, start(), grid=times).x, atol=1e-6, rtol=0)

    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    levels = (1.0 - scheduler.sigmas.double()).tolist()
    x = start().float()
    for t, timestep in zip(levels, scheduler.timesteps, strict=False):
        v = field(x.double(), torch.full((len(x),), t, dtype=torch.float64))
        x = scheduler.step(-v.float(), timestep, x).prev_sample
    times = tuple(sorted(set(levels)))
    inner = fs.solve(field, start(), solver="heun", grid=times[:-1]).x if len(times) > 2 else start()
    ours = fs.solve(field, inner, grid=times[-2:]).x
    torch.testing.assert_close(x.double(), ours, atol=1e-4, rtol=0)
