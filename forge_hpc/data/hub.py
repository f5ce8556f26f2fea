"""From ``model.path`` to a checked directory in Hugging Face format: built-in, local, or from the hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.hub_cache import MODEL_FILES, split_name
from forge_hpc.config.models import check_tokenizer, check_weights, read_model_config
from forge_hpc.config.registry import MODELS
from forge_hpc.config.user_code import load_user_code
from forge_hpc.hub.assets import Asset, find_cached, is_hub_name

BUILTIN_PREFIX = "builtin:"


def resolve_model(path: str, seed: int, cache_dir: str | Path) -> Path:
    """The directory that holds the model `path` names, complete.

    ``builtin:…`` is written under `cache_dir` from `seed` once; an existing directory passes through; a hub name is
    taken from the hub's own cache, and what that lacks is downloaded to it. Without ``@COMMIT`` the hub is asked which
    one it is now. Raises UserError where there is no such model or it is not complete.
    """
    if path.startswith(BUILTIN_PREFIX):
        return _builtin(path, seed, Path(cache_dir))
    directory = Path(path).expanduser()
    if directory.is_dir():
        check_model_dir(directory)
        return directory.resolve()
    if not is_hub_name(path):
        raise UserError(
            f"no such model directory: {path}", f"model.path: a directory, a hub name or {next(iter(MODELS))}"
        )
    return _download(path)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory, as ``transformers.AutoTokenizer`` loads it. Never goes to the network."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no eos token", 'set "eos_token" in its tokenizer_config.json')
    return tokenizer


def check_model_dir(directory: Path) -> None:
    """Raise UserError unless the directory holds config.json, a tokenizer and every weight file whole."""
    read_model_config(directory)
    check_weights(directory)
    check_tokenizer(directory)


def _builtin(name: str, seed: int, cache_dir: Path) -> Path:
    if name not in MODELS:
        raise UserError(f"unknown model {name}", f"there is {', '.join(MODELS)}")
    directory = cache_dir / f"{name.removeprefix(BUILTIN_PREFIX)}-seed{seed}"
    if directory.is_dir():
        return directory.resolve()
    write = load_user_code(MODELS[name], "model")
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=cache_dir))
    try:
        write(temporary, seed)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise  # else another process was first: the same seed, the same bytes
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory.resolve()


def _download(path: str) -> Path:
    cached, (name, revision) = find_cached(Asset("model", path, ())), split_name(path)
    if cached is not None and revision == cached.commit:  # the hub has no other
        return cached.snapshot
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    except GatedRepoError:
        raise UserError(f"the model {path} is gated", "accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"the model {name} has no revision {revision}", "a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"no such model on the hub, and no such directory: {path}", "check model.path; private models need HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.TransportError) as error:
        raise UserError(
            f"the model {path} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            f"where there is a network: forge-hpc fetch --model {path}, with the same HF_HOME; or give a directory",
        ) from None
    check_model_dir(directory)
    return directory
