"""Does a network obey this library's convention, does it see its inputs, and if not, what is the likely fix.

What is measured and when a fault is named: :mod:`.check_call` (arguments and output), :mod:`.check_loss` (time, sign,
prediction, units), :mod:`.check_inputs` (time, conditions and end time seen; conditions belong to their rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.diagnostics.check_call import Plain, device_of, find_call, find_infinite, find_redraws, mode, weight_dtype
from fewstep.diagnostics.check_inputs import (
    bound,
    find_blind_conditions,
    find_blind_end,
    find_shuffled,
    find_structural,
    find_time,
)
from fewstep.diagnostics.check_loss import (
    MISSING,
    READINGS,
    Repair,
    find_convention,
    find_no_velocity,
    find_units,
    repairs,
)
from fewstep.diagnostics.check_report import Check, Finding
from fewstep.diagnostics.check_rows import Network, Rows, Setting, setting_of, source_of
from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng
from fewstep.flow.paths import AffinePath, Linear, make_path
from fewstep.networks.foreign import Foreign
from fewstep.networks.two_time import INTERVAL

__all__ = ["Check", "Finding", "check_velocity", "quick_check"]

UNSEEN_TIME = {"blind_to_time", "truncated_time"}
UNSEEN = UNSEEN_TIME | {"blind_to_condition"}  # with one of these, samples of the network say nothing of its units
ROWS, SHORT_ROWS, FEWEST = 256, 40, 16  # data rows a network is evaluated on; chosen, not tuned


def check_velocity(
    net: Callable[..., Any],
    data: Any,
    *,
    conditions: Mapping[str, Any] | None = None,
    path: AffinePath | str = "linear",
    seed: int = 0,
    rows: int | None = None,
    short: bool = False,
    trained: bool = True,
    two_time: bool | None = None,
) -> Check:
    """Check a velocity network against data that it was trained on.

    Found on trained networks: arguments in another order, output of another shape or type, values that are not finite,
    random numbers drawn inside; flipped time, wrong sign, a factor 1000 missing or too much in the time, truncated or
    rounded times, noise or data prediction given as velocity; data in other units; a network blind to time, to the end
    time or to a condition; conditions that do not belong to the rows. A high loss alone is no fault: straightened and
    distilled networks have one. The full form evaluates 4,000 to 9,000 rows, the short one 200 to 270.

    Args:
        net: ``v(x, t, **cond)``: a module (it is evaluated in evaluation mode and left as it was), or any callable.
        data: a :class:`~fewstep.data.dataset.DataSet`, or rows ``(N, *shape)`` in network units.
        conditions: by name, each (N, ...); None: those of a data set, labels included, if the network takes them.
        path: the probability path, or its name.
        seed: of the choice of rows, the noise and the times.
        rows: data rows to evaluate it on, at least 16; 256 by default, 32 in the short form. Fewer make faults
            inconclusive.
        short: only what is cheap and decisive: no units, no test whether conditions belong to the rows, fewer times.
        trained: whether the network was trained. If not, only its call is tested, and which inputs it cannot see
            whatever its weights are.
        two_time: whether it takes an end time ``r``; None: as it says of itself.

    Raises:
        UserError: data, conditions, path or rows are none.

    >>> import torch
    >>> x1 = torch.randn(500, 2) / 2  # the velocity towards normal data of width 1/2 is linear in x
    >>> v = lambda x, t: ((t / 4 - (1 - t)) / (t**2 / 4 + (1 - t) ** 2))[:, None] * x
    >>> check_velocity(v, x1).ok
    True
    >>> [fault.name for fault in check_velocity(lambda x, t: v(x, 1 - t), x1).faults]
    ['flipped_time']
    """
    if not callable(net):
        raise UserError(f"the network must be callable as net(x, t, **cond), got {type(net).__name__}.")
    count = (SHORT_ROWS if short else ROWS) if rows is None else rows
    if count < FEWEST:
        raise UserError(f"rows={count}: a check needs at least {FEWEST} rows.")
    chosen = make_path(path) if isinstance(path, str) else path
    mask = net.mask if isinstance(net, Foreign) else None
    if mask is None and conditions is None and isinstance(data, DataSet):
        mask = data.mask
    setting = setting_of(source_of(data, conditions), chosen, count, seed, short, mask)
    ends = _two_time(net) if two_time is None else two_time
    optional = conditions is None
    with mode(net, False), isolated_rng(device_of(net)):
        return _Examination(net, setting, short, trained, ends, optional).check()


def quick_check(net: Callable[..., Any], data: Any, *, trained: bool = True, **options: Any) -> Check:
    """The short form of :func:`check_velocity`, 200 to 270 network rows: before training.

    Args:
        net: the network.
        data: as in :func:`check_velocity`.
        trained: False for a network that training starts from: weights that are random or zero raise no alarm.
        options: as in :func:`check_velocity`.
    """
    return check_velocity(net, data, trained=trained, short=True, **options)


def _two_time(net: Callable[..., Any]) -> bool:
    """Whether a network says that it takes an end time."""
    if isinstance(net, Foreign):
        return net.two_time
    return isinstance(net, nn.Module) and any(name.startswith(INTERVAL) for name, _ in net.named_parameters())


class _Examination:
    """One check: the network, the data, and what was found so far."""

    def __init__(
        self, net: Callable[..., Any], setting: Setting, short: bool, trained: bool, two_time: bool, optional: bool
    ) -> None:
        self.net, self.setting, self.short, self.trained = net, setting, short, trained
        self.two_time, self.optional = two_time, optional
        self.device, self.low = device_of(net), bound(weight_dtype(net))
        self.losses: dict[str, float] = {}
        self.seen: dict[str, float] = {}
        self.found: list[Finding] = []
        self.evaluated = 0

    def check(self) -> Check:
        """Run the parts that apply, from the call to the conditions."""
        rows = self.setting.rows()
        call, findings = find_call(self.net, rows, self.two_time, self.device, self.optional)
        self.found += findings
        if call is not None:
            if call.bare:
                rows, self.setting = replace(rows, cond={}), self.setting.without_conditions()
            network = call.network(self.net, self.device)
            self._examine(network, rows, call)
            self.evaluated = network.evaluated
        order = sorted(self.found, key=lambda finding: finding.kind)
        return Check(tuple(order), self.losses, self.seen, self.evaluated, self.short)

    def _examine(self, network: Network, rows: Rows, call: Plain) -> None:
        self.found += find_redraws(self.net, network, rows, self.short)
        self.found += find_infinite(network, rows)
        if any(finding.name == "not_finite" for finding in self.found):
            return
        if not self.trained:
            self.found += self._structural(rows, call)
            return
        times = find_time(network, rows, self.low, self.seen, self.short)
        self.found += times
        if any(finding.name == "constant_output" for finding in times):
            return
        self._conditions(network, rows.first(FEWEST) if self.short else rows)
        repair = self._losses(network, rows)
        if self.two_time:
            self.found += self._end(network, rows, call)
        if not self.short:
            self._belongs(network, rows, repair)
        if all(finding.kind == "note" for finding in self.found):
            self.found += find_no_velocity(repair, rows)
        else:
            self.found = [finding for finding in self.found if finding.name != "inconclusive"]

    def _conditions(self, network: Network, rows: Rows) -> None:
        base = network(rows.x, rows.t, **rows.cond)
        seed, mask = self.setting.seed, self.setting.mask
        self.found += find_blind_conditions(network, rows, base, self.low, self.seen, seed, mask)

    def _structural(self, rows: Rows, call: Plain) -> list[Finding]:
        if not isinstance(self.net, nn.Module):
            return []
        return find_structural(self.net, call, rows, self.device, self.two_time, self.setting)

    def _losses(self, network: Network, rows: Rows) -> Repair:
        """Convention and units; the network under the repair that it needs."""
        path = self.setting.path
        tried = repairs(network, rows, path, self.short)
        linear = isinstance(path, Linear)
        self.losses |= {repair.words(linear): repair.loss for repair in tried}
        repair, findings = find_convention(tried, rows, linear, self.short)
        blind = {finding.name for finding in self.found if finding.kind == "fault"} & UNSEEN
        if blind & UNSEEN_TIME and not any(finding.name == MISSING for finding in findings):
            repair, findings = tried[0], []  # the loss of such a network says nothing of its convention
        units = [] if self.short or blind else find_units(network, self.setting, rows, tried[0])
        if units and (repair is tried[0] or units[0].evidence["repaired"] < repair.loss):
            repair, findings = tried[0], units
        self.found += findings
        return repair

    def _end(self, network: Network, rows: Rows, call: Plain) -> list[Finding]:
        """Blindness to r, which is no fault in a two-time form that is only not trained yet."""
        found = find_blind_end(network, rows, self.low, self.seen)
        if not found or not isinstance(self.net, nn.Module):
            return found
        unseen = {finding.name for finding in self._structural(rows, call)}
        return found if "blind_to_r" in unseen else [replace(finding, kind="note") for finding in found]

    def _belongs(self, network: Network, rows: Rows, repair: Repair) -> None:
        blind = {finding.about for finding in self.found if finding.name == "blind_to_condition"}
        names = [name for name in rows.cond if name not in blind and name != self.setting.mask]

        def velocity(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            out = network(x, repair.time.at(t), **cond)
            return READINGS[repair.reading](self.setting.path, out, x, t)

        again = self.setting.rows(draw=1)
        if any(finding.name == "data_units" for finding in self.found):
            return  # what a condition does is not known in the wrong units
        self.found += find_shuffled(velocity, rows, again, repair.v, names, self.setting.seed)
