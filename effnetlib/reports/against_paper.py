"""The paper's tables and figures with ours beside them, from whatever records there are, and how each run deviates.

A run stands beside a row of Table 2, and in Figure 1, if its recipe is that row's preset. The seed may differ, and ImageNet may
lie anywhere. A run stands beside a row of Table 1 if all that decides the speed of a step is equal. It counts for DAWNBench if
it saw ImageNet.
"""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from effnetlib.data import describe
from effnetlib.presets import PAPER_PRESETS
from effnetlib.recipe import Recipe
from effnetlib.reports import paper
from effnetlib.runs.record import Record

DAWNBENCH_TOP5 = 0.93
TWO_CORES_PER_CHIP = ("TPU v2", "TPU v3")
IMAGENET = describe("imagenet", "all")


def row_of(record: Record) -> str | None:
    """The row of Table 2, by its preset's name, that has the run's model, batch and optimizer; None where none has."""
    recipe = record.recipe
    name = f"{recipe.variant}-{recipe.global_batch_size}-{recipe.optimizer}"
    return name if name in PAPER_PRESETS else None


def saw_imagenet(record: Record) -> bool:
    """Whether a run was trained on ImageNet's classes, under whatever name or path."""
    assumed = IMAGENET.num_classes if record.recipe.dataset == "imagenet" else None
    return record.data.get("num_classes", assumed) == IMAGENET.num_classes


def changed_fields(record: Record) -> dict[str, tuple]:
    """The fields of the recipe that are not as in the preset of its row: (ours, the preset's) by name. The seed is no change,
    nor is where ImageNet lies."""
    ours, preset = asdict(record.recipe), asdict(Recipe.preset(row_of(record)))
    free = {"seed", "dataset"} if saw_imagenet(record) else {"seed"}
    return {name: (ours[name], preset[name]) for name in preset if name not in free and ours[name] != preset[name]}


def deviations(record: Record) -> list[str]:
    """How a run that has a row in Table 2 deviates from it: recipe, data and hardware, one phrase each."""

    def text(value):
        return f"{value:g}" if isinstance(value, float) else str(value)

    cores = paper.table2().set_index("preset")["cores"][row_of(record)]
    said = [f"{name} {text(ours)}, not {text(preset)}" for name, (ours, preset) in changed_fields(record).items()]
    for verb, counts, name in (
        ("trained", record.data, "train_examples"),
        ("evaluated", record.result, "eval_examples"),
    ):
        if (count := counts.get(name)) not in (None, (all_ := getattr(IMAGENET, name))):
            said.append(f"{verb} on {count:,} images, not {all_:,}")
    if (record.environment["devices"], record.environment["device_kind"]) != (cores, "TPU v3"):
        said.append(f"{_devices(record)}, not {cores:,} TPU-v3 cores")
    return said


