"""Report: what a study says, as tables, figures and one HTML page. Starts where `results` ends.

runs with roles (cells) -> every comparison (comparisons) -> tables, findings, figures, page (build)
"""

from jaxgrad.report.build import read_y_limits, write_report
from jaxgrad.report.cells import Cell, Role, read_cell, read_labelled

__all__ = ["Cell", "Role", "read_cell", "read_labelled", "read_y_limits", "write_report"]
