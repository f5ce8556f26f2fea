#!/usr/bin/env bash
# One would guess: a save that the file system refuses (full, over quota, too large a file) raises OSError, as open() and
# torch.save do, and as load_file does for a file that is not there. It does not: safetensors 0.8.0 raises SafetensorError,
# which is no OSError and has no errno, so that whoever waits for ENOSPC or retries on OSError misses it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 "numpy>=2,<3"
cd "$work"
"$work/venv/bin/python" - <<'P'
import errno, resource, signal, sys
import numpy, safetensors
from safetensors.numpy import load_file, save_file

print(f"safetensors {safetensors.__version__}, numpy {numpy.__version__}, Python {sys.version.split()[0]}")
print("expected: OSError, with the errno of the file system, from a save that it refuses")


def refused_by(call):
    try:
        call()
    except Exception as error:
        return error
    sys.exit("not refused at all")


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # files above 1 MB are refused with EFBIG, as a full disk refuses with ENOSPC
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
weights = {"w": numpy.zeros(1 << 20, dtype=numpy.float32)}
plain = refused_by(lambda: weights["w"].tofile("w.bin"))
saved = refused_by(lambda: save_file(weights, "w.safetensors"))
missing = refused_by(lambda: load_file("none.safetensors"))
for name, error in (("numpy's tofile", plain), ("save_file", saved), ("load_file of nothing", missing)):
    print(f"seen: {name}: {type(error).__name__}: OSError {isinstance(error, OSError)}, errno {getattr(error, 'errno', None)}: {error}")
as_described = isinstance(plain, OSError) and isinstance(missing, OSError) and not isinstance(saved, OSError)
sys.exit(0 if as_described and getattr(saved, "errno", None) is None else 1)
P
