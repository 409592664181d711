"""A training step of B0 beside those of other libraries."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from .contestant import ROOT, Contestant, ContestantError
from .measurement import Measurement, in_turn, ratio

BENCH_PYTHON = ROOT / ".venv-bench/bin/python"
NO_GPU = "no GPU here: not run"
SAME_RATE = 1.03  # a larger batch that gives no more than this pays no more


class Peers:
    """Starts contestants of `steps.py`, each in its environment, and remembers the versions that they state.

    Args:
      say: shows a line of progress.
      cache: folder for what jax compiles, so that a contestant that starts again does not compile again.
    """

    def __init__(self, say: Callable[[str], None], cache: Path):
        self.say, self.cache = say, cache
        self.versions = {}

    def start(self, library: str, size: int, batch: int, gpu: bool = False) -> Contestant:
        self.say(f"{library} at {size} px, batch {batch}: compiling and warming up")
        python = sys.executable if library == "effnetlib" else BENCH_PYTHON
        arguments = ["tests.bench.steps", library, "--size", str(size), "--batch", str(batch), *["--gpu"] * gpu]
        environ = {"JAX_PLATFORMS": "cuda" if gpu else "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        contestant = Contestant(library, python, arguments, environ)
        self.versions[library] = contestant.facts["versions"]
        return contestant


def _rate(contestant: Contestant, seconds: float) -> float:
    """Images a second over about so many seconds."""
    return contestant.round(max(1, round(seconds / contestant.facts["step_seconds"])))


def on_cpu(
    peers: Peers, size: int, batch: int, aims: dict[str, float], rounds: int, seconds: float
) -> list[Measurement]:
    """Ours and the libraries that `aims` names, with the least that ours should be over each."""
    where = f"B0, {size} px, batch {batch}, float32 on CPU:"
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(peers.start(name, size, batch)) for name in ("effnetlib", *aims)}
        peers.say(f"{', '.join(contestants)} in turn, {rounds} rounds")
        rates = in_turn(
            "images/s",
            rounds,
            {f"{where} {name}": lambda each=each: _rate(each, seconds) for name, each in contestants.items()},
        )
    ours, *theirs = rates
    ratios = [
        ratio(f"{where} effnetlib over {name}", ours, each, at_least=aim)
        for (name, aim), each in zip(aims.items(), theirs, strict=True)
    ]
    return [*rates, *ratios]


def on_gpu(peers: Peers) -> list[Measurement]:
    """Ours against timm where both see a GPU. Elsewhere the same lines, saying so, after a rehearsal of it all on CPU."""
    try:
        for library in ("effnetlib", "timm"):
            peers.start(library, 64, 8, gpu=True).close()
    except ContestantError as error:
        peers.say(f"no GPU for all, so what would be measured is rehearsed on CPU ({error})")
        rehearsed = _largest_batches(peers, size=32, batches=(2,), rounds=1, seconds=0.1, gpu=False)
        return [Measurement(each.name, each.unit, note=NO_GPU) for each in rehearsed]
    return _largest_batches(
        peers, size=224, batches=(64, 128, 256, 512, 1024, 2048, 4096), rounds=3, seconds=10.0, gpu=True
    )


def _largest_batches(peers: Peers, size: int, batches, rounds: int, seconds: float, gpu: bool) -> list[Measurement]:
    def rate(library, batch):
        # A process a round: two of them do not fit one GPU's memory.
        with peers.start(library, size, batch, gpu) as contestant:
            return _rate(contestant, seconds)

    batch = {
        name: largest_that_pays(lambda batch, name=name: rate(name, batch), batches) for name in ("effnetlib", "timm")
    }
    where = "B0, 224 px, largest batch that pays, bfloat16 on GPU:"
    names = {"effnetlib": f"{where} effnetlib", "timm": f"{where} timm, compiled, channels-last, AMP"}
    note = ", ".join(f"{name} at batch {batch[name]}" for name in names)
    rates = in_turn(
        "images/s",
        rounds,
        {line: lambda name=name: rate(name, batch[name]) for name, line in names.items()},
        note,
    )
    return [*rates, ratio(f"{where} effnetlib over timm", *rates, at_least=1.0)]


def largest_that_pays(rate: Callable[[int], float], batches) -> int:
    """The last of the growing batches that still raised the rate; one that does not run, most likely for its memory, ends it.

    >>> largest_that_pays({32: 100.0, 64: 150.0, 128: 151.0}.get, (32, 64, 128))
    64
    """
    best, best_rate = batches[0], rate(batches[0])
    for batch in batches[1:]:
        try:
            found = rate(batch)
        except ContestantError:
            break
        if found < best_rate * SAME_RATE:
            break
        best, best_rate = batch, found
    return best
