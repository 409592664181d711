"""From records to what a report notebook shows: tables, curves, conditions and figures."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
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
    "variant": "model", "dataset": "data", "global_batch_size": "batch", "batch_norm_batch_size": "batch-norm batch",
    "peak_lr": "peak learning rate", "lr_per_256": "learning rate per 256", "warmup_epochs": "warm-up, epochs",
    "total_steps": "steps", "train_seconds": "training, s", "eval_seconds": "evaluation, s", "seconds_to_peak": "time to peak, s",
    "eval_devices": "devices that evaluate", "eval_examples": "images evaluated", "raw_final_top1": "final top-1 of the raw weights",
}  # fmt: skip
SHARES = ("top1", "top5", "_share")


def finished_records(suite: str) -> list[Record]:
    """The records of a suite (a folder under outputs/) that have a result, maybe none: of completed runs, and of those that
    diverged, which count with the top-1 of chance. A line names these, and those that are left out."""
    records = load_records(runs_folder(suite))
    for record in records:
        if (record.error or "").startswith("DivergedError"):
            chance = 1 / record.data["num_classes"]
            record.status, record.result = (
                "diverged",
                {"final_top1": chance, "peak_top1": chance, "raw_final_top1": chance},
            )
    if others := ", ".join(f"{record.name} ({record.status})" for record in records if record.status != "completed"):
        say(f"Not completed: {others}. Those that diverged count with the top-1 of chance, the others are left out.")
    return [record for record in records if record.status in ("completed", "diverged")]


def suite_records(suite: str, *names: str) -> list[Record]:
    """The records of `finished_records`, in the order of the names given. A name is that of a run, that of a point (all its
    seeds), or a pattern such as "search-*". Without names, all but the search for settings (`search-POINT-VALUE`).

    Raises:
      EffnetlibError: the suite has no such record, or lacks one that is named.
    """
    finished = finished_records(suite)
    if not finished:
        raise EffnetlibError(
            f"{runs_folder(suite)} holds no completed record: run `effnetlib run notebooks/suites/{suite}.yaml`"
        )
    if not names:
        return [record for record in finished if not record.name.startswith(SEARCH)]
    found = []
    for name in names:
        named = [record for record in finished if name == record.point or fnmatchcase(record.name, name)]
        if not named:
            known = ", ".join(record.name for record in finished)
            raise EffnetlibError(f"the suite {suite} holds no completed record of {name!r}, only of {known}")
        found += named
    return found


def best_rates(records: Sequence[Record]) -> pd.DataFrame:
    """One row per search, from records named `search-POINT-VALUE`: how many rates were tried, and the one with the highest final
    top-1 (of equals the lowest). `inside` says whether lower and higher ones were tried."""
    table = results(records).assign(search=[r.name.removeprefix(SEARCH).rpartition("-")[0] for r in records])
    groups = table.sort_values("lr_per_256").groupby("search")
    best = table.loc[groups["final_top1"].idxmax(), ["search", "lr_per_256", "peak_lr", "final_top1"]].set_index(
        "search"
    )
    rates = groups["lr_per_256"].agg(["size", "min", "max"])
    inside = (rates["min"] < best["lr_per_256"]) & (best["lr_per_256"] < rates["max"])
    return best.assign(rates=rates["size"], inside=inside)


def results(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its name (the index), its point (the name without the seed), every recipe field, its peak learning rate
    and steps, and every value of timing, environment and result."""
    rows = [
        {"point": r.point, **asdict(r.recipe), "peak_lr": r.recipe.peak_lr, "total_steps": r.data.get("total_steps")}
        | {**r.environment, **r.timing, **r.result}
        for r in records
    ]
    return pd.DataFrame(rows, index=pd.Index([record.name for record in records], name="run"))


