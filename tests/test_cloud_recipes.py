"""The recipes of configs/cloud/, as far as a machine without a cloud can tell.

Their control flow is really executed, with the stand-ins of `cloud_stubs` in place of srun, gcloud and
the others.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cloud_stubs import EVERY_TASK, SRUN, WAIT, Stubs, slurm_environment, tpu_environment

from jaxgrad.errors import BAD_INPUT, LOST_PROCESS, RUN_AGAIN

ROOT = Path(__file__).resolve().parent.parent
CLOUD = ROOT / "configs" / "cloud"
RECIPES = sorted(path for path in CLOUD.iterdir() if path.is_file())
SHELL = [path for path in RECIPES if path.suffix != ".yaml"]
UNTIL_DONE, SLURM, TPU_VM = (
    CLOUD / name for name in ("run_until_done.sh", "slurm.sbatch", "tpu_vm.sh")
)


@pytest.fixture
def stubs(tmp_path) -> Stubs:
    return Stubs(tmp_path)


# every file


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse_and_name_the_codes_as_the_program_does(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert f"RUN_AGAIN={RUN_AGAIN} LOST_PROCESS={LOST_PROCESS}\n" in path.read_text()


def test_flags_of_recipes_exist():
    program = [sys.executable, str(ROOT / "bin" / "analyze"), "--help"]
    told = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout
    known = set(re.findall(r"^  --(?:\[no\])?(\w+)", told, re.MULTILINE))
    for path in RECIPES:
        text = path.read_text().replace("\n#", "\n").replace("\\\n", " ")
        # A command ends with its line, or where a JobSet's list of arguments does.
        commands = re.findall(r"bin/analyze\b((?:[^\n]|\n\s+(?:- )?--)*)", text)
        used = set(re.findall(r"(?<![\w-])--(\w+)", " ".join(commands)))
        assert {"data_path", "output_dir"} <= used <= known, (path.name, used - known)


# run_until_done.sh


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ([0], 0, 1),
        ([LOST_PROCESS, RUN_AGAIN, LOST_PROCESS, 0], 0, 4),
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


@pytest.mark.parametrize(
    ("sent", "code", "told"),
    [(signal.SIGTERM, RUN_AGAIN, "TERM"), (signal.SIGINT, 130, "INT")],
    ids=["SIGTERM", "SIGINT"],
)
def test_run_until_done_hands_a_signal_on_and_waits_for_the_batch(stubs, sent, code, told):
    finish = f"sleep 0.3; echo batch finished on {told} >>{stubs.log}; exit {code}"
    stubs.add("analyze", f"trap '{finish}' {told}; echo ready >>{stubs.log}; {WAIT}")
    with stubs.start(UNTIL_DONE, "analyze", RETRY_SECONDS="0") as process:
        stubs.wait_for("ready")
        process.send_signal(sent)
        assert process.wait(20) == code
    # Once: the machine is about to go.
    assert stubs.calls == ["analyze", "ready", f"batch finished on {told}"]


def test_sigterm_to_the_command_alone_starts_it_again(stubs):
    second = stubs.directory / "second"
    stubs.add(
        "analyze",
        f"[ ! -e {second} ] || exit 0\ntouch {second}\n"
        f"kill -TERM $$ & trap 'exit {RUN_AGAIN}' TERM; {WAIT}",
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


def test_a_signal_that_every_process_gets_is_not_handed_on(stubs):
    """A second SIGTERM would end bin/analyze in the middle of its batch."""
    stubs.add(
        "analyze",
        f"trap 'echo told >>{stubs.log}; told=yes' TERM; echo ready >>{stubs.log}\n"
        'for _ in {1..400}; do [ -z "$told" ] || break; sleep 0.05; done; sleep 0.6\n'
        f"exit {RUN_AGAIN}",
    )
    with stubs.start(UNTIL_DONE, "analyze", RETRY_SECONDS="0", FORWARD="no") as process:
        stubs.wait_for("ready")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        stubs.wait_for("told")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == RUN_AGAIN
    assert stubs.calls == ["analyze", "ready", "told"]


# slurm.sbatch


@pytest.mark.parametrize(
    ("tasks", "code", "requeued"),
    [
        ([0, 0], 0, False),
        ([RUN_AGAIN, LOST_PROCESS], max(RUN_AGAIN, LOST_PROCESS), True),
        ([0, LOST_PROCESS], LOST_PROCESS, True),
        # One cannot go on, and the others only notice that it has gone.
        ([LOST_PROCESS, BAD_INPUT, LOST_PROCESS], BAD_INPUT, False),
        ([1, LOST_PROCESS], 1, False),
        ([LOST_PROCESS, 137], 137, False),
    ],
)
def test_slurm_requeues_exactly_what_asks_for_it(stubs, tasks, code, requeued):
    stubs.add("srun", EVERY_TASK)
    stubs.add("analyze", 'exit "$CODE"')
    environment = slurm_environment(stubs, TASKS=" ".join(map(str, tasks)))
    done = stubs.run("bash", SLURM, **environment)
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 17" in stubs.calls) == requeued
    analyze = "analyze bin/analyze --model_path=M --data_path=F --output_dir=D --mesh=auto"
    assert stubs.calls.count(analyze) == len(tasks)


@pytest.mark.parametrize(
    ("environment", "requeued"),
    [
        ({"STATE": "CANCELLED"}, False),
        ({"STATE": "COMPLETING"}, False),
        ({"SLURM_RESTART_COUNT": "50"}, False),
        ({"SLURM_RESTART_COUNT": "49"}, True),
    ],
    ids=lambda value: "".join(value.values()) if isinstance(value, dict) else "",
)
def test_slurm_does_not_requeue_a_cancelled_job_nor_for_ever(stubs, environment, requeued):
    stubs.codes("srun", [RUN_AGAIN])
    done = stubs.run("bash", SLURM, **slurm_environment(stubs, **environment))
    assert done.returncode == RUN_AGAIN and done.stderr
    assert ("scontrol requeue 17" in stubs.calls) == requeued


def test_slurm_s_signals_reach_every_process_and_only_the_program_obeys(stubs):
    """SLURM signals all processes of a step, and on preemption the batch script as well."""
    outlive = 'while :; do wait $!; code=$?; [ "$code" -gt 128 ] || exit "$code"; done'
    stubs.add("srun", f'{SRUN}trap : TERM; "$@" & {outlive}')
    finish = f"sleep 0.3; echo batch finished >>{stubs.log}; exit {RUN_AGAIN}"
    stubs.add("analyze", f"trap '{finish}' TERM; echo ready >>{stubs.log}; {WAIT}")
    with stubs.start("bash", SLURM, **slurm_environment(stubs)) as process:
        stubs.wait_for("ready")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) == RUN_AGAIN
    assert stubs.calls.count("batch finished") == 1
    assert stubs.calls[-1] == "scontrol requeue 17"


def test_bad_input_to_the_program_itself_is_not_requeued(stubs):
    stubs.add("srun", SRUN + 'exec "$@"')
    environment = slurm_environment(stubs, PYTHON=sys.executable, SLURM_SUBMIT_DIR=str(ROOT))
    done = stubs.run("bash", SLURM, "--limit=abc", **environment)
    assert done.returncode == BAD_INPUT and "--limit=abc" in done.stderr
    assert not any(call.startswith("scontrol") for call in stubs.calls)


# tpu_vm.sh


def steps(stubs: Stubs) -> list[str]:
    """create and delete, in their order, of all that gcloud was asked."""
    return re.findall(r"queued-resources (create|delete)", "\n".join(stubs.calls))


@pytest.mark.parametrize(
    ("runs", "code", "vms"),
    [
        ([0], 0, 1),
        (["gone", RUN_AGAIN, LOST_PROCESS, 0], 0, 4),
        (["taken", "lost", 0], 0, 3),
        (["never", 0], 0, 2),
        (["gone", BAD_INPUT], BAD_INPUT, 2),
        ([1], 1, 1),
        (["gone"] * 4, RUN_AGAIN, 4),
    ],
)
def test_tpu_vm(stubs, runs, code, vms):
    done = stubs.run(TPU_VM, **tpu_environment(stubs, runs))
    assert done.returncode == code, done.stderr
    assert steps(stubs) == ["create", "delete"] * vms


@pytest.mark.parametrize(
    ("environment", "code", "told", "asked"),
    [
        ({"REFUSED": "yes"}, 1, "refused", ["create", "delete"]),
        ({"INSTALL_CODE": "1"}, 1, "installation failed", ["create", "delete"]),
        ({"DELETE_CODE": "1"}, 0, "N IS STILL THERE AND COSTS MONEY", ["create", *["delete"] * 3]),
        ({"DATA": "nowhere.json"}, 2, "nowhere.json: no such file", []),
        ({"OUTPUT": "runs/here"}, 2, "would go with the VM", []),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tpu_vm_deletes_what_it_created_whatever_fails(stubs, environment, code, told, asked):
    done = stubs.run(TPU_VM, **tpu_environment(stubs, [0], **environment))
    assert done.returncode == code and told in done.stderr
    assert steps(stubs) == asked


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_tpu_vm_is_deleted_when_the_script_is_stopped(stubs, sent, code):
    environment = tpu_environment(stubs, ["running"], POLL_SECONDS="0.05")
    with stubs.start(TPU_VM, **environment) as process:
        stubs.wait_for("gcloud compute tpus tpu-vm ssh N --command=cat exit_code")
        process.send_signal(sent)
        assert process.wait(20) == code
    assert steps(stubs) == ["create", "delete"]


def test_what_runs_on_the_tpu_vm(stubs):
    """The script and the archive that are copied there, run here with a stand-in for its Python."""
    environment = tpu_environment(stubs, [0], HF_TOKEN="t k")
    assert stubs.run(TPU_VM, "--parameters=a b", **environment).returncode == 0
    checkout, python = stubs.directory / "jaxgrad", stubs.directory / "venv" / "bin" / "python"
    checkout.mkdir()
    archive = ["tar", "-xzf", stubs.directory / "jaxgrad.tar.gz", "-C", checkout]
    subprocess.run(archive, check=True)
    assert (checkout / "jaxgrad" / "pipeline.py").is_file()
    stubs.codes("python", [RUN_AGAIN, BAD_INPUT])
    python.parent.mkdir(parents=True)
    (stubs.bin / "python").rename(python)
    stubs.log.write_text("")
    for _ in range(2):  # gcloud repeats what a connection broke
        stubs.run("bash", "run.sh", HOME=str(stubs.directory), RETRY_SECONDS="0")
    assert (stubs.directory / "exit_code").read_text() == f"{BAD_INPUT}\n"
    command = "python jaxgrad/bin/analyze --model_path=M/m --data_path=none.json"
    assert stubs.calls == [f"{command} --output_dir=gs://B/R --mesh=auto --parameters=a b"] * 2
    assert "export HF_TOKEN=t\\ k\n" in (stubs.directory / "run.sh").read_text()


# the two of YAML


def test_jobset_restarts_by_the_program_s_codes():
    jobset = yaml.safe_load((CLOUD / "gke_tpu_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    signals = (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
    restarted = {RUN_AGAIN, LOST_PROCESS, *(128 + number for number in signals)}
    # The API server asks for an order.
    assert rule["onExitCodes"]["values"] == sorted(restarted)


def test_skypilot_s_run_ends_with_the_program_s_code_and_recovers_by_it(stubs):
    task = yaml.safe_load((CLOUD / "skypilot.yaml").read_text())
    codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert codes == [RUN_AGAIN, LOST_PROCESS]
    stubs.codes("python", [RUN_AGAIN])
    (stubs.directory / ".venv" / "bin").mkdir(parents=True)
    (stubs.bin / "python").rename(stubs.directory / ".venv" / "bin" / "python")
    node = {"SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3", "SKYPILOT_NUM_NODES": "2"}
    done = stubs.run("bash", "-c", task["run"], **task["envs"], **node, SKYPILOT_NODE_RANK="1")
    assert done.returncode == RUN_AGAIN, done.stderr
    (call,) = stubs.calls
    assert call.endswith("--coordinator=10.0.0.2:8476 --num_processes=2 --process_id=1")
