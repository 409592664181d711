"""What a run measures: its time, and the metrics of its steps."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from effnetlib.runs.progress import Progress
from effnetlib.runs.record import Record

LOGGED_STEPS = 200  # a run logs about this many training rows
EXPLODED_LOSS = 1000.0  # nats; only exploded weights reach such a cross-entropy
CLOCKS = ("compile_seconds", "train_seconds", "eval_seconds", "input_wait_seconds", "total_seconds")


class DivergedError(RuntimeError):
    """The loss is no longer finite, or has exploded."""


class Meter:
    """Measures the time of a run; checks, shows and logs the metrics of its steps. The clock continues from the record's
    ``timing``, and updates it. `learning_rates` is float32 ``[total_steps]``. `step` is the step of the latest checkpoint,
    or 0."""

    def __init__(self, record: Record, learning_rates: np.ndarray, step: int):
        self.record, self.timing, self.learning_rates = record, record.timing, learning_rates
        self.total = len(learning_rates)
        self.log_every = max(1, self.total // LOGGED_STEPS)
        self.progress = Progress(self.total, step, record.recipe.global_batch_size)
        self.pending: tuple[int, dict] | None = None  # the latest step and its metrics, not yet read
        self.saved(step)
        self.zero = time.perf_counter() - self.timing["total_seconds"]
        self.training_since: float | None = None

    def now(self) -> float:
        """Seconds on the paper's clock, which starts after compilation."""
        return time.perf_counter() - self.zero

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes to ``timing[name]``, unless it raises."""
        start = time.perf_counter()
        yield
        self.timing[name] += time.perf_counter() - start

    def resume(self) -> None:
        """Counts ``train_seconds`` from here until `pause`."""
        self.training_since = time.perf_counter()

    def pause(self) -> None:
        """Reads the last metrics, and stops counting ``train_seconds``. Raises DivergedError."""
        self._read_and_keep(None)
        if self.training_since is not None:
            self.timing["train_seconds"] += time.perf_counter() - self.training_since
        self.training_since = None

    def saved(self, step: int) -> None:
        """Notes that the state after `step` has a checkpoint."""
        self.saved_step, self.saved_at = step, time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a step in progress, and reads the metrics of the step before. So the devices have work while
        the host reads. Raises DivergedError for the step it reads."""
        self._read_and_keep((step, metrics))

    def _read_and_keep(self, latest: tuple[int, dict] | None) -> None:
        pending, self.pending = self.pending, latest
        if pending is None:
            return
        step, metrics = pending
        row = {name: float(value) for name, value in metrics.items()}
        self.timing["images"] += self.record.recipe.global_batch_size
        lr = float(self.learning_rates[step - 1])
        if not row["loss"] < EXPLODED_LOSS:  # nan too
            saved = f"the last good checkpoint is that of step {self.saved_step}"
            raise DivergedError(
                f"the loss is {row['loss']:.4g} at step {step} of {self.total}, learning rate {lr:.4g}, norm of the gradient "
                f"{row['grad_norm']:.4g}, of the parameters {row['param_norm']:.4g}; "
                f"{saved if self.saved_step else 'there is no checkpoint yet'}"
            )
        seconds = self.now()
        self.progress.update(step, loss=row["loss"])
        if step % self.log_every == 0 or step == self.total:
            trained = max(self.timing["train_seconds"] + time.perf_counter() - self.training_since, 1e-9)
            waited = {"input_wait_share": self.timing["input_wait_seconds"] / trained, "seconds": seconds}
            self._log("train", step, row | {"lr": lr, "images_per_second": self.timing["images"] / trained} | waited)

    def add_evaluation(self, step: int, raw, ema) -> None:
        """Logs and shows the `EvalResult`s of the raw weights and of their moving average."""
        row = {"nseen": raw.nseen, "top1": raw.top1, "top5": raw.top5, "loss": raw.loss}
        row |= {"ema_top1": ema.top1, "ema_top5": ema.top5, "ema_loss": ema.loss, "seconds": self.now()}
        self._log("eval", step, row)
        self.progress.update(step, top1=ema.top1)
        rows = [row for row in self.record.metrics if row["kind"] == "eval"]
        self.progress.draw([row["epoch"] for row in rows], [row["ema_top1"] for row in rows])

    def _log(self, kind: str, step: int, row: dict) -> None:
        self.record.log(kind=kind, step=step, epoch=step / self.record.recipe.steps_per_epoch, **row)
