"""The text of a recipe: plain values from YAML, none of which is code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from fewstep.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also reads ``1e-4`` as a number and refuses a key that occurs twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping; YAML would silently keep the last of two equal keys."""
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key {twice[0]!r} occurs twice in one mapping", node.start_mark
        )
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; tags that would make objects or run code are refused by the loader."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        if "could not determine a constructor" in str(error.problem):
            tag = str(error.problem).rpartition("tag ")[2].replace("tag:yaml.org,2002:", "!!")
            raise UserError(
                f"{where} holds the tag {tag}{_place(error)}: only plain values are read. Leave the tag out."
            ) from error
        raise UserError(f"{where} cannot be used: {error.problem}{_place(error)}.") from error
    except yaml.MarkedYAMLError as error:
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(
            f"{where} is not valid YAML: {what}{_place(error)}. Check brackets, colons and indents "
            "(spaces, no tabs); words with special characters need quotes."
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} is not valid YAML: {what}.") from error


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def refuse_code(fields: Mapping[str, Any]) -> None:
    """Refuse the key ``module`` in a recipe, in one of its stages and in their networks.

    Raises:
        UserError: there is one; it is said where a network of the user's own is named instead.
    """
    stages = fields.get("stages")
    named = stages.items() if isinstance(stages, dict) else ()
    parts: dict[str, Any] = {"the recipe": fields, **{f"stage {name!r}": stage for name, stage in named}}
    for where, part in parts.items():
        network = part.get("network") if isinstance(part, dict) else None
        described = isinstance(network, dict) and "parameters" in network  # of a network that was passed from Python
        holds = isinstance(network, dict) and "module" in network and not described
        if (isinstance(part, dict) and "module" in part) or holds:
            raise UserError(
                f"{where} has the key 'module', and a recipe alone never runs code: name the function that makes your "
                "network on the command line, fewstep run RECIPE --module file.py:make, and leave the key out."
            )
