"""Report: finished runs as tables, findings in words, figures and one HTML page. No JAX.

    runs with roles (cells) -> numbers (comparisons) -> tables, findings, figures, page (build)

`analysis.statistics` declares what a report can show. `style` says how projections look and what losses are
called.
"""

from jaxgrad.report.build import read_y_limits, write_report
from jaxgrad.report.cells import Cell, Role, read_cell, read_labelled

__all__ = ["Cell", "Role", "read_cell", "read_labelled", "read_y_limits", "write_report"]
