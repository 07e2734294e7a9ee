"""Conditions of samples: read from a file of the user's, and as they are written beside samples."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fewstep.data.dataset import LABEL, as_tensor
from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.generator import Generator

FIX = "write it with numpy.savez(file, obs=rows, …), one array (num, ...) per condition under its name"


def read_rows(path: Path) -> dict[str, Any]:
    """The conditions in a ``.npz`` file by name: tensors (num, ...), or (1, ...) for all samples; labels as they are.

    Args:
        path: the file. An array ``x`` in it is left out: a file that ``fewstep sample`` wrote can be read again.

    Raises:
        UserError: no such file, none of this format, or one that holds objects.
    """
    if not path.is_file():
        raise UserError(f"--cond {path}: there is no such file: {FIX}.")
    try:
        file = np.load(path, allow_pickle=False)
        named = isinstance(file, np.lib.npyio.NpzFile)
        arrays = {name: np.asarray(file[name]) for name in file.files if name != "x"} if named else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--cond {path} cannot be read as arrays by name ({error}): {FIX}.") from error
    if not named:
        raise UserError(f"--cond {path} holds one array without a name: {FIX}.")
    wrong = [name for name, rows in arrays.items() if rows.dtype.kind not in "biuf" and name != LABEL]
    if wrong or not arrays:
        what = f"{wrong[0]!r} of dtype {arrays[wrong[0]].dtype}" if wrong else "no conditions"
        raise UserError(f"--cond {path} holds {what}, and conditions are arrays of numbers: {FIX}.")
    return {name: rows if name == LABEL else as_tensor(rows) for name, rows in arrays.items()}


def model_conditions(model: Generator, cond: Mapping[str, Tensor]) -> dict[str, Any]:
    """The conditions of samples as arrays to write, (num, ...); labels as the data name them.

    Args:
        model: the model that was sampled.
        cond: conditions by name, each (num, ...).
    """
    made = {name: rows.detach().cpu().contiguous().numpy() for name, rows in cond.items()}
    names = model.config.label_names
    if LABEL in made and names is not None:
        made[LABEL] = np.asarray(names)[made[LABEL]]
    return made
