#!/usr/bin/env bash
# One TPU VM (spot, by a queued resource) until the run is done. A preempted VM is replaced. The VM is
# deleted at the end, however it ends. Runs on your own machine and needs gcloud there.
# Not yet run on a cloud; docs/cloud.md says what was checked, and how.
#
#   command     PROJECT=P ZONE=us-west4-a MODEL=M DATA=F OUTPUT=gs://BUCKET/RUN \
#                 configs/cloud/tpu_vm.sh [flags of bin/analyze]
#   beforehand  gcloud auth login; the Cloud TPU API and a quota for spot TPUs in that zone; a bucket that
#               the project's default Compute Engine service account may write
#   settings    PROJECT, ZONE, OUTPUT; DATA (a file here, copied to the VM); MODEL (a hub id; for a gated
#               one export HF_TOKEN, which goes to the VM); NAME (jaxgrad-USER); ACCELERATOR
#               (v5litepod-8: eight chips on one host); RUNTIME (v2-alpha-tpuv5-lite); MAX_VMS (20);
#               POLL_SECONDS (60)
#
#   preemption  A spot VM that is taken away is shut down, which sends SIGTERM to its processes. bin/analyze
#               finishes its batch if the time suffices (Compute Engine gives spot VMs 30 s) and ends with
#               75. Finished batches are in the bucket either way. This script sees the queued resource
#               leave ACTIVE, deletes it, asks for another and gives the same command, which goes on where
#               the run stopped. On the VM itself run_until_done.sh starts again after 75 and 69.
#   exit codes  0: done. 75: still not done after MAX_VMS VMs. 130: Ctrl-C, the VM is deleted. 2 (bad
#               input), 1 or any other code of bin/analyze: ended at once, with no second VM.
#   the end     A trap deletes the VM however this script ends, except by kill -9 or if its machine stops.
#               Then you go on paying until you delete the VM, by the command that was printed first.
#
#   time        bin/analyze --dry_run --calibrate on the VM estimates T seconds
#   costs       PRICE x CHIPS x (T + VMs x S) / 3600, and the bucket. PRICE: of a chip and hour (spot, your
#               zone). CHIPS: 8 for v5litepod-8. VMs: how many it took. S: seconds from ACTIVE to the first
#               batch (copy, install, load, compile). Waiting in the queue is not charged.
set -euo pipefail
RUN_AGAIN=75 LOST_PROCESS=69
: "${PROJECT:?set PROJECT: the Google Cloud project}"
: "${ZONE:?set ZONE: a zone with TPUs of that kind}"
: "${MODEL:?set MODEL: a hub id}"
: "${DATA:?set DATA: the data file on this machine}"
: "${OUTPUT:?set OUTPUT: gs://BUCKET/RUN}"
NAME="${NAME:-jaxgrad-$(id -un)}"
ACCELERATOR="${ACCELERATOR:-v5litepod-8}" RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"
MAX_VMS="${MAX_VMS:-20}" POLL_SECONDS="${POLL_SECONDS:-60}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
WORK="$(mktemp -d)"

if [ ! -f "$DATA" ]; then
  echo "tpu_vm: $DATA: no such file" >&2
  exit 2
fi
case "$OUTPUT" in
  gs://*) ;;
  *)
    echo "tpu_vm: OUTPUT=$OUTPUT would go with the VM; give a gs:// directory" >&2
    exit 2
    ;;
esac

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }
on_vm() { tpus tpu-vm ssh "$NAME" --command="$1"; }
state() { tpus queued-resources describe "$NAME" --format='value(state.state)'; }
node_state() { tpus tpu-vm describe "$NAME" --format='value(state)'; }

