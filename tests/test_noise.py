"""Noise tables and hashed seeds: independent of how they are cut, of the right law, and no global state."""

from __future__ import annotations

import ast
import contextlib
import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

import fewstep
from fewstep.errors import UserError
from fewstep.flow.noise import BLOCK, Draws, block_rows, generator_for, integer_rows, isolated_rng, mix, noise_rows

SOURCE = Path(fewstep.__file__).parent


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 5)])
@pytest.mark.parametrize(("num", "start"), [(1, 0), (7, 3), (BLOCK, 0), (300, 100), (5, BLOCK - 2), (600, 511)])
def test_a_row_is_the_same_however_the_table_is_cut(num: int, start: int, shape: tuple[int, ...]) -> None:
    table = noise_rows(5 * BLOCK, shape, seed=3)
    assert torch.equal(noise_rows(num, shape, seed=3, start=start), table[start : start + num])
    numbers = integer_rows(5 * BLOCK, 10, seed=3)
    assert torch.equal(integer_rows(num, 10, seed=3, start=start), numbers[start : start + num])


def test_rows_have_the_standard_normal_law() -> None:
    """Kolmogorov-Smirnov at the 1e-4 level (critical value 2.23 / sqrt n), and uncorrelated coordinates."""
    x = noise_rows(20_000, (2,), seed=0).double()
    n = x.numel()
    ordered = x.flatten().sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(n, dtype=torch.float64) / n
    assert float(torch.maximum(cdf - steps, steps + 1 / n - cdf).max()) < 2.23 / n**0.5
    assert abs(float((x[:, 0] * x[:, 1]).mean())) < 4 / len(x) ** 0.5
    assert abs(float((x[1:, 0] * x[:-1, 0]).mean())) < 4 / len(x) ** 0.5


