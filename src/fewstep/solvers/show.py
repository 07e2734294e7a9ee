"""A solver's table as text."""

from __future__ import annotations

from fewstep.solvers.tables import Table


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
