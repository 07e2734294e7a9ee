"""Training from Python: one stage of a run, from objects instead of a recipe's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.data.scaling import Scaling
from fewstep.errors import UserError, unknown
from fewstep.generator import Generator
from fewstep.interop.diffusers_folders import is_diffusers_folder
from fewstep.interop.open_model import folder_kind
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Stream
from fewstep.methods.registry import find_method
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import Foreign, frozen_within
from fewstep.pipeline.checks import check_networks, check_precision, read_stage
from fewstep.pipeline.compare import check_reference
from fewstep.pipeline.environment import environment
from fewstep.pipeline.feature_checks import NO_VELOCITY
from fewstep.pipeline.network_checks import check_foreign
from fewstep.pipeline.opening import Run, by_name, make_source
from fewstep.pipeline.recipe import STAGE_NAME, Header, Recipe, validated
from fewstep.pipeline.train_stage import run_stage
from fewstep.store.files import make_folder, write_json
from fewstep.training.world import LocalWorld

Model = Generator | nn.Module | str | Path


def train(
    method: str,
    *,
    data: Any,
    out: str | Path,
    teacher: Model | None = None,
    init: Model | None = None,
    network: nn.Module | Mapping[str, Any] | str | None = None,
    base: Any = "gaussian",
    conditional: bool | None = None,
    dequantise: float | None = None,
    seed: int = 0,
    check: bool = True,
    quiet: bool = False,
    **options: Any,
) -> Generator:
    """Train one model; the same call again resumes, and loads the model once it is finished.

    It is the engine of a recipe's stage: a stage of the same name, options, seed and data writes equal bytes.

    Args:
        method: a method's name, as in ``fewstep list methods``.
        data: a built-in name, a path, a recipe's mapping, an array, a data set, or a stream (:func:`fewstep.stream`).
            Arrays and data sets are given to a network of the user's own as they are, without scaling, because it was
            trained in their units; to change that, pass ``{"path": …, "scale": …}`` or a ``DataSet``.
        out: the model's folder; its last part is the stage's name, from which the random numbers are derived.
        teacher: the velocity to learn from: a network ``v(x, t, **cond)`` such as that of :func:`fewstep.adapt` or
            :func:`fewstep.from_diffusers`, a generator, or a model's folder.
        init: the model whose weights the student starts from; the teacher's by default.
        network: the student's network: one of the user's own, or fewstep's by name or mapping. By default the
            teacher's, where that is the user's own, else fewstep's default for the data.
        base: ``gaussian``, or data to start from.
        conditional: whether networks are given the labels; by default where the teacher takes them, and without a
            teacher where labels were given with the data. Other conditions are always given.
        dequantise: standard deviation of the noise on discrete data, in network units.
        seed: of data order, noise and initial weights.
        check: evaluate a network from outside on a few rows first, and refuse one that does not fit the data or the
            convention.
        quiet: print nothing.
        options: of the method, as in a recipe: ``samples``, ``batch_size``, ``lr``, …

    Returns:
        The trained model. ``.inner`` is the user's own module with its own parameter names.

    Raises:
        UserError: a wrong argument; a folder that was begun with other arguments; a training that diverged.

    >>> import fewstep as fs, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     teacher = fs.train("flow_matching", data="moons", out=f"{folder}/teacher", samples=512, quiet=True)
    >>> teacher.sample(3, steps=4).shape
    torch.Size([3, 2])
    """
    out, world = Path(out), LocalWorld(quiet=quiet)
    if not STAGE_NAME.fullmatch(out.name):
        raise UserError(f"out={str(out)!r}: the last part is the stage's name; use letters, digits, '_', '-' and '.'.")
    rows, stream = _open_data(data, seed, _units(teacher, init, network), out)
    given: dict[str, Generator] = {}
    words = {role: _word(role, model, rows, given) for role, model in (("teacher", teacher), ("init", init))}
    foreign = [_as_foreign(network)] if isinstance(network, nn.Module) else []
    foreign += [model.module for model in given.values() if isinstance(model.module, Foreign)]
    checked = _options(method, {**options, **words, **_network_option(network)})
    header = Header.model_construct(
        data=rows.name,
        base="gaussian" if base == "gaussian" else "data",
        network={},
        seed=seed,
        conditional=_conditional(conditional, rows, words["teacher"], given, _labels_named(data)),
        dequantise=dequantise,
        check=check,
    )
    check_reference(rows)
    source, base_rows = make_source(base, rows)
    recipe = Recipe(header, {out.name: checked})
    run = Run(recipe, out.parent, rows, source, base_rows, world, by_name(foreign), given, stream)
    return _run(run, out)


def _run(run: Run, out: Path) -> Generator:
    """Train the only stage of a run, and load its model."""
    check_networks(run)
    if run.recipe.header.check:
        check_foreign(run)
    check_precision(run)
    if run.world.rank == 0:
        make_folder(out)
        write_json(out / "run.json", environment(run.recipe.header.seed))
    run.world.barrier()
    with frozen_within(model.module for model in run.given.values()):
        failure = run_stage(run, out.name, run.recipe.stages[out.name])
    if failure is not None:
        raise UserError(failure.reason)
    run.world.barrier()
    return run.open_model(out)


def _units(*models: Any) -> dict[str, Any] | Literal["none"] | None:
    """The scaling of the first model that was given; ``none`` for the user's own network, which was trained on data as
    they are; None where no model says it.
    """
    for model in models:
        if isinstance(model, nn.Module):
            return "none"
        if isinstance(model, Generator):
            return model.config.scaling or "none"
        if isinstance(model, str | Path) and (is_diffusers_folder(model) or (Path(model) / "config.json").is_file()):
            return folder_kind(model).scaling or "none"
    return None


def _open_data(
    data: Any, seed: int, units: dict[str, Any] | Literal["none"] | None, out: Path
) -> tuple[DataSet, Stream | None]:
    """The data set, and the stream whose first rows it is.

    Args:
        data: the argument of :func:`train`.
        seed: of built-in data that are drawn.
        units: scaling of arrays, and of streams that were given none; None for the rules of the data.
        out: the model's folder: a stream that is resumed keeps its scaling.
    """
    from fewstep.data.sources import as_data
    from fewstep.data.stream import Stream as Streamed

    if isinstance(data, Streamed):
        begun = read_stage(out).get("inputs", {}).get("scaling")
        wanted = begun or (None if data.scale_named else units)
        if wanted is not None:
            data.use_scaling(_scaling(wanted, data.reservoir))
        return data.reservoir, data
    if isinstance(data, DataSet):
        return data, None
    if isinstance(data, str | Path) or (isinstance(data, Mapping) and {"path", "name"} & set(data)):
        return load_data(data, seed=seed), None
    rows = as_data(data, scale=None if units is None else "none")
    return (replace(rows, scaling=_scaling(units, rows)) if isinstance(units, dict) else rows), None


def _scaling(units: dict[str, Any] | Literal["none"], rows: DataSet) -> Scaling:
    """The scaling of a model or of a run, or that of rows that are taken as they are."""
    if isinstance(units, dict):
        return Scaling.from_dict(units)
    return Scaling(shape=rows.shape, layout=rows.scaling.layout)


def _labels_named(data: Any) -> bool:
    """Whether labels are used unless the user says otherwise: where they were given with the data, and not for data
    that bring labels of their own, such as ``digits``, as in a recipe.
    """
    if isinstance(data, str | Path):
        return False
    return not (isinstance(data, Mapping) and {"path", "name"} & set(data)) or "labels" in data


def _as_foreign(module: nn.Module) -> Foreign:
    """A network of the user's own; one that is called by this library's convention is wrapped."""
    return module if isinstance(module, Foreign) else Adapter(module)


def _word(role: str, model: Model | None, data: DataSet, given: dict[str, Generator]) -> str | None:
    """The word by which options name a model; models that are objects, or saved by others, are put into ``given``."""
    if model is None:
        return None
    if isinstance(model, str | Path):
        return str(model)
    if not isinstance(model, Generator | nn.Module):
        raise UserError(
            f"{role} is a {type(model).__name__}: give a network v(x, t, **cond) (a torch.nn.Module, fs.adapt), a "
            "generator (fs.load), or a model's folder."
        )
    generator = model if isinstance(model, Generator) else Generator(_as_foreign(model), shape=data.shape)
    word = generator.name
    while word in given and given[word].module is not generator.module:
        word += "'"
    given[word] = generator
    return word


def _network_option(network: Any) -> dict[str, Any]:
    """The option ``network``; a network of the user's own is looked up in the run."""
    if network is None:
        return {}
    return {"network": _as_foreign(network).describe() if isinstance(network, nn.Module) else network}


