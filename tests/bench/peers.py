"""A training step of B0 beside those of other libraries."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from .contestant import ROOT, Contestant, ContestantError
from .measurement import Measurement, in_turn, ratio

BENCH_PYTHON = ROOT / ".venv-bench/bin/python"
ASKS_FOR_GPU = {"effnetlib": "import jax; jax.devices('cuda')", "timm": "import torch; torch.cuda.current_device()"}
NO_GPU = "no GPU that jax and torch can use here: see make bench-gpu"
DOES_NOT_RUN = "does not run at this batch"


class Peers:
    """Starts contestants of `steps.py`, each in its environment, and remembers the versions that they state.

    Args:
      say: shows a line of progress.
      cache: folder for what jax compiles, so that a contestant that starts again does not compile again.
    """

    def __init__(self, say: Callable[[str], None], cache: Path):
        self.say, self.cache = say, cache
        self.versions = {}
        self.device = None  # of the last contestant

    @functools.cached_property
    def blind(self) -> list[str]:
        """The libraries that see no GPU; asked once, for that starts each of them."""

        def fails(library, code):
            asked = [self._python(library), "-c", code]
            return subprocess.run(asked, env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True).returncode

        return [library for library, code in ASKS_FOR_GPU.items() if fails(library, code)]

    def start(self, library: str, size: int, batch: int, gpu: bool = False) -> Contestant:
        self.say(f"{library} at {size} px, batch {batch}: compiling and warming up")
        arguments = ["tests.bench.steps", library, "--size", str(size), "--batch", str(batch), *["--gpu"] * gpu]
        environ = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            # One arena suits programs that are loaded, and PyTorch's; compiling leaves its lists of free memory long.
            "GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.arena_max=1"))),
        }
        if gpu:
            # Leaves memory to the other side; and a start chooses its kernels itself, instead of finding another's choice.
            environ = {
                "JAX_PLATFORMS": "cuda",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "JAX_ENABLE_COMPILATION_CACHE": "0",
            }
        contestant = Contestant(library, self._python(library), arguments, environ)
        self.versions[library], self.device = contestant.facts["versions"], contestant.facts["device"]
        return contestant

    def _python(self, library):
        return sys.executable if library == "effnetlib" else BENCH_PYTHON


def _rate(contestant: Contestant, seconds: float) -> float:
    """Images per second over about so many seconds."""
    return contestant.round(max(1, round(seconds / contestant.facts["step_seconds"])))


def on_cpu(
    peers: Peers, size: int, batch: int, aims: dict[str, float], starts: int, rounds: int, seconds: float
) -> list[Measurement]:
    """Ours and the libraries that `aims` names, with the least that ours should be over each: so many rounds in each of so many
    starts.

    Processes of one program differ for their whole life: the first of ours, which compiles it, is half as fast at 224 px as the
    four that load it (tuning.json says why). So all start anew, and another one first.
    """
    where = f"B0, {size} px, batch {batch}, float32 on CPU:"
    names = ["effnetlib", *aims]
    rates = {name: Measurement(f"{where} {name}", "images/s") for name in names}
    for start in range(starts):
        first = start % len(names)
        with ExitStack() as stack:
            contestants = [
                stack.enter_context(peers.start(name, size, batch)) for name in names[first:] + names[:first]
            ]
            peers.say(f"{', '.join(names)} in turn, {rounds} rounds, start {start + 1} of {starts}")
            turns = {each.name: lambda each=each: _rate(each, seconds) for each in contestants}
            for each in in_turn("images/s", rounds, turns):
                rates[each.name].values += each.values
    ours, *theirs = rates.values()
    ratios = [
        ratio(f"{where} effnetlib over {name}", ours, each, at_least=aim)
        for (name, aim), each in zip(aims.items(), theirs, strict=True)
    ]
    return [*rates.values(), *ratios]


def on_gpu(peers: Peers, size: int, batches: Iterable[int], starts: int, rounds: int) -> Iterator[Measurement]:
    """Ours against timm where both see a GPU: so many rounds in each of so many starts, for starts differ, whose compilers
    choose kernels by timing them (ours at batch 256: 7,078 images/s in one start on an H200, 5,875 in the next).

    Elsewhere the same lines, saying so, after a rehearsal of it all on CPU.
    """
    if peers.blind:
        peers.say(f"no GPU for {' and '.join(peers.blind)}, so what would be measured is rehearsed on CPU")
        if len(_gpu_rates(peers, 32, 2, rounds=1, seconds=0.1, gpu=False)) < len(ASKS_FOR_GPU):
            raise ContestantError("the GPU's part could not be rehearsed on CPU")
    for batch in batches:
        where = f"B0, {size} px, batch {batch:,}, bfloat16 on GPU:"
        found = {library: [] for library in ASKS_FOR_GPU}
        for _ in range(0 if peers.blind else starts):
            for library, values in _gpu_rates(peers, size, batch, rounds, seconds=2.0, gpu=True).items():
                found[library] += values
        missing = NO_GPU if peers.blind else DOES_NOT_RUN
        names = {"effnetlib": f"{where} effnetlib", "timm": f"{where} timm, compiled, channels-last, AMP"}
        rates = [
            Measurement(name, "images/s", found[library], note=peers.device if found[library] else missing)
            for library, name in names.items()
        ]
        yield from rates
        over = f"{where} effnetlib over timm"
        both = len(found["effnetlib"]) == len(found["timm"]) > 0
        yield ratio(over, *rates, at_least=1.0, note=peers.device) if both else Measurement(over, "times", note=missing)


def _gpu_rates(peers: Peers, size: int, batch: int, rounds: int, seconds: float, gpu: bool) -> dict[str, list[float]]:
    """Images per second of each library; one that does not run at this batch, most likely for its memory, is left out."""

    def start(library):
        return peers.start(library, size, batch, gpu)

    try:
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            # At the same time, for each compiles for a minute or two.
            contestants = list(pool.map(lambda library: stack.enter_context(start(library)), ASKS_FOR_GPU))
            turns = {each.name: lambda each=each: _rate(each, seconds) for each in contestants}
            return {each.name: each.values for each in in_turn("images/s", rounds, turns)}
    except ContestantError as error:
        peers.say(f"one after the other, since side by side {error}")
    found = {}
    for library in ASKS_FOR_GPU:
        try:
            with start(library) as contestant:
                found[library] = [_rate(contestant, seconds) for _ in range(rounds)]
        except ContestantError as error:
            peers.say(str(error))
    return found
