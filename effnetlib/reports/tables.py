"""The contents of report notebooks, from records: tables, curves, conditions and figures."""

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
from effnetlib.runs.meter import CLOCKS
from effnetlib.runs.paths import outputs_folder, runs_folder, user_path
from effnetlib.runs.progress import say
from effnetlib.runs.record import Record, load_records

SEARCH = "search-"
MUCH_WAITING = 0.05
# Headings of columns that need more than their name. A column with one of the endings SHARES is shown in percent.
HEADINGS = {
    "variant": "model", "dataset": "data", "global_batch_size": "batch", "batch_norm_batch_size": "batch-norm batch",
    "peak_lr": "peak learning rate", "lr_per_256": "learning rate per 256", "warmup_epochs": "warm-up, epochs",
    "total_steps": "steps", "train_seconds": "training, s", "eval_seconds": "evaluation, s", "seconds_to_peak": "time to peak, s",
    "eval_devices": "devices that evaluate", "eval_examples": "images evaluated", "raw_final_top1": "final top-1 of the raw weights",
}  # fmt: skip
SHARES = ("top1", "top5", "_share")
ENDS = {"completed": "Completed", "preempted": "Stopped on request", "running": "Running, or killed,"}


def finished_records(suite: str) -> list[Record]:
    """The records of a suite (a folder in outputs/) with a result: completed and diverged runs. There may be none.

    Diverged runs count with the top-1 of chance. A printed line names them and the runs that are left out."""
    records = load_records(runs_folder(suite))
    for record in records:
        if (record.error or "").startswith("DivergedError"):
            names = ("final_top1", "peak_top1", "raw_final_top1")
            record.status, record.result = "diverged", dict.fromkeys(names, 1 / record.data["num_classes"])
    if others := ", ".join(f"{record.name} ({record.status})" for record in records if record.status != "completed"):
        say(f"Not completed: {others}. Diverged runs count with the top-1 of chance. The others are left out.")
    return [record for record in records if record.status in ("completed", "diverged")]


def suite_records(suite: str, *names: str) -> list[Record]:
    """The `finished_records` with these names, in the order of the names.

    A name is a run, a point (all its seeds), or a pattern such as "search-*". Without names: all runs but searches for
    settings (`search-POINT-VALUE`).

    Raises:
      EffnetlibError: the suite has no finished record, or none for one of the names.
    """
    finished = finished_records(suite)
    if not finished:
        command = f"effnetlib run notebooks/suites/{suite}.yaml"
        raise EffnetlibError(f"{runs_folder(suite)} holds no completed record: run `{command}`")
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
    """The rate with the highest final top-1 per search, from records named `search-POINT-VALUE`. On a tie the lowest.

    `rates` is the number of rates tried. `inside`: lower and higher rates were tried."""
    table = results(records).assign(search=[r.name.removeprefix(SEARCH).rpartition("-")[0] for r in records])
    groups = table.sort_values("lr_per_256").groupby("search")
    best = table.loc[groups["final_top1"].idxmax(), ["search", "lr_per_256", "peak_lr", "final_top1"]]
    best = best.set_index("search")
    rates = groups["lr_per_256"].agg(["size", "min", "max"])
    inside = (rates["min"] < best["lr_per_256"]) & (best["lr_per_256"] < rates["max"])
    return best.assign(rates=rates["size"], inside=inside)


def results(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, by name: its point (the name without the seed), the recipe's fields, peak learning rate, steps,
    environment, timing and result."""
    rows = [
        {"point": r.point, **asdict(r.recipe), "peak_lr": r.recipe.peak_lr, "total_steps": r.data.get("total_steps")}
        | {**r.environment, **r.timing, **r.result}
        for r in records
    ]
    return pd.DataFrame(rows, index=pd.Index([record.name for record in records], name="run"))


def over_seeds(table: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """One row per point of a table of `results`: the columns `by`, n, and `values` as "mean ± standard deviation" over
    seeds. Shares are in percent."""

    def text(column):
        share = column.name.endswith(SHARES)
        column = 100 * column if share else column
        digits = 2 if share else 1 if column.name.endswith("seconds") or column.abs().max() >= 10 else 4
        spread = f" ± {column.std():,.{digits}f}" if len(column) > 1 else ""
        return f"{column.mean():,.{digits}f}{spread}"

    groups = table.groupby(list(by), sort=False)
    return groups[list(values)].agg(text).assign(n=groups.size()).reset_index()


def curves(records: Sequence[Record], kind: str) -> pd.DataFrame:
    """The "train" or "eval" rows of several runs in one long table, with `run`, `point` and the recipe's fields."""
    rows = [
        asdict(record.recipe) | row | {"run": record.name, "point": record.point}
        for record in records
        for row in record.metrics
        if row["kind"] == kind
    ]
    return pd.DataFrame(rows)


def steps_to(record: Record, top1: float) -> float:
    """The step at which the moving average first reaches a top-1, by linear interpolation between evaluations.

    NaN if it never does. If the first evaluation is above it, that evaluation's step."""
    rows = record.frame("eval")
    if rows.empty or rows["ema_top1"].max() < top1:
        return np.nan
    best = rows.set_index("step")["ema_top1"].cummax().drop_duplicates()
    return float(np.interp(top1, best, best.index))


def conditions(records: Sequence[Record]) -> str:
    """One sentence on the runs: number, model, data, seeds, host and versions."""
    table = results(records)
    table["dataset"] = table["dataset"].map(lambda path: Path(path).name)
    table["resolution"] = [record.recipe.resolution for record in records]
    names = ["variant", "resolution", "dataset", "epochs", "seed", "host", "device_kind", "python", "jax", "flax"]
    values = {
        name: ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(table[name])))
        for name in names
    }
    return (
        "{runs} of {variant} at {resolution} px on {dataset}, epochs: {epochs}; seeds {seed}; on {host} "
        "(devices: {device_kind}), Python {python}, jax {jax}, flax {flax}."
    ).format(runs=f"{len(records)} run{'s' * (len(records) > 1)}", **values)


