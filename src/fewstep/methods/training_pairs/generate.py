"""Make the pairs a student learns from: noise carried to the teacher's endpoint, or data to its noise.

Every row is a function of (seed, row number), shards are solved in fixed chunks, and each process writes
its own shards, so that a killed generation, or one with more processes, ends with the same bytes. The
number of solver steps is settled once, when a store is begun, and kept in its manifest. Before a store is
used, rows from all over it pass three checks: solving them again gives what is stored (so the pairs are
this teacher's, and the right way round), twice the steps give nearly the same (the error), and inverted
noise has the law of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, GaussianSource
from fewstep.flow.field import Velocity
from fewstep.flow.noise import BLOCK, generator_for, integer_rows, mix, noise_rows
from fewstep.methods.contract.options import PairOptions, baked_in
from fewstep.methods.contract.stage import Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.training_pairs.batches import EpochOrder
from fewstep.solvers.solve import invert, solve
from fewstep.solvers.tables import find_solver
from fewstep.store.pairs import Columns, PairRows, PairStore

PILOT = 256
MOST_SQUARE, LEAST_SQUARE = 2.0, 0.5  # mean square of inverted noise: refused above, left out below
LEAST_SPREAD = 0.05  # standard deviation in network units from which a coordinate of the data counts as varying
LADDER = (16, 32, 64, 128)  # network calls per pair that the error gate tries
SAME = 0.01  # relative difference of two equal solves, on whatever machines


@final
@dataclass(frozen=True)
class PairRequest:
    """Which pairs to make.

    Attributes:
        direction: ``generated`` (noise to the teacher's endpoint) or ``inverted`` (data to its noise).
        rows: how many.
        options: solver, calls, tolerance, guidance.
        teacher: who makes them.
        tag: distinguishes the noise of rounds.
    """

    direction: Literal["generated", "inverted"]
    rows: int
    options: PairOptions
    teacher: Teacher
    tag: str


def build_pairs(stage: Stage, request: PairRequest) -> PairStore:
    """Make (or finish) a pair store below the stage's folder and check it.

    Raises:
        UserError: the store on disk is another teacher's; the pairs are less accurate than ``tolerance`` at a
            number of calls the user fixed; inverted noise that is nothing like the base.
    """
    maker = _Maker(stage, request)
    world = stage.world
    store = PairStore(stage.folder / "pairs" / request.tag / request.direction, maker.description(), request.rows)
    if world.rank == 0:
        store.open(maker.settle)
    world.barrier()
    if store.complete:
        return store
    maker.steps = int(store.manifest["request"]["steps"])
    missing = store.missing()
    world.barrier()  # every process has seen the same shards missing before the first one writes
    done = request.rows - sum(store.shard_range(number)[1] for number in missing)
    with world.progress(request.rows, done, f"{stage.name}: {request.direction} pairs") as bar:
        for number in missing[world.rank :: world.size]:
            start, count = store.shard_range(number)
            store.write_shard(number, maker.rows(start, count, bar))
    world.barrier()
    if world.rank == 0:
        store.finish(maker.check(store))
    world.barrier()
    return store


@final
class _Maker:
    """Computes rows of a store and checks them."""

    def __init__(self, stage: Stage, request: PairRequest) -> None:
        self.stage, self.request = stage, request
        self.seed = mix(stage.seed, "pairs", request.tag, request.direction)
        self.velocity: Velocity = request.teacher.guided(request.options.guidance)
        self.train = torch.as_tensor(stage.data.train)
        self.order = EpochOrder(len(self.train), (self.seed, "rows"))
        self.labels = stage.data.label_rows(stage.data.train) if stage.conditional else None
        self.stages = find_solver(request.options.solver).calls
        self.steps = 0

    def description(self) -> dict[str, Any]:
        """What is asked for; kept in the manifest, and a store that holds something else is refused."""
        options = self.request.options
        accuracy = {"tolerance": options.tolerance} if options.nfe is None else {"nfe": options.nfe}
        return {
            "direction": self.request.direction,
            "teacher": self.request.teacher.digest,
            "solver": options.solver,
            **accuracy,
            "grid": options.grid,
            "guidance": options.guidance,
            "seed": self.stage.seed,
            "tag": self.request.tag,
            "shape": list(self.stage.data.shape),
            "conditional": self.stage.conditional,
            "data": self.stage.data.fingerprint,
            "dequantise": self.stage.dequantise,
            "time": "0 is noise, 1 is data",
            "range": "network units",
        }

    def settle(self) -> dict[str, Any]:
        """The solver steps of a new store."""
        steps = self._choose_steps()
        return {"steps": steps, "nfe": steps * self.stages}

    def starts(self, start: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The known end of rows ``start … start + count`` and their conditions."""
        if self.request.direction == "generated":
            x = base_rows(self.stage, count, seed=self.seed, start=start)
            rows = integer_rows(count, len(self.train), seed=self.seed, start=start, draw=1)
        else:
            rows = self.order.indices(start, count)
            x = self.stage.data.network_rows(self.train[rows].numpy())
            if self.stage.dequantise:
                x = x + self.stage.dequantise * noise_rows(count, x.shape[1:], seed=self.seed, start=start)
        return x, {} if self.labels is None else {"label": self.labels[rows]}

    def carry(self, x: Tensor, cond: Mapping[str, Tensor], steps: int) -> Tensor:
        """Solve from the known end to the other one."""
        run = solve if self.request.direction == "generated" else invert
        device = self.stage.world.device
        cond = {name: value.to(device) for name, value in cond.items()}
        options, path = self.request.options, self.request.teacher.path
        x = x.to(device)
        return run(
            self.velocity, x, solver=options.solver, steps=steps, grid=options.grid, cond=cond, path=path
        ).x.cpu()

    def rows(self, start: int, count: int, bar: Any) -> Columns:
        """Columns of one shard, solved in chunks of 256 rows."""
        parts: list[Columns] = []
        for first in range(start, start + count, BLOCK):
            size = min(BLOCK, start + count - first)
            x, cond = self.starts(first, size)
            y = self.carry(x, cond, self.steps)
            if not torch.isfinite(y).all():
                raise UserError(
                    f"stage {self.stage.name!r}: the flow of {self.request.teacher.name!r} ends in NaN or "
                    f"infinite values ({self.request.direction} pairs): train it longer or with a lower lr."
                )
            x0, x1 = (x, y) if self.request.direction == "generated" else (y, x)
            parts.append({"x0": x0, "x1": x1, **cond})
            bar.update(size)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _choose_steps(self) -> int:
        """Steps per pair: the user's, or the first of the ladder whose error is within the tolerance."""
        options = self.request.options
        if options.nfe is not None:
            assert options.nfe % self.stages == 0, "the options were checked when the recipe was read"
            return options.nfe // self.stages
        x, cond = self.starts(0, min(PILOT, self.request.rows))
        coarse = self.carry(x, cond, LADDER[0] // self.stages)
        for nfe in LADDER:
            fine = self.carry(x, cond, 2 * nfe // self.stages)
            if relative_error(coarse, fine) <= options.tolerance:
                return nfe // self.stages
            coarse = fine
        return LADDER[-1] // self.stages

    def check(self, store: PairStore) -> dict[str, Any]:
        """Solve some stored rows again, with as many and with twice the steps; look at inverted noise."""
        stored = store.training_rows()
        chosen = torch.linspace(0, len(stored) - 1, min(PILOT, len(stored))).round().long()
        rows = stored.columns(chosen)
        cond = {"label": rows["label"]} if "label" in rows else {}
        known, found = ("x0", "x1") if self.request.direction == "generated" else ("x1", "x0")
        self._judge_origin(store, rows[known], rows[found], cond)
        error = relative_error(rows[found], self.carry(rows[known], cond, 2 * self.steps))
        checks: dict[str, Any] = {"relative_error": error}
        self._judge_error(error)
        if self.request.direction == "inverted" and isinstance(self.stage.source, GaussianSource):
            law = noise_law(stored)
            checks["noise_law"] = law
            self._judge_law(law)
        return checks

    def _judge_origin(self, store: PairStore, known: Tensor, found: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Refuse pairs that this teacher, solved as the manifest says, does not make."""
        if relative_error(self.carry(known, cond, self.steps), found) <= SAME:
            return
        swapped = relative_error(self.carry(found, cond, self.steps), known) <= SAME
        what = "have x0 and x1 swapped" if swapped else "are not what the teacher makes of their starting points"
        raise UserError(
            f"the pairs in {store.folder} {what}: delete that folder, and the same command makes them again."
        )

    def _judge_error(self, error: float) -> None:
        options, tolerance = self.request.options, self.request.options.tolerance
        if error <= tolerance:
            return
        what = (
            f"{self.request.direction} pairs are off by {error:.3g} of their spread when re-solved with twice the steps"
        )
        if options.nfe is not None or not error <= 0.5:
            raise UserError(
                f"stage {self.stage.name!r}: {what}, and the tolerance is {tolerance:g}: raise nfe (now "
                f"{self.steps * self.stages} calls of {options.solver!r}) or, if that will do, the tolerance."
            )
        self.stage.world.say(f"warning: {what}, even at {LADDER[-1]} calls (tolerance {tolerance:g}).")

    def _judge_law(self, law: Mapping[str, float]) -> None:
        if law["mean_square"] > MOST_SQUARE:
            raise UserError(
                f"stage {self.stage.name!r}: the data inverted to noise of mean square "
                f"{law['mean_square']:.3g} instead of 1: the teacher was trained on other data, or too "
                "little. Train it longer, or use 'real: independent'."
            )
        if law["worst_variance"] > 2.0 or law["worst_variance"] < 0.4:
            self.stage.world.say(
                f"note: inverted noise has variance {law['worst_variance']:.2f} in its worst coordinate "
                "(1 expected); a longer-trained teacher brings it closer."
            )


def has_base_law(store: PairStore) -> bool:
    """Whether a store of inverted pairs has noise that can stand for the base's.

    Data that the teacher has memorised lie at the centres of large cells of noise, and invert to too small a norm.
    """
    law = store.manifest["checks"].get("noise_law")
    return law is None or bool(law["mean_square"] >= LEAST_SQUARE)


def base_rows(stage: Stage, count: int, *, seed: int, start: int) -> Tensor:
    """Rows of the base: N(0, I), or rows of the base data set, as a function of (seed, row number)."""
    if isinstance(stage.source, GaussianSource):
        return noise_rows(count, stage.data.shape, seed=seed, start=start)
    first, last = start // BLOCK, (start + count - 1) // BLOCK
    blocks = [stage.source.sample(BLOCK, generator_for(seed, block, 0)) for block in range(first, last + 1)]
    offset = start - first * BLOCK
    return torch.cat(blocks)[offset : offset + count]


def relative_error(x: Tensor, y: Tensor) -> float:
    """RMS of ``x - y`` over the 95 % of rows that agree best, over the RMS spread of ``y``.

    The few rows beside a boundary between modes, where the flow map nearly jumps, would otherwise decide.
    """
    error = (x - y).double().flatten(1).square().mean(1).sort().values
    kept = error[: max(1, math.ceil(0.95 * len(error)))].mean()
    spread = y.double().flatten(1).var(0, correction=0).mean() if len(y) > 1 else y.double().square().mean()
    return float((kept / spread.clamp_min(1e-12)).sqrt())


def noise_law(stored: PairRows) -> dict[str, float]:
    """How far inverted noise is from N(0, I).

    Returns:
        ``mean_square`` (1 for N(0, I)), ``worst_mean`` (largest coordinate mean in absolute value),
        ``worst_variance`` (coordinate variance furthest from 1, as a ratio), ``neighbour_correlation``
        (between adjacent entries). Coordinates in which the data hardly vary are left out: the flow has
        squeezed their noise into nothing, and no inversion brings it back.
    """
    columns = stored.columns(torch.arange(min(8192, len(stored))))
    varies = columns["x1"].double().flatten(1).std(0) > LEAST_SPREAD
    flat = columns["x0"].double().flatten(1)
    flat = flat[:, varies] if varies.any() else flat
    variance = flat.var(0)
    worst = variance[(variance.clamp_min(1e-12).log().abs()).argmax()]
    standard = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-12)
    neighbours = (standard[:, 1:] * standard[:, :-1]).mean() if flat.shape[1] > 1 else torch.zeros(())
    return {
        "mean_square": float(flat.square().mean()),
        "worst_mean": float(flat.mean(0).abs().max()),
        "worst_variance": float(worst),
        "neighbour_correlation": float(neighbours),
    }


def pair_facts(request: PairRequest) -> Facts:
    """What is true of pairs that one teacher made."""
    return Facts(
        independent=False,
        deterministic=True,
        teacher=request.teacher.digest,
        guidance=baked_in(request.options.guidance),
    )