def test_blocks_seeds_and_draws_are_uncorrelated() -> None:
    size = 4096
    tables = [
        noise_rows(BLOCK, (size // BLOCK,), seed=seed, start=start, draw=draw).flatten()
        for seed, start, draw in [(0, 0, 0), (0, BLOCK, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (-1, 0, 0)]
    ]
    for a, b in itertools.combinations(tables, 2):
        assert abs(float((a * b).mean())) < 4.5 / size**0.5


def test_integers_are_uniform() -> None:
    counts = torch.bincount(integer_rows(10_000, 5, seed=1), minlength=5).double()
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert len(counts) == 5
    assert chi2 < 23.5  # 1e-4 level, 4 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_sees_the_same_noise(dtype: torch.dtype) -> None:
    x = noise_rows(10, (3,), seed=0, dtype=dtype)
    assert x.dtype == dtype
    assert torch.equal(x, noise_rows(10, (3,), seed=0).to(dtype))


def test_no_rows_and_negative_rows() -> None:
    assert noise_rows(0, (3, 2), seed=0).shape == (0, 3, 2)
    assert integer_rows(0, 5, seed=0).dtype == torch.long
    for num, start in ((-1, 0), (3, -1)):
        with pytest.raises(UserError, match="rows are counted from 0"):
            noise_rows(num, (2,), seed=0, start=start)


def test_only_the_blocks_that_are_needed_are_drawn() -> None:
    drawn: list[int] = []

    def block(k: int) -> torch.Tensor:
        drawn.append(k)
        return torch.arange(k * BLOCK, (k + 1) * BLOCK)

    rows = block_rows(BLOCK + 2, 3 * BLOCK - 1, block, empty=torch.empty(0))
    assert torch.equal(rows, torch.arange(3 * BLOCK - 1, 4 * BLOCK + 1))
    assert drawn == [2, 3, 4]


def test_the_hash_depends_on_every_part_and_its_place() -> None:
    values = [mix(*parts) for parts in itertools.product(range(4), repeat=3)] + [mix(k) for k in range(64)]
    values += [mix("a", 1), mix(1, "a"), mix("a"), mix("b"), mix("ab"), mix(-1), mix(2**63)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)
    assert mix(np.int64(7), np.int32(3)) == mix(7, 3)
    with pytest.raises(TypeError):
        mix(1.5)  # type: ignore[arg-type]


def test_neighbouring_keys_flip_half_the_bits() -> None:
    flips = [bin((mix(k) ^ mix(k + 1)) & (2**32 - 1)).count("1") for k in range(4000)]
    mean, sigma = 16, 8**0.5  # binomial(32, 1/2)
    assert abs(np.mean(flips) - mean) < 4 * sigma / 4000**0.5


def test_the_hash_is_splitmix64_and_the_same_in_every_process() -> None:
    """The second output of splitmix64 from state 0 (Steele, Lea & Flood 2014), less its lowest bit."""
    assert mix(0) == 0x6E789E6AA1B965F4 >> 1
    assert mix("stage", 3) == 2786015196579268938  # words do not pass through Python's salted hash


def test_generators_are_fresh_and_seeded_by_the_hash() -> None:
    a, b = (torch.rand(3, generator=generator_for("x", 1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(3, generator=generator_for("x", 2)))


def test_a_process_draws_its_rows_of_the_global_batch() -> None:
    whole = Draws(generator_for(1), 12)
    u, z, v = whole.uniform(), whole.normal((2, 2)), whole.uniform()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        part = Draws(generator_for(1), 12, rows)
        assert torch.equal(part.uniform(), u[rows])
        assert torch.equal(part.normal((2, 2)), z[rows])
        assert torch.equal(part.uniform(), v[rows])


def test_draws_have_their_laws() -> None:
    draws = Draws(generator_for(5), 40_000)
    u, z = draws.uniform().double(), draws.normal((1,)).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    for q in (0.1, 0.5, 0.9):
        sigma = (q * (1 - q) / len(u)) ** 0.5
        assert abs(float((u < q).double().mean()) - q) < 4 * sigma
        assert abs(float((z < NormalDist().inv_cdf(q)).double().mean()) - q) < 4 * sigma


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    noise_rows(300, (2,), seed=0)
    integer_rows(300, 4, seed=0)
    Draws(generator_for(0), 8).normal((2,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_the_global_state_is_put_back_also_after_an_error(device: torch.device | str | None) -> None:
    before = torch.get_rng_state()
    with isolated_rng(device):
        torch.manual_seed(5)
        first = torch.rand(4)
        with isolated_rng(device):
            torch.rand(9)
        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)
    with contextlib.suppress(ZeroDivisionError), isolated_rng(device):
        torch.rand(4)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("device", "forked"), [(None, []), ("cpu", []), ("meta", []), ("cuda:2", [2]), ("cuda", [1])])
def test_at_most_one_gpu_has_its_generator_forked(
    device: str | None, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a machine with several GPUs: what torch is asked to fork."""
    asked: list[list[int]] = []

    def fork_rng(devices: list[int]) -> AbstractContextManager[None]:
        asked.append(devices)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with isolated_rng(device):
        pass
    assert asked == [forked]


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
def test_the_state_of_a_gpu_is_put_back() -> None:
    before = torch.cuda.get_rng_state()
    with isolated_rng("cuda"):
        torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def forks_of_every_gpu(tree: ast.AST) -> list[int]:
    """Lines that call ``fork_rng`` and do not say for which devices."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if ast.unparse(call.func).rpartition(".")[2] == "fork_rng"
        and not any(word.arg == "devices" for word in call.keywords)
    ]


def test_no_code_forks_the_generator_of_every_gpu() -> None:
    assert forks_of_every_gpu(ast.parse("with torch.random.fork_rng(), x: pass")) == [1]
    assert forks_of_every_gpu(ast.parse("torch.random.fork_rng(devices=[])")) == []
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if forks_of_every_gpu(ast.parse(path.read_text("utf-8")))
    }
    assert found == set()
