"""An adapter: a user's module under this library's convention, from one declaration."""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks.foreign import FOREIGN, Combine, Foreign, Intervals, embedding_width, registered, spread

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # weights in float8 are only stored so
OF_DEVICES = ("out of memory", "allocate memory", "CUDA error", "NCCL")  # in the messages of errors that memory causes
Call = Callable[..., Tensor]  # call(module, x, t, **conditions) -> velocity


def plain_call(module: nn.Module, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """``module(x, t, **cond)``: the call of a module that has this library's convention already."""
    return module(x, t, **cond)


@final
class Adapter(Foreign):
    """A user's module, called as ``v(x, t, r=None, **cond)``.

    - Time: ``t`` (B,) in [0, 1] from noise to data, in float32 (float64 for float64 weights): it is never rounded to
      half precision. A ``t`` of another dtype than x's, as float64 beside float32, keeps its digits.
    - Dtype: x and floating-point conditions are cast to the dtype that most of the weights have; the result has the
      dtype of x.
    - Modes: in training mode only the dropout layers and the recurrent layers (their backward pass on GPUs needs it) of
      the module are in training mode. Some modules replace labels at random in training mode, so that two calls with
      equal arguments are two different functions; those stay as in evaluation.
    - Mask: with ``mask``, the entries that it marks as padding are set to zero in x and in the result.

    Args:
        module: the user's module.
        call: ``call(module, x, t, **cond)`` returns the velocity, (B, ...) like x; :func:`plain_call` by default.
        time_embed: name of the sub-module that embeds the time, or several names; two-time networks need it.
        null: what replaces a condition in an unconditional call, by name: a number, or a tensor of one row's shape.
        mask: name of the condition with the valid entries, (B,), (B, T) or the shape of x; it is given to ``call`` too.
        combine: how guidance combines ``(v_0, v_c, w)``; ``v_0 + w (v_c - v_0)`` by default.
        name: recorded in JSON files to recognise the network; the module's class by default.

    Attributes:
        record: plain values that are recorded beside the description, from which the network can be built again.

    Raises:
        UserError: ``module`` is no ``torch.nn.Module``; there is no sub-module ``time_embed``. When it is called: the
            module's call failed (the message has the error, and the arguments it was called with), or returned no
            tensor like x.

    >>> import torch
    >>> net = Adapter(torch.nn.Linear(2, 2), lambda m, x, t: -m(x * (1 - t)[:, None]))
    >>> net(torch.ones(3, 2), torch.zeros(3)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call | None = None,
        *,
        time_embed: str | Sequence[str] | None = None,
        null: Mapping[str, Any] | None = None,
        mask: str | None = None,
        combine: Combine | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise UserError(
                f"an adapter needs a torch.nn.Module, got {type(module).__name__}: training copies it and its weights. "
                "Wrap the function in a module; for sampling alone fs.solve(v, x0) takes any callable."
            )
        self.wrapped = module
        self.call = plain_call if call is None else call
        self.places = (time_embed,) if isinstance(time_embed, str) else tuple(time_embed or ())
        self.widths = tuple(embedding_width(module, place) for place in self.places)
        self.null, self.mask, self.combine = dict(null or {}), mask, combine
        self.name = name or f"{type(module).__module__}.{type(module).__qualname__}"
        self.intervals: Intervals | None = None
        self.record: dict[str, Any] = {}
        self.eval()

    @property
    def inner(self) -> nn.Module:
        """The user's own module."""
        return self.wrapped

    @property
    def two_time(self) -> bool:
        """Whether it takes the end time ``r``."""
        return self.intervals is not None

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        """The velocity, or the average velocity from t to r, (B, ...) like x."""
        return self.evaluate(x, t, r, cond, self.intervals)

    def evaluate(
        self, x: Tensor, t: Tensor, r: Tensor | None, cond: Mapping[str, Tensor], intervals: Intervals | None
    ) -> Tensor:
        """The call with the interval functions of another network, which shares this one's module.

        Args:
            x: (B, ...).
            t: (B,).
            r: (B,); None for r = t.
            cond: conditions by name, each (B, ...).
            intervals: the functions of ``r - t``; None for a velocity network.
        """
        if intervals is None:
            if r is not None:
                raise UserError("r was given, and this is a velocity network: it has no end time.")
            return self._velocity(self.wrapped, x, t, cond)
        length = torch.zeros_like(t) if r is None else r - t
        with intervals.added(registered(self, "wrapped"), length) as module:
            return self._velocity(module, x, t, cond)

    def _velocity(self, module: nn.Module, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        valid = None if self.mask is None else spread(self._mask_of(cond), x)
        given = x if valid is None else x * valid
        dtype = self.dtype
        cast = {name: _cast(rows, dtype) for name, rows in cond.items()}
        least = torch.promote_types(dtype, torch.float32)
        time = t.to(least if t.dtype == x.dtype else torch.promote_types(t.dtype, least))
        try:
            v = self.call(module, given.to(dtype), time, **cast)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            if _not_of_the_call(error):
                raise
            raise self._failed(error, given, time, cast) from error
        if not isinstance(v, Tensor) or v.shape != x.shape:
            found = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            raise UserError(
                f"the call of {self.name} returned {found} for x of shape {tuple(x.shape)}: it must return the "
                "velocity as a tensor like x. Take the tensor out of an output object (.sample, [0]), and keep as many "
                "channels as x has."
            )
        v = v.to(x.dtype)
        return v if valid is None else v * valid

    def _mask_of(self, cond: Mapping[str, Tensor]) -> Tensor:
        assert self.mask is not None
        if self.mask not in cond:
            raise UserError(
                f"the condition {self.mask!r}, the mask of {self.name}, is missing: pass it, cond={{{self.mask!r}: "
                "rows}; in a shell, --cond FILE.npz."
            )
        return cond[self.mask]

    def _failed(self, error: Exception, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> UserError:
        """What to say of an error inside the user's call."""
        how = "module(" if self.call is plain_call else "call(module, "
        form = ", ".join(["x, t", *(f"{name}={name}" for name in cond)])
        named = ", ".join(["x", "t", *cond])
        shapes = ", ".join(_told(name, rows) for name, rows in {"x": x, "t": t, **cond}.items())
        message = " ".join(str(error).split()) or "no message"
        return UserError(
            f"the call of {self.name} failed with {type(error).__name__}: {message} ({_where(error)}). "
            f"This library calls {how}{form}), here with {shapes}. "
            f"{self._hint(error, x)}If the module takes its arguments in another order, under other names or in "
            f"another form, say so: fs.adapt(module, lambda m, {named}: m({named.replace('x, t', 't, x', 1)})), or "
            "name its convention, such as 'torchcfm'."
        )

    def _hint(self, error: Exception, x: Tensor) -> str:
        """The likely reason of an error, where devices or dtypes are one: a sentence and a space, or nothing."""
        devices = sorted({str(parameter.device) for parameter in self.wrapped.parameters()})
        if devices and str(x.device) not in devices:
            return f"The rows are on {x.device} and the weights on {', '.join(devices)}: move one of them. "
        if isinstance(error, TypeError) and "missing" in str(error):
            return "If that is a condition, pass it: cond={name: rows}; in a shell, --cond FILE.npz. "
        if "dtype" in str(error):
            return "x has the dtype of the weights and t at least float32: if need be, cast t, t.to(x.dtype). "
        return ""

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of the weights; float32 without any."""
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self.wrapped.parameters():
            if parameter.dtype in COMPUTED:
                sizes[parameter.dtype] += parameter.numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def train(self, mode: bool = True) -> Adapter:
        """Put the dropout and recurrent layers of the module into training mode; the rest stays in evaluation."""
        super().train(mode)
        self.wrapped.eval()
        for layer in self.wrapped.modules():
            if isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RNNBase)):
                layer.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Give all parameters gradients, or none; integer parameters, as quantised networks have, never have them."""
        for parameter in self.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(requires_grad)
        return self

    def with_interval(self) -> Adapter:
        """A copy in two-time form.

        Raises:
            UserError: ``time_embed`` was not given.
        """
        if not self.places:
            raise UserError(
                f"this method learns from pairs of times, and it is not known where {self.name} embeds the time: name "
                "the sub-module whose output is the embedding of t, fs.adapt(…, time_embed='time_embed'). "
                f"{_candidates(self.wrapped)}"
            )
        made = copy.deepcopy(self)
        first = next(self.wrapped.parameters(), torch.empty(0))
        made.intervals = Intervals(self.places, self.widths).to(first.device)
        return made

    def describe(self) -> dict[str, Any]:
        """Class, number of parameters and the declaration, for JSON files."""
        sizes = sum(parameter.numel() for parameter in self.wrapped.parameters())
        plain = {"name": FOREIGN, "module": self.name, "parameters": sizes, "time_embed": list(self.places)}
        made = {**plain, "null": sorted(self.null), "mask": self.mask, **self.record}
        return {**made, "two_time": True} if self.two_time else made


def _cast(rows: Any, dtype: torch.dtype) -> Any:
    """Floating-point rows in another dtype; labels, masks and what is no tensor as they are."""
    return rows.to(dtype) if isinstance(rows, Tensor) and rows.is_floating_point() else rows


def _told(name: str, rows: Any) -> str:
    """Name, shape and dtype of an argument."""
    if not isinstance(rows, Tensor):
        return f"{name} {type(rows).__name__}"
    return f"{name} {tuple(rows.shape)} {str(rows.dtype).removeprefix('torch.')}"


def _where(error: Exception) -> str:
    """The last line outside torch on the way to an error: an assertion often has no message."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if not frame.filename.startswith(torch_folder)][-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"


def _not_of_the_call(error: Exception) -> bool:
    """Whether an error inside the user's call is none of the call's form.

    That is so if it is explained already, if memory or a device failed, and within a transform (forward-mode
    differentiation, vmap, export), which not every module supports: callers then take another way.
    """
    if isinstance(error, (UserError, torch.OutOfMemoryError)) or any(word in str(error) for word in OF_DEVICES):
        return True
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._functorch.peek_interpreter_stack() is not None or torch.compiler.is_compiling()


def _candidates(module: nn.Module) -> str:
    """The sub-modules whose name looks like a time embedding's, in a sentence."""
    names = [name for name, _ in module.named_modules() if _names_time(name)]
    return f"It may be one of: {', '.join(names[:5])}." if names else "None of its sub-modules has 'time' in its name."


def _names_time(name: str) -> bool:
    """Whether a sub-module's name looks like a time embedding's."""
    return any(word in name.rpartition(".")[2] for word in ("time", "sigma", "noise_level")) or "t_emb" in name
