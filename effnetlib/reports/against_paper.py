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
from effnetlib.reports.tables import results
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


def changed_fields(record: Record) -> list[str]:
    """The fields of the recipe that are not as in the preset of its row, such as "epochs 90, not 350". The seed is no change, nor
    is where ImageNet lies."""
    ours, preset = asdict(record.recipe), asdict(Recipe.preset(row_of(record)))
    free = {"seed", "dataset"} if saw_imagenet(record) else {"seed"}
    pairs = {name: (ours[name], preset[name]) for name in preset if name not in free and ours[name] != preset[name]}
    text = {name: [f"{x:g}" if isinstance(x, float) else str(x) for x in pair] for name, pair in pairs.items()}
    return [f"{name} {mine}, not {theirs}" for name, (mine, theirs) in text.items()]


def deviations(record: Record) -> list[str]:
    """How a run that has a row in Table 2 deviates from it: recipe, data and hardware, one phrase each."""
    said, trained = changed_fields(record), record.data.get("train_examples", IMAGENET.train_examples)
    if trained != IMAGENET.train_examples:
        said.append(f"trained on {trained:,} images, not {IMAGENET.train_examples:,}")
    if (evaluated := record.result["eval_examples"]) != IMAGENET.eval_examples:
        said.append(f"evaluated on {evaluated:,} images, not {IMAGENET.eval_examples:,}")
    cores = paper.table2().set_index("preset")["cores"][row_of(record)]
    if (record.environment["devices"], record.environment["device_kind"]) != (cores, "TPU v3"):
        said.append(f"{_devices(record)}, not {cores:,} TPU-v3 cores")
    return said


def _ours(records: Sequence[Record]) -> pd.DataFrame:
    """Our ImageNet runs, one row per run. `preset` is the row of Table 2 whose recipe a run has, if any."""
    records = [record for record in records if saw_imagenet(record)]
    table = results(records).reset_index()
    columns = (
        "preset",
        "variant",
        "global_batch_size",
        "precision",
        "peak_top1",
        "final_top1",
        "images_per_second",
        "seconds_to_peak",
    )
    table = table.reindex(columns=[*columns, "run"])
    table["preset"] = [row_of(r) if row_of(r) and not changed_fields(r) else None for r in records]
    table["resolution"] = [r.recipe.resolution for r in records]
    table["cores"] = [r.environment["devices"] for r in records]
    return table.assign(on=[_devices(r) for r in records])


def table2(records: Sequence[Record]) -> pd.DataFrame:
    """Table 2 with the top-1 of the runs of each row's recipe beside it; one row per run, and one where there is none."""
    ours = _ours(records)[["preset", "peak_top1", "final_top1", "run"]]
    ours = ours.rename(columns={"peak_top1": "our_peak_top1", "final_top1": "our_final_top1"})
    table = paper.table2().rename(columns={"top1": "paper_top1"}).merge(ours, "left", "preset")
    return table.assign(**{"difference, points": 100 * (table["our_peak_top1"] - table["paper_top1"])})


def table1(records: Sequence[Record]) -> pd.DataFrame:
    """Table 1 with our images/ms beside it; one row per run, and one where there is none. The optimizer hardly counts."""
    stated = paper.table1().rename(columns={"images_per_ms": "paper images/ms"}).drop(columns="all_reduce_percent")
    presets = [Recipe.preset(f"{row.variant}-{row.global_batch_size}-lars") for row in stated.itertuples()]
    step = ["variant", "global_batch_size", "resolution", "precision"]  # what decides its speed
    keys = stated.assign(**{name: [getattr(preset, name) for preset in presets] for name in step})
    ours = _ours(records).assign(**{"our images/ms": lambda table: table["images_per_second"] / 1e3})
    table = keys.merge(ours[[*step, "our images/ms", "on", "run"]], "left", step).drop(columns=step[2:])
    return table.assign(**{"ours / paper": table["our images/ms"] / table["paper images/ms"]})


def figure1(records: Sequence[Record]) -> pd.DataFrame:
    """Figure 1: the paper's points and our runs of its recipes, by its clock, which stops at the peak."""
    ours = _ours(records).dropna(subset="preset").rename(columns={"run": "whose", "peak_top1": "top1"})
    stated, ours = paper.figure1().assign(whose="paper"), ours.assign(minutes=ours["seconds_to_peak"] / 60)
    return pd.DataFrame(stated.to_dict("records") + ours[stated.columns].to_dict("records"))


def dawnbench(records: Sequence[Record], chip_hour: float) -> pd.DataFrame:
    """Seconds and dollars to 93 % top-5, as DAWNBench counts: those of our ImageNet runs, at the first evaluation that
    reaches it, under the history of fast ImageNet training. Of a run that never does, its best evaluation.

    Args:
      chip_hour: dollars per chip and hour.
    """
    stated = paper.history()
    stated["hardware"] += " (" + stated["year"].astype(str) + ")"
    stated["seconds"] = 60 * stated["minutes"]
    columns = ["what", "hardware", "seconds", "dollars", "top1", "top5", "checked"]
    ours = [_to_93(record, chip_hour) for record in records if saw_imagenet(record)]
    return pd.DataFrame(stated[columns].to_dict("records") + ours, columns=columns)


def _to_93(record: Record, chip_hour: float) -> dict:
    evaluations = record.frame("eval")
    there = evaluations[evaluations["ema_top5"] >= DAWNBENCH_TOP5]
    row = evaluations.loc[evaluations["ema_top5"].idxmax()] if there.empty else there.iloc[0]
    checked = "ours" if row["nseen"] == IMAGENET.eval_examples else f"ours, on {row['nseen']:,} images"
    found = {"what": record.name, "hardware": _devices(record), "top1": row["ema_top1"], "top5": row["ema_top5"]}
    if there.empty:
        return found | {"checked": f"{checked}: 93 % not reached"}
    # A CPU has no chips that are rented by the hour.
    dollars = None if record.environment.get("platform") == "cpu" else chip_hour * chips(record) * row["seconds"] / 3600
    return found | {"seconds": row["seconds"], "dollars": dollars, "checked": checked}


def chips(record: Record) -> int:
    """How many chips the run's devices are on: up to TPU v3, two cores share one."""
    return record.environment["devices"] // (2 if record.environment["device_kind"] in TWO_CORES_PER_CHIP else 1)


def stated_deviations(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run that has a row in Table 2: its peak, what was evaluated, and every deviation."""
    records = [record for record in records if row_of(record)]
    columns = [
        "run",
        "beside",
        "recipe",
        "peak_top1",
        "peak_epoch",
        "evaluated_weights",
        "eval_examples",
        "evaluations",
    ]
    table = results(records).reset_index().reindex(columns=columns)
    table["beside"] = [row_of(record) for record in records]
    table["recipe"] = ["another" if changed_fields(record) else "the same" for record in records]
    table["evaluations"] = [len(record.frame("eval")) for record in records]
    return table.assign(deviations=["; ".join(deviations(record)) or "none known" for record in records])


def _devices(record: Record) -> str:
    return f"{record.environment['devices']:,} x {record.environment['device_kind']}"
