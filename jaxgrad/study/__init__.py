"""A study: a declared grid of models x data x settings, measured cell by cell, and its report."""

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
