"""Make the pairs that a student learns from: solve a teacher's flow from noise to its endpoint, or from data to noise.

Every row is a function of (seed, row number), shards are solved in fixed chunks, and each process writes its own
shards. So a generation that was killed and resumed, or one on several processes, gives the same bytes. The number of
solver steps is chosen when a store is begun, and is stored in its manifest. Before a store is used, 256 rows from all
over it pass three checks. Solved again, they are equal to the stored ones, so the pairs are this teacher's and x0 and
x1 are not swapped. Solved with twice the steps, they are almost equal; the difference is the error. Inverted noise has
the mean square of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.data.dataset import LABEL
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, GaussianSource, Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import BLOCK, generator_for, integer_rows, mix, noise_rows
from fewstep.methods.contract.options import PairOptions, baked_in
from fewstep.methods.contract.stage import Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.training_pairs.batches import EpochOrder, without_padding
from fewstep.solvers.solve import invert, solve
from fewstep.solvers.tables import find_solver
from fewstep.store.pairs import ROW, Columns, PairRows, PairStore

PILOT = 256  # rows on which errors are measured; chosen, not tuned
MAX_MEAN_SQUARE = 2.0  # of inverted noise; above it the pairs are refused; chosen, not tuned
MIN_MEAN_SQUARE = 0.5  # of inverted noise; below it the pairs are not used; chosen, not tuned
MIN_SPREAD = 0.05  # standard deviation of a coordinate that varies, in network units; chosen, not tuned
LADDER = (16, 32, 64, 128)  # network calls per pair that are tried until the error is within the tolerance
MAX_RESOLVE_ERROR = 0.01  # relative difference of two equal solves, also on different machines; chosen, not tuned


@final
@dataclass(frozen=True)
class PairRequest:
    """The pairs to make.

    Attributes:
        direction: ``generated`` (from noise to the teacher's endpoint) or ``inverted`` (from a data row to its noise).
        rows: number of pairs.
        options: solver, network calls, tolerance and guidance.
        teacher: the model whose flow is solved.
        tag: name of the round; different tags have different noise.
    """

    direction: Literal["generated", "inverted"]
    rows: int
    options: PairOptions
    teacher: Teacher
    tag: str


def build_pairs(stage: Stage, request: PairRequest) -> PairStore:
    """Make a pair store below the stage's folder, or finish one that was begun, and check it.

    Args:
        stage: the stage.
        request: the pairs to make.

    Raises:
        UserError: the store on disk has pairs of another request or teacher; the error is above ``tolerance`` with the
            number of calls that the options fix, or above .5; the flow ends in values that are not finite; or inverted
            noise has a mean square above 2.
    """
    maker = _Maker(stage, request)
    world = stage.world
    folder = stage.folder / "pairs" / request.tag / request.direction
    store = PairStore(folder, maker.description(), request.rows, stage.cond_rows)
    if world.rank == 0:
        store.open(maker.choose_steps)
    world.barrier()
    if store.complete:
        return store
    maker.steps = int(store.manifest["request"]["steps"])
    missing = store.missing()
    world.barrier()  # all processes list the missing shards before one of them writes a shard
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


class KnownEnds(NamedTuple):
    """The known ends of some pairs.

    Attributes:
        x: noise, or data rows, (B, ...).
        cond: their conditions.
        numbers: the data rows that the conditions belong to, (B,).
    """

    x: Tensor
    cond: dict[str, Tensor]
    numbers: Tensor


@final
class _Maker:
    """Computes the rows of a store, and checks a finished store."""

    def __init__(self, stage: Stage, request: PairRequest) -> None:
        self.stage, self.request = stage, request
        self.seed = mix(stage.seed, "pairs", request.tag, request.direction)
        self.velocity: Velocity = request.teacher.guided(request.options.guidance)
        self.train = torch.as_tensor(stage.data.train)
        self.order = EpochOrder(len(self.train), (self.seed, "rows"))
        self.stages = find_solver(request.options.solver).calls
        self.steps = 0

    def description(self) -> dict[str, Any]:
        """The request as it is stored in the manifest; a store with another request is refused."""
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
            **({"conditions": list(self.stage.conditions)} if self.by_reference else {}),
            "data": self.stage.data.fingerprint,
            "dequantise": self.stage.dequantise,
            "time": "0 is noise, 1 is data",
            "range": "network units",
        }

    def choose_steps(self) -> dict[str, Any]:
        """The solver steps and network calls per pair of a new store."""
        steps = self._choose_steps()
        return {"steps": steps, "nfe": steps * self.stages}

    @property
    def by_reference(self) -> bool:
        """Whether the store holds numbers of data rows in place of conditions; labels are as small as a number."""
        return self.stage.conditions not in ((), (LABEL,))

    def known_ends(self, start: int, count: int) -> KnownEnds:
        """The known ends of rows ``start … start + count``."""
        if self.request.direction == "generated":
            x = base_rows(self.stage, count, seed=self.seed, start=start)
            rows = integer_rows(count, len(self.train), seed=self.seed, start=start, draw=1)
        else:
            rows = self.order.indices(start, count)
            x = self.stage.data.network_rows(self.train[rows].numpy())
            if self.stage.dequantise:
                x = x + self.stage.dequantise * noise_rows(count, x.shape[1:], seed=self.seed, start=start)
        cond = self.stage.cond_rows(self.train[rows])
        return KnownEnds(without_padding(Pair(x, x, cond), self.stage.data.mask).x0, cond, self.train[rows])

    def solve_rows(self, x: Tensor, cond: Mapping[str, Tensor], steps: int) -> Tensor:
        """Solve the flow from the known end x (B, ...) to the other end, on the CPU."""
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
            x, cond, numbers = self.known_ends(first, size)
            y = self.solve_rows(x, cond, self.steps)
            if not torch.isfinite(y).all():
                raise UserError(
                    f"stage {self.stage.name!r}: the flow of {self.request.teacher.name!r} ends in NaN or "
                    f"infinite values ({self.request.direction} pairs): train it longer or with a lower lr."
                )
            x0, x1 = (x, y) if self.request.direction == "generated" else (y, x)
            parts.append({"x0": x0, "x1": x1, **({ROW: numbers} if self.by_reference else cond)})
            bar.update(size)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _choose_steps(self) -> int:
        """Steps per pair: those of ``nfe``, or the fewest of the ladder whose error is within the tolerance."""
        options = self.request.options
        if options.nfe is not None:
            assert options.nfe % self.stages == 0, "the options were checked when the recipe was read"
            return options.nfe // self.stages
        x, cond, _ = self.known_ends(0, min(PILOT, self.request.rows))
        coarse = self.solve_rows(x, cond, LADDER[0] // self.stages)
        for nfe in LADDER:
            fine = self.solve_rows(x, cond, 2 * nfe // self.stages)
            if relative_error(coarse, fine) <= options.tolerance:
                return nfe // self.stages
            coarse = fine
        return LADDER[-1] // self.stages

    def check(self, store: PairStore) -> dict[str, Any]:
        """Solve 256 stored rows again, with the same and with twice the steps, and measure inverted noise."""
        stored = store.training_rows()
        chosen = torch.linspace(0, len(stored) - 1, min(PILOT, len(stored))).round().long()
        rows = stored.columns(chosen)
        cond = {name: rows[name] for name in self.stage.conditions}
        known, found = ("x0", "x1") if self.request.direction == "generated" else ("x1", "x0")
        self._check_origin(store, rows[known], rows[found], cond)
        error = relative_error(rows[found], self.solve_rows(rows[known], cond, 2 * self.steps))
        checks: dict[str, Any] = {"relative_error": error}
        self._check_error(error)
        if self.request.direction == "inverted" and isinstance(self.stage.source, GaussianSource):
            law = noise_law(stored)
            checks["noise_law"] = law
            self._check_law(law)
        return checks

    def _check_origin(self, store: PairStore, known: Tensor, found: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Refuse pairs that differ from the teacher's solution with the manifest's solver and steps."""
        if relative_error(self.solve_rows(known, cond, self.steps), found) <= MAX_RESOLVE_ERROR:
            return
        swapped = relative_error(self.solve_rows(found, cond, self.steps), known) <= MAX_RESOLVE_ERROR
        what = "have x0 and x1 swapped" if swapped else "are not what the teacher makes of their starting points"
        raise UserError(
            f"the pairs in {store.folder} {what}: delete that folder, and the same command makes them again."
        )

    def _check_error(self, error: float) -> None:
        """Refuse an error above the tolerance if the user fixed ``nfe`` or it is above .5; otherwise warn."""
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

    def _check_law(self, law: Mapping[str, float]) -> None:
        """Refuse inverted noise of too large a mean square, and print a note on a coordinate's variance."""
        if law["mean_square"] > MAX_MEAN_SQUARE:
            raise UserError(
                f"stage {self.stage.name!r}: the data inverted to noise of mean square "
                f"{law['mean_square']:.3g} instead of 1: the teacher was trained on other data, or for too few "
                "samples. Train it longer, or use 'real: independent'."
            )
        if law["worst_variance"] > 2.0 or law["worst_variance"] < 0.4:
            self.stage.world.say(
                f"note: inverted noise has variance {law['worst_variance']:.2f} in its worst coordinate, instead of 1; "
                "a teacher that is trained longer comes closer."
            )


def has_base_law(store: PairStore) -> bool:
    """Whether the noise of a store of inverted pairs has a mean square of .5 or more; True for generated pairs.

    A teacher that has memorised a data row maps a large region of noise to it, and the row inverts to the middle of
    that region, whose norm is too small.
    """
    law = store.manifest["checks"].get("noise_law")
    return law is None or bool(law["mean_square"] >= MIN_MEAN_SQUARE)


def base_rows(stage: Stage, count: int, *, seed: int, start: int) -> Tensor:
    """Rows of the base, N(0, I) or a data set, as a function of (seed, row number); (count, ...).

    Args:
        stage: gives the base and the shape of a row.
        count: number of rows.
        seed: the seed.
        start: number of the first row.
    """
    if isinstance(stage.source, GaussianSource):
        return noise_rows(count, stage.data.shape, seed=seed, start=start)
    first, last = start // BLOCK, (start + count - 1) // BLOCK
    blocks = [stage.source.sample(BLOCK, generator_for(seed, block, 0)) for block in range(first, last + 1)]
    offset = start - first * BLOCK
    return torch.cat(blocks)[offset : offset + count]


def relative_error(x: Tensor, y: Tensor) -> float:
    """Root mean square of ``x - y`` over the 95 % of rows with the least error, divided by the spread of y.

    The other rows are left out because near a boundary between modes the flow map is almost discontinuous, and a few
    rows there would dominate the error.

    Args:
        x, y: (B, ...). The spread is the root mean variance of y's coordinates over the rows.

    >>> relative_error(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]]))
    0.5
    """
    error = (x - y).double().flatten(1).square().mean(1).sort().values
    kept = error[: max(1, math.ceil(0.95 * len(error)))].mean()
    spread = y.double().flatten(1).var(0, correction=0).mean() if len(y) > 1 else y.double().square().mean()
    return float((kept / spread.clamp_min(1e-12)).sqrt())


def noise_law(stored: PairRows) -> dict[str, float]:
    """Moments of inverted noise, which are known for N(0, I).

    Args:
        stored: rows of a store; up to 8192 are used.

    Returns:
        ``mean_square`` (1 for N(0, I)); ``worst_mean``, the largest absolute mean of a coordinate (0);
        ``worst_variance``, the variance of a coordinate with the largest ratio to 1; ``neighbour_correlation`` of
        adjacent entries (0). Coordinates whose data have a standard deviation below .05 are left out: the flow maps all
        noise there to almost one value, so its inversion is not determined.
    """
    columns = stored.columns(torch.arange(min(8192, len(stored))))
    varies = columns["x1"].double().flatten(1).std(0) > MIN_SPREAD
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
    """What holds for the coupling of pairs that one teacher made: dependent, deterministic, with its guidance."""
    return Facts(
        independent=False,
        deterministic=True,
        teacher=request.teacher.digest,
        guidance=baked_in(request.options.guidance),
    )
