"""The paper's tables and figures beside ours, and the deviations of each run.

Table 2 and Figure 1 take runs whose recipe is the preset of a row. The seed and the place of ImageNet may differ.
Table 1 takes runs with the same model, batch, resolution and precision as a row.
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
        found.append(f"{devices(record)}, not {cores:,} TPU-v3 cores")
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
    return table.assign(on=[devices(r) for r in records])


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


def devices(record: Record) -> str:
    return f"{record.environment['devices']:,} x {record.environment['device_kind']}"
