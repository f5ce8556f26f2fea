"""What the Hugging Face cache of this machine has, without its libraries, which take a second to import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models and datasets of the hub are kept, by the variables that ``huggingface_hub`` reads."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached_snapshot(name: str, kind: str = "model") -> Path | None:
    """The directory of ``OWNER/NAME`` at its main branch; None where it was never fetched. ``kind``: model, dataset."""
    folder = hub_cache() / f"{kind}s--{name.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None
