"""see.py WHAT DIR SECONDS [SIGN]: look at DIR again and again until it shows what is awaited; say after how long.

WHAT: exists (a name that was absent), locked (is_locked), status (opened as `forge-hpc watch` does, for SECONDS).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, "/src")
from forge_hpc.control import StatusReader
from forge_hpc.files import is_there
from forge_hpc.run_dir import RunDir


def main() -> int:
    what, path, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    run_dir, end = RunDir(path), time.monotonic() + seconds
    seen = StatusReader(run_dir)
    looks = {"exists": lambda: is_there(run_dir.status), "locked": run_dir.is_locked, "status": lambda: False}
    print("LOOKING", looks[what](), flush=True)
    while time.monotonic() < end:
        if looks[what]():
            print(f"SEEN {time.time():.2f}", flush=True)
            return 0
        if what == "status" and (status := seen.status()) is not None:
            print(f"step {status.step}", flush=True)
        time.sleep(0.2)
    print("OVER", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
