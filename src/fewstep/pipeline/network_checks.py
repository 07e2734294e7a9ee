"""The short check of networks from outside, before anything is trained from them."""

from __future__ import annotations

from fewstep.data.dataset import LABEL
from fewstep.diagnostics.check_velocity import quick_check
from fewstep.errors import UserError
from fewstep.methods.contract.teacher import Teacher
from fewstep.networks.foreign import FOREIGN, Foreign
from fewstep.pipeline.opening import Run
from fewstep.pipeline.teachers import load_initial, load_teacher

ROWS = 64  # rows of the data that the check may use; chosen, not tuned


def check_foreign(run: Run) -> None:
    """Check every foreign teacher on a few rows, and the call of every foreign network that a stage starts from.

    Raises:
        UserError: a fault, with its evidence and its likely fix.
    """
    seen: set[str] = set()
    for name, options in run.recipe.stages.items():
        for chosen in (options.teacher, options.init):
            if chosen is not None and chosen not in run.recipe.stages and chosen not in seen:
                seen.add(chosen)
                model = load_teacher(run, chosen) if chosen == options.teacher else load_initial(run, name, chosen)
                check_teacher(run, model)
        network = run.network(name)
        if options.teacher is None and options.init is None and network.get("name") == FOREIGN:
            look(run, run.prototype(network), network["module"], trained=False)


def check_teacher(run: Run, teacher: Teacher) -> None:
    """Check a velocity from outside the run, unless it is a network that fewstep built and trained."""
    if isinstance(teacher.velocity, Foreign) and not teacher.velocity.two_time:
        look(run, teacher.velocity, teacher.name, trained=teacher.independent, path=teacher.path)


def look(run: Run, network: Foreign, name: str, *, trained: bool, path: str = "linear") -> None:
    """Run the short check of one network.

    Args:
        run: gives data, conditions and device.
        network: the network.
        name: its name, for the message.
        trained: whether it is the velocity of independent pairs, whose convention can be told from its loss.
        path: the path that it was trained on.
    """
    rows = run.data.train[:ROWS]
    device = run.world.device
    x = run.data.network_rows(rows).to(device)
    cond = {key: value.to(device) for key, value in run.data.cond_rows(rows, run.conditions).items()}
    training = network.training
    found = quick_check(network.to(device), x, conditions=cond, path=path, trained=trained, seed=run.recipe.header.seed)
    network.train(training)
    if found.faults:
        first = found.faults[0]
        hint = ""
        if run.data.labels is not None and LABEL not in run.conditions:
            hint = f" The labels of {run.data.name!r} are not used: conditional=True gives them to the network."
        raise UserError(
            f"the network {name!r} does not fit: {first.text} {first.fix}{hint} fs.check_velocity(net, data), or "
            "'fewstep check', shows the evidence; check=False in fs.train and 'check: false' in a recipe train all the "
            "same."
        )