created=""
delete_vm() {
  [ -n "$created" ] || return 0
  local attempt
  for attempt in 1 2 3; do
    if tpus queued-resources delete "$NAME" --force; then
      created=""
      return 0
    fi
    echo "tpu_vm: deletion failed, attempt $attempt of 3" >&2
    sleep "$POLL_SECONDS"
  done
  echo "tpu_vm: $NAME IS STILL THERE AND COSTS MONEY; delete it by hand" >&2
}
finish() {
  local code=$?
  trap - EXIT
  trap '' INT TERM
  rm -rf "$WORK"
  delete_vm
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# In the background, so that a signal ends the pause at once.
pause() {
  sleep "$POLL_SECONDS" &
  wait $!
}

# 0: the VM is there. 1: the request came to nothing, or the VM has gone already.
create_vm() {
  created=yes
  if ! tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" --spot; then
    echo "tpu_vm: the request was refused" >&2
    exit 1
  fi
  while :; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
      *) pause ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING; nothing while offline
    esac
  done
}

# The checkout, the data, and a new Python, because that of the VM's image may be older than 3.11.
install_on_vm() {
  tpus tpu-vm scp "$WORK/jaxgrad.tar.gz" "$WORK/run.sh" "$DATA" "$NAME": &&
    on_vm 'mkdir -p jaxgrad && tar -xzf jaxgrad.tar.gz -C jaxgrad &&
      python3 -m pip install --quiet --user uv && .local/bin/uv venv --quiet --python 3.12 venv &&
      .local/bin/uv pip install --quiet --python venv/bin/python "./jaxgrad[tpu,gcs]"'
}

# What runs on the VM, detached from ssh, so that a lost connection does not end it. gcloud repeats a
# command whose connection failed, so a second start does nothing.
write_run() {
  local analyze=(venv/bin/python jaxgrad/bin/analyze --model_path="$MODEL"
    --data_path="$(basename "$DATA")" --output_dir="$OUTPUT" --mesh=auto "$@")
  {
    echo 'cd && mkdir started || exit 0'
    if [ -n "${HF_TOKEN:-}" ]; then printf 'export HF_TOKEN=%q\n' "$HF_TOKEN"; fi
    printf '%q ' env FORWARD=no bash jaxgrad/configs/cloud/run_until_done.sh "${analyze[@]}"
    printf '>analyze.log 2>&1\necho $? >exit_code.new && mv exit_code.new exit_code\n'
  } >"$WORK/run.sh"
}

# Sets `code` to that of the run, or to 75 if the VM has gone. A VM that is there but cannot be reached for
# LOST polls counts as gone. While this machine is offline nothing is decided.
LOST=30
wait_for_run() {
  local answer unreachable=0
  while pause; do
    if answer="$(on_vm 'cat exit_code 2>/dev/null || echo running')"; then
      unreachable=0
      case "$answer" in
        running | '' | *[!0-9]*) continue ;;
      esac
      code="$answer"
      return 0
    fi
    case "$(state)/$(node_state)" in
      SUSPEND* | FAILED* | */PREEMPTED) unreachable="$LOST" ;;
      ACTIVE/*) unreachable=$((unreachable + 1)) ;;
    esac
    if [ "$unreachable" -ge "$LOST" ]; then
      code="$RUN_AGAIN"
      return 0
    fi
  done
}

echo "tpu_vm: should this script be killed, delete the VM by: gcloud compute tpus queued-resources" \
  "delete $NAME --force --project=$PROJECT --zone=$ZONE" >&2
tar -C "$ROOT" --exclude=__pycache__ -czf "$WORK/jaxgrad.tar.gz" \
  pyproject.toml README.md jaxgrad bin configs
write_run "$@"
for ((vm = 1; vm <= MAX_VMS; vm++)); do
  code="$RUN_AGAIN"
  if create_vm; then
    echo "tpu_vm: VM $vm of at most $MAX_VMS is there" >&2
    if install_on_vm && on_vm 'setsid nohup bash run.sh </dev/null >/dev/null 2>&1 &'; then
      wait_for_run
    elif [ "$(state)" = ACTIVE ]; then
      echo "tpu_vm: the installation failed" >&2
      exit 1
    fi
  fi
  case "$code" in
    "$RUN_AGAIN" | "$LOST_PROCESS") echo "tpu_vm: code $code, another VM" >&2 ;;
    *)
      on_vm 'tail -n 40 analyze.log' >&2 || true
      exit "$code"
      ;;
  esac
  delete_vm
done
echo "tpu_vm: not done after $MAX_VMS VMs; the same command goes on" >&2
exit "$RUN_AGAIN"
