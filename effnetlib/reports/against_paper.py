"""The paper's tables and figures with ours beside them, from whatever records there are, and how each run deviates.

A run stands beside a row of Table 2, and in Figure 1, if its recipe is that row's preset; the seed may differ, and ImageNet may
lie anywhere. It stands beside a column of Table 1 if all that decides the speed of a step is equal, and counts for DAWNBench if it
saw ImageNet.
"""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from effnetlib.data import describe
from effnetlib.presets import PAPER_PRESETS
from effnetlib.recipe import Recipe
from effnetlib.reports import paper
from effnetlib.runs.paths import runs_folder
from effnetlib.runs.progress import say
from effnetlib.runs.record import Record, load_records

DAWNBENCH_TOP5 = 0.93
TWO_CORES_A_CHIP = ("TPU v2", "TPU v3")
IMAGENET = describe("imagenet", "all")
OUR_TOP1 = ("our peak top-1 %", "difference, points", "our final top-1 %", "run")
OUR_SPEED = ("our images/ms", "ours / paper", "on", "run")


def completed_records(suite: str) -> list[Record]:
    """The completed records of a suite, maybe none; a line says how many, and what became of the others."""
    folder = runs_folder(suite)
    found = load_records(folder)
    completed = [record for record in found if record.status == "completed"]
    others = ", ".join(f"{record.name} ({record.status})" for record in found if record not in completed)
    count = f"{len(completed) or 'no'} completed record{'s' * (len(completed) != 1)}"
    say(f"{folder} holds {count}{'; not completed: ' * bool(others)}{others}.")
    return completed


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
    """How a run that has a row in Table 2 deviates from it: recipe, data and hardware, a phrase each."""
    cores = paper.table2().set_index("preset")["cores"][row_of(record)]
    said = [f"{name} {_text(ours)}, not {_text(preset)}" for name, (ours, preset) in changed_fields(record).items()]
    counts = {
        "trained": (record.data.get("train_examples"), IMAGENET.train_examples),
        "evaluated": (record.result.get("eval_examples"), IMAGENET.eval_examples),
    }
    said += [f"{verb} on {n:,} images, not {all_:,}" for verb, (n, all_) in counts.items() if n not in (None, all_)]
    devices, kind = record.environment["devices"], record.environment["device_kind"]
    if (devices, kind) != (cores, "TPU v3"):
        said.append(f"{devices:,} x {kind}, not {cores:,} TPU-v3 cores")
    return said


def table2(records: Sequence[Record]) -> pd.DataFrame:
    """Table 2 with the top-1 of the runs of each row's recipe beside it; a row a run, and one where there is none."""
    rows = []
    for row in paper.table2().itertuples():
        stated = {"preset": row.preset, "cores": row.cores, "paper top-1 %": 100 * row.top1, "checked": row.checked}
        ours = [
            {
                "our peak top-1 %": 100 * record.result["peak_top1"],
                "difference, points": 100 * (record.result["peak_top1"] - row.top1),
                "our final top-1 %": 100 * record.result["final_top1"],
                "run": record.name,
            }
            for record in _of_recipe(records, row.preset)
        ]
        rows += [stated | each for each in ours or [dict.fromkeys(OUR_TOP1)]]
    return pd.DataFrame(rows)


def table1(records: Sequence[Record]) -> pd.DataFrame:
    """Table 1 with our images/ms beside it; a row a run, and one where there is none."""
    rows = []
    for row in paper.table1().itertuples():
        stated = {"model": row.variant, "cores": row.cores, "batch": row.global_batch_size}
        stated |= {"paper images/ms": row.images_per_ms, "checked": row.checked}
        step = _step(Recipe.preset(f"{row.variant}-{row.global_batch_size}-lars"))
        ours = [
            {
                "our images/ms": record.result["images_per_second"] / 1e3,
                "ours / paper": record.result["images_per_second"] / 1e3 / row.images_per_ms,
                "on": _devices(record),
                "run": record.name,
            }
            for record in records
            if saw_imagenet(record) and _step(record.recipe) == step
        ]
        rows += [stated | each for each in ours or [dict.fromkeys(OUR_SPEED)]]
    return pd.DataFrame(rows)


