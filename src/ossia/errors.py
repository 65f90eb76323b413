"""What a user can do wrong, as two exceptions. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OssiaError(Exception):
    """Something the user can mend: bad data, a damaged file, a missing package. Exit code 1.

    The message names what was given, what was expected and the next action.
    """

    exit_code = 1


class UsageError(OssiaError):
    """A wrong flag, key, path or combination of flags. Exit code 2."""

    exit_code = 2


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or `""` where none is as close as `cutoff` (1: the same)."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""
