"""``python -m forge_hpc.submit`` is ``forge-hpc submit``; see ``submission``."""

from __future__ import annotations

import sys

from forge_hpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
