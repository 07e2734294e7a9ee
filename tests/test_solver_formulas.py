"""The formula of every solver in ``fewstep list solvers`` is evaluated as it is written and compared with its table.

The formulas' text is read by a few substitutions (a space between factors is a product, ``int P d(w)`` an integral),
the polynomials are integrated by quadrature, and the solver is run from them alone, start-up included.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.cli.main import main
from fewstep.flow.noise import noise_rows
from fewstep.flow.paths import Cosine, Linear
from fewstep.solvers.adaptive import ADAPTIVE
from fewstep.solvers.show import WIDTH, entries
from fewstep.solvers.solve import FIRST_DRAW
from fewstep.solvers.tables import SOLVERS, VALUED

UNEQUAL = (0.05, 0.2, 0.3, 0.55, 0.7, 0.85, 0.9)
EQUAL = tuple(0.1 + 0.1 * k for k in range(7))
WHOLE = (0.0, 0.1, 0.35, 0.5, 0.7, 0.9, 1.0)
FORMULAS = {name: solver.formula for name, solver in SOLVERS.items()} | {
    "ddim:1": VALUED["ddim"](1.0).formula,
    "trapezium": "x* = euler step; x_b = x_a + (h / 2) (v_a + v*)",
}
# the formula of the first steps, which have too short a history for the solver's own
START = {
    "ab2": "euler", "ab3": "ab2", "ab4": "ab3", "abm2": "trapezium",
    "deis2": "ddim", "deis3": "deis2", "deis4": "deis3",
    "deis2-rho": "ddim", "deis3-rho": "deis2-rho", "deis4-rho": "deis3-rho",
    "dpm++2m": "ddim", "dpm++3m": "dpm++2m", "dpm++3m-reference": "dpm++2m", "dpm++sde": "ddim:1",
    "unipc2": "unipc1", "unipc3": "unipc2", "unipc2-bh1": "unipc1-bh1", "unipc3-bh1": "unipc2-bh1",
    "unipc2-t": "unipc1-t", "unipc3-t": "unipc2-t",
}  # fmt: skip
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


@dataclass(frozen=True)
class Line:
    """alpha = t, sigma = 1 - t."""

    def coefficients(self, t: Any) -> tuple[Any, Any, Any, Any]:
        """alpha, sigma and their derivatives."""
        return t, 1 - t, 1 + 0 * t, -1 + 0 * t


@dataclass(frozen=True)
class Circle:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def coefficients(self, t: Any) -> tuple[Any, Any, Any, Any]:
        """alpha, sigma and their derivatives."""
        angle, rate = np.pi * t / 2, np.pi / 2
        return np.sin(angle), np.cos(angle), rate * np.cos(angle), -rate * np.sin(angle)


PATHS = {"linear": (Line(), Linear()), "cosine": (Circle(), Cosine())}


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    return np.sin((1 + t) * x) - 0.3 * x + t**2


def as_network(x: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(velocity(x.numpy(), float(t[0])))


@dataclass
class Run:
    """A solver under way, from its formula alone."""

    path: Any
    grid: tuple[float, ...]
    x: np.ndarray
    noise: list[np.ndarray]
    past: list[dict[str, Any]] = field(default_factory=list)  # t, v, m, e of every call, newest first

    def look(self, x: np.ndarray, t: float) -> dict[str, Any]:
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        v, det = velocity(x, t), alpha * d_sigma - d_alpha * sigma
        return {"t": t, "v": v, "m": (d_sigma * x - sigma * v) / det, "e": (alpha * v - d_alpha * x) / det}

    def log_snr(self, t: Any) -> Any:
        alpha, sigma, _, _ = self.path.coefficients(t)
        with np.errstate(divide="ignore"):
            return np.log(alpha) - np.log(sigma)

    def names(self, i: int, x_a: np.ndarray) -> dict[str, Any]:
        """What the notation gives a value to in step i."""
        a, b = self.grid[i : i + 2]
        found: dict[str, Any] = {"x_0": self.x, "x_a": x_a, "t_a": a, "t_b": b, "h": b - a, "v": velocity}
        found |= {"exp": np.exp, "sqrt": math.sqrt, "eta": 1.0, "c": 1.0, "z": self.noise[i]}
        for place, t in (("a", a), ("b", b)):
            found[f"alpha_{place}"], found[f"sigma_{place}"], _, _ = self.path.coefficients(t)
        with np.errstate(invalid="ignore"):
            found["H"] = self.log_snr(b) - self.log_snr(a)
            found["H_1"] = self.log_snr(a) - self.log_snr(self.grid[i - 1])
        for k, values in enumerate(self.past):
            found |= {f"{q}_{k or 'a'}": values[q] for q in "tvme"}
        return found


def product(text: str) -> str:
    """The formula's text as Python: powers, starred names, and products where two factors stand side by side."""
    text = re.sub(r"int (\w) d(?:\((\w+) / (\w+)\)|t)", r"integral(\1,'\2/\3')", text)
    text = re.sub(r"\b([xvmt])\*", r"\1_star", text).replace("^", "**")
    return re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", text)


