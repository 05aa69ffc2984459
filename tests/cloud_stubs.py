"""Stand-ins for srun, gcloud and the others: shell scripts on PATH, for test_cloud_recipes.py.

They record what they were asked, and end with the codes that a test chose.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "configs" / "demo" / "none.json"
# What a stand-in does until a signal comes; it ends by itself, should none come.
WAIT = "for _ in {1..400}; do sleep 0.05; done"


class Stubs:
    """Programs that record their arguments in calls.txt, and then do what their script says."""

    def __init__(self, directory: Path):
        self.directory, self.bin = directory, directory / "bin"
        self.bin.mkdir()
        self.log = directory / "calls.txt"
        self.log.touch()

    def add(self, name: str, script: str = "") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >>{self.log}\n{script}\n')
        path.chmod(0o755)

    def codes(self, name: str, codes: list[int]) -> None:
        """A program that ends with one code after the other, and with the last for ever."""
        turns = self.directory / f"{name}.codes"
        turns.write_text("".join(f"{code}\n" for code in codes))
        next_turn = f'[ "$(wc -l <{turns})" -le 1 ] || sed -i 1d {turns}'
        self.add(name, f'code=$(head -n1 {turns})\n{next_turn}\nexit "$code"')

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def run(self, *command: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.directory,
            env=self.environment(environment),
            check=False,
        )

    @contextlib.contextmanager
    def start(self, *command: str | Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
        """The command in a process group of its own, which is killed at the end."""
        # Bash cannot trap a signal that was ignored when it began, as SIGINT is in a background shell.
        listening = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "os.execvp(sys.argv[1], sys.argv[1:])"
        )
        with subprocess.Popen(
            [sys.executable, "-c", listening, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory,
            env=self.environment(environment),
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | more

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + 20
        while not any(line.startswith(call) for line in self.calls):
            assert time.monotonic() < deadline, f"{call} was not called: {self.calls}"
            time.sleep(0.02)


# srun's own arguments stand before the command.
SRUN = 'while [[ "$1" == --* ]]; do shift; done\n'
# srun ends with the highest code of its tasks (srun(1), RETURN VALUE); TASKS are their codes.
EVERY_TASK = SRUN + (
    'highest=0; for CODE in $TASKS; do CODE=$CODE "$@"; code=$?\n'
    '[ "$code" -le "$highest" ] || highest=$code; done; exit "$highest"'
)


def slurm_environment(stubs: Stubs, **more: str) -> dict[str, str]:
    stubs.add("scontrol")
    stubs.add("squeue", 'echo "${STATE:-RUNNING}"')
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(stubs.directory), "PYTHON": "analyze"}
    return {"MODEL": "M", "DATA": "F", "OUTPUT": "D"} | job | more


# A cloud of one zone: a queued resource is ACTIVE once it was created, and its VM answers with the code of
# its run, a line of `runs` each. "never": the request comes to nothing. The others are VMs that answer
# once: "gone" and "taken" are preempted (seen at the request, at the node), "lost" stops answering.
GCLOUD = """
vms="$HERE/vms" runs="$HERE/runs"
run="$(sed -n "$(wc -l <"$vms")p" "$runs")" turn="$HERE/asked.$(wc -l <"$vms")"
case "$*" in
  *queued-resources\\ create*) [ -z "$REFUSED" ] || exit 1; echo >>"$vms" ;;
  *queued-resources\\ delete*) exit "${DELETE_CODE:-0}" ;;
  *queued-resources\\ describe*)
    if [ "$run" = never ]; then echo FAILED
    elif [ "$run" = gone ] && [ -e "$turn" ]; then echo SUSPENDED
    else echo ACTIVE; fi ;;
  *tpu-vm\\ describe*) [ "$run" = taken ] && echo PREEMPTED || echo READY ;;
  *"cat exit_code"*)
    if [ ! -e "$turn" ]; then touch "$turn"; echo running; exit; fi
    case "$run" in gone | taken | lost) exit 255 ;; esac
    echo "$run" ;;
  *tpu-vm\\ scp*) cp $(tr ' ' '\\n' <<<"$*" | grep -e tar.gz -e run.sh) "$HERE" ;;
  *"uv pip install"*) exit "${INSTALL_CODE:-0}" ;;
esac
"""


def tpu_environment(stubs: Stubs, runs: list[str | int], **more: str) -> dict[str, str]:
    stubs.add("gcloud", GCLOUD)
    (stubs.directory / "runs").write_text("".join(f"{run}\n" for run in runs))
    (stubs.directory / "vms").touch()
    asked = {"PROJECT": "P", "ZONE": "Z", "MODEL": "M/m", "DATA": str(DATA), "NAME": "N"}
    settings = {"OUTPUT": "gs://B/R", "POLL_SECONDS": "0", "MAX_VMS": "4"}
    return {"HERE": str(stubs.directory)} | asked | settings | more
