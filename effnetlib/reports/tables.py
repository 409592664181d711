"""From records to what a report notebook shows: tables, curves, conditions and figures."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
from IPython.display import SVG, Image, Markdown, display
from pandas.io.formats.style import Styler

from effnetlib.errors import EffnetlibError
from effnetlib.reports.style import NAMES
from effnetlib.runs.files import write_atomically
from effnetlib.runs.hosts import is_main_process
from effnetlib.runs.paths import outputs_folder, runs_folder, user_path
from effnetlib.runs.progress import say
from effnetlib.runs.record import Record, load_records

SEARCH = "search-"
MUCH_WAITING = 0.05
# What tables call a column where its own name would not do. A column whose name ends in SHARES is shown in percent.
HEADINGS = {
    "variant": "model",
    "dataset": "data",
    "global_batch_size": "batch",
    "batch_norm_batch_size": "batch-norm batch",
    "peak_lr": "peak learning rate",
    "lr_per_256": "learning rate per 256",
    "warmup_epochs": "warm-up, epochs",
    "total_steps": "steps",
    "train_seconds": "training, s",
    "eval_seconds": "evaluation, s",
    "eval_devices": "devices that evaluate",
    "raw_final_top1": "final top-1 of the raw weights",
    "eval_examples": "images evaluated",
    "seconds_to_peak": "time to peak, s",
}
SHARES = ("top1", "top5", "_share")


def completed_records(suite: str) -> list[Record]:
    """The completed records of a suite, maybe none. A line names those that are left out because they are not completed."""
    found = load_records(runs_folder(suite))
    if others := ", ".join(f"{record.name} ({record.status})" for record in found if record.status != "completed"):
        say(f"Not completed, and left out: {others}.")
    return [record for record in found if record.status == "completed"]


def suite_records(suite: str, *names: str) -> list[Record]:
    """The completed records of a suite (a folder under outputs/), in the order of the names given. A name is that of a run, or
    of a point: all its seeds. Without names, all but the search for settings (see `search_records`).

    Raises:
      EffnetlibError: the suite has no completed record, or lacks one that is named.
    """
    completed = completed_records(suite)
    if not completed:
        raise EffnetlibError(
            f"{runs_folder(suite)} holds no completed record: run `effnetlib run notebooks/suites/{suite}.yaml`"
        )
    found = []
    for name in names:
        named = [record for record in completed if name in (record.name, record.point)]
        if not named:
            known = ", ".join(record.name for record in completed)
            raise EffnetlibError(f"the suite {suite} holds no completed record of {name!r}, only of {known}")
        found += named
    return found if names else [record for record in completed if not record.name.startswith(SEARCH)]


def search_records(suite: str) -> list[Record]:
    """The completed records of a suite's search for settings: those named `search-POINT-VALUE`.

    Raises:
      EffnetlibError: there is none.
    """
    found = [record for record in completed_records(suite) if record.name.startswith(SEARCH)]
    if not found:
        raise EffnetlibError(f"the suite {suite} holds no completed record of a search (named {SEARCH}POINT-VALUE)")
    return found


def best_rates(records: Sequence[Record]) -> pd.DataFrame:
    """One row per search: how many rates were tried, and the one with the highest final top-1 (of equals the lowest). `inside`
    says whether lower and higher ones were tried.

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


def results(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its name (the index), its point (the name without the seed), every recipe field, its peak learning rate
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
    """One row per point: the columns `by`, n, and the mean of each of `values` with its standard deviation over seeds, as text.
    Shares are in percent.

    Args:
      table: of `results`.
    """

    def text(column):
        share = column.name.endswith(SHARES)
        column = 100 * column if share else column
        digits = 2 if share else 1 if column.name.endswith("seconds") or column.abs().max() >= 10 else 4
        spread = f" ± {column.std():,.{digits}f}" if len(column) > 1 else ""
        return f"{column.mean():,.{digits}f}{spread}"

    groups = table.groupby(list(by), sort=False)
    return groups[list(values)].agg(text).assign(n=groups.size()).reset_index()


def curves(records: Sequence[Record], kind: str) -> pd.DataFrame:
    """The "train" or "eval" rows of several runs in one long table, with the columns `run`, `point` and every recipe field."""
    frames = [(record, record.frame(kind)) for record in records]
    return pd.concat(
        [
            pd.DataFrame(asdict(record.recipe) | dict(frame), index=frame.index).assign(
                run=record.name, point=record.point
            )
            for record, frame in frames
        ],
        ignore_index=True,
    )


def scale(records: Sequence[Record]) -> str:
    """How large the runs are, in a few words: network, image size, data and epochs."""
    recipes = [record.recipe for record in records]
    each = {
        name: ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(values)))
        for name, values in {
            "model": [recipe.variant for recipe in recipes],
            "pixels": [recipe.resolution for recipe in recipes],
            "data": [Path(recipe.dataset).name for recipe in recipes],
            "epochs": [float(recipe.epochs) for recipe in recipes],
        }.items()
    }
    return "{model} at {pixels} px on {data}, epochs: {epochs}".format(**each)


