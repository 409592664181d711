"""What became of a notebook of a suite: returned by `execute`, and kept beside the executed notebook for its pages."""

import json
from dataclasses import dataclass
from pathlib import Path

from effnetlib.runs.files import write_atomically


@dataclass(frozen=True)
class Outcome:
    """What became of an entry of a suite.

    `status` is "completed", "failed", "preempted" (stopped because it was asked to; the same command goes on with it) or
    "skipped" (finished earlier). `error` is one sentence, and empty where all went well. `key` says what was executed:
    another key means that it must be executed again.
    """

    name: str
    is_run: bool = True
    status: str = ""
    seconds: float = 0.0
    error: str = ""
    key: str = ""

    @classmethod
    def read(cls, directory: Path, name: str) -> "Outcome":
        """What `write` left in a suite's folder, which is neither `status` nor `seconds`. An empty one if there is none."""
        path = directory / "executed" / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {"run": True}
        return cls(name, kept.pop("run"), **kept)

    def write(self, directory: Path) -> None:
        """Writes ``executed/NAME.json`` in a suite's folder."""
        kept = {"run": self.is_run, "key": self.key, "error": self.error}
        write_atomically(directory / "executed" / f"{self.name}.json", json.dumps(kept))
