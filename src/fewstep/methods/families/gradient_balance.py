"""Terms of one loss that pull on one output: how strongly each pulls, and a weight found from that.

The pull of a term ``L_k`` is the norm of its gradient at the generator's last layer ``W``. A term with a target share
is weighted so that its pull is that share of the other terms' (arXiv:2012.09841, eq. 7):

    lambda = share * |grad_W L_rest| / |grad_W L_k|

averaged over steps and bounded, because the gradient of a term that is nearly satisfied goes through zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from fewstep.methods.contract.stage import World

LARGEST = 20.0  # of the ratio of pulls
MEMORY = 0.95  # of its running mean, per step
TINY = 1e-12


def last_layer(module: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of the output layer: ``output`` in our networks, else the last one that has a matrix.

    The bias counts: what pushes all samples alike is felt there, and hardly at weights whose inputs are centred.
    """
    matrices = [name for name, p in module.named_parameters() if p.ndim > 1 and p.requires_grad]
    owner = "output" if "output.weight" in matrices else matrices[-1].rpartition(".")[0]
    return [p for p in module.get_submodule(owner).parameters(recurse=False) if p.requires_grad]


@final
@dataclass(frozen=True)
class TermGradients:
    """The terms of a loss at one output.

    Attributes:
        values: of the terms.
        gradients: of the terms at the output.
        pulls: norms of the gradients at the last layer, over the global batch.
        rest: norm of the summed gradient of all terms but the last.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    pulls: dict[str, float]
    rest: float


def term_gradients(
    output: Tensor, layer: list[nn.Parameter], terms: Mapping[str, Tensor], world: World
) -> TermGradients:
    """Differentiate every term once, down to ``output``, and measure its pull on ``layer``."""
    gradients = {name: torch.autograd.grad(term, output, retain_graph=True)[0] for name, term in terms.items()}

    def norm(gradient: Tensor) -> float:
        found = torch.autograd.grad(output, layer, gradient, retain_graph=True)
        return float(world.average(torch.cat([part.flatten() for part in found])).norm())

    pulls = {name: norm(gradient) for name, gradient in gradients.items()}
    first = list(gradients.values())[:-1]
    rest = norm(torch.stack(first).sum(0)) if first else 0.0
    return TermGradients({name: term.detach() for name, term in terms.items()}, gradients, pulls, rest)


def combine_terms(output: Tensor, found: TermGradients, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The loss ``sum_k scale_k L_k``, whose backward pass goes through the generator once.

    Returns:
        ``loss``, every term, and ``pull/<term>``: its part of all pulls.
    """
    scale = {name: scales.get(name, 1.0) for name in found.values}
    through = (output * torch.stack([scale[name] * g for name, g in found.gradients.items()]).sum(0)).sum()
    value = torch.stack([scale[name] * term for name, term in found.values.items()]).sum()
    pulls = {name: scale[name] * pull for name, pull in found.pulls.items()}
    whole = max(sum(pulls.values()), TINY)
    return {
        "loss": value + (through - through.detach()),
        **found.values,
        **{f"pull/{name}": value.new_tensor(pull / whole) for name, pull in pulls.items()},
    }


@final
class RunningRatio:
    """``|grad rest| / |grad own|`` of recent steps: the ratio of two running means, which a gradient that goes through
    zero does not throw off as it does the mean of ratios.

    Attributes:
        state: the means (of the rest, of its own) and the number of their values; a checkpoint must keep it.
    """

    def __init__(self) -> None:
        self.state = {"pulls": torch.zeros(2, dtype=torch.float64), "pulled": torch.zeros((), dtype=torch.long)}

    def update(self, rest: float, own: float) -> float:
        """Take a step's two pulls in, and return the ratio."""
        pulls = self.state["pulls"]
        if math.isfinite(rest) and math.isfinite(own):  # a bad step is skipped, and must leave no trace here
            count = int(self.state["pulled"])
            memory = min(MEMORY, count / (count + 1))  # the plain mean until there are enough values
            pulls.mul_(memory).add_(torch.tensor([rest, own], dtype=torch.float64), alpha=1 - memory)
            self.state["pulled"].add_(1)
        return min(LARGEST, float(pulls[0]) / max(float(pulls[1]), TINY))
