"""hold.py DIR JOB REQUEUES SECONDS: take a run directory, write a step a second, beat, and say what happens.

Each line begins with the seconds since the start. Exit code: 0 released, 1 refused, 3 lost.
"""

import os
import sys
import threading
import time

sys.path.insert(0, "/src")
from forge_hpc.config.errors import UserError
from forge_hpc.observability.jsonl import JsonlWriter
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter

BEGAN = time.monotonic()
STALL_S = 5.0


def say(*words: object) -> None:
    print(f"{time.monotonic() - BEGAN:7.2f}", *words, flush=True)


def write_steps(run_dir: RunDir, job: str, ended: threading.Event) -> None:
    """As a controller's loop does: a line, and the status. A pause of more than STALL_S is said."""
    writer, status = JsonlWriter(run_dir.metrics, 10**9), StatusWriter(run_dir)
    step = writer.last_step or 0
    say("steps go on after", step)
    status.update(state="running", job_id=job)
    worst = 0.0
    while not ended.wait(1):
        step, before = step + 1, time.monotonic()
        try:
            writer.write({"step": step, "job": job, "pad": "z" * 40})
        except OSError as error:
            say("WRITE FAILED", error)
        status.update(step=step)
        worst = max(worst, time.monotonic() - before)
        if time.monotonic() - before > STALL_S:
            say(f"STALL of {time.monotonic() - before:.1f} s at step {step}")
    say(f"last step {step}, longest pause {worst:.2f} s")


def main() -> int:
    path, job, requeues, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    run_dir = RunDir(path)
    try:
        lock = run_dir.lock(job, requeues=requeues, stop=lambda: None)
    except UserError as error:
        say("REFUSED", error.message)
        return 1
    say("TAKEN")
    ended = threading.Event()
    writing = threading.Thread(target=write_steps, args=(run_dir, job, ended), daemon=True)
    writing.start()
    lost = lock.lost.wait(seconds)
    if lost:
        say("LOST")
        time.sleep(2)  # as long as a supervisor takes to end what it runs
    ended.set()
    writing.join(10)
    if lost:
        sys.stdout.flush()
        os._exit(3)
    lock.release()
    say("RELEASED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