def figure1(records: Sequence[Record]) -> pd.DataFrame:
    """Figure 1: the paper's points and our runs of its recipes, by its clock, which stops at the peak."""
    points = paper.figure1().assign(whose="paper")
    ours = [
        {
            "variant": record.recipe.variant,
            "cores": record.environment["devices"],
            "global_batch_size": record.recipe.global_batch_size,
            "minutes": record.result["seconds_to_peak"] / 60,
            "top1": record.result["peak_top1"],
            "whose": record.name,
        }
        for preset in PAPER_PRESETS
        for record in _of_recipe(records, preset)
    ]
    return pd.concat([points, pd.DataFrame(ours, columns=points.columns)]) if ours else points


def dawnbench(records: Sequence[Record], chip_hour: float) -> pd.DataFrame:
    """Seconds and dollars to 93 % top-5, as DAWNBench counts: those of our ImageNet runs, at the first evaluation that
    reaches it, under the history of fast ImageNet training. Of a run that never does, its best evaluation.

    Args:
      chip_hour: dollars a chip and hour.
    """
    stated = paper.history()
    stated["hardware"] += [f" ({year})" for year in stated["year"]]
    percent = {"top1": 100 * stated["top1"], "top5": 100 * stated["top5"], "seconds": 60 * stated["minutes"]}
    stated = stated.assign(**percent)[["what", "hardware", "seconds", "dollars", "top1", "top5", "checked"]]
    ours = [_to_93(record, chip_hour) for record in records if saw_imagenet(record)]
    table = pd.DataFrame(stated.to_dict("records") + ours, columns=stated.columns)
    return table.rename(columns={"top1": "top-1 %", "top5": "top-5 %"})


def _to_93(record: Record, chip_hour: float) -> dict:
    evaluations = record.frame("eval")
    there = evaluations[evaluations["ema_top5"] >= DAWNBENCH_TOP5]
    row = evaluations.loc[evaluations["ema_top5"].idxmax()] if there.empty else there.iloc[0]
    found = {"what": record.name, "hardware": _devices(record)}
    found |= {"top1": 100 * row["ema_top1"], "top5": 100 * row["ema_top5"]}
    images = "" if row["nseen"] == IMAGENET.eval_examples else f", on {row['nseen']:,} images"
    if there.empty:
        return found | {"checked": f"ours{images}: 93 % not reached"}
    # A CPU has no chips that are rented by the hour.
    dollars = None if record.environment.get("platform") == "cpu" else chip_hour * chips(record) * row["seconds"] / 3600
    return found | {"seconds": row["seconds"], "dollars": dollars, "checked": f"ours{images}"}


def chips(record: Record) -> int:
    """How many chips the run's devices are on: two TPU cores share one up to v3."""
    devices = record.environment["devices"]
    return devices // 2 if record.environment["device_kind"] in TWO_CORES_A_CHIP else devices


def stated_deviations(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run that has a row in Table 2: its peak, what was evaluated, and every deviation."""
    rows = [
        {
            "run": record.name,
            "beside": row_of(record),
            "recipe": "another" if changed_fields(record) else "the same",
            "peak top-1 %": 100 * record.result["peak_top1"],
            "at epoch": record.result["peak_epoch"],
            "weights": record.result["evaluated_weights"],
            "peak chosen among": f"{len(record.frame('eval'))} evaluations of {record.result['eval_examples']:,} images",
            "deviations": "; ".join(deviations(record)) or "none known",
        }
        for record in records
        if row_of(record)
    ]
    return pd.DataFrame(rows)


def _of_recipe(records: Sequence[Record], preset: str) -> list[Record]:
    return [each for each in records if row_of(each) == preset and saw_imagenet(each) and not changed_fields(each)]


def _step(recipe: Recipe) -> tuple:
    """What decides how long a step takes; the optimizer hardly does."""
    return recipe.variant, recipe.global_batch_size, recipe.resolution, recipe.precision


def _devices(record: Record) -> str:
    return f"{record.environment['devices']:,} x {record.environment['device_kind']}"


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
