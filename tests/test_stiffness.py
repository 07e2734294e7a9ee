"""Eigenvalues of the velocity's Jacobian against closed forms and dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.diagnostics.diagnose import stiffness_nodes
from fewstep.diagnostics.profiles import with_middles
from fewstep.diagnostics.stiffness import eigenvalues
from fewstep.flow import closed_form


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rates(t: np.ndarray, stds: Tensor) -> np.ndarray:
    """Eigenvalues (t s^2 - (1 - t)) / q of the Gaussian flow, (times, dimensions)."""
    s, time = stds.numpy()[None], t[:, None]
    return (time * s**2 - (1 - time)) / ((1 - time) ** 2 + (s * time) ** 2)


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float64), (2, torch.float64), (7, torch.float64)])
def test_with_as_many_vectors_as_dimensions_it_is_exact(size: int, dtype: torch.dtype) -> None:
    matrices = noise(20, size, size)
    found = eigenvalues(lambda q: torch.einsum("bij,bj->bi", matrices, q), noise(20, size, seed=1))
    for own, matrix in zip(found, matrices, strict=True):
        expected = torch.linalg.eigvals(matrix)
        assert (own[:, None] - expected).abs().amin(0).max() < 1e-9
        assert (own[:, None] - expected).abs().amin(1).max() < 1e-9


def test_outer_eigenvalues_of_large_matrices_come_first() -> None:
    """A spectrum in the unit disk, a real eigenvalue 3 and a pair 2 ± 2i outside it: |λ|max = 3, both within 1 %."""
    rotation = torch.tensor([[0.0, 2.5], [-2.5, 0.0]], dtype=torch.float64)
    inner = noise(98, 98) / 98**0.5
    change, _ = torch.linalg.qr(noise(100, 100, seed=1))
    matrix = change @ torch.block_diag(rotation, inner) @ change.T
    found = eigenvalues(lambda q: q @ matrix.T, noise(10, 100, seed=2))
    assert found.shape == (10, 16)
    assert (found.abs().amax(1) / 2.5 - 1).abs().max() < 1e-2
    assert (found.imag.amax(1) / 2.5 - 1).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_closed_span_is_left_for_another_direction(dtype: torch.dtype) -> None:
    """The first vector is an eigenvector of every multiple of 1, and half of these of diag(1, 1, 1, -2, -2)."""
    values = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0], dtype=dtype)
    found = eigenvalues(lambda q: q * values, noise(8, 5).to(dtype))
    np.testing.assert_allclose(found.real.amin(1), -2, atol=1e-5)
    np.testing.assert_allclose(found.real.amax(1), 1, atol=1e-5)
    same = eigenvalues(lambda q: 3 * q, noise(8, 5).to(dtype))
    np.testing.assert_allclose(same.real, 3, atol=1e-5)
    assert eigenvalues(lambda q: 0 * q, noise(8, 5).to(dtype)).abs().max() < 1e-6


@pytest.mark.parametrize("s", [2.0, 1.0, 0.1, 0.01, 1e-3])
def test_stiffness_of_a_gaussian_flow_is_its_closed_form(s: float) -> None:
    flow = closed_form.gaussian(torch.full((3,), 0.3), torch.tensor([s, s, 0.5]))
    d = fs.diagnose(flow.velocity, noise(8, 3), sensitivity=False)
    exact = rates(d.stiffness_times, flow.std)
    np.testing.assert_allclose(d.stiffness, np.abs(exact).max(1), rtol=1e-4)
    np.testing.assert_allclose(d.contraction, exact.min(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d.expansion, exact.max(1), rtol=1e-4, atol=1e-6)
    assert d.stiffness_error.max() < 1e-6 * d.stiffness.max()  # J does not depend on x
    if s < 0.1:
        assert d.stiffness.max() == pytest.approx(1 / (2 * s), rel=0.03)  # the peak, at t = 1 - s, is not missed


def test_sixteen_vectors_find_the_stiffness_in_64_dimensions() -> None:
    flow = closed_form.gaussian(torch.zeros(64), torch.logspace(-1, 0.3, 64))
    d = fs.diagnose(flow.velocity, noise(16, 64), sensitivity=False, nodes=16)
    exact = rates(d.stiffness_times, flow.std)
    np.testing.assert_allclose(d.stiffness, np.abs(exact).max(1), rtol=0.02)
    np.testing.assert_allclose(d.contraction, exact.min(1), atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_a_rotation_has_a_pair_of_imaginary_eigenvalues(shape: tuple[int, ...]) -> None:
    turn = torch.tensor([[-0.5, 3.0], [-3.0, -0.5]], dtype=torch.float64)
    d = fs.diagnose(lambda x, t: (x.flatten(1) @ turn).reshape(x.shape), noise(8, *shape), nodes=16)
    np.testing.assert_allclose(d.stiffness, abs(-0.5 + 3j), rtol=1e-10)
    np.testing.assert_allclose(d.contraction, -0.5, rtol=1e-9)
    np.testing.assert_allclose(d.expansion, -0.5, rtol=1e-9)


def test_the_mean_is_over_samples_with_its_standard_error() -> None:
    """v = -k x with k = 0, 1, … for the samples: |λ| = k."""
    kind = torch.arange(20.0, dtype=torch.float64)
    d = fs.diagnose(lambda x, t, k: -k[:, None] * x / 4, noise(20, 2), cond={"k": kind}, nodes=16)
    np.testing.assert_allclose(d.stiffness, 9.5 / 4, rtol=1e-9)
    np.testing.assert_allclose(d.stiffness_error, float(kind.std()) / 4 / 20**0.5, rtol=1e-9)


def test_times_are_even_and_denser_where_panels_were_halved() -> None:
    even = with_middles(np.linspace(0, 1, 33))
    np.testing.assert_allclose(even[stiffness_nodes(even)], np.linspace(0, 1, 17))
    halved = with_middles(np.array([*np.linspace(0, 0.96875, 32), *(1 - 0.5 ** np.arange(6, 12)), 1.0]))
    times = halved[stiffness_nodes(halved)]
    assert len(times) <= 34
    assert (times > 0.97).sum() >= 8
