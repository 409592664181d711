"""The paper's tables and figures beside ours, and the deviations of each run.

Table 2 and Figure 1 take runs whose recipe is the preset of a row. The seed and the place of ImageNet may differ.
Table 1 takes runs with the same model, batch, resolution and precision as a row. DAWNBench takes every run on ImageNet.
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
    """The preset of Table 2 with the run's model, batch and optimizer, or None."""
    recipe = record.recipe
    name = f"{recipe.variant}-{recipe.global_batch_size}-{recipe.optimizer}"
    return name if name in PAPER_PRESETS else None


def saw_imagenet(record: Record) -> bool:
    """Whether a run was trained on as many classes as ImageNet has, from any name or path."""
    default = IMAGENET.num_classes if record.recipe.dataset == "imagenet" else None
    return record.data.get("num_classes", default) == IMAGENET.num_classes


def changed_fields(record: Record) -> list[str]:
    """The recipe's fields that differ from the preset of its row, such as "epochs 90, not 350".

    The seed and the place of ImageNet may differ."""
    ours, preset = asdict(record.recipe), asdict(Recipe.preset(row_of(record)))
    free = {"seed", "dataset"} if saw_imagenet(record) else {"seed"}
    pairs = {name: (ours[name], preset[name]) for name in preset if name not in free and ours[name] != preset[name]}
    text = {name: [f"{x:g}" if isinstance(x, float) else str(x) for x in pair] for name, pair in pairs.items()}
    return [f"{name} {pair[0]}, not {pair[1]}" for name, pair in text.items()]


def deviations(record: Record) -> list[str]:
    """The differences between a run and its row of Table 2: recipe, data and hardware, one phrase each."""
    found, trained = changed_fields(record), record.data.get("train_examples", IMAGENET.train_examples)
    if trained != IMAGENET.train_examples:
        found.append(f"trained on {trained:,} images, not {IMAGENET.train_examples:,}")
    if (evaluated := record.result["eval_examples"]) != IMAGENET.eval_examples:
        found.append(f"evaluated on {evaluated:,} images, not {IMAGENET.eval_examples:,}")
    cores = paper.table2().set_index("preset")["cores"][row_of(record)]
    if (record.environment["devices"], record.environment["device_kind"]) != (cores, "TPU v3"):
        found.append(f"{_devices(record)}, not {cores:,} TPU-v3 cores")
    return found


def _ours(records: Sequence[Record]) -> pd.DataFrame:
    """Our ImageNet runs, one row per run. `preset` is the row of Table 2 with the run's recipe, or None."""
    records = [record for record in records if saw_imagenet(record)]
    figures = ["peak_top1", "final_top1", "images_per_second", "seconds_to_peak"]
    columns = ["preset", "variant", "global_batch_size", "precision", *figures, "run"]
    table = results(records).reset_index().reindex(columns=columns)
    table["preset"] = [row_of(r) if row_of(r) and not changed_fields(r) else None for r in records]
    table["resolution"] = [r.recipe.resolution for r in records]
    table["cores"] = [r.environment["devices"] for r in records]
    return table.assign(on=[_devices(r) for r in records])


def table2(records: Sequence[Record]) -> pd.DataFrame:
    """Table 2 with our top-1: one row per run of each recipe, or one row for a recipe without runs."""
    ours = _ours(records)[["preset", "peak_top1", "final_top1", "run"]]
    ours = ours.rename(columns={"peak_top1": "our_peak_top1", "final_top1": "our_final_top1"})
    table = paper.table2().rename(columns={"top1": "paper_top1"}).merge(ours, "left", "preset")
    return table.assign(**{"difference, points": 100 * (table["our_peak_top1"] - table["paper_top1"])})


def table1(records: Sequence[Record]) -> pd.DataFrame:
    """Table 1 with our images/ms: one row per run, or one row without runs. Any optimizer, as the speed is the same."""
    stated = paper.table1().rename(columns={"images_per_ms": "paper images/ms"}).drop(columns="all_reduce_percent")
    presets = [Recipe.preset(f"{row.variant}-{row.global_batch_size}-lars") for row in stated.itertuples()]
    step = ["variant", "global_batch_size", "resolution", "precision"]  # these decide its speed
    keys = stated.assign(**{name: [getattr(preset, name) for preset in presets] for name in step})
    ours = _ours(records).assign(**{"our images/ms": lambda table: table["images_per_second"] / 1e3})
    table = keys.merge(ours[[*step, "our images/ms", "on", "run"]], "left", step).drop(columns=step[2:])
    return table.assign(**{"ours / paper": table["our images/ms"] / table["paper images/ms"]})


def figure1(records: Sequence[Record]) -> pd.DataFrame:
    """Figure 1: the paper's points, and our runs of its recipes. The clock stops at the peak, as in the paper."""
    ours = _ours(records).dropna(subset="preset").rename(columns={"run": "whose", "peak_top1": "top1"})
    stated, ours = paper.figure1().assign(whose="paper"), ours.assign(minutes=ours["seconds_to_peak"] / 60)
    return pd.DataFrame(stated.to_dict("records") + ours[stated.columns].to_dict("records"))


def dawnbench(records: Sequence[Record], chip_hour: float) -> pd.DataFrame:
    """Seconds and dollars to 93 % top-5, by DAWNBench's rules: the history of fast ImageNet training, then our runs.

    Our runs count up to the first evaluation that reaches it. A run that never reaches it shows its best evaluation.

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
    reached = evaluations[evaluations["ema_top5"] >= DAWNBENCH_TOP5]
    row = evaluations.loc[evaluations["ema_top5"].idxmax()] if reached.empty else reached.iloc[0]
    checked = "ours" if row["nseen"] == IMAGENET.eval_examples else f"ours, on {row['nseen']:,} images"
    found = {"what": record.name, "hardware": _devices(record), "top1": row["ema_top1"], "top5": row["ema_top5"]}
    if reached.empty:
        return found | {"checked": f"{checked}: 93 % not reached"}
    # Nobody rents CPUs by the chip and hour.
    dollars = None if record.environment.get("platform") == "cpu" else chip_hour * chips(record) * row["seconds"] / 3600
    return found | {"seconds": row["seconds"], "dollars": dollars, "checked": checked}


def chips(record: Record) -> int:
    """The chips of the run's devices. On TPU v2 and v3 two devices share a chip."""
    return record.environment["devices"] // (2 if record.environment["device_kind"] in TWO_CORES_PER_CHIP else 1)


def stated_deviations(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run with a row in Table 2: its peak, its evaluations, and every deviation."""
    records = [record for record in records if row_of(record)]
    columns = ["peak_top1", "peak_epoch", "evaluated_weights", "eval_examples", "evaluations"]
    table = results(records).reset_index().reindex(columns=["run", "beside", "recipe", *columns])
    table["beside"] = [row_of(record) for record in records]
    table["recipe"] = ["another" if changed_fields(record) else "the same" for record in records]
    table["evaluations"] = [len(record.frame("eval")) for record in records]
    return table.assign(deviations=["; ".join(deviations(record)) or "none known" for record in records])


def _devices(record: Record) -> str:
    return f"{record.environment['devices']:,} x {record.environment['device_kind']}"