def conditions(records: Sequence[Record]) -> str:
    """One sentence on the scale of the runs, and where and with what they were made."""
    environments = [record.environment for record in records]
    host, kind, python, jax, flax = (
        ", ".join(sorted({str(environment[name]) for environment in environments}))
        for name in ("host", "device_kind", "python", "jax", "flax")
    )
    seeds = ", ".join(map(str, sorted({record.recipe.seed for record in records})))
    return (
        f"{len(records)} run{'s' * (len(records) > 1)} of {scale(records)}; seeds {seeds}; "
        f"on {host} (devices: {kind}), Python {python}, jax {jax}, flax {flax}."
    )


def answer(records: Sequence[Record], *said) -> None:
    """Shows what a report says, and below it the conditions. It belongs into the first cell after the imports.

    Args:
      said: verdicts, or sentences in Markdown.
    """
    display(*(Markdown(f"**{each}**") if isinstance(each, str) else each for each in said))
    if records:
        display(Markdown(f"Scale: {conditions(records)}"))


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
        "memory (`effnetlib data prepare SOURCE /dev/shm/NAME`), more processor cores per host, or a lighter augmentation help."
    )


def styled(table: pd.DataFrame, *, precision: int = 2, missing: str = "-") -> Styler:
    """A table to read: headings with units, thousands set apart, shares in percent, a word for what is missing, no index.

    Args:
      table: one row per line. A column of integers stays one where some are missing, for which pandas would show 1,024.00.
      precision: the most decimals. Columns with values above 100 show fewer; learning rates show four digits.
    """
    shares = [name for name in table.columns if str(name).endswith(SHARES)]
    numbers = [name for name in shares if pd.api.types.is_numeric_dtype(table[name])]
    table = table.assign(**{name: 100 * table[name] for name in numbers}).convert_dtypes()
    table = table.astype(dict.fromkeys(numbers, "Float64"))
    if "optimizer" in table:
        table["optimizer"] = table["optimizer"].replace(NAMES)
    table = table.rename(columns=lambda name: _heading(str(name)))
    style = Styler(table, cell_ids=False, thousands=",", na_rep=missing, escape="html").hide()
    for name in table.select_dtypes("Float64"):
        most = table[name].abs().fillna(0).max()
        digits = min(precision, 0 if most >= 1000 else 1 if most >= 100 and not name.endswith("%") else precision)
        form = "{:.4g}" if "learning rate" in name else f"{{:,.{digits}f}}"
        style = style.format(form, [name], na_rep=missing)
    return style


def _heading(name: str) -> str:
    plain = name.replace("top1", "top-1").replace("top5", "top-5").replace("_", " ")
    if name.endswith("_seconds"):
        plain = f"{plain.removesuffix(' seconds')}, s"
    return HEADINGS.get(name, plain) + ", %" * name.endswith(SHARES)


def show(figure, path: Path | str, alt: str) -> Image | SVG:
    """A figure as an image with alternative text, also written to a file.

    Args:
      figure: a matplotlib figure or axes, or a seaborn grid.
      path: of the file, relative to the outputs folder. Its suffix is the format: .svg for plots of few marks, .png (of 256
        colours) where that is smaller, .jpg for photographs.
      alt: alternative text: what the figure shows.
    """
    figure = getattr(figure, "figure", figure)
    form, drawn = Path(path).suffix[1:], io.BytesIO()
    more = {"metadata": {"Date": None}} if form == "svg" else {"pil_kwargs": {"quality": 85}}
    figure.savefig(drawn, format=form, dpi=110, bbox_inches="tight", facecolor="white", **more)
    plt.close(figure)  # or the notebook would show it a second time, without the text
    if form == "png":
        plot = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        plot.save(drawn := io.BytesIO(), form, optimize=True)  # a third of the size, and no difference to be seen
    if is_main_process():
        path = user_path(path, "the figure", outputs_folder())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawn.getvalue())
    # IPython 7, Colab's, has no parameter for the text.
    return (SVG if form == "svg" else Image)(data=drawn.getvalue(), metadata={"alt": alt})
