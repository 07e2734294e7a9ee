"""Reports: a self-contained HTML page of a comparison, and sheets of samples."""

from __future__ import annotations

from fewstep.report.page import write_report
from fewstep.report.sheets import scatter_sheet, sheet, write_sheet

__all__ = ["scatter_sheet", "sheet", "write_report", "write_sheet"]
