"""The recipes of configs/cloud/, as far as a machine without a cloud can tell.

Their control flow is really executed: small shell scripts on PATH stand in for srun, gcloud and the
others, record what they were asked, and end with the codes that a test chose.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_files import write_model

from jaxgrad.errors import BAD_INPUT, LOST_PROCESS, RUN_AGAIN

ROOT = Path(__file__).resolve().parent.parent
CLOUD = ROOT / "configs" / "cloud"
UNTIL_DONE, SLURM, TPU_VM = (
    CLOUD / name for name in ("run_until_done.sh", "slurm.sbatch", "tpu_vm.sh")
)
SHELL = (UNTIL_DONE, SLURM, TPU_VM)
JOBSET, SKYPILOT = (CLOUD / name for name in ("gke_tpu_jobset.yaml", "skypilot.yaml"))
DATA = ROOT / "configs" / "demo" / "none.json"
# What a stand-in does until a signal comes; it ends by itself, should none come.
WAIT = "for _ in {1..400}; do sleep 0.05; done"


@pytest.fixture
def stubs(tmp_path) -> "Stubs":
    return Stubs(tmp_path)


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
        self.add(
            name,
            f"code=$(head -n1 {turns})\n"
            f'[ "$(wc -l <{turns})" -le 1 ] || sed -i 1d {turns}\n'
            'exit "$code"',
        )

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
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | more

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + 20
        while not any(line.startswith(call) for line in self.calls):
            assert time.monotonic() < deadline, f"{call} was not called: {self.calls}"
            time.sleep(0.02)


# every file


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def recipes() -> list[Path]:
    return sorted(path for path in CLOUD.iterdir() if path.is_file())


def test_every_recipe_is_known_here():
    assert recipes() == sorted((*SHELL, JOBSET, SKYPILOT))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_headers_say_what_a_user_needs(path):
    header = path.read_text()
    for topic in ("command", "preemption", "costs"):
        assert re.search(rf"^# +{topic} ", header, re.MULTILINE), topic
    if path != UNTIL_DONE:
        for topic in ("beforehand", "exit codes", "time"):
            assert re.search(rf"^# +{topic} ", header, re.MULTILINE), topic
        assert "Nothing was run on a cl" in header


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_name_the_codes_as_the_program_does(path):
    assert f"RUN_AGAIN={RUN_AGAIN} LOST_PROCESS={LOST_PROCESS}\n" in path.read_text()


def analyze_flags(path: Path) -> set[str]:
    """Flags of bin/analyze in a recipe's command, comments included, and in what --help shows."""
    text = path.read_text().replace("\n#", "\n").replace("\\\n", " ")
    # A command ends with its line, or where an array or a JobSet's list of arguments does.
    flags = set()
    for match in re.finditer(r"bin/analyze\b((?:[^\n]|\n\s+(?:- )?--)*)", text):
        flags |= set(re.findall(r"(?<![\w-])--(\w+)", match[1]))
    return flags


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bin" / "analyze"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(re.findall(r"^  --(?:\[no\])?(\w+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_flags_of_recipes_exist(path, known_flags):
    used = analyze_flags(path)
    assert {"data_path", "output_dir"} <= used
    assert used <= known_flags, f"unknown to bin/analyze: {sorted(used - known_flags)}"


# run_until_done.sh


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ([0], 0, 1),
        ([RUN_AGAIN, 0], 0, 2),
        ([LOST_PROCESS, RUN_AGAIN, LOST_PROCESS, 0], 0, 4),
        ([BAD_INPUT], BAD_INPUT, 1),
        ([RUN_AGAIN, BAD_INPUT], BAD_INPUT, 2),
        ([1], 1, 1),
        ([137], 137, 1),
        ([RUN_AGAIN], RUN_AGAIN, 5),
    ],
)
def test_run_until_done(stubs, codes, code, calls):
    stubs.codes("analyze", codes)
    done = stubs.run(UNTIL_DONE, "analyze", "a b", "--c=*", MAX_ATTEMPTS="5", RETRY_SECONDS="0")
    assert done.returncode == code, done.stderr
    assert stubs.calls == ["analyze a b --c=*"] * calls


