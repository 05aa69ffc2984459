#!/usr/bin/env bash
# Runs a command until it is done. It starts again after exit codes 75 (stopped by SIGTERM) and 69 (a
# process of the group died), with which bin/analyze asks for it. Any other code ends this script, too.
#
#   command     configs/cloud/run_until_done.sh python3 bin/analyze --data_path=F --output_dir=D
#   settings    MAX_ATTEMPTS (20), RETRY_SECONDS between two attempts (10), FORWARD (yes)
#   preemption  SIGTERM to this script: it is passed on, the command finishes its batch, and both end with
#               75. The machine is about to go, so whoever sent the signal starts again elsewhere.
#               SIGTERM to the command alone: it finishes its batch and is started again here.
#               FORWARD=no: for machines that send SIGTERM to every process, as at a shutdown. A second
#               SIGTERM would end bin/analyze in the middle of its batch.
#   costs       none of its own
set -u
# Job control: the command gets a process group of its own, so Ctrl-C reaches it once, by the trap below.
# Without job control a shell makes its background commands ignore Ctrl-C.
set -m
RUN_AGAIN=75 LOST_PROCESS=69
MAX_ATTEMPTS="${MAX_ATTEMPTS:-20}" RETRY_SECONDS="${RETRY_SECONDS:-10}" FORWARD="${FORWARD:-yes}"

if [ "$#" -eq 0 ]; then
  echo "usage: run_until_done.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

told_to_stop="" handed_on="" interrupted="" child=""
hand_on() {
  handed_on=yes
  if [ "$told_to_stop" = INT ] || [ "$FORWARD" = yes ]; then
    kill "-$told_to_stop" "$child" 2>/dev/null
  fi
}
stop() {
  told_to_stop="$1" interrupted=yes
  [ -z "$child" ] || hand_on
}
trap 'stop TERM' TERM
trap 'stop INT' INT

for ((attempt = 1; ; attempt++)); do
  "$@" &
  child=$!
  # A signal may have come before `child` was set.
  if [ -n "$told_to_stop" ] && [ -z "$handed_on" ]; then hand_on; fi
  # A trap ends `wait` early. Called again, it waits for the command and gives its code.
  while :; do
    interrupted=""
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || break
  done
  child=""
  case "$code" in
    "$RUN_AGAIN" | "$LOST_PROCESS") ;;
    *) exit "$code" ;;
  esac
  if [ -n "$told_to_stop" ]; then
    exit "$code"
  fi
  if [ "$attempt" -ge "$MAX_ATTEMPTS" ]; then
    echo "run_until_done: still code $code after $attempt attempts; giving up" >&2
    exit "$code"
  fi
  echo "run_until_done: code $code, attempt $((attempt + 1)) of $MAX_ATTEMPTS follows" >&2
  for ((second = 0; second < RETRY_SECONDS; second++)); do
    [ -z "$told_to_stop" ] || exit "$code"
    sleep 1
  done
done