def variable(run: Run, word: str, t: Any) -> Any:
    """The polynomial's variable at time t."""
    alpha, sigma, _, _ = run.path.coefficients(t)
    return {"t": t, "lambda": run.log_snr(t), "sigma / alpha": sigma / alpha}[word]


def polynomial(run: Run, word: str, values: list[str], names: dict[str, Any]) -> Any:
    """The polynomial in ``word`` through values called v_a, m_1, e_2, m* (in Newton's form), as a function of t."""
    keys = [value.replace("*", "_star") for value in values]
    z = [variable(run, word, names["t" + key[1:]]) for key in keys]
    table = [names[key] for key in keys]
    for level in range(1, len(z)):
        for k in range(len(z) - 1, level - 1, -1):
            table[k] = (table[k] - table[k - 1]) / (z[k] - z[k - level])

    def at(t: float) -> np.ndarray:
        here = variable(run, word, t)
        total = 0 * table[0]
        for coefficient, node in zip(table[::-1], z[::-1], strict=True):
            total = total * (here - node) + coefficient
        return total

    return at


def tangent(run: Run, at: Any, t_a: float) -> Any:
    """The line in lambda through the polynomial's value and slope at t_a (central difference in t)."""
    step = 1e-5
    rise = run.log_snr(t_a + step) - run.log_snr(t_a - step)
    slope = (at(t_a + step) - at(t_a - step)) / rise
    return lambda t: at(t_a) + slope * (run.log_snr(t) - run.log_snr(t_a))


def integral(run: Run, names: dict[str, Any]) -> Any:
    """``int P dw`` over the step by Gauss-Legendre quadrature."""

    def integrate(at: Any, measure: str) -> np.ndarray:
        a, b = names["t_a"], names["t_b"]
        t = (a + b) / 2 + (b - a) / 2 * NODES
        alpha, sigma, d_alpha, d_sigma = run.path.coefficients(t)
        wronskian = d_alpha * sigma - alpha * d_sigma
        density = {"/": 1 + 0 * t, "alpha/sigma": wronskian / sigma**2, "sigma/alpha": -wronskian / alpha**2}[measure]
        return (b - a) / 2 * sum(w * d * at(float(s)) for w, d, s in zip(WEIGHTS, density, t, strict=True))

    return integrate


