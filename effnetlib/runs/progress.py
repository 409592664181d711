"""Progress of long work: in place in a notebook, a plain line now and then elsewhere; a curve where somebody watches."""

import atexit
import contextlib
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

LINE_SECONDS = 15.0  # between plain lines
IN_PLACE_SECONDS = 0.5  # between changes of a line that is shown in place
CLEAR = "\r\x1b[K"  # a terminal's: back to the beginning of the line, and delete it


def say(text: object, *, end: str = "\n", err: bool = False) -> bool:
    """Prints a line for people, to stdout or stderr. Trouble with the output never ends the work: characters that it does not
    know become "?", and a line that cannot be written is lost. False if somebody may miss that, as on a full device."""
    stream = sys.stderr if err else sys.stdout
    try:
        try:
            print(text, end=end, file=stream or io.StringIO(), flush=True)
        except UnicodeEncodeError:
            known = str(text).encode(stream.encoding, "replace").decode(stream.encoding)
            print(known, end=end, file=stream, flush=True)
    except BrokenPipeError:
        pass  # `| head`: nobody misses it
    except (OSError, ValueError, RuntimeError):  # closed; or a signal's handler speaks amid a line
        return False
    return True


@atexit.register
def _end_output() -> None:
    """Loses what still cannot be written. Python would show a traceback, and exit with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def at_work(text: str, state: Callable[[], str] | None = None, seconds: float = LINE_SECONDS) -> Iterator[Callable]:
    """Says on stderr that the block is still running: ``TEXT · ELAPSED · STATE``, one line every so many seconds.

    `state` returns how far it is. It is called in a thread of its own, only when a line is due, and must not raise. With it, a
    terminal shows one line that changes in place, and that is gone when the block ends. Gives a function that prints a line
    of its own to stdout meanwhile.
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
    """Shows steps, images per second, the time left, and the latest values given to `update`. Of `total` steps of so many
    `images`, an earlier process has `done` some. `unit` is what a step is called."""

    def __init__(self, total: int, done: int, images: int, unit: str = "step"):
        self.total, self.first, self.images, self.unit = total, done, images, unit
        self.start, self.shown, self.values, self.displays = time.perf_counter(), 0.0, {}, {}
        kernel = _kernel()
        self.in_notebook = kernel is not None
        # A front end that could ask its user for input has one; papermill and nbconvert say that they have none.
        self.watched = getattr(kernel, "_allow_stdin", False)
        self.interval = IN_PLACE_SECONDS if self.in_notebook else LINE_SECONDS

    def update(self, step: int, **values) -> None:
        """Shows the state after `step` if it is time to, and always at the last step."""
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
        """Draws top-1 against epochs in place, where somebody watches the notebook."""
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
        # As metadata: IPython 7, Colab's, has no parameter for it.
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
    """The Jupyter kernel that this process is, if it is one."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None)
