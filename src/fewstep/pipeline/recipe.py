"""A recipe: data, network and named stages, from one YAML file, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewstep.errors import UserError, suggestion, unknown
from fewstep.methods.base import Options
from fewstep.methods.registry import METHODS, find_method

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = {"recipe.yaml", "run.json", "stats.jsonl", "compare.json", "report.html"}


class CompareOptions(BaseModel):
    """What ``compare:`` in a recipe holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[int, ...] = Field((1, 2, 4, 8, 50), min_length=1)
    samples: int | None = Field(None, gt=5, description="generated samples; default min(4000, reference)")
    seed: int = 0


class Header(BaseModel):
    """The recipe without its stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | dict[str, Any]
    base: str | dict[str, Any] = "gaussian"
    network: str | dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)
    conditional: bool | None = Field(None, description="use the labels; default: when the recipe names a label file")
    dequantise: float | None = Field(None, ge=0, description="noise added to discrete data, network units")
    compare: CompareOptions = CompareOptions()


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


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also reads ``1e-4`` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; tags that would make objects or run code are refused by the loader."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with fewstep, by name: beside the package when installed, else in the checkout."""
    folders = [Path(__file__).parents[3] / "recipes", Path(__file__).parents[1] / "recipes"]
    return {found.stem: found for folder in folders for found in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """A path, or the name of a recipe that comes with fewstep (``digits``, ``digits.yaml``)."""
    path = Path(recipe)
    if path.is_file():
        return path
    names = shipped_recipes()
    if path.stem in names and str(path) in (path.stem, path.name, f"recipes/{path.name}"):
        return names[path.stem]
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a recipe: give a YAML file.")
    raise UserError(
        f"there is no recipe {str(recipe)!r}: {suggestion(path.stem, names)}give a YAML file, or one of "
        f"{', '.join(names) or 'your own'}."
    )


def load_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply ``KEY=VALUE`` changes, and check it."""
    found = find_recipe(path)
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {found} cannot be read: {error}") from error
    fields = parse_yaml(text, f"the recipe {found}")
    for change in changes:
        apply_change(fields, change)
    return make_recipe(fields, str(found))


def apply_change(fields: Any, change: str) -> None:
    """Apply one ``--set KEY=VALUE`` with a dotted key."""
    key, equals, value = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {change!r} is not KEY=VALUE: write for example --set stages.teacher.samples=100000.")
    at = fields
    for depth, part in enumerate(parts[:-1]):
        if isinstance(at, dict) and isinstance(at.get(part), str) and part in ("data", "base", "network"):
            at[part] = {"name": at[part]}
        if isinstance(at, dict) and part not in at and depth == 0 and part in ("data", "network", "compare", "base"):
            at[part] = {}
        if not isinstance(at, dict) or not isinstance(at.get(part), dict):
            known = list(at) if isinstance(at, dict) else []
            raise UserError(f"--set {key}: the recipe has no {'.'.join(parts[: depth + 1])!r}: "
                            f"{suggestion(part, known)}Known here: {', '.join(map(str, known))}.")
        at = at[part]
    at[parts[-1]] = parse_yaml(value, f"--set {key}")


def make_recipe(fields: Any, where: str) -> Recipe:
    """Check a recipe's fields.

    Raises:
        UserError: unknown keys, methods, teachers; wrong values; with the place and the likeliest word.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is no recipe: it must hold keys such as data, network and stages.")
    fields = dict(fields)
    stages = fields.pop("stages", None)
    for key in fields:
        if key not in Header.model_fields:
            raise unknown("recipe key", key, [*Header.model_fields, "stages"])
    header = validated(Header, fields, where)
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{where} has no stages: add 'stages:' with at least one named stage.")
    checked: dict[str, Options] = {}
    for name, options in stages.items():
        checked[str(name)] = _check_stage(str(name), options, checked)
    return Recipe(header, checked)


def _check_stage(name: str, fields: Any, earlier: Mapping[str, Options]) -> Options:
    where = f"stage {name!r}"
    if not STAGE_NAME.fullmatch(name) or name in RESERVED:
        raise UserError(f"{where}: a stage's name is a folder's name; use letters, digits, '_' and '-'.")
    if isinstance(fields, str):
        fields = {"method": fields}
    if not isinstance(fields, dict) or "method" not in fields:
        raise UserError(f"{where} names no method: add 'method: ...'. Known: {', '.join(sorted(METHODS))}.")
    spec = find_method(fields["method"])
    for key in fields:
        if key not in spec.options.model_fields:
            raise unknown(f"option of {where} (method {fields['method']!r}):", key, spec.options.model_fields)
    options = validated(spec.options, fields, where)
    for role in ("teacher", "init"):
        chosen = getattr(options, role)
        if chosen is not None and chosen not in earlier and not Path(chosen, "config.json").is_file():
            known = ", ".join(earlier) or "none"
            raise UserError(
                f"{where}: unknown {role} {chosen!r}: {suggestion(chosen, earlier)}It must be an earlier stage "
                f"({known}) or a model's folder."
            )
    return options


def validated(model: Any, fields: Mapping[str, Any], where: str) -> Any:
    """Validate with pydantic and turn its report into one message."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            given = "" if item["type"] == "missing" or not place else f" (got {item['input']!r})"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{place + ': ' if place else ''}{message}{given}")
        raise UserError(f"{where}: " + "; ".join(lines)) from error
