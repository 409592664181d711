"""The outcome of a notebook in a suite. `execute` returns it, and keeps it beside the executed notebook."""

import json
from dataclasses import dataclass
from pathlib import Path

from effnetlib.runs.files import write_atomically


@dataclass(frozen=True)
class Outcome:
    """The outcome of an entry in a suite.

    `status` is "completed", "failed", "skipped" (finished earlier) or "preempted" (asked to stop; the same command resumes
    it). `error` is one sentence, or empty. `key` is a hash of the inputs. If it changes, the entry is executed again.
    """

    name: str
    is_run: bool = True
    status: str = ""
    seconds: float = 0.0
    error: str = ""
    key: str = ""

    @classmethod
    def read(cls, directory: Path, name: str) -> "Outcome":
        """Reads what `write` wrote in a suite's folder: all but `status` and `seconds`. Empty if there is no file."""
        path = directory / "executed" / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {"run": True}
        return cls(name, kept.pop("run"), **kept)

    def write(self, directory: Path) -> None:
        """Writes ``executed/NAME.json`` in a suite's folder."""
        kept = {"run": self.is_run, "key": self.key, "error": self.error}
        write_atomically(directory / "executed" / f"{self.name}.json", json.dumps(kept))
