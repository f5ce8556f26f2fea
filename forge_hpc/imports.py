"""Large imports, at less cost."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch, vLLM and the like: what they make stays, so it is not searched for garbage, neither
    meanwhile nor later.

    The search, repeated as objects become more, is a fifth of the CPU time that such an import takes. It leaves out
    whatever else the process has made by then, garbage among it: imports belong to a process's beginning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.unregister(gc.unfreeze)  # once: modules that count their objects at the end find none left then
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()