def answer(records: Sequence[Record], *findings) -> None:
    """Shows the findings of a report (verdicts, or sentences in Markdown), and the conditions below them."""
    display(*(Markdown(f"**{finding}**") if isinstance(finding, str) else finding for finding in findings))
    if records:
        display(Markdown(f"Scale: {conditions(records)}"))


def what_happened(record: Record) -> str:
    """One paragraph on a run of any status: where it stands, what it reached, and what its time went to, most of it first.

    The time is that of the record's clocks at its latest checkpoint, with compilation. Training steps are training without
    the wait for images. Nothing is said of the time of a failed run, as its clocks stop at different steps."""
    epoch, rows = max([0, *(row["epoch"] for row in record.metrics)]), record.frame("eval")
    said = f"{ENDS.get(record.status, record.status.capitalize())} at epoch {epoch:.3g} of {record.recipe.epochs:g}"
    said += f" ({record.error})." if record.error else "."
    if rows.empty:
        said += " It has no evaluation."
    else:
        peak, last = rows.loc[rows["ema_top1"].idxmax()], rows.iloc[-1]
        said += f" Top-1 reached {100 * peak['ema_top1']:.1f} % at epoch {peak['epoch']:.3g}, after {peak['seconds']:,.0f} s. "
        said += f"The last is {100 * last['ema_top1']:.1f} %, counted on {last['nseen']:,.0f} images."
    clock = dict.fromkeys(CLOCKS, 0.0) | record.timing
    total, wait = clock["compile_seconds"] + clock["total_seconds"], clock["input_wait_seconds"]
    if record.error or not total:
        return said
    parts = {"training steps": clock["train_seconds"] - wait, "the wait for images": wait, "compilation": clock["compile_seconds"],
             "evaluation": clock["eval_seconds"], "all else": clock["total_seconds"] - clock["train_seconds"] - clock["eval_seconds"]}  # fmt: skip
    shares = 100 * pd.Series(parts).sort_values(ascending=False) / total
    others = ", ".join(f"{name} ({share:.0f} %)" for name, share in shares[1:].items())
    said += f" It was limited by {shares.index[0]}, which took {shares.iloc[0]:.0f} % of {total:,.0f} s"
    return f"{said}; then came {others}."


def input_advice(records: Sequence[Record]) -> str:
    """One sentence on the share of time that runs waited for images, with advice if it was above 5 % in any run."""
    waiting = sorted(((r.input_wait_share, r.name) for r in records if r.status == "completed"), reverse=True)
    worst, name = waiting[0]
    if worst <= MUCH_WAITING:
        return f"Runs waited for images at most {worst:.1%} of the training time ({name})."
    slow = sum(share > MUCH_WAITING for share, _ in waiting)
    return (
        f"{slow} of {len(waiting)} runs waited for images more than {MUCH_WAITING:.0%} of the training time, "
        f"worst in {name}: {worst:.0%}. Three things help: shards on a local disk or in memory "
        "(`effnetlib data prepare SOURCE /dev/shm/NAME`), more processor cores per host, or a lighter augmentation."
    )


def styled(table: pd.DataFrame, *, precision: int = 2, missing: str = "-") -> Styler:
    """A table for readers: headings with units, thousands separated, shares in percent, no index.

    Args:
      table: one row per line. Integers with missing values stay integers (pandas alone would show 1,024.00).
      precision: the most decimals. Columns with values from 100 show fewer. Learning rates show four digits.
      missing: the text in place of missing values.
    """
    shares = [name for name in table.select_dtypes("number") if str(name).endswith(SHARES)]
    table = table.assign(**{name: 100 * table[name] for name in shares}).convert_dtypes()
    table = table.astype(dict.fromkeys(shares, "Float64")).rename(columns=lambda name: _heading(str(name)))
    if "optimizer" in table:
        table["optimizer"] = table["optimizer"].replace(NAMES)
    style = Styler(table, cell_ids=False).format(thousands=",", na_rep=missing, escape="html").hide()
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
    """Writes a figure to a file, and returns it as an image with alternative text.

    Args:
      figure: a matplotlib figure or axes, or a seaborn grid.
      path: the file, relative to the outputs folder. The suffix is the format: .svg, .png (256 colours), or .jpg for
        photographs. Without a suffix it is the smaller of SVG and PNG.
      alt: alternative text: what the figure shows.
    """
    figure, path = getattr(figure, "figure", figure), user_path(path, "the figure", outputs_folder())
    forms = [path.suffix] if path.suffix else [".svg", ".png"]
    suffix, drawn = min(((form, _drawn(figure, form)) for form in forms), key=lambda pair: len(pair[1]))
    plt.close(figure)  # otherwise the notebook shows it a second time, without the text
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        for form in forms:
            path.with_suffix(form).unlink(missing_ok=True)
        write_atomically(path.with_suffix(suffix), drawn)
    # Colab's IPython 7 has no parameter `alt`.
    return (SVG if suffix == ".svg" else Image)(data=drawn, metadata={"alt": alt})


def _drawn(figure, suffix: str) -> bytes:
    options = {"metadata": {"Date": None}} if suffix == ".svg" else {"pil_kwargs": {"quality": 85}}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix[1:], dpi=110, bbox_inches="tight", facecolor="white", **options)
    if suffix == ".png":
        plot = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        plot.save(drawn := io.BytesIO(), "png", optimize=True)  # a third of the size, with no visible difference
    return drawn.getvalue()
