"""The value of ``--data``: a built-in name, a path, or a recipe's mapping."""

from __future__ import annotations

from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.pipeline.recipe_text import parse_yaml


def named_data(text: str) -> DataSet:
    """The data that ``--data`` names.

    Args:
        text: a built-in name, a path, or what a recipe has after ``data:``, such as
            ``{path: rows.npz, conditions: [obs]}``.

    Raises:
        UserError: no YAML, or data that cannot be read.

    >>> named_data("{name: moons, rows: 40}").shape
    (2,)
    """
    return load_data(parse_yaml(text, "--data") if text.lstrip().startswith("{") else text)
