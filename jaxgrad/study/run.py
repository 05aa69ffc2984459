"""Runs a study: each model is loaded once for all its cells. Then the report is written."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from jaxgrad.errors import OutputError, UserError
from jaxgrad.measure.programs import is_out_of_memory
from jaxgrad.processes.place import find_place
from jaxgrad.report.cells import Role, read_cell
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import load_run
from jaxgrad.results.urls import local_path
from jaxgrad.runs.asked import ask_run
from jaxgrad.runs.session import Session
from jaxgrad.study.config import StudyConfig, StudyModel
from jaxgrad.study.plan import PlannedCell, StudyPlan, in_a_study, plan_study, unavailable

_ONE_PROCESS = (
    "Start it once, with --num_processes=1; bin/analyze is what several processes can share"
)
# (model, role) -> why that cell is missing.
Reasons = dict[tuple[str, Role], str]
# Raised if the host's or the device's memory is too small. Bugs raise the second one, too.
_OUT_OF_MEMORY = (MemoryError, jax.errors.JaxRuntimeError)


def refuse_several_processes(num_processes: int | None = None) -> None:
    """Refuses to be one of several processes, because each of them would measure the whole study.

    Args:
        num_processes: 1 for a process on its own, whatever its environment says.

    Raises:
        UserError: This is one of several processes, by its environment or `num_processes`.
    """
    if num_processes not in (None, 1):
        raise UserError(
            f"--num_processes={num_processes}: bin/study runs as one process. {_ONE_PROCESS}"
        )
    place = find_place(None, num_processes)
    if place is not None:
        raise UserError(
            f"bin/study runs as one process, and this is process {place.process_id} of "
            f"{place.num_processes}. {_ONE_PROCESS}"
        )


def run_study(
    config: StudyConfig,
    output_dir: str | Path,
    *,
    report_only: bool = False,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Measures what is not measured yet, and writes the report.

    If a data file or a model is missing or cannot be read, only its cells are left out. The reason is
    printed and stands in the report. The same call continues an interrupted study.

    Args:
        config: From `read_study`.
        output_dir: The runs go to OUTPUT_DIR/runs/MODEL/CELL, the report to OUTPUT_DIR/report.
        report_only: Measure nothing, report what is finished.
        say: Takes the lines for the user.
        progress: Show bars on stderr.

    Returns:
        The report's index.html.

    Raises:
        OutputError: `output_dir` cannot be written, or holds runs with other settings.
        UserError: No cell is finished.
    """
    output_dir = local_path(output_dir)
    plan = plan_study(config, output_dir)
    RunDirectory.probe(output_dir)
    for line in plan.summary():
        say(line)
    reasons: Reasons = {}
    if not report_only:
        for model in config.models:
            reasons |= _measure_model(plan, model, say, progress)
    return _report(plan, output_dir, reasons, report_only, say, progress)


def _measure_model(
    plan: StudyPlan, model: StudyModel, say: Callable[[str], None], progress: bool
) -> Reasons:
    """Runs the cells of one model. Returns why cells are missing."""
    config = plan.config
    numbered = [(k, cell) for k, cell in enumerate(plan.cells, 1) if cell.model == model]
    cells = [(k, cell) for k, cell in numbered if cell.data is not None]
    reasons: Reasons = {
        (model.name, cell.role): cell.reason for _, cell in numbered if cell.reason is not None
    }
    if not cells:
        return reasons
    try:
        session = Session(
            config.model_path(model),
            config.options_of(model),
            model_options=config.model_options(model),
            progress=progress,
        )
        _ = session.checkpoint
    except UserError as error:
        say(f"{model.name} cannot be opened, so its cells are left out: {in_a_study(error)}")
        return reasons | _left_out(cells, in_a_study(error))
    clock = _Clock([cell for _, cell in cells])
    for position, (k, cell) in enumerate(cells):
        assert cell.data is not None
        say(f"[{k} of {len(plan.cells)}] {cell.title}{clock.left(model)}")
        try:
            asked = ask_run(
                cell.data, cell.directory, cell.options, start=config.start, limit=config.limit
            )
            with clock.timing(cell):
                summary = session.run(asked, say=say, progress=progress)
        except OutputError as error:
            raise OutputError(f"{cell.title}: {error}") from error
        except UserError as error:
            why = in_a_study(error)
        except _OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            why = "the device's memory is too small for this model and these examples"
        else:
            if summary.reused:
                say("finished already: nothing to compute")
            continue
        if not _loads(session):
            say(f"{model.name} cannot be loaded, so its cells are left out: {why}")
            return reasons | _left_out(cells[position:], why)
        say(f"left out: {why}")
        reasons[model.name, cell.role] = why
    return reasons