def _ours(records: Sequence[Record]) -> pd.DataFrame:
    """One row per ImageNet run, with what the paper states of its own, and the row of Table 2 whose recipe it has, if any."""
    rows = [
        {
            "preset": row_of(record) if row_of(record) and not changed_fields(record) else None,
            "step": _step(record.recipe),
            "variant": record.recipe.variant,
            "cores": record.environment["devices"],
            "global_batch_size": record.recipe.global_batch_size,
            "minutes": record.result["seconds_to_peak"] / 60,
            "top1": record.result["peak_top1"],
            "our peak top-1 %": 100 * record.result["peak_top1"],
            "our final top-1 %": 100 * record.result["final_top1"],
            "our images/ms": record.result["images_per_second"] / 1e3,
            "on": _devices(record),
            "run": record.name,
        }
        for record in records
        if saw_imagenet(record)
    ]
    columns = ["preset", "step", "our peak top-1 %", "our final top-1 %", "our images/ms", "on", "run"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def _step(recipe: Recipe) -> tuple:
    """What decides the speed of a step; the optimizer hardly counts."""
    return recipe.variant, recipe.global_batch_size, recipe.resolution, recipe.precision


def table2(records: Sequence[Record]) -> pd.DataFrame:
    """Table 2 with the top-1 of the runs of each row's recipe beside it; one row per run, and one where there is none."""
    ours = _ours(records)[["preset", "our peak top-1 %", "our final top-1 %", "run"]]
    table = paper.table2().merge(ours, "left", "preset")
    table.insert(3, "paper top-1 %", 100 * table.pop("top1"))
    return table.assign(**{"difference, points": table["our peak top-1 %"] - table["paper top-1 %"]})


def table1(records: Sequence[Record]) -> pd.DataFrame:
    """Table 1 with our images/ms beside it; one row per run, and one where there is none."""
    stated = paper.table1().drop(columns="all_reduce_percent").rename(columns={"images_per_ms": "paper images/ms"})
    stated["step"] = [
        _step(Recipe.preset(f"{row.variant}-{row.global_batch_size}-lars")) for row in stated.itertuples()
    ]
    table = stated.merge(_ours(records)[["step", "our images/ms", "on", "run"]], "left", "step").drop(columns="step")
    return table.assign(**{"ours / paper": table["our images/ms"] / table["paper images/ms"]})


def figure1(records: Sequence[Record]) -> pd.DataFrame:
    """Figure 1: the paper's points and our runs of its recipes, by its clock, which stops at the peak."""
    stated, ours = paper.figure1().assign(whose="paper"), _ours(records).dropna(subset="preset")
    return pd.concat([stated, ours.rename(columns={"run": "whose"})], join="inner") if len(ours) else stated


def dawnbench(records: Sequence[Record], chip_hour: float) -> pd.DataFrame:
    """Seconds and dollars to 93 % top-5, as DAWNBench counts: those of our ImageNet runs, at the first evaluation that
    reaches it, under the history of fast ImageNet training. Of a run that never does, its best evaluation.

    Args:
      chip_hour: dollars per chip and hour.
    """
    stated = paper.history()
    stated["hardware"] = stated["hardware"] + " (" + stated["year"].astype(str) + ")"
    stated["seconds"] = 60 * stated["minutes"]
    columns = ["what", "hardware", "seconds", "dollars", "top1", "top5", "checked"]
    ours = [_to_93(record, chip_hour) for record in records if saw_imagenet(record)]
    return pd.DataFrame(stated[columns].to_dict("records") + ours, columns=columns)


def _to_93(record: Record, chip_hour: float) -> dict:
    evaluations = record.frame("eval")
    there = evaluations[evaluations["ema_top5"] >= DAWNBENCH_TOP5]
    row = evaluations.loc[evaluations["ema_top5"].idxmax()] if there.empty else there.iloc[0]
    found = {"what": record.name, "hardware": _devices(record), "top1": row["ema_top1"], "top5": row["ema_top5"]}
    images = "" if row["nseen"] == IMAGENET.eval_examples else f", on {row['nseen']:,} images"
    if there.empty:
        return found | {"checked": f"ours{images}: 93 % not reached"}
    # A CPU has no chips that are rented by the hour.
    dollars = None if record.environment.get("platform") == "cpu" else chip_hour * chips(record) * row["seconds"] / 3600
    return found | {"seconds": row["seconds"], "dollars": dollars, "checked": f"ours{images}"}


def chips(record: Record) -> int:
    """How many chips the run's devices are on: up to TPU v3, two cores share one."""
    devices = record.environment["devices"]
    return devices // 2 if record.environment["device_kind"] in TWO_CORES_PER_CHIP else devices


def stated_deviations(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run that has a row in Table 2: its peak, what was evaluated, and every deviation."""
    rows = [
        {
            "run": record.name,
            "beside": row_of(record),
            "recipe": "another" if changed_fields(record) else "the same",
            "peak_top1": record.result["peak_top1"],
            "at epoch": record.result["peak_epoch"],
            "weights": record.result["evaluated_weights"],
            "peak chosen among": f"{len(record.frame('eval'))} evaluations of {record.result['eval_examples']:,} images",
            "deviations": "; ".join(deviations(record)) or "none known",
        }
        for record in records
        if row_of(record)
    ]
    return pd.DataFrame(rows)


def _devices(record: Record) -> str:
    return f"{record.environment['devices']:,} x {record.environment['device_kind']}"
