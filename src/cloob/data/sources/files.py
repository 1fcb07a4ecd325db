"""What is wrong with a file, in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cloob.errors import InputError, one_line

# what the cache has removed, or has no room for
_LOST = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def reading(path: Path, *faults: type[Exception]) -> Iterator[None]:
    """Inside, what is wrong with a file is one line for the user; what is wrong with
    the cache stays an OSError.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException, *faults) as error:
        if not path.exists():
            raise InputError(f"{path}: no such file") from None
        if getattr(error, "errno", None) in _LOST:
            raise
        hint = ""
        if '"' in str(error):
            hint = "; a quote that is not closed takes in the rows after it"
        kind = path.suffix[1:].lower()
        raise InputError(
            f"{path} cannot be read as {kind}: {one_line(error)}{hint}"
        ) from error
