"""The one error users see for bad input, and the suggestion that goes into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """A setting that cannot work: its message names it, what was found and expected, the nearest valid choice."""


def nearest(found: object, valid: Iterable[object]) -> str:
    """The end of an error message: the nearest of the ``valid`` choices, or all of them where none is near.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "seed"])
        "Did you mean 'learning_rate'?"
    """
    choices = sorted(str(choice) for choice in valid)
    close = difflib.get_close_matches(str(found), choices, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Valid: {', '.join(choices)}." if choices else "There is no valid choice here."
