"""Progress of long work: in place in a notebook, a plain line now and then elsewhere."""

import sys
import time


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(3661)
    ('0:59', '1:01:01')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Shows steps, images/s, the time left, and the latest values given to `update`.

    Args:
      total: steps in all.
      done: steps done before this process (a resumed run).
      images: images a step.
      unit: what a step is called.
    """

    def __init__(self, total: int, done: int, images: int, unit: str = "step"):
        self.total, self.first, self.images, self.unit = total, done, images, unit
        self.start = time.perf_counter()
        self.shown = 0.0
        self.values = {}
        self.display = None
        self.in_notebook = "ipykernel" in sys.modules and _has_kernel()
        self.interval = 0.5 if self.in_notebook else 15.0

    def update(self, step: int, **values) -> None:
        """Shows the state after `step` if it is time to, and always at the last step."""
        self.values |= values
        now = time.perf_counter()
        if now - self.shown >= self.interval or step == self.total:
            self.shown = now
            self._show(self.line(step, now - self.start))

    def line(self, step: int, elapsed: float) -> str:
        rate = (step - self.first) / elapsed if elapsed else 0.0
        left = duration((self.total - step) / rate) if rate else "?"
        values = "".join(f" · {name} {value:.4g}" for name, value in self.values.items())
        return f"{self.unit} {step:,} of {self.total:,} · {rate * self.images:,.0f} images/s · {left} left{values}"

    def _show(self, line: str) -> None:
        if not self.in_notebook:
            print(line, flush=True)
            return
        from IPython.display import display

        if self.display is None:
            self.display = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self.display.update({"text/plain": line}, raw=True)


def _has_kernel() -> bool:
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None
