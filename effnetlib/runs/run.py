"""A run under way: the lock of its folder, its record, its checkpoints, and how it is saved when it stops."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from effnetlib import data
from effnetlib.errors import EffnetlibError, FailedError, first_line, require
from effnetlib.presets import SESSIONS
from effnetlib.recipe import Recipe
from effnetlib.runs.checkpoints import finish, open_checkpoints, restore, save
from effnetlib.runs.files import exclusive_lock, make_writable
from effnetlib.runs.hosts import gather, is_main_process, raise_together, wait_for_devices
from effnetlib.runs.machine import keep_compiled, pinned
from effnetlib.runs.meter import CLOCKS, Meter
from effnetlib.runs.paths import user_path
from effnetlib.runs.progress import say
from effnetlib.runs.record import Record, environment
from effnetlib.runs.stopping import PreemptedError, Stop

CHANGES_NUMBERS = ("jax", "jaxlib", "flax", "optax", "platform", "device_kind", "xla_flags")  # in the environment


@contextlib.contextmanager
def open_run(
    recipe: Recipe, directory: Path | str, eval_devices: int | None, max_minutes: float | None
) -> Iterator["Run"]:
    """Opens a run's folder in all processes. For arguments and errors see `train`. Everything is checked before anything
    is written. When the block ends, the record holds the status. Nothing is written if the run was completed before."""
    with contextlib.ExitStack() as block:
        settings, devices = block.enter_context(pinned()), wait_for_devices()
        stop = block.enter_context(Stop(max_minutes))
        stop.before_training()
        with raise_together():
            directory = user_path(directory, "directory", folder=True)
            _require_accelerator(recipe, devices)
            count, batch = len(devices) if eval_devices is None else eval_devices, recipe.global_batch_size
            require(0 < count <= len(devices), f"eval_devices must be from 1 to {len(devices)}, and is {count}")
            require(batch % count == 0, f"global_batch_size {batch} does not divide over {count} eval_devices")
            alone = count == len(devices) or jax.process_count() == 1
            require(alone, "eval_devices needs a single process: of several, all must take part in the evaluation")
        with raise_together():  # here nothing may raise in one process alone before all have the data
            recipe.validate(len(devices))
            splits = {name: data.load(recipe.dataset, name, recipe.subset) for name in ("train", "eval")}
            make_writable(directory, "the run's folder")
            if is_main_process():
                block.enter_context(exclusive_lock(directory, "training in"))
            record = _open_record(recipe, directory, splits)
        _require_same_data(splits)
        keep_compiled()
        if is_main_process() and (remark := data.remark(splits)):
            say(remark)
        run = Run(record, splits, devices[:count], stop)
        if record.status == "completed":
            yield run
            return

        _note_environment(record, environment() | {"settings": settings, "eval_devices": len(run.eval_devices)})
        record.status, record.error = "running", None
        try:
            with open_checkpoints(directory) as run.checkpoints:
                yield run
                finish(run.checkpoints)
            record.summarize()
            record.status = "completed"
        except (KeyboardInterrupt, PreemptedError):
            record.status = "preempted"
            raise
        except Exception as error:
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
            if not isinstance(error, OSError):
                raise
            met = f"an error of the file system: {error.strerror or error} ({error.filename or 'no file named'})"
            raise FailedError(f"the run in {directory} met {met}; fix it, and the same call goes on") from error
        finally:
            with contextlib.suppress(OSError):  # if the disk fails again, the error above says so
                record.save()


@dataclass
class Run:
    """A run under way. It saves train states, which are equal in every process."""

    record: Record
    splits: dict[str, data.Split]
    eval_devices: list[jax.Device]
    stop: Stop
    checkpoints: CheckpointManager | None = None  # None if the run is completed
    meter: Meter | None = None  # set by `begin`

    def begin(self, template: dict, learning_rates: np.ndarray, compile_seconds: float) -> dict | None:
        """Starts the clock at the latest checkpoint. Returns its state, or None if there is no checkpoint (see `restore`)."""
        gather("compiled")
        self.stop.can_save.set()
        state, timing = restore(self.checkpoints, template) or (None, dict.fromkeys(CLOCKS, 0.0) | {"images": 0})
        step = int(state["step"]) if state else 0
        self.record.timing = timing | {"compile_seconds": timing["compile_seconds"] + compile_seconds}
        self.record.rewind(step)
        self.record.save()
        self.meter = Meter(self.record, learning_rates, step)
        return state

    def checkpoint(self, state, top1: float | None = None, by_any: bool = False) -> None:
        """Starts to write a checkpoint, unless this step has one, and saves the record. `top1` is the evaluation's.
        `by_any`: any process may write, not only process 0."""
        step = int(state.step)
        self.record.timing["total_seconds"] = self.meter.now()
        if (is_main_process() or by_any) and self.meter.saved_step != step:
            # `device_get` starts to copy all arrays before it waits for the first.
            host_state = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), vars(state)))
            save(self.checkpoints, step, host_state, self.record.timing, top1)
        self.meter.saved(step)
        self.record.save()

    def stop_if_requested(self, state, during: str) -> None:
        """Saves the state and raises PreemptedError if any process was asked to stop."""
        if reason := self.stop.requested_anywhere(during):
            at = self._save_now(state)
            raise PreemptedError(f"stopped at {at} ({reason}); saved: run the same command or cell again to go on")

    @contextlib.contextmanager
    def saved_first(self, state) -> Iterator[None]:
        """For a block that reads input. If the block fails, saves the state and raises FailedError."""
        try:
            yield
        except (PreemptedError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # decoders, file systems and input threads raise anything
            at = self._save_now(state, by_any=True)
            reason = error if isinstance(error, EffnetlibError) else f"{type(error).__name__}: {first_line(error)}"
            failed = f"the input failed after {at}: {reason}"
            raise FailedError(f"{failed}; saved: fix the cause, and the same call goes on") from error

    def _save_now(self, state, by_any: bool = False) -> str:
        self.meter.pause()
        self.checkpoint(state, by_any=by_any)
        finish(self.checkpoints)
        return f"step {int(state.step)} of {self.meter.total}"


def _require_same_data(splits: dict) -> None:
    """Process 0 lists photographs for all processes. Do all of them read the same ones? Some of each split are compared."""
    if jax.process_count() > 1:
        with raise_together():
            sample = [split.sample() for split in splits.values()]
        first, *others = gather("sample", sample)
        for process, other in enumerate(others, 1):
            wrong = f"process {process} reads other data than process 0"
            require(other == first, f"{wrong}: the data set must be the same on every host")


def _require_accelerator(recipe: Recipe, devices: list[jax.Device]) -> None:
    """Refuses the network and images of the presets `colab` and `kaggle` on a CPU that nobody asked for."""
    if devices[0].platform == "cpu" and jax.config.jax_platforms != "cpu":
        for name in SESSIONS:
            fields = ("variant", "dataset", "image_size")
            same = all(getattr(recipe, field) == getattr(Recipe.preset(name), field) for field in fields)
            slow = (
                f"preset {name} is for a TPU or a GPU, and jax finds only a CPU: choose an accelerator for the session"
            )
            require(not same, f"{slow}, or set JAX_PLATFORMS=cpu to train on the CPU all the same")


def _open_record(recipe: Recipe, directory: Path, splits: dict) -> Record:
    """The record in the folder, which must have this recipe and data; or a new one if there is none."""
    class_names = list(splits["train"].class_names)
    now = {
        "source": recipe.dataset,
        **{f"{name}_examples": len(split) for name, split in splits.items()},
        "num_classes": len(class_names),
        "class_names": class_names,
        "fingerprints": {name: split.fingerprint for name, split in splits.items()},
        "names": {name: split.names for name, split in splits.items() if split.names},
        "total_steps": recipe.total_steps,
    }
    if not (directory / "run.json").exists():
        return Record(directory, recipe, data=now)
    record = Record.load(directory)
    wanted, known = asdict(recipe), record.as_read["recipe"] | asdict(record.recipe)
    differ = ", ".join(name for name, value in known.items() if name not in wanted or value != wanted[name])
    other = f"{directory} holds a run of another recipe ({differ} differ)"
    require(not differ, f"{other}: choose another folder, or delete that one")
    record.recipe = recipe  # an equal recipe, but this object has already listed its data
    if record.status != "completed":
        _note_data(record, now)
    return record


def _note_data(record: Record, now: dict) -> None:
    """Writes the present data into the record. The run must have begun with it, or with photographs of the same names."""
    # Records of earlier versions lack some keys.
    before = {"class_names": now["class_names"], "fingerprints": {}, "names": {}} | record.data
    old, new = before["fingerprints"], now["fingerprints"]
    changed = {name: old.get(name) for name in new if new[name] != old.get(name)}
    same = all(before.get(key) == now[key] for key in now.keys() - {"fingerprints", "names"})
    same &= all(name in now["names"] and now["names"][name] == before["names"].get(name) for name in changed)
    other = f"the data set {now['source']} is not the one that {record.directory} was begun with"
    require(same, f"{other}: choose another folder")
    if changed:
        replaced = f"photographs in {now['source']} ({', '.join(changed)}) were replaced by others of the same names"
        say(f"{replaced} since this run began: it goes on with them, and the record says so")
    record.data = now | _history("replaced", before, changed)


def _note_environment(record: Record, now: dict) -> None:
    """Writes the environment into the record, with all changes since the run began."""
    before = record.environment
    if changed := {name: before[name] for name in CHANGES_NUMBERS if name in before and before[name] != now[name]}:
        words = ", ".join(f"{name} was {value!r} and is {now[name]!r}" for name, value in changed.items())
        say(f"this run goes on in another environment, and the record says so: {words}")
    record.environment = now | _history("earlier", before, changed)


def _history(key: str, before: dict, changed: dict) -> dict:
    """``{key: [old values, one dict per change]}``; empty if nothing has ever changed."""
    values = [*before.get(key, ()), *filter(None, [changed])]
    return {key: values} if values else {}
