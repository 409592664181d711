"""Contestants: processes of their own that warm up, and then do a round whenever they are asked to.

The two sides speak in lines of JSON, requests on the standard input and answers on the standard output. A contestant whose turn
it is not waits for a line, and so takes nothing from the one whose turn it is.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class ContestantError(RuntimeError):
    """A contestant could not start, or did not end a round."""


def serve(prepare: Callable[[], tuple[dict, Callable]]) -> None:
    """The contestant's side. `prepare` warms up and returns facts about itself, and what does a round: request -> value."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value):
        answers.write(json.dumps(value) + "\n")

    facts, do_round = prepare()
    answer(facts)
    for line in sys.stdin:
        answer(do_round(json.loads(line)))


class Contestant:
    """The other side: starts the process, and waits until it has warmed up.

    Args:
      name: for people.
      python: the interpreter, which decides the environment.
      arguments: module and its arguments, as after ``python -m``.
      environ: environment variables, on top of ours.

    Raises:
      ContestantError: it ended; here and in `round`.
    """

    def __init__(self, name: str, python: Path | str, arguments: list[str], environ: dict | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(python), "-m", *arguments],
            cwd=ROOT,
            env=os.environ | (environ or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def round(self, request=None):
        """One round; what it answers is the contestant's affair."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, and why is seen below
        return self._answer()

    def _answer(self):
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        raise ContestantError(f"{self.name} ended with code {code}: {said[-1] if said else 'it said nothing'}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
