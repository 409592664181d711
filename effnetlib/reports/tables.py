"""From records to what a report notebook shows: tables, curves, conditions and figures."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
from IPython.display import Image
from pandas.io.formats.style import Styler

from effnetlib.errors import EffnetlibError
from effnetlib.runs.files import write_atomically
from effnetlib.runs.hosts import is_main_process
from effnetlib.runs.paths import outputs_folder, runs_folder, user_path
from effnetlib.runs.record import Record, load_records

SEARCH = "search-"


def suite_records(suite: str, *names: str) -> list[Record]:
    """The completed records of a suite (a folder under outputs/), in the order of the names given. A name is that of a run, or
    of a point: all its seeds. Without names, all but the search for settings (see `search_records`).

    Raises:
      EffnetlibError: the suite has no completed record, or lacks one that is named.
    """
    completed = _completed(suite)
    named = [[record for record in completed if name in (record.name, record.point)] for name in names]
    for name, found in zip(names, named, strict=True):
        if not found:
            known = ", ".join(record.name for record in completed)
            raise EffnetlibError(f"the suite {suite} holds no completed record of {name!r}, only of {known}")
    if names:
        return [record for found in named for record in found]
    return [record for record in completed if not record.name.startswith(SEARCH)]


def search_records(suite: str) -> list[Record]:
    """The completed records of a suite's search for settings: those named `search-POINT-VALUE`.

    Raises:
      EffnetlibError: there is none.
    """
    found = [record for record in _completed(suite) if record.name.startswith(SEARCH)]
    if not found:
        raise EffnetlibError(f"the suite {suite} holds no completed record of a search (named {SEARCH}POINT-VALUE)")
    return found


def best_rates(records: Sequence[Record]) -> pd.DataFrame:
    """A row a search: how many rates were tried, the one with the highest final top-1 (of equals the lowest), and whether it
    lies inside what was tried.

    Args:
      records: those of `search_records`.
    """
    table = results(records).assign(search=[r.name.removeprefix(SEARCH).rpartition("-")[0] for r in records])
    rows = {}
    for search, tried in table.sort_values("lr_per_256").groupby("search"):
        best = tried.loc[tried["final_top1"].idxmax()]
        inside = tried["lr_per_256"].iloc[0] < best["lr_per_256"] < tried["lr_per_256"].iloc[-1]
        rows[search] = {name: best[name] for name in ("lr_per_256", "peak_lr", "final_top1")}
        rows[search] |= {"rates": len(tried), "inside": inside}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("search")


def _completed(suite: str) -> list[Record]:
    folder = runs_folder(suite)
    completed = [record for record in load_records(folder) if record.status == "completed"]
    if not completed:
        raise EffnetlibError(f"{folder} holds no completed record: run `effnetlib run notebooks/suites/{suite}.yaml`")
    return completed


def results(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: its name (the index), its point (the name without the seed), every recipe field, its peak learning rate
    and steps, and every value of timing, environment and result."""
    rows = [
        {"point": r.point}
        | asdict(r.recipe)
        | {"peak_lr": r.recipe.peak_lr, "total_steps": r.data.get("total_steps")}
        | r.environment
        | r.timing
        | r.result
        for r in records
    ]
    return pd.DataFrame(rows, index=pd.Index([record.name for record in records], name="run"))


def over_seeds(table: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """A row a point: the columns `by`, the mean of each of `values` with its standard deviation over seeds, as text, and n.

    Args:
      table: of `results`.
    """

    def text(column):
        digits = 1 if column.abs().max() >= 10 else 4
        spread = f" ± {column.std():,.{digits}f}" if len(column) > 1 else ""
        return f"{column.mean():,.{digits}f}{spread}"

    groups = table.groupby(list(by), sort=False)
    return groups[list(values)].agg(text).assign(n=groups.size()).reset_index()


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
        f"worst in {name}: {worst:.0%}. Shards on a local disk or in "
        "memory (`effnetlib data prepare SOURCE /dev/shm/NAME`), more processor cores a host, or a lighter augmentation help."
    )


def styled(table: pd.DataFrame, *, precision: int = 2, missing: str = "-") -> Styler:
    """A table to read: thousands set apart, so many decimals, a word for what is missing, no index.

    Args:
      table: a row a line. A column of integers stays one where some are missing, for which pandas would show 1,024.00.
    """
    return table.convert_dtypes().style.format(precision=precision, thousands=",", na_rep=missing, escape="html").hide()


def show(figure, path: Path | str, alt: str) -> Image:
    """A figure as an image with alternative text, also written to a file.

    Args:
      figure: a matplotlib figure or axes, or a seaborn grid.
      path: of the file, relative to the outputs folder; its suffix is the format: .png, of 256 colours, for plots, or .jpg for
        photographs.
      alt: what the figure shows, for who cannot see it.
    """
    figure = getattr(figure, "figure", figure)
    drawn = io.BytesIO()
    form = Path(path).suffix[1:]
    figure.savefig(drawn, format=form, dpi=110, bbox_inches="tight", facecolor="white", pil_kwargs={"quality": 85})
    plt.close(figure)  # or the notebook would show it a second time, without the text
    if form == "png":
        plot = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        plot.save(drawn := io.BytesIO(), form, optimize=True)  # a third of the size, and no difference to be seen
    if is_main_process():
        path = user_path(path, "the figure", outputs_folder())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawn.getvalue())
    return Image(data=drawn.getvalue(), metadata={"alt": alt})  # IPython 7, Colab's, has no parameter for it
