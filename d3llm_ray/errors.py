"""The errors that all rooms share, and how they are told in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

# Errors that come with time, not with what was asked for.
STORAGE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE}
NAMED = 10  # failures in the line that ends a verb


class InputError(ValueError):
    """Input that a user can correct: one line that names the field and what is accepted.

    The command line turns it into exit code 2, the HTTP edge into a 4xx response.
    """


class WorkError(RuntimeError):
    """Work that failed through no fault of its input, in one line. Exit code 1."""


class DecodingError(WorkError):
    """A request that could not be decoded through no fault of its sender, such as NaN logits."""


class IncompleteError(WorkError):
    """Work that is done but for some of its parts, which the line names with their reasons."""


class StorageError(OSError):
    """An output that the storage refused to take: a full disk, a lost share. Exit code 1."""


def unknown(field: str, value: object, accepted: Iterable[object]) -> InputError:
    """Build the error for a name that is not in a closed set."""
    names = ", ".join(sorted(str(name) for name in accepted))
    return InputError(f"{field}: unknown value {value!r}; accepted: {names}")


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raise `InputError` unless `condition` holds; `accepted` says in words what would do."""
    if not condition:
        raise InputError(f"{field}: got {value!r}; accepted: {accepted}")


def one_line(text: object) -> str:
    """What a library says, line breaks and indentation included, as one line."""
    return " ".join(str(text).split())


def first_failures(failures: Sequence[str], count: int | None = None) -> str:
    """The first few failures with their reasons, and how many more there are of `count` (None: of those given)."""
    named = failures[:NAMED]
    more = (len(failures) if count is None else count) - len(named)
    return "; ".join([*named, *([f"and {more} more"] if more else [])])
