"""A session: one model and one set of options, for one data file after the other."""

import dataclasses
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxgrad.checkpoints import Checkpoint, LoadedModel, open_checkpoint
from jaxgrad.data.read import DataSet
from jaxgrad.data.tokens import tokens_digest
from jaxgrad.measure.memory import resident_bytes
from jaxgrad.measure.programs import Programs
from jaxgrad.models.sharding import (
    MeshShape,
    make_mesh,
    parse_mesh,
    replicated_line,
    spans_processes,
)
from jaxgrad.options import AnalyzeOptions, MeasureSettings, ModelOptions
from jaxgrad.processes import stopping
from jaxgrad.processes.group import ALONE, Exchange, Group
from jaxgrad.results.provenance import provenance
from jaxgrad.runs.agreement import compare_with_leader, open_together
from jaxgrad.runs.asked import AskedRun, finished_before
from jaxgrad.runs.plan import RunPlan, plan_run
from jaxgrad.runs.report_lines import (
    memory_line,
    memory_warnings,
    note_lines,
    run_line,
    summary_lines,
)
from jaxgrad.runs.windows import complete_run


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended: where, how many examples of each status and reason, and what it cost."""

    output_dir: str | Path
    counts: dict[str, Any]
    reused: bool


class Session:
    """One model and one set of options, for one data file after the other.

    The checkpoint is opened, the weights are read and the programs are compiled at their first use and
    kept, so that the second data file starts at once. In a group each process has a session of its own,
    which makes the same calls in the same order.
    """

    def __init__(
        self,
        model_path: str | None,
        options: AnalyzeOptions,
        *,
        mesh: str = "auto",
        model_options: ModelOptions = ModelOptions(),
        progress: bool = False,
        group: Group = ALONE,
    ) -> None:
        self._model_path, self._model_options = model_path, model_options
        self.options, self._progress = options, progress
        # None until the first plan settles an "auto".
        self._mesh_shape: MeshShape | None = parse_mesh(mesh)
        self._group = group
        self._model: LoadedModel | None = None
        self._programs: dict[MeasureSettings, Programs] = {}

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The model on disk, without the values of its weights."""
        return open_checkpoint(self._model_path, self._model_options)

    @property
    def model(self) -> LoadedModel:
        """The model with its weights, on the mesh of the first plan."""
        return self._loaded(None)

    def _loaded(self, exchange: Exchange | None) -> LoadedModel:
        """The model. With an exchange the processes share the reading, if their mesh spans them."""
        if self._model is None:
            mesh = make_mesh(self._mesh_shape or MeshShape())
            self._model = self.checkpoint.load(
                self.options.dtype,
                mesh=mesh,
                progress=self._progress,
                exchange=exchange if spans_processes(mesh) else None,
            )
        return self._model

    def plan(self, data: DataSet, options: AnalyzeOptions) -> RunPlan:
        """The plan of a run. The first one settles the mesh, which stays, as the loaded weights do.

        Args:
            data: the examples.
            options: the session's, with what a run of its own has settled.

        Raises:
            UserError: see `plan_run`.
        """
        loaded = 0 if self._model is None else self._model.weight_bytes
        plan = plan_run(
            self.checkpoint,
            data.examples,
            options,
            mesh=self._mesh_shape,
            loaded=loaded,
            across=self._group.num_processes > 1 and self._group.leads,
        )
        self._mesh_shape = plan.mesh
        return plan

    def programs_for(self, plan: RunPlan) -> Programs:
        """The programs of a run, kept for the next ones with the same settings."""
        if plan.settings not in self._programs:
            self._programs[plan.settings] = Programs(
                plan.config, plan.options.dtype, plan.settings, make_mesh(plan.mesh)
            )
        return self._programs[plan.settings]

    def run(self, asked: AskedRun, *, say: Callable[[str], None], progress: bool) -> RunSummary:
        """Measures a run, or what is left of it; in a group this process's share.

        A finished run that was made from these very model files is reused, and nothing is said. Where a
        part of it is damaged, what that part holds is measured again.

        Args:
            asked: from `ask_run`.
            say: takes the lines for the user.
            progress: show a bar on stderr.

        Raises:
            OutputError: `asked.output_dir` cannot be written or holds another run.
            UserError: the model cannot be loaded, or does not fit the options or the data; or another
                process of the group was given other inputs.
            Stopped: the process was asked to stop, see `stopping`.
        """
        stopping.raise_if_requested()
        stopping.note_start()
        group, exchange = self._group, self._group.begin_run()
        if not group.leads:
            say, progress = say_nothing, False
        asked = asked.for_model(self.checkpoint)
        compare_with_leader(exchange, asked.identity)
        counts = exchange.from_leader(lambda: finished_before(asked.output_dir, self.checkpoint))
        if counts is not None:
            return RunSummary(asked.output_dir, counts, reused=True)
        plan = self._plan_together(asked, exchange)
        programs = self.programs_for(plan)
        tally_at_start = programs.tally
        self._introduce(plan, programs, asked, say)
        self._loaded(exchange)
        identity = self._identity(plan, asked)
        compare_with_leader(exchange, identity)
        info = self._session_info(plan, asked.data)
        with open_together(group, exchange, asked.output_dir, identity, info) as store:
            counts = complete_run(
                store,
                plan,
                programs,
                self.model,
                tally_at_start=tally_at_start,
                say=say if group.leads else group.warn,
                progress=progress,
                group=group,
                exchange=exchange,
            )
        for line in summary_lines(counts):
            say(line)
        files = ", ".join(f"{asked.output_dir}/{n}" for n in ("examples", "matrices", "run.json"))
        say(f"results: {files}")
        return RunSummary(asked.output_dir, counts, reused=False)

    def _plan_together(self, asked: AskedRun, exchange: Exchange) -> RunPlan:
        """The plan with what process 0 chooses by its memory, so that all plan the same batches."""
        if self._group.leads:
            plan = self.plan(asked.data, asked.options)
            spans = spans_processes(make_mesh(plan.mesh))
            exchange.from_leader(
                lambda: [
                    plan.options.batch_tokens,
                    plan.options.layerwise,
                    spans and list(plan.mesh),
                ]
            )
            return plan
        batch_tokens, layerwise, spanning = exchange.from_leader(lambda: None)
        if spanning:
            self._mesh_shape = MeshShape(*spanning)
        options = dataclasses.replace(asked.options, batch_tokens=batch_tokens, layerwise=layerwise)
        return self.plan(asked.data, options)

    def _introduce(
        self, plan: RunPlan, programs: Programs, asked: AskedRun, say: Callable[[str], None]
    ) -> None:
        """Says what will be measured and needed; compiles the largest batch's program."""
        for line in asked.data.lines:
            say(line)
        if plan.memory is not None:
            say(memory_line(plan, programs.memory(plan.memory.shape), _program_bytes()))
            warn = say if self._group.leads else self._group.warn
            for line in memory_warnings(plan.choice):
                warn(line)
        if programs.spans:
            say(
                f"mesh {plan.mesh} spans {self._group.num_processes} processes, which compute every batch "
                "together"
            )
        whole = replicated_line(plan.config, plan.mesh)
        if whole is not None:
            say(whole)
        several = self._group.num_processes
        say(run_line(plan, asked.data.path) + (f"; {several} processes" if several > 1 else ""))
        for line in (*self.checkpoint.lines(), *note_lines(plan)):
            say(line)

    def _identity(self, plan: RunPlan, asked: AskedRun) -> dict[str, Any]:
        """All that the numbers depend on."""
        options = asked.identity["options"] | {
            "batch_tokens": plan.options.batch_tokens,
            "layerwise": plan.options.layerwise,
        }
        model = {
            "weights_sha256": self.model.fingerprint,
            "config": dataclasses.asdict(plan.config),
        }
        tokens = tokens_digest(plan.tokenized)
        return asked.identity | {"options": options, "model": model, "tokens_sha256": tokens}

    def _session_info(self, plan: RunPlan, data: DataSet) -> dict[str, Any]:
        """Where a session's numbers come from: versions, commit, devices, command, files.

        Of several processes it is the leading one's; devices are counted in all of them.
        """
        return provenance() | {
            "model": self.checkpoint.name,
            "model_origin": self.checkpoint.origin,
            "model_notes": list(self.checkpoint.notes),
            "model_files": self.checkpoint.files,
            "tokenizer": self.checkpoint.loaded_tokenizer.described(),
            "data_path": str(data.path),
            "data_kind": data.kind,
            "device": {
                "backend": jax.default_backend(),
                "kind": jax.local_devices()[0].device_kind,
                "count": jax.device_count(),
                "mesh": str(plan.mesh),
                "machine": platform.machine(),
            },
            "processes": self._group.num_processes,
        }


def say_nothing(line: str) -> None:
    """For processes that do not lead."""


@functools.cache
def _program_bytes() -> int:
    # Once a process, before its first weights: the most memory ever had does not shrink with them.
    return resident_bytes()
