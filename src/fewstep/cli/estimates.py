"""What a verb will cost, said before it starts, kept to where the user limits it, and shown while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from fewstep.diagnostics.cost import Cost, Speed, measure_speed
from fewstep.diagnostics.diagnose import LEAST_NODES, diagnosis_cost
from fewstep.diagnostics.pick import Choice
from fewstep.diagnostics.tune import MIN_NOISES, noises_for, tuning_cost
from fewstep.errors import UserError
from fewstep.flow.field import as_field, calls_at
from fewstep.training.world import Progress

if TYPE_CHECKING:
    from fewstep.generator import Generator

FEWEST_NOISES = 8  # of the smallest diagnosis that is planned with; derivatives may take three times what is planned
SPARE_ROWS = 64  # for finding out how a network is differentiated


@final
class Estimates:
    """The pieces of a verb's work in their order: what each costs, and how much of the user's time each may take.

    The time is shared in proportion to the estimates; what one piece leaves is shared among the following ones.

    Args:
        speed: of the network.
        minutes: the user's limit; None for no limit.

    Raises:
        UserError: a limit that is no positive number.
    """

    def __init__(self, speed: Speed, minutes: float | None) -> None:
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"--minutes must be a positive number, got {minutes:g}.")
        self.speed, self.minutes = speed, minutes
        self._pieces: list[tuple[str, Cost, Cost]] = []
        self._until = math.inf

    def add(self, label: str, cost: Cost, least: Cost) -> None:
        """Plan a piece of work.

        Args:
            label: its name in the progress display.
            cost: what it takes.
            least: what it takes when all is reduced that can be.
        """
        self._pieces.append((label, cost, least))

    def start(self) -> None:
        """Begin to count the user's minutes.

        Raises:
            UserError: they are fewer than the work takes when all is reduced that can be.
        """
        if self.minutes is None:
            return
        least = self._seconds(2)
        if least > 60 * self.minutes:
            raise UserError(
                f"--minutes {self.minutes:g} is too little: with the fewest noises this takes {in_words(least)} here. "
                "Give more minutes, or ask for fewer network calls."
            )
        self._until = time.monotonic() + 60 * self.minutes

    def __str__(self) -> str:
        """All pieces in one line."""
        rows = sum(cost.rows for _, cost, _ in self._pieces)
        parts = [f"{label} {cost.rows:,}" for label, cost, _ in self._pieces]
        detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        limit = "" if self.minutes is None else f"; reduced where it would take more than {self.minutes:g} minutes"
        return f"about {rows:,} network rows{detail}, {in_words(self._seconds(1))}{limit}"

    @contextmanager
    def next(self) -> Iterator[dict[str, Any]]:
        """Run the next piece with the keyword arguments ``max_rows`` and ``progress``, and show its progress."""
        rows = self._allowed()
        label, cost, _ = self._pieces.pop(0)
        with Progress(cost.rows, 0, label, shown=True, unit="network row") as bar:
            yield {"max_rows": rows, "progress": bar.reach}

    def _allowed(self) -> int | None:
        """Network rows that the next piece may take."""
        if self.minutes is None:
            return None
        _, cost, least = self._pieces[0]
        share = self.speed.seconds(cost) / max(self._seconds(1), 1e-9)
        seconds = (self._until - time.monotonic()) * share
        return max(least.rows + SPARE_ROWS, int(cost.rows * seconds / max(self.speed.seconds(cost), 1e-9)))

    def _seconds(self, which: int) -> float:
        """Seconds of the costs (1), or of the least costs (2), of all pieces."""
        costs = [piece[1] if which == 1 else piece[2] for piece in self._pieces]
        return self.speed.seconds(sum(costs, Cost()))


def in_words(seconds: float) -> str:
    """A time in seconds, or in minutes where it is long.

    >>> in_words(0.2), in_words(14.0), in_words(150.0)
    ('less than a second', '14 seconds', '2.5 minutes')
    """
    if seconds < 60:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second" if seconds >= 1 else "less than a second"
    return f"{seconds / 60:.1f} minutes"


def of_diagnosis(
    model: Generator, x0: Tensor, cond: Mapping[str, Any], calls: Sequence[int], minutes: float | None
) -> Estimates:
    """The work of ``diagnose``: the measures, then the samplers that are not known yet.

    Args:
        model: the model.
        x0: the noises of the measures, (M, ...).
        cond: their conditions.
        calls: numbers of network calls to find a sampler for.
        minutes: the user's limit.
    """
    made = Estimates(measure_speed(as_field(model.module), x0, cond), minutes)
    few = (min(FEWEST_NOISES, len(x0)), *x0.shape[1:])
    made.add("diagnosis", diagnosis_cost(x0.shape), diagnosis_cost(few, nodes=LEAST_NODES))
    for number in calls:
        if _missing(model, number, "auto", None, minutes):
            _add_tuning(made, model, number, "auto", None)
    made.start()
    return made


def find_samplers(model: Generator, calls: Sequence[int], estimates: Estimates) -> list[Choice]:
    """The best solver and grid for every number of calls; the model stores them.

    Args:
        model: the model.
        calls: numbers of network calls.
        estimates: of :func:`of_diagnosis`, after the measures.
    """
    found = []
    for number in calls:
        if _missing(model, number, "auto", None, estimates.minutes):
            with estimates.next() as limits:
                model.tune(number, **limits)
        choice = model.known_sampler(number)
        assert choice is not None, "tune keeps what it finds"
        found.append(choice)
    return found


def find_sampler(model: Generator, calls: int, kind: str, guidance: float | None, minutes: float | None) -> None:
    """Find the sampler for ``sample``, and print what that costs; nothing where it is known already.

    Args:
        model: the model.
        calls: evaluations per sample.
        kind: ``auto`` or ``fitted``.
        guidance: the guidance weight.
        minutes: the user's limit.
    """
    if model.known_sampler(calls, kind, guidance) is not None:
        return
    made = Estimates(measure_speed(*model.tuning_noises(2 * MIN_NOISES, guidance), derivatives=False), minutes)
    _add_tuning(made, model, calls, kind, guidance)
    made.start()
    print(f"cost  {made}", flush=True)
    with made.next() as limits:
        model.tune(calls, kind, guidance, **limits)


def _missing(model: Generator, calls: int, kind: str, guidance: float | None, minutes: float | None) -> bool:
    """Whether a sampler has to be found: there is none, or a reduced one where there is no limit now."""
    known = model.known_sampler(calls, kind, guidance)
    return known is None or (minutes is None and bool(known.notes))


def _add_tuning(made: Estimates, model: Generator, calls: int, kind: str, guidance: float | None) -> None:
    shape, path = model.config.shape, model.config.path
    costs = [
        tuning_cost(
            (noises, *shape),
            calls=calls,
            kind=kind,
            path=path,
            evaluations=1 if guidance is None else calls_at(guidance),
        )
        for noises in (noises_for(kind, shape), 2 * MIN_NOISES)
    ]
    made.add(f"best of {calls} calls" if kind == "auto" else f"fit of {calls} calls", *costs)
