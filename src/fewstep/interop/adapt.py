"""A network of the user's own in one call, by a function or by the name of its library's convention.

| name | how the module is called |
|---|---|
| ``torchcfm`` | ``m(t, x)``, ``m(t, x, y=label)``; a module of one argument with x and t joined: ``m([x, t])`` |
| ``flow_matching`` | ``m(x, t, **cond)``, the form of ``flow_matching.utils.ModelWrapper`` |
| ``rectified_flow`` | ``m(x, t, **cond)``, a label as ``y`` (github.com/lqiang67/rectified-flow) |
| ``sbi`` | ``-m(x, condition, 1 - t)``: a flow-matching posterior estimator, whose time 1 is noise (sbi 0.23 to 0.27) |

In sbi, x is the observation and theta the sample. Here x is the sample, and the observation is the condition named
``condition``.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError, unknown
from fewstep.networks.adapter import Adapter, Call
from fewstep.networks.foreign import Combine


def adapt(
    module: nn.Module,
    call: Call | str | None = None,
    *,
    time_embed: str | Sequence[str] | None = None,
    null: Mapping[str, Any] | None = None,
    mask: str | None = None,
    combine: Combine | None = None,
    name: str | None = None,
) -> Adapter:
    """A module of your own as a network of this library, ``v(x, t, **cond)``.

    Args:
        module: your module. It is not changed, and ``.inner`` of the result is this object.
        call: ``call(module, x, t, **conditions)`` returns the velocity from noise to data, (B, ...) like x (B, ...), at
            times t (B,) between 0, noise, and 1, data. Or the name of a convention: ``torchcfm``, ``flow_matching``,
            ``rectified_flow``, ``sbi``. By default ``module(x, t, **conditions)``.
        time_embed: the sub-module whose output is the embedding of t, or several; methods that learn from pairs of
            times need it. A convention knows that of its library's own networks.
        null: what replaces a condition in an unconditional call, by name: a number, or a tensor of one row's shape.
            Without it there is no guidance and no dropout of conditions: no null is guessed.
        mask: name of the condition that says which entries of a sample are valid.
        combine: how guidance combines ``(v_0, v_c, w)``; ``v_0 + w (v_c - v_0)`` by default.
        name: recorded in JSON files to recognise the network; the module's class by default.

    Raises:
        UserError: ``module`` is no module; an unknown convention; a null label outside the module's table of labels;
            ``call`` uses the module itself in place of its first argument.

    Time from 1000 to 0 and the opposite sign, with the arguments in the order (time, sample):

    >>> import torch
    >>> class Mine(torch.nn.Module):
    ...     def forward(self, timestep, sample):
    ...         return -sample * timestep[:, None] / 1000
    >>> net = adapt(Mine(), lambda m, x, t: -m(1000 * (1 - t), x))
    >>> net(torch.ones(1, 2), torch.tensor([0.25]))
    tensor([[0.7500, 0.7500]])
    """
    if call is not None and not isinstance(call, str):
        _check_call(call, module)
        return Adapter(module, call, time_embed=time_embed, null=null, mask=mask, combine=combine, name=name)
    if isinstance(call, str) and isinstance(module, nn.Module):
        if call not in CONVENTIONS:
            raise unknown("convention", call, CONVENTIONS)
        convention = CONVENTIONS[call]
        _check_null(module, convention.table, (null or {}).get("label"))
        call = convention.call(module)
        time_embed = convention.place(module) if time_embed is None else time_embed
    made = None if isinstance(call, str) else call  # a name with no module is refused by the adapter
    return Adapter(module, made, time_embed=time_embed, null=null, mask=mask, combine=combine, name=name)


@final
@dataclass(frozen=True)
class Convention:
    """How the networks of a library are called.

    Attributes:
        call: the call of a given module.
        place: where a given module embeds the time; None if that is not known.
        table: name of the sub-module with the embeddings of the labels, where the module has one.
    """

    call: Callable[[nn.Module], Call]
    place: Callable[[nn.Module], str | None]
    table: str


def _torchcfm(module: nn.Module) -> Call:
    if type(module).__name__ == "torch_wrapper":  # it repeats one time for all rows; here each row has its own
        return lambda m, x, t: m.model(torch.cat([x, t[:, None]], 1))
    return _joined if _takes_one(module) else _time_first


def _joined(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return module(torch.cat([x, t[:, None].to(x.dtype)], 1))


def _time_first(module: nn.Module, x: Tensor, t: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
    return module(t, x, **cond) if label is None else module(t, x, y=label, **cond)


def _label_as_y(module: nn.Module, x: Tensor, t: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
    return module(x, t, **cond) if label is None else module(x, t, y=label, **cond)


def _same(module: nn.Module, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    return module(x, t, **cond)


def _takes_one(module: nn.Module) -> bool:
    """Whether ``forward`` needs one argument and takes no second one by position."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.kind for p in parameters if p.default is p.empty] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _torchcfm_place(module: nn.Module) -> str | None:
    """``time_embed`` of a U-Net; the first layer of a network on [x, t]: adding to its output is one more input."""
    if type(module).__name__ == "torch_wrapper" or _takes_one(module):
        return next((name for name, layer in module.named_modules() if name and isinstance(layer, nn.Linear)), None)
    return _first_of("time_embed")(module)


