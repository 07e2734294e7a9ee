"""The gradients of a loss's terms at one output, and the weight of a term that is computed from them.

A term ``L_k`` gets the weight for which the norm of its gradient at the generator's last layer W is a given share of
the gradient norm of the other terms together (arXiv:2012.09841, eq. 7):

    lambda = share * |grad_W L_rest| / |grad_W L_k|

The ratio is taken of running means and has an upper bound, because the gradient of a term near its minimum passes
through zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from fewstep.methods.contract.objective import Terms
from fewstep.methods.contract.stage import World

MAX_RATIO = 20.0  # of the gradient norms; chosen, not tuned
MEAN_DECAY = 0.95  # of the running means, per step; chosen, not tuned
MIN_NORM = 1e-12  # least divisor: keeps quotients of norms finite
RATIO_STATE = ("ratio/rest", "ratio/own", "ratio/count")  # entries of the state: two running means, number of steps


def last_layer(module: nn.Module, output: Tensor | None = None) -> list[nn.Parameter]:
    """Weight and bias of a network's output layer.

    Args:
        module: its layer ``output`` is taken if it has one, otherwise the last layer with a weight matrix.
        output: of the module, with its graph; layers that have no part in it are passed over. A network from outside
            may register such a layer last.

    The bias is included: a gradient that is equal for all samples changes the bias, and hardly changes weights whose
    inputs have mean zero.
    """
    matrices = {name: p for name, p in module.named_parameters() if p.ndim > 1 and p.requires_grad}
    names = ["output.weight"] if "output.weight" in matrices else list(reversed(matrices))
    owner = next(name for name in names if output is None or _has_part(matrices[name], output)).rpartition(".")[0]
    return [p for p in module.get_submodule(owner).parameters(recurse=False) if p.requires_grad]


def _has_part(parameter: nn.Parameter, output: Tensor) -> bool:
    """Whether the output was computed with the parameter."""
    found = torch.autograd.grad(output, parameter, torch.zeros_like(output), retain_graph=True, allow_unused=True)
    return found[0] is not None


@final
@dataclass(frozen=True)
class TermGradients:
    """The gradients of a loss's terms at one output.

    Attributes:
        values: of the terms, scalars.
        gradients: of the terms in the output, each of the output's shape.
        norms: of the terms' gradients in the last layer, for the global batch.
        rest: the same norm for the sum of all terms but the last one.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norms: dict[str, float]
    rest: float


def term_gradients(
    output: Tensor, layer: list[nn.Parameter], terms: Mapping[str, Tensor], world: World
) -> TermGradients:
    """Differentiate every term in ``output``, and compute the norms of the gradients in ``layer``.

    Args:
        output: the generator's samples (B, ...), with their graph.
        layer: parameters of the generator's last layer, as :func:`last_layer`.
        terms: scalar terms by name; the one that gets a weight is the last.
        world: the processes over which gradients are averaged.
    """
    gradients = {name: torch.autograd.grad(term, output, retain_graph=True)[0] for name, term in terms.items()}

    def norm(gradient: Tensor) -> float:
        found = torch.autograd.grad(output, layer, gradient, retain_graph=True)
        return float(world.average(torch.cat([part.flatten() for part in found])).norm())

    norms = {name: norm(gradient) for name, gradient in gradients.items()}
    first = list(gradients.values())[:-1]
    rest = norm(torch.stack(first).sum(0)) if first else 0.0
    return TermGradients({name: term.detach() for name, term in terms.items()}, gradients, norms, rest)


def combine_terms(output: Tensor, found: TermGradients, scales: Mapping[str, float]) -> Terms:
    """The loss ``sum_k scale_k L_k``, from gradients that are known, so that its backward pass runs the generator once.

    Args:
        output: the generator's samples (B, ...), with their graph.
        found: the terms' gradients at that output.
        scales: weights of the terms by name; 1 for a term without an entry.

    Returns:
        ``loss``; every term by its name; and ``pull/<term>``, the share of the scaled term in the sum of all gradient
        norms at the last layer.
    """
    scale = {name: scales.get(name, 1.0) for name in found.values}
    through = (output * torch.stack([scale[name] * g for name, g in found.gradients.items()]).sum(0)).sum()
    value = torch.stack([scale[name] * term for name, term in found.values.items()]).sum()
    norms = {name: scale[name] * norm for name, norm in found.norms.items()}
    total = max(sum(norms.values()), MIN_NORM)
    return {
        "loss": value + (through - through.detach()),
        **found.values,
        **{f"pull/{name}": value.new_tensor(norm / total) for name, norm in norms.items()},
    }


def ratio_state() -> dict[str, Tensor]:
    """The state of :func:`running_ratio` before the first step, zeros; a checkpoint must keep it."""
    return {name: torch.zeros((), dtype=torch.float64) for name in RATIO_STATE}


def running_ratio(state: Mapping[str, Tensor], rest: float, own: float) -> tuple[float, dict[str, Tensor]]:
    """``|grad rest| / |grad own|`` as a ratio of running means, and the means after this step.

    A step in which ``own`` is almost zero changes the ratio of two means little; it would change a mean of ratios
    without bound.

    Args:
        state: the means so far, as :func:`ratio_state`.
        rest, own: the gradient norms of this step. If one is not finite, the means do not change.

    Returns:
        The ratio, at most 20, and the next state.

    >>> ratio, following = running_ratio(ratio_state(), rest=6.0, own=2.0)
    >>> round(ratio, 6), int(following["ratio/count"])
    (3.0, 1)
    """
    means = [float(state[name]) for name in RATIO_STATE]
    if math.isfinite(rest) and math.isfinite(own):
        count = means[2]
        decay = min(MEAN_DECAY, count / (count + 1))  # the arithmetic mean in the first 19 steps
        means = [decay * means[0] + (1 - decay) * rest, decay * means[1] + (1 - decay) * own, count + 1]
    following = {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(RATIO_STATE, means, strict=True)}
    return min(MAX_RATIO, means[0] / max(means[1], MIN_NORM)), following
