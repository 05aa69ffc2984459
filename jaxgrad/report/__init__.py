"""Report: what a study says, as tables, figures and one HTML page. Starts where `results` ends.

    runs with roles (cells) -> every comparison (comparisons) -> tables, findings, figures, page (build)
"""
