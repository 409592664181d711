"""The one exception for bad input: a sentence that says what is wrong, where, and the nearest valid choice."""

import difflib
import unicodedata
from collections.abc import Iterable


class EffnetlibError(ValueError):
    """Bad input. The command line and notebooks show its sentence without a traceback; the former exits with 2."""

    def _render_traceback_(self):  # IPython's hook
        return [f"{type(self).__name__}: {self}"]


class FailedError(EffnetlibError):
    """What was asked for rightly did not succeed: the disk is full, a file is damaged. The command line exits with 1."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a sentence of ours; its kind where it says nothing.

    >>> first_line(ValueError("no such thing\\nand a page of details")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def shown(name: str) -> str:
    """A name of a file or a class as a sentence shows it: as it is, or with escapes where it could be taken for another one
    (blanks at its ends, letters made of parts, signs that cannot be seen).

    >>> shown("ant"), shown("ant "), shown("A\u0308pfel")
    ('ant', "'ant '", "'A\\u0308pfel'")
    """
    plain = name.isprintable() and name == " ".join(name.split()) != "" and unicodedata.is_normalized("NFKC", name)
    return name if plain else ascii(name)


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """A clause naming the choice nearest to `name`, or all of them where none is near.

    >>> did_you_mean("rmsprob", ["rmsprop", "lars"])
    'did you mean rmsprop?'
    >>> did_you_mean("x", ["rmsprop", "lars"])
    'choose one of rmsprop, lars'
    """
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
