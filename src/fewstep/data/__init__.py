"""Data: built-in sets, files, data sets of other libraries and streams; their scaling and the held-out split."""

from __future__ import annotations

from fewstep.data.builtin import DATA, Builtin
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array, load_data
from fewstep.data.scaling import Scaling
from fewstep.data.sources import as_data
from fewstep.data.stream import Stream

__all__ = ["DATA", "Builtin", "DataSet", "Scaling", "Stream", "as_data", "from_array", "load_data"]