def step(run: Run, name: str, i: int, x_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The predicted and the final state at the end of step i; they are the same without a corrector."""
    names = run.names(i, x_a)
    names["integral"] = integral(run, names)
    clauses = FORMULAS[name].split("; ")
    predicted, ends = None, {}
    if clauses[0].startswith("x* = ") and clauses[0].endswith(" step"):
        predicted = step(run, clauses[0][5:-5], i, x_a)[1]
    # first the clauses that define symbols, then the states; what needs the prediction comes after it
    waiting = [clause for clause in clauses if not clause.endswith(" step") and " as " not in clause]
    while waiting:
        clause = waiting.pop(0)
        if predicted is not None and "x_star" not in names:
            names |= {f"{q}_star": value for q, value in run.look(predicted, names["t_b"]).items()}
            names["x_star"] = predicted
        try:
            kind = read(run, clause, names)
        except (KeyError, NameError):  # a symbol of it is defined by a later clause
            assert waiting, f"{name}: {clause!r} has a symbol without a meaning"
            waiting.append(clause)
            continue
        if kind == "x*":
            predicted = names["x*"]
        elif kind == "x_b":
            ends[clause.startswith("on equal steps")] = names["x_b"]
    if True in ends and len({round(s - r, 9) for r, s in itertools.pairwise(run.grid)}) == 1:
        np.testing.assert_allclose(ends[True], ends[False], rtol=1e-12)
    return ends[False] if predicted is None else predicted, ends[False]


def read(run: Run, clause: str, names: dict[str, Any]) -> str:
    """Give the symbol that a clause defines its value; return the symbol."""
    if found := re.fullmatch(r"(\w)\((.*)\) through (.*)", clause):
        names[found[1]] = polynomial(run, found[2], found[3].split(", "), names)
        return found[1]
    if clause == "T tangent to P at lambda_a":
        names["T"] = tangent(run, names["P"], names["t_a"])
        return "T"
    symbol, text = clause.removeprefix("on equal steps ").split(" = ")
    names[symbol] = eval(product(text), {}, names)
    return symbol


def run_formula(name: str, path: Any, grid: tuple[float, ...], x: np.ndarray, noise: list[np.ndarray]) -> np.ndarray:
    """The states at the grid's times where the network is called, and the end."""
    run = Run(path, grid, x, noise)
    states, point = [x], x
    for i in range(len(grid) - 1):
        run.past.insert(0, run.look(point, grid[i]))
        now = name
        while history(now) > i:
            now = START[now]
        point, x = step(run, now, i, x)
        states.append(point)
    return np.array(states)


def history(name: str) -> int:
    """How many steps before its own a formula looks at."""
    own = [int(k) for k in re.findall(r"\b[vme]_(\d)", FORMULAS[name])]
    other = re.match(r"x\* = ([^;]*) step;", FORMULAS[name])
    return max([0, *own, *([history(other[1])] if other else [])])


@pytest.mark.parametrize(
    ("name", "path", "grid"),
    [
        ("anchored", "linear", WHOLE),
        *itertools.product(sorted({*FORMULAS} - {"anchored", "trapezium"}), PATHS, (UNEQUAL, EQUAL)),
    ],
)
def test_the_formula_of_every_solver_gives_its_tables_states(name: str, path: str, grid: tuple[float, ...]) -> None:
    x0 = np.array([[-1.3], [0.2], [0.9]])
    own, ours = PATHS[path]
    noise = [
        noise_rows(3, (1,), seed=5, draw=FIRST_DRAW + k, dtype=torch.float64).numpy() for k in range(len(grid) - 1)
    ]
    states = run_formula(name, own, grid, x0, noise)
    sol = fs.solve(as_network, torch.from_numpy(x0), solver=name, grid=grid, path=ours, trajectory=True, seed=5)
    # the tangent of the one formula that has it is a central difference
    tolerance = 1e-7 if "tangent" in FORMULAS[name] else 1e-10
    assert sol.trajectory is not None
    np.testing.assert_allclose(sol.trajectory.numpy(), states, atol=tolerance)


def test_no_two_formulas_give_the_same_states() -> None:
    """So that a formula cannot stand at the wrong solver unseen."""
    x0, noise = np.array([[0.7]]), [np.array([[0.4]])] * 6
    names = sorted({*FORMULAS} - {"anchored", "trapezium"})
    ends = np.array([run_formula(name, Circle(), UNEQUAL, x0, noise)[-1].item() for name in names])
    gaps = np.abs(ends[:, None] - ends) + np.eye(len(ends))
    first, second = np.unravel_index(gaps.argmin(), gaps.shape)
    assert gaps.min() > 1e-8, (names[first], names[second])


def test_every_solver_has_a_formula_and_a_source() -> None:
    for name, solver in [*SOLVERS.items(), *ADAPTIVE.items()]:
        assert re.match(r"x_b = |x\* = ", solver.formula), name
        assert re.search(r"arXiv:\d{4}\.\d{5}|Solving ODEs I, ", solver.source), name
        assert "\n" not in solver.formula, name
    assert {name for name, _ in entries()} == {*SOLVERS, "ddim:eta"}


def test_the_list_prints_order_calls_source_and_formula_in_a_hundred_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "solvers"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "heun                 order 2, 2 calls a step        Hairer et al., Solving ODEs I, II.1" in printed
    for name, solver in [*SOLVERS.items(), ("rk45", ADAPTIVE["rk45"])]:
        assert re.search(rf"^{re.escape(name)} +.*{re.escape(solver.source)}$", printed, re.MULTILINE), name
        for clause in solver.formula.split("; "):
            assert clause in printed, name
            assert len(clause) <= WIDTH, name