def over_seeds(table: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """One row per point of a table of `results`: the columns `by`, n, and the mean of each of `values` with its standard deviation
    over seeds, as text. Shares are in percent."""

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
    rows = [
        asdict(record.recipe) | row | {"run": record.name, "point": record.point}
        for record in records
        for row in record.metrics
        if row["kind"] == kind
    ]
    return pd.DataFrame(rows)


def steps_to(record: Record, top1: float) -> float:
    """The step at which the moving average first has a top-1, read from a straight line between two evaluations; NaN where it
    never has. Where the first evaluation has it already, that one's step."""
    rows = record.frame("eval")
    if rows.empty or rows["ema_top1"].max() < top1:
        return np.nan
    best = rows.set_index("step")["ema_top1"].cummax().drop_duplicates()
    return float(np.interp(top1, best, best.index))


def conditions(records: Sequence[Record]) -> str:
    """One sentence on the scale of the runs, and where and with what they were made."""
    table = results(records)
    table["dataset"] = table["dataset"].map(lambda path: Path(path).name)
    table["resolution"] = [record.recipe.resolution for record in records]
    every = {
        name: ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(table[name])))
        for name in (
            "variant",
            "resolution",
            "dataset",
            "epochs",
            "seed",
            "host",
            "device_kind",
            "python",
            "jax",
            "flax",
        )
    }
    return (
        "{runs} of {variant} at {resolution} px on {dataset}, epochs: {epochs}; seeds {seed}; on {host} "
        "(devices: {device_kind}), Python {python}, jax {jax}, flax {flax}."
    ).format(runs=f"{len(records)} run{'s' * (len(records) > 1)}", **every)


def answer(records: Sequence[Record], *said) -> None:
    """Shows what a report says, verdicts or sentences in Markdown, and below it the conditions."""
    display(*(Markdown(f"**{each}**") if isinstance(each, str) else each for each in said))
    if records:
        display(Markdown(f"Scale: {conditions(records)}"))


def input_advice(records: Sequence[Record]) -> str:
    """Whether runs waited for images, and if they did for more than 5 % of a run what to do about it."""
    waiting = sorted(((r.input_wait_share, r.name) for r in records if r.status == "completed"), reverse=True)
    worst, name = waiting[0]
    if worst <= MUCH_WAITING:
        return f"Runs waited for images at most {worst:.1%} of the training time ({name})."
    slow = sum(share > MUCH_WAITING for share, _ in waiting)
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
    shares = [name for name in table.select_dtypes("number") if str(name).endswith(SHARES)]
    table = table.assign(**{name: 100 * table[name] for name in shares}).convert_dtypes()
    table = table.astype(dict.fromkeys(shares, "Float64")).rename(columns=lambda name: _heading(str(name)))
    if "optimizer" in table:
        table["optimizer"] = table["optimizer"].replace(NAMES)
    style = Styler(table, cell_ids=False, thousands=",", na_rep=missing, escape="html").hide()
    for name in table.select_dtypes("Float64"):
        most = max(table[name].abs().fillna(0), default=0)
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
      path: of the file, relative to the outputs folder. Its suffix is the format: .svg, .png (of 256 colours), or .jpg for
        photographs. Without one it is SVG or PNG, whichever is smaller.
      alt: alternative text: what the figure shows.
    """
    figure, path = getattr(figure, "figure", figure), user_path(path, "the figure", outputs_folder())
    forms = [path.suffix] if path.suffix else [".svg", ".png"]
    suffix, drawn = min(((form, _drawn(figure, form)) for form in forms), key=lambda each: len(each[1]))
    plt.close(figure)  # or the notebook would show it a second time, without the text
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        for form in forms:
            path.with_suffix(form).unlink(missing_ok=True)
        write_atomically(path.with_suffix(suffix), drawn)
    # IPython 7, Colab's, has no parameter for the text.
    return (SVG if suffix == ".svg" else Image)(data=drawn, metadata={"alt": alt})


def _drawn(figure, suffix: str) -> bytes:
    more = {"metadata": {"Date": None}} if suffix == ".svg" else {"pil_kwargs": {"quality": 85}}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix[1:], dpi=110, bbox_inches="tight", facecolor="white", **more)
    if suffix == ".png":
        plot = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        plot.save(drawn := io.BytesIO(), "png", optimize=True)  # a third of the size, and no difference to be seen
    return drawn.getvalue()