def test_run_until_done_without_a_command():
    assert subprocess.run([UNTIL_DONE], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    ("sent", "code", "told"),
    [(signal.SIGTERM, RUN_AGAIN, "TERM"), (signal.SIGINT, 130, "INT")],
    ids=["SIGTERM", "SIGINT"],
)
def test_run_until_done_hands_a_signal_on_and_waits_for_the_batch(stubs, sent, code, told):
    stubs.add(
        "analyze",
        f"trap 'sleep 0.3; echo batch finished on {told} >>{stubs.log}; exit {code}' {told}\n"
        f"echo ready >>{stubs.log}\n" + WAIT,
    )
    with stubs.start(UNTIL_DONE, "analyze", RETRY_SECONDS="0") as process:
        stubs.wait_for("ready")
        process.send_signal(sent)
        assert process.wait(20) == code
    # Once: the machine is about to go.
    assert stubs.calls == ["analyze", "ready", f"batch finished on {told}"]


def test_sigterm_to_the_command_alone_starts_it_again(stubs):
    stubs.add(
        "analyze",
        f"[ ! -e {stubs.directory}/second ] || exit 0\n"
        f"touch {stubs.directory}/second\n"
        f"kill -TERM $$ & trap 'exit {RUN_AGAIN}' TERM; " + WAIT,
    )
    done = stubs.run(UNTIL_DONE, "analyze", RETRY_SECONDS="0")
    assert done.returncode == 0, done.stderr
    assert stubs.calls == ["analyze", "analyze"]


def test_sigterm_between_two_attempts_ends_the_pause(stubs):
    stubs.codes("analyze", [LOST_PROCESS])
    with stubs.start(UNTIL_DONE, "analyze", RETRY_SECONDS="60") as process:
        assert process.stdout is not None
        assert "attempt 2 of 20 follows" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == LOST_PROCESS


def test_a_signal_that_everybody_gets_is_not_handed_on(stubs):
    """The second SIGTERM would end bin/analyze in the middle of its batch."""
    stubs.add(
        "analyze",
        f"trap 'echo told >>{stubs.log}; told=yes' TERM\n"
        f"echo ready >>{stubs.log}\n"
        'for _ in {1..400}; do [ -z "$told" ] || break; sleep 0.05; done; sleep 0.6\n'
        f"exit {RUN_AGAIN}",
    )
    with stubs.start(UNTIL_DONE, "analyze", RETRY_SECONDS="0", FORWARD="no") as process:
        stubs.wait_for("ready")
        (child,) = children(process.pid)
        os.kill(child, signal.SIGTERM)
        stubs.wait_for("told")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == RUN_AGAIN
    assert stubs.calls == ["analyze", "ready", "told"]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# slurm.sbatch

# What of srun's own arguments stands before the command.
SRUN = 'while [[ "$1" == --* ]]; do shift; done\n'
# srun ends with the highest code of its tasks (srun(1), RETURN VALUE); TASKS are their codes.
EVERY_TASK = SRUN + (
    "highest=0\n"
    'for CODE in $TASKS; do CODE=$CODE "$@"; code=$?; '
    '[ "$code" -le "$highest" ] || highest=$code; done\n'
    'exit "$highest"'
)


def slurm_job(stubs: Stubs, *arguments: str, **environment: str) -> Any:
    stubs.add("scontrol")
    stubs.add("squeue", 'echo "${STATE:-RUNNING}"')
    stubs.add("analyze", 'exit "$CODE"')
    return stubs.run(
        "bash",
        SLURM,
        *arguments,
        **{
            "MODEL": "M",
            "DATA": "F",
            "OUTPUT": "D",
            "PYTHON": "analyze",
            "SLURM_JOB_ID": "17",
            "SLURM_SUBMIT_DIR": str(stubs.directory),
        }
        | environment,
    )


@pytest.mark.parametrize(
    ("tasks", "code", "requeued"),
    [
        ([0, 0], 0, False),
        ([RUN_AGAIN, RUN_AGAIN], RUN_AGAIN, True),
        ([RUN_AGAIN, LOST_PROCESS], max(RUN_AGAIN, LOST_PROCESS), True),
        ([0, LOST_PROCESS], LOST_PROCESS, True),
        ([BAD_INPUT, BAD_INPUT], BAD_INPUT, False),
        # One cannot go on, and the others only notice that it has gone.
        ([LOST_PROCESS, BAD_INPUT, LOST_PROCESS], BAD_INPUT, False),
        ([1, LOST_PROCESS], 1, False),
        ([LOST_PROCESS, 137], 137, False),
    ],
)
def test_slurm_requeues_exactly_what_asks_for_it(stubs, tasks, code, requeued):
    stubs.add("srun", EVERY_TASK)
    done = slurm_job(stubs, TASKS=" ".join(map(str, tasks)))
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 17" in stubs.calls) == requeued
    analyze = "analyze bin/analyze --model_path=M --data_path=F --output_dir=D --mesh=auto"
    assert stubs.calls.count(analyze) == len(tasks)


