"""Solvers as text: the entry of each in ``fewstep list solvers``, and the rows of its table on a grid."""

from __future__ import annotations

import textwrap

from fewstep.solvers.tables import SOLVERS, VALUED, Table
from fewstep.solvers.tape import Solver

NOTATION = """\
notation: one step from (x_a, t_a) to (x_b, t_b) on the path x_t = alpha x1 + sigma x0
    h = t_b - t_a, lambda = log(alpha / sigma), H = lambda_b - lambda_a, H_1 = H of the step before
    v_a, m_a, e_a: velocity, data prediction E[x1 | x_t] and noise prediction E[x0 | x_t] at t_a
    v_1, m_1, e_1: the same one step before t_a; v_2, m_2, e_2: two steps before; and so on
    x*, v*, m*: predicted state at t_b and the network there (the next step uses the same call)
    int P dw: integral over the step of the polynomial P, which interpolates the named values
    z: fresh noise N(0, I)"""
WIDTH = 96  # columns of a formula: 100 less the indent


def entries() -> list[tuple[str, str]]:
    """Name and text of every solver that has a table: order, network calls a step and source; below, the formula."""
    found = [(name, entry(solver)) for name, solver in SOLVERS.items()]
    ancestral = ("ddim:eta", entry(VALUED["ddim"](1.0)))
    after = 1 + list(SOLVERS).index("ddim")
    return [*found[:after], ancestral, *found[after:]]


def entry(solver: Solver) -> str:
    """The text of one solver.

    >>> print(entry(SOLVERS["euler"]))
    order 1, 1 call a step         Hairer et al., Solving ODEs I, II.1
    x_b = x_a + h v_a
    """
    order = f"order {solver.order}" if solver.converges else "straight flows"
    calls = f"{solver.calls} call{'s' if solver.calls > 1 else ''} a step"
    return text(f"{order}, {calls}", solver.formula, solver.source)


def text(head: str, formula: str, source: str) -> str:
    """An entry's lines: head and source, then the formula, its clauses kept together where they fit."""
    return "\n".join([f"{head:30} {source}", *_clauses(formula)])


def _clauses(formula: str) -> list[str]:
    lines = [""]
    for clause in formula.split("; "):
        longer = f"{lines[-1]}; {clause}" if lines[-1] else clause
        if len(longer) <= WIDTH:
            lines[-1] = longer
        else:
            lines.extend(textwrap.wrap(clause, WIDTH))
    return [line for line in lines if line]


def rows(table: Table) -> list[str]:
    """Lines of the dense form ``y_j = a_j x_0 + sum_k b_jk v_k``, ``v_j = v(y_j, t_j)``, and last the end point."""
    a, b = table.dense
    count = len(table.times)
    head = ["row", "t", "x_0", *(f"v_{k}" for k in range(count))]
    lines = [head]
    for j in range(count + 1):
        name, time = (f"y_{j}", table.times[j]) if j < count else ("end", table.grid[-1])
        weights = [f"{weight:.6f}" for weight in b[j, : min(j, count)]]
        lines.append([name, f"{time:.6f}", f"{a[j]:.6f}", *weights, *[""] * (count - len(weights))])
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
