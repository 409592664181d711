"""Measures speed side by side, prints the table, and writes the record.

    python -m tests.bench [--only cpu --only overheads] [--record FILE]

A round is some seconds of each competitor in turn; figures are medians over the rounds, with the range, and ratios are taken round
by round. Nothing else should be running: the record says how busy the machine was at the start.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from effnetlib.runs.files import write_atomically
from effnetlib.runs.progress import duration
from effnetlib.runs.record import environment

from . import overheads, peers
from .contestant import ContestantError
from .measurement import Measurement, table

PARTS = ("cpu", "gpu", "overheads")


def measure(parts, contenders: peers.Peers, folder: Path) -> Iterator[Measurement]:
    """One after the other, as each is done."""
    runs = overheads.Runs(folder)
    small = {"pytorch": 1.2, "keras": 5.0}
    steps: list[tuple[str, str, Callable[[], Iterable[Measurement]]]] = [
        ("cpu", "32 px", lambda: peers.on_cpu(contenders, 32, 128, small, starts=3, rounds=5, seconds=3.0)),
        ("cpu", "224 px", lambda: peers.on_cpu(contenders, 224, 16, {"pytorch": 1.0}, starts=5, rounds=4, seconds=3.0)),
        ("gpu", "against timm", lambda: peers.on_gpu(contenders, 224, (256, 1024), starts=2, rounds=5)),
        ("overheads", "papermill", lambda: overheads.papermill(runs, rounds=13)),
        ("overheads", "batch-norm groups", lambda: overheads.batch_norm_groups(rounds=7)),
        ("overheads", "evaluation", lambda: overheads.evaluation(runs, rounds=3)),
        ("overheads", "logging", lambda: overheads.loop(rounds=5)),
        ("overheads", "checkpoints", lambda: overheads.checkpoints(rounds=5)),
        ("overheads", "compilation", lambda: overheads.compilation(folder, rounds=3)),
        ("overheads", "imports", lambda: overheads.imports(rounds=5)),
    ]
    for part, what, step in steps:
        if part in parts:
            contenders.say(f"{part}: {what}")
            yield from step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be given again")
    parser.add_argument("--record", type=Path, help="where to write the record, as JSON")
    options = parser.parse_args()
    start, load = time.monotonic(), os.getloadavg()[0]

    def say(what):
        print(f"{duration(time.monotonic() - start)} {what}", flush=True)

    measurements = []

    def record():
        return {
            "environment": environment() | {"load_at_start": load, "peers": contenders.versions},
            "seconds": round(time.monotonic() - start),
            "measurements": [each.to_dict() for each in measurements],
        }

    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            contenders = peers.Peers(say, Path(folder) / "compiled")
            if options.record and options.only == ["gpu"] and contenders.blind:
                raise ContestantError(f"no GPU for {' and '.join(contenders.blind)}, so there is nothing to record")
            for each in measure(options.only or PARTS, contenders, Path(folder)):
                measurements.append(each)
                if options.record:  # again and again: what has been measured outlasts what stops the rest
                    options.record.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(options.record, json.dumps(record(), indent=2) + "\n")
    except ContestantError as error:
        sys.exit(f"the bench stopped: {error}")
    done = record()
    where = done["environment"]
    print(f"\n{where['host']}; jax {where['jax']}; load at the start {load:.2f}; {duration(done['seconds'])} in all\n")
    print(table(done["measurements"]))


if __name__ == "__main__":
    main()