@pytest.mark.parametrize(
    "environment",
    [{"STATE": "CANCELLED"}, {"STATE": "COMPLETING"}, {"SLURM_RESTART_COUNT": "50"}],
    ids=lambda environment: "".join(environment.values()),
)
def test_slurm_does_not_requeue_a_cancelled_job_nor_for_ever(stubs, environment):
    stubs.add("srun", EVERY_TASK)
    done = slurm_job(stubs, TASKS=str(RUN_AGAIN), **environment)
    assert done.returncode == RUN_AGAIN
    assert not any(call.startswith("scontrol") for call in stubs.calls)
    assert done.stderr


def test_slurm_s_last_restart_but_one_is_made(stubs):
    stubs.add("srun", EVERY_TASK)
    slurm_job(stubs, TASKS=str(RUN_AGAIN), SLURM_RESTART_COUNT="49")
    assert "scontrol requeue 17" in stubs.calls


@pytest.mark.parametrize("missing", ["MODEL", "DATA", "OUTPUT"])
def test_slurm_names_what_is_not_set(stubs, missing):
    stubs.add("srun")
    done = slurm_job(stubs, **{missing: ""})
    assert done.returncode != 0 and f"set {missing}" in done.stderr
    assert stubs.calls == []


def test_slurm_s_signals_reach_every_process_and_only_the_program_obeys(stubs):
    """SLURM signals all processes of a step, and on preemption the batch script as well."""
    stubs.add(
        "srun",
        SRUN + "trap : TERM\n"
        '"$@" & while :; do wait $!; code=$?; [ "$code" -gt 128 ] || exit "$code"; done',
    )
    process = None
    try:
        stubs.add("scontrol")
        stubs.add("squeue", "echo RUNNING")
        stubs.add(
            "analyze",
            f"trap 'sleep 0.3; echo batch finished >>{stubs.log}; exit {RUN_AGAIN}' TERM\n"
            f"echo ready >>{stubs.log}\n" + WAIT,
        )
        process = subprocess.Popen(
            ["bash", str(SLURM)],
            cwd=stubs.directory,
            start_new_session=True,
            stderr=subprocess.DEVNULL,
            env=stubs.environment(
                {"MODEL": "M", "DATA": "F", "OUTPUT": "D", "PYTHON": "analyze"}
                | {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(stubs.directory)}
            ),
        )
        stubs.wait_for("ready")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) == RUN_AGAIN
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert stubs.calls.count("batch finished") == 1
    assert stubs.calls[-2:] == ["squeue --noheader --jobs=17 --format=%T", "scontrol requeue 17"]


def sbatch_options() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text(), re.MULTILINE)
    return dict(lines)


def test_slurm_s_options():
    options = sbatch_options()
    # "B:" would signal the script alone, and srun takes SIGTERM for the order to kill its tasks.
    assert re.fullmatch(r"TERM@(\d+)", options["signal"])
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    # Bound to tasks, the devices that JAX_LOCAL_DEVICE_IDS counts would not be there.
    assert not {"gpus-per-task", "gpu-bind", "ntasks-per-gpu"} & set(options)
    first_command = SLURM.read_text().index("\nset -u")
    assert all(match.start() < first_command for match in re.finditer("#SBATCH", SLURM.read_text()))