def _left_out(cells: Sequence[tuple[int, PlannedCell]], why: str) -> Reasons:
    # A finished cell needs no model.
    return {(cell.model.name, cell.role): why for _, cell in cells if not cell.finished}


def _loads(session: Session) -> bool:
    """Whether the session's model can be loaded."""
    try:
        _ = session.model
    except UserError:
        return False
    except _OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


class _Clock:
    """Estimates how long the rest of a model's cells takes, from the text measured so far."""

    # How much of an example's text counts. At about four characters a token, most of the rest is cut off.
    _CHARACTERS = 4096

    def __init__(self, cells: Sequence[PlannedCell]) -> None:
        self._left = {cell.role: self._work(cell) for cell in cells if not cell.finished}
        self._done, self._seconds = 0, 0.0

    def _work(self, cell: PlannedCell) -> int:
        assert cell.data is not None
        lengths = (len(e.instruction) + len(e.response) for e in cell.data.examples)
        return sum(min(length, self._CHARACTERS) for length in lengths)

    @contextlib.contextmanager
    def timing(self, cell: PlannedCell) -> Iterator[None]:
        """Times a cell. One that an earlier session began says nothing of the speed."""
        begun = load_run(cell.directory) is not None
        started = time.monotonic()
        yield
        work = self._left.pop(cell.role, 0)
        if not begun:
            self._done += work
            self._seconds += time.monotonic() - started

    def left(self, model: StudyModel) -> str:
        """The estimate, such as " (about 12 min left for MODEL)"; "" while it is not known."""
        if not self._done or not self._left:
            return ""
        minutes = sum(self._left.values()) * self._seconds / self._done / 60
        amount = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(1, round(minutes))} min"
        return f" (about {amount} left for {model.name})"


def _report(
    plan: StudyPlan,
    output_dir: Path,
    reasons: Reasons,
    report_only: bool,
    say: Callable[[str], None],
    progress: bool,
) -> Path:
    config, cells = plan.config, []
    for planned in plan.cells:
        key = (planned.model.name, planned.role)
        run = load_run(planned.directory)
        if run is None or not run["finished"]:
            reasons.setdefault(key, planned.reason or "not run yet")
            continue
        try:
            cells.append(read_cell(planned.role, planned.directory))
            reasons.pop(key, None)
        except UserError as error:
            reasons[key] = str(error)
    missing = unavailable(config, reasons)
    for what, why in missing.items():
        say(f"missing: {what}: {why}")
    if not cells:
        hint = "run without --report_only" if report_only else "mend one of these"
        # The reason of a cell that was tried says more than that of a missing file.
        cell = next((cell for cell in plan.cells if cell.data is not None), plan.cells[0])
        why = f"{cell.title}: {reasons[cell.model.name, cell.role]}"
        raise UserError(f"{config.path}: not one cell is there to report ({why}); {hint}")
    # Imported here: figures and page need libraries that measuring does not need.
    from jaxgrad.report.build import write_report

    say(f"report: {len(cells)} of {len(plan.cells)} cells")
    index = write_report(
        cells,
        output_dir / "report",
        title=config.title,
        about=config.about,
        model_pairs=config.model_pairs(),
        unavailable=missing,
        resampling=config.resampling,
        progress=progress,
    )
    say(str(index))
    return Path(index)
