"""The gradients of a loss's terms at one output, and the weight of a term found from them.

The strength of a term ``L_k`` is the norm of its gradient at the generator's last layer ``W``. A term with a target
share is weighted so that its strength is that share of the other terms' (arXiv:2012.09841, eq. 7):

    lambda = share * |grad_W L_rest| / |grad_W L_k|

The ratio is one of running means and is bounded, because the gradient of a term that is nearly satisfied passes
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

MAX_RATIO = 20.0  # of the strengths; chosen, not tuned
MEMORY = 0.95  # decay of the running means, per step; chosen, not tuned
TINY = 1e-12
RATIO_STATE = ("ratio/rest", "ratio/own", "ratio/count")


def last_layer(module: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of the output layer: ``output`` in our networks, else the last layer that has a matrix.

    The bias is included: a gradient that is equal for all samples acts on it, and hardly on weights whose inputs have
    mean zero.
    """
    matrices = [name for name, p in module.named_parameters() if p.ndim > 1 and p.requires_grad]
    owner = "output" if "output.weight" in matrices else matrices[-1].rpartition(".")[0]
    return [p for p in module.get_submodule(owner).parameters(recurse=False) if p.requires_grad]


@final
@dataclass(frozen=True)
class TermGradients:
    """The gradients of a loss's terms at one output.

    Attributes:
        values: of the terms, scalars.
        gradients: of the terms at the output, each in its shape.
        norms: of the gradients at the last layer, over the global batch.
        rest: norm of the summed gradient of all terms but the last one.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norms: dict[str, float]
    rest: float


def term_gradients(
    output: Tensor, layer: list[nn.Parameter], terms: Mapping[str, Tensor], world: World
) -> TermGradients:
    """Differentiate every term once, down to ``output``, and measure its gradient at ``layer``."""
    gradients = {name: torch.autograd.grad(term, output, retain_graph=True)[0] for name, term in terms.items()}

    def norm(gradient: Tensor) -> float:
        found = torch.autograd.grad(output, layer, gradient, retain_graph=True)
        return float(world.average(torch.cat([part.flatten() for part in found])).norm())

    norms = {name: norm(gradient) for name, gradient in gradients.items()}
    first = list(gradients.values())[:-1]
    rest = norm(torch.stack(first).sum(0)) if first else 0.0
    return TermGradients({name: term.detach() for name, term in terms.items()}, gradients, norms, rest)


def combine_terms(output: Tensor, found: TermGradients, scales: Mapping[str, float]) -> Terms:
    """The loss ``sum_k scale_k L_k``, whose backward pass goes through the generator once.

    Returns:
        ``loss``, every term, and ``pull/<term>``: the share of the term in the sum of all gradient norms.
    """
    scale = {name: scales.get(name, 1.0) for name in found.values}
    through = (output * torch.stack([scale[name] * g for name, g in found.gradients.items()]).sum(0)).sum()
    value = torch.stack([scale[name] * term for name, term in found.values.items()]).sum()
    norms = {name: scale[name] * norm for name, norm in found.norms.items()}
    whole = max(sum(norms.values()), TINY)
    return {
        "loss": value + (through - through.detach()),
        **found.values,
        **{f"pull/{name}": value.new_tensor(norm / whole) for name, norm in norms.items()},
    }


def ratio_state() -> dict[str, Tensor]:
    """The running means of :func:`running_ratio` before the first step; a checkpoint must keep them."""
    return {name: torch.zeros((), dtype=torch.float64) for name in RATIO_STATE}


def running_ratio(state: Mapping[str, Tensor], rest: float, own: float) -> tuple[float, dict[str, Tensor]]:
    """``|grad rest| / |grad own|`` as a ratio of running means, and the means after this step.

    A gradient that passes through zero changes a ratio of means little, and a mean of ratios without bound.

    Args:
        state: the means so far, as :func:`ratio_state`.
        rest, own: the two norms of this step; a step with norms that are not finite leaves the means alone.

    Returns:
        The ratio, at most 20, and the next state.
    """
    means = [float(state[name]) for name in RATIO_STATE]
    if math.isfinite(rest) and math.isfinite(own):
        count = means[2]
        memory = min(MEMORY, count / (count + 1))  # the plain mean until there are enough values
        means = [memory * means[0] + (1 - memory) * rest, memory * means[1] + (1 - memory) * own, count + 1]
    following = {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(RATIO_STATE, means, strict=True)}
    return min(MAX_RATIO, means[0] / max(means[1], TINY)), following
