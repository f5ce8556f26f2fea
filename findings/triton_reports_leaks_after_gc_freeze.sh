#!/usr/bin/env bash
# One would guess that gc.freeze(), which servers call after their imports so that collections are short, changes nothing
# that is printed. What is frozen is not collected when the interpreter ends either, and triton's library (nanobind) counts
# its objects there: each process ends with a list of leaks that are none. gc.unfreeze() at exit, and there is no list.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check triton==3.9.0

run() {
  venv/bin/python -c "import gc, triton._C.libtriton; $1" 2>&1
}
venv/bin/python -c 'from importlib.metadata import version; print("triton", version("triton"))'
frozen=$(run "gc.freeze()")
echo "gc.freeze(): $(grep -c . <<< "$frozen") lines at the end, the first: ${frozen%%$'\n'*}"
[[ $frozen == *"leaked"* ]] || { echo "it has changed"; exit 1; }
[[ -z $(run "pass") ]] || { echo "it has changed: leaks without freezing"; exit 1; }
[[ -z $(run "import atexit; gc.freeze(); atexit.register(gc.unfreeze)") ]] || { echo "it has changed: unfreezing is not enough"; exit 1; }
echo "without it, and with gc.unfreeze() at exit: nothing"
