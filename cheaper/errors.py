"""The one exception for mistakes a user can make, and how to suggest what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, expected and got.

    ``cheaper.cli`` prints the message without a traceback and exits with status 2.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns ``"; did you mean X?"`` for the choice nearest to ``name``, or all choices if none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose from {', '.join(choices)}" if choices else ""
