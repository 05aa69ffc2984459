#!/usr/bin/env python3
"""Kills processes of a shared run at random moments, and continues it with another number of processes.

First 1, 2 and 4 processes make the run undisturbed. Then come the trials. In each, 2 or 4 processes
begin a new run, and one of them gets SIGKILL or SIGTERM at a random moment. All must end in bounded time,
with the right exit codes. Then 1, 2, 3 or 4 processes continue the run. Its Parquet files must be those of
the single process, byte for byte. Prints a table; exits with 1 on any difference.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from process_groups import Processes, digest, faults, make_inputs, start_and_wait

NUM_MATRICES = 1
OK = {0}
AFTER_KILL, AFTER_TERM = {0, 69}, {0, 69, 75}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="trials with SIGKILL")
    parser.add_argument("--terms", type=int, default=10, help="trials with SIGTERM")
    parser.add_argument("--records", type=int, default=600, help="examples of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--timeout", type=int, default=5, help="--process_timeout of the processes")
    parser.add_argument(
        "--calm", default="1,2,4", help="how many processes make the undisturbed runs, 1 first"
    )
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds that the processes may take"
    )
    options = parser.parse_args()
    rng, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.records)

        def start(output_dir: Path, count: int) -> Processes:
            return Processes(folder, output_dir, count, timeout=options.timeout)

        expected, seconds = "", dict[int, float]()
        print("processes  seconds  codes  result")
        for count in map(int, options.calm.split(",")):
            output_dir, began = folder / f"calm-{count}", time.monotonic()
            codes = [ended.code for ended in start(output_dir, count).wait(options.limit)]
            seconds[count] = time.monotonic() - began
            wrong = [] if set(codes) == OK else [f"codes {codes}"]
            wrong = wrong or faults(output_dir, options.records, NUM_MATRICES)
            expected = expected or digest(output_dir)
            if not wrong and digest(output_dir) != expected:
                wrong = ["other bytes than one process's"]
            bad += bool(wrong)
            told = ", ".join(wrong) or "same bytes"
            print(f"{count:9d}  {seconds[count]:7.1f}  {codes}  {told}", flush=True)

        print(
            "\nsignal   victim  moment  batches  codes             ended after  "
            "continued by  result"
        )
        signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
        for trial, number in enumerate(signals):
            count = rng.choice((2, 4))
            victim = rng.randrange(count)
            moment = rng.uniform(0.0, seconds.get(count, max(seconds.values())))
            again = rng.choice((1, 2, 3, 4))
            output_dir = folder / f"trial-{trial}"
            # Most moments of a run are in its start. So every other trial waits for the first batch.
            if trial % 2:
                processes = start_and_wait(folder, output_dir, count, 1, timeout=options.timeout)
                moment = rng.uniform(0.0, 3.0)
            else:
                processes = start(output_dir, count)
            time.sleep(moment)
            processes.signal(victim, number)
            struck = time.monotonic()
            wrong: list[str] = []
            codes, lasted, batches = [], 0.0, "?"
            try:
                ended = processes.wait(options.limit)
                lasted = time.monotonic() - struck
                codes = [process.code for process in ended]
                others = set(codes[:victim] + codes[victim + 1 :])
                allowed = AFTER_KILL if number == signal.SIGKILL else AFTER_TERM
                # Until the handler is installed, SIGTERM kills the process.
                own = {0, -number} if number == signal.SIGKILL else {0, 75, -number}
                if not (others <= allowed and codes[victim] in own):
                    wrong.append(f"codes {codes}: {[process.stderr[-300:] for process in ended]}")
                if any("Traceback" in process.stderr for process in ended):
                    wrong.append(f"traceback: {[process.stderr[-2000:] for process in ended]}")
                batches = str(len(list(output_dir.glob("journal/*.batch"))))
                final = start(output_dir, again).wait(options.limit)
                if {process.code for process in final} != OK:
                    wrong.append(f"continued: {[(p.code, p.stderr[-500:]) for p in final]}")
                else:
                    wrong += faults(output_dir, options.records, NUM_MATRICES)
                    if digest(output_dir) != expected:
                        wrong.append("other bytes than one process's")
            except TimeoutError as error:
                wrong.append(str(error))
            bad += bool(wrong)
            print(
                f"{number.name}  {victim} of {count}  {moment:5.1f}s  {batches:>7}  {codes!s:16}  "
                f"{lasted:10.1f}s  {again:12d}  {', '.join(wrong) or 'same bytes'}",
                flush=True,
            )
    print(f"\n{len(signals)} trials, {bad} with differences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
