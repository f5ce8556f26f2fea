"""Large imports, at less cost."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_was_enabled = False


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch, vLLM and the like, where a process begins: what they make stays, so it is not searched for
    garbage, neither meanwhile nor, unless a library unfreezes it, later.

    The search, repeated as objects become more, is a fifth of the CPU time that such an import takes. Where a module
    was new, whatever else the process has by then is left out of it, too: it must be nothing that is to go, no model.
    """
    global _inside, _was_enabled
    with _lock:
        if not _inside:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    num_modules = len(sys.modules)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if len(sys.modules) > num_modules:
                gc.freeze()
                atexit.unregister(gc.unfreeze)  # once
                atexit.register(gc.unfreeze)  # libraries that count their objects then find none left
            if not _inside and _was_enabled:
                gc.enable()
