"""Studies: a declared grid of models x data x settings is measured cell by cell, then reported.

`config` reads the file that declares the grid, `plan` finds what is left to do, `run` does it.
"""

from jaxgrad.study.config import StudyConfig, StudyData, StudyModel, read_study
from jaxgrad.study.run import plan_study, refuse_several_processes, run_study

__all__ = [
    "StudyConfig",
    "StudyData",
    "StudyModel",
    "plan_study",
    "read_study",
    "refuse_several_processes",
    "run_study",
]