def _options(method: str, fields: dict[str, Any]) -> Options:
    """The checked options of the method."""
    spec = find_method(method)
    try:
        fields = spec.options.with_present_names(fields)
    except ValueError as error:
        raise UserError(f"method {method!r}: {error}") from error
    for key in fields:
        if key not in spec.options.model_fields:
            raise unknown(f"option of method {method!r}:", key, spec.options.model_fields)
    options: Options = validated(spec.options, {"method": method, **fields}, f"method {method!r}")
    for role, chosen in (("teacher", options.teacher), ("init", options.init)):
        if chosen is not None and any((Path(chosen) / file).is_file() for file in ("config.json", "model_index.json")):
            kind = folder_kind(chosen).kind
            if kind != "velocity" and not (role == "init" and kind == "map" and spec.starts_from_maps):
                raise UserError(f"the {role} {chosen!r} {NO_VELOCITY[kind]}")
    return options


def _conditional(
    wish: bool | None, data: DataSet, teacher: str | None, given: Mapping[str, Generator], named: bool
) -> bool:
    """Whether networks are given the labels."""
    if wish is True and data.labels is None:
        raise UserError(f"conditional=True, but the data {data.name!r} has no labels: give them with the data.")
    if wish is not None:
        return wish
    if data.labels is None:
        return False
    if teacher is not None and teacher not in given:
        return folder_kind(teacher).labels
    if teacher is not None and given[teacher].conditional:
        return True
    return named
