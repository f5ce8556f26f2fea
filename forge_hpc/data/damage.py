"""Damaged files, told from everything else that goes wrong where data are read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from forge_hpc.config.errors import UserError


@contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Raise a UserError for what is raised where a file is damaged, or is not what its suffix says."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        import datasets

        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if not isinstance(cause, OSError):
                raise _damaged(path, cause) from None
        if _is_damage(cause):
            raise _damaged(path, cause) from None
        raise cause from None


def _is_damage(error: BaseException) -> bool:
    """Whether it tells of what is in a file, and not of a network, a disk or a name."""
    import pandas
    import pyarrow

    kinds = (pyarrow.ArrowException, pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError)
    of_compression = type(error) in (OSError, gzip.BadGzipFile, EOFError, zlib.error)
    return isinstance(error, kinds) or (of_compression and getattr(error, "errno", None) is None)


def _damaged(path: str, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot read {path}: {reason}",
        "the file is damaged, or is not what its suffix says: write it or download it again, or leave it out",
    )
