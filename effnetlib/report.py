"""From records to what a report notebook shows: tables, curves, conditions and figures."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.figure import Figure

from effnetlib.errors import EffnetlibError
from effnetlib.records import Record, is_main_process, load_records, outputs_folder, runs_folder, write_atomically


def suite_records(suite: str, *names: str) -> list[Record]:
    """The completed records of a suite (a folder under outputs/), all of them or those named, in the order given. A name is
    that of a run, or of a point: all its seeds.

    Raises:
      EffnetlibError: the suite has no completed record, or lacks one that is named.
    """
    folder = runs_folder(suite)
    completed = [record for record in load_records(folder) if record.status == "completed"]
    if not completed:
        raise EffnetlibError(f"{folder} holds no completed record: run `effnetlib run notebooks/suites/{suite}.yaml`")
    named = [[record for record in completed if name in (record.name, record.point)] for name in names]
    for name, found in zip(names, named, strict=True):
        if not found:
            known = ", ".join(record.name for record in completed)
            raise EffnetlibError(f"{folder} holds no completed record of {name!r}, only of {known}")
    return [record for found in named for record in found] if names else completed


def results(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: its name (the index), its point (the name without the seed), every recipe field, its peak learning rate
    and steps, and every value of timing, environment and result."""
    derived = ("peak_lr", "total_steps")
    rows = [
        {"point": r.point}
        | asdict(r.recipe)
        | {name: getattr(r.recipe, name) for name in derived}
        | r.environment
        | r.timing
        | r.result
        for r in records
    ]
    return pd.DataFrame(rows, index=pd.Index([record.name for record in records], name="run"))


def curves(records: Sequence[Record], kind: str) -> pd.DataFrame:
    """The "train" or "eval" rows of several runs in one long table, with the columns `run`, `point` and every recipe field."""
    frames = []
    for record in records:
        frame = record.frame(kind)
        names = [name for name in asdict(record.recipe) if name not in frame.columns]
        frames.append(
            frame.assign(run=record.name, point=record.point, **{name: getattr(record.recipe, name) for name in names})
        )
    return pd.concat(frames, ignore_index=True)


def conditions(records: Sequence[Record]) -> str:
    """One sentence on where and with what the records were made, for the notebooks to print."""
    environments = [record.environment for record in records]
    parts = [
        ", ".join(sorted({str(environment[name]) for environment in environments}))
        for name in ("host", "device_kind", "python", "jax", "flax")
    ]
    seeds = sorted({record.recipe.seed for record in records})
    return (
        f"{len(records)} run{'s' * (len(records) > 1)} on {parts[0]} (devices: {parts[1]}), Python {parts[2]}, jax {parts[3]}, flax {parts[4]}; "
        f"seeds {', '.join(map(str, seeds))}."
    )


MUCH_WAITING = 0.05


def input_advice(records: Sequence[Record]) -> str:
    """Whether runs waited for images, and if they did for more than 5 % of a run what to do about it."""
    waiting = sorted(((r.input_wait_share, r.name) for r in records), reverse=True)
    worst, name = waiting[0]
    slow = sum(share > MUCH_WAITING for share, _ in waiting)
    if not slow:
        return f"Runs waited for images at most {worst:.1%} of the training time ({name})."
    return (
        f"{slow} of {len(waiting)} runs waited for images more than {MUCH_WAITING:.0%} of the training time, "
        f"worst in {name}: {worst:.0%}. `effnetlib data bench SOURCE` says which step is slow. Shards on a local disk or in "
        "memory (`effnetlib data prepare SOURCE /dev/shm/NAME`), more processor cores a host, or a lighter augmentation help."
    )


def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int) -> Figure:
    """Images, uint8 ``[height, width, 3]``, in rows, each under its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=8)
    return figure


def show(figure, path: Path | str, alt: str) -> Image:
    """A figure as an image with alternative text, also written to a PNG file.

    Args:
      figure: a matplotlib figure or axes, or a seaborn grid.
      path: of the file, relative to the outputs folder.
      alt: what the figure shows, for who cannot see it.
    """
    figure = getattr(figure, "figure", figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)  # or the notebook would show it a second time, without the text
    if is_main_process():
        path = outputs_folder() / path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawn.getvalue())
    return Image(data=drawn.getvalue(), alt=alt)