def _first_of(*places: str) -> Callable[[nn.Module], str | None]:
    """The first of these sub-modules that a module has and that has a linear layer."""

    def place(module: nn.Module) -> str | None:
        having = {
            name for name, layer in module.named_modules() if any(isinstance(m, nn.Linear) for m in layer.modules())
        }
        return next((place for place in places if place in having), None)

    return place


def _sbi(module: nn.Module) -> Call:
    if "ConditionalScoreEstimator" in {base.__name__ for base in type(module).__mro__}:
        raise UserError(
            f"{type(module).__name__} is a score estimator (NPSE), whose output is no velocity: the convention 'sbi' "
            "is that of flow matching (FMPE)."
        )
    if getattr(module, "compose_enabled", False):
        raise UserError(
            "this sbi estimator was built with compose_standardization=True: its network works on standardised "
            "parameters. Give the data as estimator.to_z(theta), bring samples back by estimator.from_z, and declare "
            "the call yourself: fs.adapt(estimator, lambda m, x, t, condition: -m(x, condition, 1 - t))."
        )
    return _sbi_call


def _sbi_call(module: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    return -module(x, condition, 1 - t)  # by position: the last argument is called t in sbi 0.23, and time since 0.25


CONVENTIONS: dict[str, Convention] = {
    "flow_matching": Convention(lambda _: _same, _first_of("model.time_embed", "time_embed"), ""),
    "rectified_flow": Convention(lambda _: _label_as_y, _first_of("t_embedder"), "y_embedder.embedding_table"),
    "sbi": Convention(_sbi, _first_of("net.time_linear_layer", "net.global_mlp.input_layer"), ""),
    "torchcfm": Convention(_torchcfm, _torchcfm_place, "label_emb"),
}


def _check_null(module: nn.Module, table: str, null: Any) -> None:
    """Refuse a null label that the module's table of labels does not have."""
    found = dict(module.named_modules()).get(table) if table else None
    if not isinstance(found, nn.Embedding) or not isinstance(null, int) or 0 <= null < found.num_embeddings:
        return
    rows = found.num_embeddings
    raise UserError(
        f"null has the label {null}, and the module's table {table!r} has rows for the labels 0 to {rows - 1}: train "
        "with one class more, whose label stands for no label, and name that one; or leave null out, then there is "
        "no guidance."
    )


def _check_call(call: Any, module: nn.Module) -> None:
    """Refuse what is not callable, and a function that uses the module itself: a copy of it would call the original."""
    if not callable(call):
        raise UserError(
            f"call must be a function call(module, x, t, **conditions) or the name of a convention "
            f"({', '.join(CONVENTIONS)}), got {type(call).__name__}."
        )
    if not inspect.isfunction(call):
        return
    used = {step.argval for step in dis.get_instructions(call) if step.opname == "LOAD_GLOBAL"}
    known = {name: call.__globals__.get(name) for name in used}
    for name, cell in zip(call.__code__.co_freevars, call.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable without a value yet
            known[name] = cell.cell_contents
    names = [name for name, value in known.items() if value is module]
    if names:
        raise UserError(
            f"the call uses {names[0]!r}, the module itself, and not its first argument: training copies the module, "
            f"and a copy would still call the original. Write lambda m, x, t: m(…) with m in place of {names[0]}."
        )
