#!/usr/bin/env bash
# One would guess that the state of a job of submitit's LocalExecutor tells a job that went well from one that did not, as
# under Slurm, where the same function's job is COMPLETED or FAILED. It does not: a function that returns, one that raises
# and one that leaves with code 3 are all FINISHED. And as the code is not kept, the last can be told only by a result
# that is missing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check submitit==1.5.4

cat > states.py <<'PYTHON'
import importlib.metadata
import sys

import submitit


def returns():
    return 1


def raises():
    raise ValueError("bad")


def leaves():
    sys.exit(3)


if __name__ == "__main__":
    print("version    submitit", importlib.metadata.version("submitit"))
    print("expected   a job that failed has another state than one that went well")
    executor = submitit.LocalExecutor(folder="logs")
    executor.update_parameters(timeout_min=10)
    states = {}
    for function in (returns, raises, leaves):
        job = executor.submit(function)
        job.wait()
        states[function.__name__] = job.state
        error = job.exception() if function is not leaves else None
        print(f"seen       {function.__name__}: {job.state}", f"({type(error).__name__})" if error else "")
    same = set(states.values()) == {"FINISHED"}
    print("behaviour  all are FINISHED" if same else "behaviour  no longer so")
    sys.exit(not same)
PYTHON
venv/bin/python states.py
