"""The one exception for bad input: a sentence that says what is wrong, where, and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class EffnetlibError(ValueError):
    """Bad input. Shown as a sentence without a traceback; the command line exits with 2."""

    def _render_traceback_(self):  # IPython's hook
        return [f"{type(self).__name__}: {self}"]


class FailedError(EffnetlibError):
    """The request was valid, but it failed: the disk is full, a file is damaged. The command line exits with 1."""


def require(condition: object, sentence: str) -> None:
    """Raises EffnetlibError with the sentence, unless the condition holds."""
    if not condition:
        raise EffnetlibError(sentence)


def first_line(error: Exception) -> str:
    """The first line of another library's error, cut to 200 characters; its class where it says nothing."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """A clause with the choice nearest to `name`, or with all of them where none is near.

    >>> did_you_mean("rmsprob", ["rmsprop", "lars"])
    'did you mean rmsprop?'
    >>> did_you_mean("x", ["rmsprop", "lars"])
    'choose one of rmsprop, lars'
    """
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
