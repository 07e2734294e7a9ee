"""fewstep: fast generation with flow matching.

Time runs from noise to data: ``t = 0`` is the base ``x0 ~ p0``, ``t = 1`` is data ``x1``. Networks are called
``v(x, t, **cond)`` with ``x`` (B, ...) and ``t`` (B,). A public name is imported when it is first used, so
``import fewstep`` itself imports only torch and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import fewstep.flow.closed_form as closed_form
    from fewstep.data.sources import as_data
    from fewstep.data.stream import stream
    from fewstep.diagnostics.check_velocity import check_velocity
    from fewstep.diagnostics.diagnose import Diagnosis, diagnose, diagnosis_cost
    from fewstep.diagnostics.likelihood import Likelihood, dequantise, log_likelihood
    from fewstep.diagnostics.pick import Choice
    from fewstep.diagnostics.tune import tune, tuning_cost
    from fewstep.diagnostics.verdict import verdict
    from fewstep.errors import UserError
    from fewstep.flow.field import Guided
    from fewstep.generator import Generator
    from fewstep.interop.adapt import adapt
    from fewstep.interop.diffusers_networks import from_diffusers
    from fewstep.interop.lora import lora
    from fewstep.interop.open_model import load
    from fewstep.pipeline.compare import compare
    from fewstep.pipeline.train import train
    from fewstep.solvers.solve import Solution, invert, solve

_PUBLIC = {
    "Choice": "fewstep.diagnostics.pick",
    "Diagnosis": "fewstep.diagnostics.diagnose",
    "Generator": "fewstep.generator",
    "Guided": "fewstep.flow.field",
    "Likelihood": "fewstep.diagnostics.likelihood",
    "Solution": "fewstep.solvers.solve",
    "UserError": "fewstep.errors",
    "adapt": "fewstep.interop.adapt",
    "as_data": "fewstep.data.sources",
    "check_velocity": "fewstep.diagnostics.check_velocity",
    "compare": "fewstep.pipeline.compare",
    "dequantise": "fewstep.diagnostics.likelihood",
    "diagnose": "fewstep.diagnostics.diagnose",
    "diagnosis_cost": "fewstep.diagnostics.diagnose",
    "from_diffusers": "fewstep.interop.diffusers_networks",
    "invert": "fewstep.solvers.solve",
    "load": "fewstep.interop.open_model",
    "log_likelihood": "fewstep.diagnostics.likelihood",
    "lora": "fewstep.interop.lora",
    "solve": "fewstep.solvers.solve",
    "stream": "fewstep.data.stream",
    "train": "fewstep.pipeline.train",
    "tune": "fewstep.diagnostics.tune",
    "tuning_cost": "fewstep.diagnostics.tune",
    "verdict": "fewstep.diagnostics.verdict",
}
_MODULES = {"closed_form": "fewstep.flow.closed_form"}

__all__ = [
    "Choice",
    "Diagnosis",
    "Generator",
    "Guided",
    "Likelihood",
    "Solution",
    "UserError",
    "__version__",
    "adapt",
    "as_data",
    "check_velocity",
    "closed_form",
    "compare",
    "dequantise",
    "diagnose",
    "diagnosis_cost",
    "from_diffusers",
    "invert",
    "load",
    "log_likelihood",
    "lora",
    "solve",
    "stream",
    "train",
    "tune",
    "tuning_cost",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
