"""The methods by name, in the order in which they are listed. A new method is a new file and one line here."""

from __future__ import annotations

from fewstep.errors import unknown
from fewstep.methods import (
    consistency,
    consistency_fm,
    distill,
    dmd,
    features,
    fgm,
    flow_matching,
    imm,
    instaflow,
    lagrangian,
    meanflow,
    piecewise,
    realuid,
    reflow,
    shortcut,
    sid,
    slimflow,
)
from fewstep.methods.contract.stage import Spec

METHODS: dict[str, Spec] = {
    "flow_matching": flow_matching.SPEC,
    "reflow": reflow.SPEC,
    "distill": distill.SPEC,
    "instaflow": instaflow.SPEC,
    "slimflow": slimflow.SPEC,
    "features": features.SPEC,
    "piecewise": piecewise.SPEC,
    "consistency_fm": consistency_fm.SPEC,
    "consistency": consistency.SPEC,
    "meanflow": meanflow.SPEC,
    "lagrangian": lagrangian.SPEC,
    "shortcut": shortcut.SPEC,
    "imm": imm.SPEC,
    "fgm": fgm.SPEC,
    "sid": sid.SPEC,
    "dmd": dmd.SPEC,
    "realuid": realuid.SPEC,
}


def find_method(name: object) -> Spec:
    """Look a method up by name.

    Args:
        name: a key of :data:`METHODS`, as a recipe gives it.

    Raises:
        UserError: there is no method of that name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
