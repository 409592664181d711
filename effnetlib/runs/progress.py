"""Progress of long work: in place in a notebook, plain lines elsewhere, and a curve if a user watches the notebook."""

import atexit
import contextlib
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

LINE_SECONDS = 15.0  # between two plain lines
IN_PLACE_SECONDS = 0.5  # between two updates of a line in place
CLEAR = "\r\x1b[K"  # for a terminal: go to the start of the line, and erase it


def say(text: object, *, end: str = "\n", err: bool = False) -> bool:
    """Prints a line for people, to stdout or stderr. An output error never ends the work: unknown characters become "?", and
    a line that cannot be written is lost. Returns False if a user may miss the line, as on a full disk."""
    stream = sys.stderr if err else sys.stdout
    try:
        try:
            print(text, end=end, file=stream or io.StringIO(), flush=True)
        except UnicodeEncodeError:
            printable = str(text).encode(stream.encoding, "replace").decode(stream.encoding)
            print(printable, end=end, file=stream, flush=True)
    except BrokenPipeError:
        pass  # as after `| head`: nobody misses the line
    except (OSError, ValueError, RuntimeError):  # closed, or a signal handler prints in the middle of a line
        return False
    return True


@atexit.register
def _end_output() -> None:
    """Drops output that still cannot be written. Python would print a traceback, and exit with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def at_work(text: str, state: Callable[[], str] | None = None, seconds: float = LINE_SECONDS) -> Iterator[Callable]:
    """Says on stderr that the block is still running: ``TEXT · ELAPSED · STATE``, one line per `seconds`.

    `state` returns the progress as text. It is called in a thread of its own, only when a line is due, and must not raise.
    With `state`, a terminal shows one line that changes in place. The line is erased when the block ends. Yields a function
    that prints another line to stdout meanwhile.
    """
    in_place = state is not None and os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
    done, start = threading.Event(), time.perf_counter()

    def clear():
        if in_place:
            say(CLEAR, end="", err=True)

    def talk():
        while not done.wait(IN_PLACE_SECONDS if in_place else seconds):
            line = " · ".join([text, duration(time.perf_counter() - start), *([state()] if state else [])])
            if in_place:
                width = shutil.get_terminal_size().columns - 1
                line = CLEAR + (line if len(line) <= width else line[: width - 1] + "…")
            say(line, end="" if in_place else "\n", err=True)

    def tell(line: str) -> None:
        clear()
        say(line)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        done.set()
        thread.join()
        clear()


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(3661)
    ('0:59', '1:01:01')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Shows the step, images per second, the time left, and the latest values given to `update`. An earlier process did
    `done` of the `total` steps. `images` is the number of images per step. `unit` is the word for a step."""

    def __init__(self, total: int, done: int, images: int, unit: str = "step"):
        self.total, self.first, self.images, self.unit = total, done, images, unit
        self.start, self.shown, self.values, self.displays = time.perf_counter(), 0.0, {}, {}
        kernel = _kernel()
        self.in_notebook = kernel is not None
        # A front end with a user allows input. papermill and nbconvert do not allow it.
        self.watched = getattr(kernel, "_allow_stdin", False)
        self.interval = IN_PLACE_SECONDS if self.in_notebook else LINE_SECONDS

    def update(self, step: int, **values) -> None:
        """Shows the state after `step` if a line is due, and always at the last step."""
        self.values |= values
        now = time.perf_counter()
        if now - self.shown >= self.interval or step == self.total:
            self.shown = now
            line = self.line(step, now - self.start)
            if self.in_notebook:
                self._display("line", {"text/plain": line})
            else:
                say(line)

    def draw(self, epochs: Sequence[float], top1: Sequence[float]) -> None:
        """Draws top-1 against epochs in place, if a user watches the notebook."""
        if not self.watched:
            return
        from IPython.display import Image
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(epochs, top1, marker="o", clip_on=False)
        axes.set(xlabel="epoch", ylabel="top-1 (moving average)", xlim=(0, None), ylim=(0, 1))
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=100, facecolor="white")
        # As metadata, because IPython 7 (Colab) has no parameter for it.
        alt = {"alt": "Top-1 against epochs, so far"}
        self._display("curve", *Image(data=drawn.getvalue(), metadata=alt)._repr_mimebundle_())

    def line(self, step: int, elapsed: float) -> str:
        rate = (step - self.first) / elapsed if elapsed else 0.0
        left = duration((self.total - step) / rate) if rate else "?"
        values = "".join(f" · {name} {value:.4g}" for name, value in self.values.items())
        return f"{self.unit} {step:,} of {self.total:,} · {rate * self.images:,.0f} images/s · {left} left{values}"

    def _display(self, name: str, content: dict, metadata: dict | None = None) -> None:
        from IPython.display import display

        if name in self.displays:
            self.displays[name].update(content, metadata=metadata, raw=True)
        else:
            self.displays[name] = display(content, metadata=metadata, raw=True, display_id=True)


def _kernel():
    """The Jupyter kernel of this process, or None."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None)
