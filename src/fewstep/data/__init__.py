"""Data: built-in sets, arrays, idx files and image folders; their scaling and the held-out split."""

from __future__ import annotations

from fewstep.data.builtin import DATA, Builtin
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array, load_data
from fewstep.data.scaling import Scaling

__all__ = ["DATA", "Builtin", "DataSet", "Scaling", "from_array", "load_data"]
