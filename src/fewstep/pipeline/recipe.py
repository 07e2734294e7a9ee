"""A recipe: data, network and named stages, from one YAML file, checked before anything runs."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fewstep.data.builtin import DATA
from fewstep.diagnostics.tune import KINDS
from fewstep.errors import UserError, suggestion, unknown
from fewstep.flow.grids import explicit_times, make_grid
from fewstep.interop.open_model import folder_kind
from fewstep.methods.contract.options import Options
from fewstep.methods.registry import METHODS, find_method
from fewstep.pipeline.compare_rows import MAX_ROWS
from fewstep.pipeline.feature_checks import NO_VELOCITY, check_features
from fewstep.pipeline.recipe_text import parse_yaml, refuse_code
from fewstep.solvers.tables import find_solver

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = {"recipe.yaml", "run.json", "stats.jsonl", "compare.json", "compare.md", "report.html"}
SHORTHAND = {
    "data": "a built-in name, a path or a mapping",
    "base": "'gaussian', a built-in name, a path or a mapping",
    "network": "a network's name or a mapping",
}


class CompareOptions(BaseModel):
    """What ``compare:`` in a recipe holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2, 4, 8, 50)
    solver: str | None = Field(default=None, description="of velocity models; their own when absent")
    grid: str | None = Field(default=None, description="of velocity models; their own when absent")
    samples: int | None = Field(default=None, gt=5, description="generated samples; default min(4000, reference)")
    seed: int = Field(default=0, ge=0, lt=2**63)
    features: str | None = Field(
        default=None, description="features of the Fréchet distance: a stage, a path, lpips:vgg"
    )
    max_rows: int = Field(default=MAX_ROWS, gt=5, description="most rows of each split that are read, evenly spaced")
    diagnosis: bool = Field(default=True, description="diagnose velocity models too, for the report")

    @field_validator("steps", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """One number is a list of one."""
        if isinstance(value, int | float | str):
            return (value,)
        if value is None or not isinstance(value, list | tuple) or not value:
            raise ValueError("must be a list of step counts, such as [1, 2, 4, 8]")
        return value

    @model_validator(mode="after")
    def _known_sampler(self) -> CompareOptions:
        if self.solver is not None and self.solver not in KINDS:
            find_solver(self.solver)
        if self.solver in KINDS and self.grid is not None:
            raise ValueError(f"solver {self.solver!r} finds its own grid: leave grid out")
        if self.grid is not None:
            make_grid(self.grid, None if explicit_times(self.grid) else max(self.steps))
        return self


class Header(BaseModel):
    """The recipe without its stages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str | dict[str, Any]
    base: str | dict[str, Any] = "gaussian"
    network: str | dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0, lt=2**63)
    conditional: bool | None = Field(None, description="use the labels; default: when the recipe names a label file")
    dequantise: float | None = Field(None, ge=0, description="noise added to discrete data, network units")
    check: bool = Field(True, description="check networks from outside on a few rows before training from them")
    compare: CompareOptions = CompareOptions()

    @field_validator("data", "base", "network", mode="before")
    @classmethod
    def _word_or_mapping(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str | dict):
            raise ValueError(f"must be {SHORTHAND[str(info.field_name)]}")
        return value

    @field_validator("base")
    @classmethod
    def _known_base(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        words = ["gaussian", *DATA]
        if isinstance(value, str) and value not in words and re.fullmatch(r"\w+", value) and not os.path.exists(value):
            raise unknown("base", value, words)
        return value

    @field_validator("compare", mode="before")
    @classmethod
    def _compare_mapping(cls, value: object) -> object:
        if not isinstance(value, dict | CompareOptions):
            raise ValueError("must be a mapping, such as {steps: [1, 2, 4]}")
        return value


@final
class Recipe:
    """A checked recipe.

    Attributes:
        header: everything but the stages.
        stages: the options of every stage, in order.
    """

    def __init__(self, header: Header, stages: dict[str, Options]) -> None:
        self.header = header
        self.stages = stages

    def as_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in, as written to ``recipe.yaml``."""
        fields = self.header.model_dump(mode="json")
        fields["stages"] = {name: options.model_dump(mode="json") for name, options in self.stages.items()}
        return fields

    @property
    def conditional(self) -> bool:
        """Whether networks see the labels."""
        if self.header.conditional is not None:
            return self.header.conditional
        return isinstance(self.header.data, dict) and self.header.data.get("labels") is not None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with fewstep, by name: in the package when installed, else in the checkout."""
    folders = [Path(__file__).parents[3] / "recipes", Path(__file__).parents[1] / "recipes"]
    return {found.stem: found for folder in folders for found in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """A path, or the name of a recipe that comes with fewstep (``digits``, ``digits.yaml``).

    A name goes before a file of the same name in the current folder; ``./digits`` means the file.
    """
    path, names = Path(recipe), shipped_recipes()
    if str(recipe) in names:
        return names[str(recipe)]
    if os.path.isfile(path):
        return path
    if path.stem in names and str(path) in (path.name, f"recipes/{path.name}"):
        return names[path.stem]
    if os.path.isdir(path):
        raise UserError(f"{str(recipe) or 'the recipe'!r} is a folder, not a recipe: give a YAML file.")
    raise UserError(
        f"there is no recipe {str(recipe)!r}: {suggestion(path.stem, names)}Give a YAML file, or one of "
        f"{', '.join(names) or 'your own'}."
    )


def load_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply ``KEY=VALUE`` changes, and check it."""
    found = find_recipe(path)
    where = f"the recipe {found}"
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not a text file in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): "
            "give a YAML file, or save it as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}.") from error
    fields = parse_yaml(text, where)
    if fields is None:
        raise UserError(f"{where} is empty: it must hold data and stages; 'fewstep list recipes' names examples.")
    for change in changes:
        apply_change(fields, change)
    return make_recipe(fields, where)