def test_jax_gets_every_gpu_of_a_slurm_node(stubs):
    """JAX's own detection, on the variables that srun sets and on the one that the recipe adds."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    program = (
        "import jax; jax.distributed.initialize(); from jax._src import xla_bridge; "
        "print(xla_bridge.CUDA_VISIBLE_DEVICES.value, jax.process_count())"
    )
    stubs.add("srun", SRUN + 'exec "$@"')
    stubs.add("python", f'exec {shlex.quote(sys.executable)} -c "{program}"')
    done = stubs.run(
        "bash",
        SLURM,
        MODEL="M",
        DATA="F",
        OUTPUT="D",
        PYTHON="python",
        JAX_PLATFORMS="cpu",
        JAX_COORDINATOR_PORT=str(port),
        SLURM_SUBMIT_DIR=str(stubs.directory),
        SLURM_GPUS_ON_NODE="4",
        SLURM_JOB_ID="17",
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="1",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0,1,2,3 1\n"


# tpu_vm.sh

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


def tpu_run(stubs: Stubs, runs: list[str | int], *arguments: str, **environment: str) -> Any:
    stubs.add("gcloud", GCLOUD)
    (stubs.directory / "runs").write_text("".join(f"{run}\n" for run in runs))
    (stubs.directory / "vms").touch()
    return stubs.run(
        TPU_VM,
        *arguments,
        **{
            "HERE": str(stubs.directory),
            "PROJECT": "P",
            "ZONE": "Z",
            "MODEL": "M/m",
            "DATA": str(DATA),
            "OUTPUT": "gs://B/R",
            "NAME": "N",
            "POLL_SECONDS": "0",
            "MAX_VMS": "4",
        }
        | environment,
    )


def steps(stubs: Stubs) -> list[str]:
    """create and delete, in their order, of all that gcloud was asked."""
    return re.findall(r"queued-resources (create|delete)", "\n".join(stubs.calls))


@pytest.mark.parametrize(
    ("runs", "code", "vms"),
    [
        ([0], 0, 1),
        (["gone", 0], 0, 2),
        (["gone", RUN_AGAIN, LOST_PROCESS, 0], 0, 4),
        (["taken", "lost", 0], 0, 3),
        (["never", 0], 0, 2),
        ([BAD_INPUT], BAD_INPUT, 1),
        (["gone", BAD_INPUT], BAD_INPUT, 2),
        ([1], 1, 1),
        (["gone"] * 4, RUN_AGAIN, 4),
    ],
)
def test_tpu_vm(stubs, runs, code, vms):
    done = tpu_run(stubs, runs)
    assert done.returncode == code, done.stderr
    assert steps(stubs) == ["create", "delete"] * vms
    deletions = [call for call in stubs.calls if "delete" in call]
    assert set(deletions) == {
        "gcloud compute tpus queued-resources delete N --force --project=P --zone=Z --quiet"
    }


@pytest.mark.parametrize(
    "environment", [{"REFUSED": "yes"}, {"INSTALL_CODE": "1"}], ids=["refused", "installation"]
)
def test_tpu_vm_failures_of_the_cloud_end_at_once_and_delete_the_vm(stubs, environment):
    done = tpu_run(stubs, [0], **environment)
    assert done.returncode == 1 and "tpu_vm: " in done.stderr
    assert steps(stubs) == ["create", "delete"]


def test_tpu_vm_that_cannot_be_deleted_is_shouted_about(stubs):
    done = tpu_run(stubs, [0], DELETE_CODE="1")
    assert done.returncode == 0
    assert steps(stubs) == ["create", "delete", "delete", "delete"]
    assert "N IS STILL THERE AND COSTS MONEY" in done.stderr


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_tpu_vm_is_deleted_when_the_script_is_stopped(stubs, sent, code):
    stubs.add("gcloud", GCLOUD)
    (stubs.directory / "runs").write_text("running\n")
    (stubs.directory / "vms").touch()
    environment = {"HERE": str(stubs.directory), "PROJECT": "P", "ZONE": "Z", "MODEL": "M"}
    environment |= {"DATA": str(DATA), "OUTPUT": "gs://B/R", "NAME": "N", "POLL_SECONDS": "0.05"}
    with stubs.start(TPU_VM, **environment) as process:
        stubs.wait_for("gcloud compute tpus tpu-vm ssh N --command=cat exit_code")
        process.send_signal(sent)
        assert process.wait(20) == code
    assert steps(stubs) == ["create", "delete"]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"DATA": "nowhere.json"}, "nowhere.json: no such file"),
        ({"OUTPUT": "runs/here"}, "would go with the VM"),
        ({"ZONE": ""}, "set ZONE"),
    ],
    ids=["data", "output", "zone"],
)
def test_tpu_vm_asks_for_nothing_while_something_is_wrong(stubs, environment, told):
    done = tpu_run(stubs, [0], **environment)
    assert done.returncode != 0 and told in done.stderr
    assert stubs.calls == []


def test_what_runs_on_the_tpu_vm(stubs):
    """The script and the archive that are copied there, run here with a stand-in for its Python."""
    assert tpu_run(stubs, [0], "--parameters=a b", HF_TOKEN="t k").returncode == 0
    home = stubs.directory / "home"
    (home / "jaxgrad").mkdir(parents=True)
    subprocess.run(
        ["tar", "-xzf", stubs.directory / "jaxgrad.tar.gz", "-C", home / "jaxgrad"], check=True
    )
    assert (home / "jaxgrad" / "jaxgrad" / "pipeline.py").is_file()
    assert not list((home / "jaxgrad").rglob("__pycache__"))
    stubs.codes("python", [RUN_AGAIN, BAD_INPUT])
    (home / "venv" / "bin").mkdir(parents=True)
    (stubs.bin / "python").rename(home / "venv" / "bin" / "python")
    stubs.log.write_text("")
    for _ in range(2):  # gcloud repeats what a connection broke
        stubs.run("bash", stubs.directory / "run.sh", HOME=str(home), RETRY_SECONDS="0")
    assert (home / "exit_code").read_text() == f"{BAD_INPUT}\n"
    command = (
        "python jaxgrad/bin/analyze --model_path=M/m --data_path=none.json --output_dir=gs://B/R "
        "--mesh=auto --parameters=a b"
    )
    assert stubs.calls == [command] * 2
    assert "export HF_TOKEN=t\\ k\n" in (stubs.directory / "run.sh").read_text()


# gke_tpu_jobset.yaml


def read_yaml(path: Path) -> Any:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


def test_jobset_restarts_and_gives_up_by_the_program_s_codes():
    jobset = read_yaml(JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    restarted = set(rule["onExitCodes"]["values"])
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    signals = (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
    assert restarted == {RUN_AGAIN, LOST_PROCESS, *(128 + number for number in signals)}
    assert BAD_INPUT not in restarted and 1 not in restarted
    # Values stand in order, as the API server asks, and the rule is about the container that is there.
    assert rule["onExitCodes"]["values"] == sorted(restarted)
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    # A pod failure policy needs pods that are not restarted in place; the first failure fails the Job,
    # and the JobSet tells by its reason whether to try again.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (only,) = policy["rules"]
    assert only["action"] == "FailJobSet" and only["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", only["name"])


def test_jobset_is_one_indexed_job_over_the_hosts_of_its_slice():
    job = read_yaml(JOBSET)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    # The program is process 1 of its container: a shell between would keep SIGTERM to itself.
    assert container["command"][:2] == ["python3", "bin/analyze"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    from jax._src.clusters import cloud_tpu_cluster

    assert {"containerPort": int(cloud_tpu_cluster.coordinator_port)} in container["ports"]
    header = JOBSET.read_text()
    assert f"--restart-on-exit-codes={RUN_AGAIN},{LOST_PROCESS}" in header
    assert f"--tpu-type=v5litepod-{rows * columns}" in header


# skypilot.yaml


def test_skypilot_recovers_by_the_program_s_codes():
    recovery = read_yaml(SKYPILOT)["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [RUN_AGAIN, LOST_PROCESS]
    assert "max_restarts_on_errors" not in recovery


@pytest.mark.parametrize("code", [0, RUN_AGAIN, LOST_PROCESS, BAD_INPUT])
def test_skypilot_s_run_ends_with_the_program_s_code(stubs, code):
    task = read_yaml(SKYPILOT)
    assert task["run"].startswith("exec "), "a shell between would keep signals to itself"
    stubs.codes("python", [code])
    (stubs.directory / ".venv" / "bin").mkdir(parents=True)
    (stubs.bin / "python").rename(stubs.directory / ".venv" / "bin" / "python")
    done = stubs.run(
        "bash",
        "-c",
        task["run"],
        **task["envs"],
        SKYPILOT_NODE_IPS="10.0.0.2\n10.0.0.3",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
    )
    assert done.returncode == code, done.stderr
    (call,) = stubs.calls
    assert call.endswith("--coordinator=10.0.0.2:8476 --num_processes=2 --process_id=1")
    assert f"--output_dir={task['envs']['OUTPUT']}" in call
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


# the program itself, inside a recipe


def test_a_recipe_s_command_really_runs(stubs, known_flags):
    """slurm.sbatch with nothing replaced but srun: a dry run on a tiny model, then a bad value."""
    stubs.add("srun", SRUN + 'exec "$@"')
    stubs.add("scontrol")
    # Flags that bin/analyze does not know are another test's matter.
    stubs.add(
        "python",
        'kept=(); for word in "$@"; do name="${word#--}"; case "$word" in\n'
        f'--*) [[ " {" ".join(known_flags)} " == *" ${{name%%=*}} "* ]] || continue ;; esac\n'
        'kept+=("$word"); done\n'
        f'exec {shlex.quote(sys.executable)} "${{kept[@]}}"',
    )

    model = write_model(stubs.directory / "tiny")

    def run(*flags: str) -> Any:
        return stubs.run(
            "bash",
            SLURM,
            "--dry_run",
            "--chat=no",
            "--max_length=128",
            *flags,
            MODEL=str(model),
            DATA=str(DATA),
            OUTPUT=str(stubs.directory / "out"),
            PYTHON="python",
            JAX_PLATFORMS="cpu",
            HF_HUB_OFFLINE="1",
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID="17",
        )

    done = run("--limit=2")
    assert done.returncode == 0, done.stderr
    assert "2 examples" in done.stdout
    refused = run("--limit=abc")
    assert refused.returncode == BAD_INPUT and "--limit=abc" in refused.stderr
    assert not any(call.startswith("scontrol") for call in stubs.calls)