def apply_change(fields: Any, change: str) -> None:
    """Apply one ``--set KEY=VALUE`` with a dotted key."""
    key, equals, value = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {change!r} is not KEY=VALUE: write for example --set stages.teacher.samples=100000.")
    at = fields
    for depth, part in enumerate(parts[:-1]):
        _make_room(fields, at, parts[:depth], part, parts[depth + 1])
        if not isinstance(at, dict) or not isinstance(at.get(part), dict):
            known = [str(name) for name in at] if isinstance(at, dict) else []
            raise UserError(
                f"--set {key}: the recipe has no {'.'.join(parts[: depth + 1])!r}: {suggestion(part, known)}"
                f"Known here: {', '.join(known) or 'nothing'}."
            )
        at = at[part]
    if not isinstance(at, dict):
        raise UserError(f"--set {key}: the recipe is no mapping of keys such as data, network and stages.")
    at[parts[-1]] = parse_yaml(value, f"--set {key}")


def _make_room(fields: Any, at: Any, above: list[str], part: str, below: str) -> None:
    """Turn a shorthand that a dotted key goes into (``data: digits``, a bare method) into its mapping."""
    if not isinstance(at, dict):
        return
    value = at.get(part)
    if above == ["stages"] and isinstance(value, str):
        at[part] = {"method": value}
    elif not above and part in ("data", "base") and isinstance(value, str):
        named = value in DATA or (part == "base" and value == "gaussian")
        # a new path replaces the old name or path altogether
        at[part] = {} if below == "path" else {"name" if named else "path": value}
    elif part == "network" and (not above or above[0] == "stages") and not isinstance(value, dict):
        # a stage without a network of its own has the shared one: change a copy of it
        shared = value if value is not None or not above else fields.get("network")
        at[part] = {"name": shared} if isinstance(shared, str) else dict(shared or {})
    elif not above and part in ("data", "base", "compare") and value is None:
        at[part] = {}


def make_recipe(fields: Any, where: str) -> Recipe:
    """Check a recipe's fields.

    Raises:
        UserError: unknown keys, methods, teachers; wrong values; with the place and the likeliest word.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is no recipe: it must hold keys such as data, network and stages.")
    fields = dict(fields)
    refuse_code(fields)
    stages = fields.pop("stages", None)
    for key in fields:
        if key not in Header.model_fields:
            raise unknown("recipe key", key, [*Header.model_fields, "stages"])
    header = validated(Header, fields, where)
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{where} has no stages: add 'stages:' with at least one named stage.")
    checked: dict[str, Options] = {}
    for name, options in stages.items():
        checked[str(name)] = _check_stage(str(name), options, checked, [str(other) for other in stages])
    recipe = Recipe(header, checked)
    check_features(checked, header.compare.features)
    _check_guidance(recipe)
    return recipe


def _check_stage(name: str, fields: Any, earlier: Mapping[str, Options], names: Sequence[str]) -> Options:
    where = f"stage {name!r}"
    if not STAGE_NAME.fullmatch(name):
        raise UserError(f"{where}: a stage's name is a folder's name; use letters, digits, '_' and '-'.")
    if name.lower() in RESERVED:
        raise UserError(f"{where}: the run writes a file of that name beside the stages: choose another.")
    if isinstance(fields, str):
        fields = {"method": fields}
    if not isinstance(fields, dict) or fields.get("method") is None:
        raise UserError(f"{where} names no method: add 'method: …'. Known: {', '.join(sorted(METHODS))}.")
    try:
        spec = find_method(fields["method"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        fields = spec.options.with_present_names(fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    for key in fields:
        if key not in spec.options.model_fields:
            raise unknown(f"option of {where} (method {fields['method']!r}):", key, spec.options.model_fields)
    options: Options = validated(spec.options, fields, where)
    for role, chosen in (("teacher", options.teacher), ("init", options.init)):
        if chosen is not None and chosen not in earlier:
            if chosen in names and chosen != name:
                raise UserError(f"{where}: its {role} {chosen!r} comes later: put that stage before this one.")
            _check_folder(where, role, chosen, earlier)
        if chosen is not None:
            kind = find_method(earlier[chosen].method).makes if chosen in earlier else folder_kind(chosen).kind
            if kind != "velocity" and not (role == "init" and kind == "map" and spec.starts_from_maps):
                raise UserError(f"{where}: the {role} {chosen!r} {NO_VELOCITY[kind]}")
    return options


def _check_folder(where: str, role: str, chosen: str, earlier: Mapping[str, Options]) -> None:
    """A model from outside the recipe: its folder must be there."""
    if not any(os.path.isfile(Path(chosen) / name) for name in ("config.json", "model_index.json")):
        raise UserError(
            f"{where}: unknown {role} {chosen!r}: {suggestion(chosen, earlier)}It must be an earlier stage "
            f"({', '.join(earlier) or 'there is none'}) or a model's folder."
        )


def _check_guidance(recipe: Recipe) -> None:
    """Refuse guidance without labels, and guiding a teacher that has guidance in its weights already."""
    baked: dict[str, float | None] = {}
    for name, options in recipe.stages.items():
        asked = find_method(options.method).needs(options).guidance
        own = None if asked == 1.0 else asked
        teacher = options.teacher
        if own is not None and not recipe.conditional:
            raise UserError(
                f"stage {name!r}: guidance {own:g} needs labels, and the recipe trains without: add "
                "'conditional: true' (the data must have labels), or leave guidance out."
            )
        inherited = None
        if teacher is not None:
            inherited = baked[teacher] if teacher in baked else folder_kind(teacher).guidance
        if own is not None and inherited is not None:
            raise UserError(
                f"stage {name!r}: guidance {own:g} asked of {teacher!r}, which has guidance {inherited:g} "
                "baked in already: guiding twice is wrong. Leave it out, or learn from the unguided teacher."
            )
        baked[name] = inherited if own is None else own


def validated(model: Any, fields: Mapping[str, Any], where: str) -> Any:
    """Validate with pydantic and turn its report into one message."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_complaints(model, error))) from error


def _complaints(model: Any, error: ValidationError) -> list[str]:
    """What pydantic complains about, each as ``key must be … (got …)``."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = CompareOptions.model_fields if place.startswith("compare.") else model.model_fields
            lines.append(str(unknown("key", place, [f"compare.{key}" for key in known])).rstrip("."))
        elif item["type"] == "missing":
            lines.append(f"the key {place!r} is missing")
        elif not place:
            lines.append(message)
        else:
            message = message.replace("Input should be", "must be")
            joint = " " if message.startswith("must") else ": "
            given = "" if message.startswith("unknown") else f" (got {reprlib.repr(item['input'])})"
            lines.append(f"{place}{joint}{message}{given}")
    return lines
