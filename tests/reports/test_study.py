"""The reports of the study of large batches, drawn from hand-made records: the study itself takes hours."""

import ast
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.display import SVG, Image

from effnetlib import Record
from effnetlib.reports import claims, html, tables
from effnetlib.suites.outcome import Outcome
from effnetlib.suites.suite import load_suite

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SUITE = load_suite(NOTEBOOKS / "suites/study.yaml")
REPORTS = {entry.name: dict(entry.parameters) for entry in SUITE.reports}
# Points of top-1 that a run loses for each doubling of its batch.
LOSS = {"lars": 1.0, "momentum": 1.02, "rmsprop": 2.0, "rmsprop-scaled": 4.0}


def made_up_top1(name, recipe) -> float:
    """Made up: what a run's final top-1 could be."""
    kind = recipe.optimizer + "-scaled" * ("-scaled" in name and recipe.optimizer == "rmsprop")
    top1 = 70 - LOSS[kind] * np.log2(recipe.global_batch_size / 128)
    top1 -= 0.8 * abs(np.log2(recipe.batch_norm_batch_size / 32)) + 3 * (recipe.warmup_epochs == 0)
    top1 -= 2 * ("-exponential" in name) + 2 * abs(np.log2(recipe.lr_per_256)) * name.startswith("search-")
    spread = 2.0 if "momentum-4096-warmup0" in name else 0.2  # so wide that five seeds are too few
    noise = np.random.default_rng([recipe.seed, recipe.global_batch_size, len(name)]).standard_normal()
    return (top1 + 0.5 * np.sin(recipe.seed) + spread * noise) / 100


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The outputs folder with the study after its first stage: every search, and five seeds of every point."""
    folder = tmp_path_factory.mktemp("study")
    for entry in SUITE.runs:
        recipe = entry.recipe
        timed = entry.name.startswith("eval-")
        if 5 <= recipe.seed < 100 and not timed:
            continue
        on_one = entry.parameters.get("eval_devices") == 1
        environment = {"host": "made up", "platform": "cpu", "device_kind": "cpu", "devices": 2 if timed else 1, "eval_devices": 1 if on_one else 2}  # fmt: skip
        environment |= {"python": "3", "jax": "0", "flax": "0", "xla_flags": "--xla_cpu_multi_thread_eigen=false"}
        seconds = 10 + recipe.seed + on_one * (2.0 if "eval-4" in entry.name else 0.1) + 0.01 * (recipe.seed % 3)
        record = Record(
            folder / "study/runs" / entry.name, recipe, "completed", environment,
            data={"num_classes": 10, "eval_examples": 360 if timed else 10_000, "total_steps": recipe.total_steps},
            timing={"images": 36_720, "train_seconds": 8.0, "eval_seconds": 1.0, "input_wait_seconds": 0.1, "total_seconds": seconds},
        )  # fmt: skip
        record.directory.mkdir(parents=True)
        final = made_up_top1(entry.name, recipe)
        if entry.name.startswith("rmsprop-4096-scaled-seed"):
            record.status, record.error = "failed", "DivergedError: the loss is nan at step 9 of 122, made up"
        for share in (0.25, 0.5, 0.75, 1.0) if not record.error else ():
            row = {"step": int(share * recipe.total_steps), "epoch": share * recipe.epochs, "seconds": share * seconds}
            record.metrics.append({"kind": "train", **row, "loss": 2 - share, "lr": 1 - share, "top1": 0.5})
            top1 = {
                f"{which}{name}": value
                for which in ("", "ema_")
                for name, value in (("top1", share * final), ("top5", 0.9), ("loss", 1.0))
            }
            record.metrics.append({"kind": "eval", **row, "nseen": record.data["eval_examples"], **top1})
        if not record.error:
            record.summarize()
        record.save()
        record.rewind(recipe.total_steps)  # which writes the metrics
    return folder


def draw(name, parameters, monkeypatch) -> list:
    """Runs a notebook's cells here, which is quicker than in a kernel; returns what they show."""
    shown, cells = [], nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    monkeypatch.setattr(tables, "display", lambda *each: shown.extend(each))
    namespace = {"display": shown.append, "print": lambda *text: shown.append(" ".join(map(str, text)))}
    for cell in cells:
        if cell.cell_type != "code" or cell.id == "setup":
            continue
        body = ast.parse(cell.source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"{name}, {cell.id}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", ()):
            namespace |= parameters
        if last:
            shown.append(eval(compile(ast.Expression(last.value), f"{name}, {cell.id}", "eval"), namespace))
    for each in shown:
        if hasattr(each, "to_html"):
            assert "<table" in each.to_html()
    return [each for each in shown if each is not None]


S, C, U = claims.SUPPORTED, claims.CONTRADICTED, claims.UNDECIDED
WANTED = {
    "02_large_batch": {"tuned": [S], "scaled": [S]},
    "03_schedules": {"tuned": [S, U, S, U]},  # stairs lose nothing; momentum without warm-up spreads too much
    "04_batch_norm_groups": {"tuned": [S]},
    "05_distributed_evaluation": {"timed": [S, S]},
    "06_precision": {"tuned": [S]},
    "12_learning_rates": {},
    "16_reality_check": {"tuned": [S], "scaled": [S]},
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_the_study_is_drawn_and_judges_its_claims(name, study, monkeypatch):
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(study))
    shown = draw(name, REPORTS[name], monkeypatch)
    verdicts = [each for each in shown if isinstance(each, claims.Verdict)]
    assert {protocol: [v.verdict for v in verdicts if v.protocol == protocol] for protocol in WANTED[name]} == WANTED[
        name
    ]
    assert len(verdicts) == sum(map(len, WANTED[name].values()))
    figures = [each for each in shown if isinstance(each, SVG | Image)]
    assert figures and all(figure.metadata["alt"] for figure in figures)
    text = " ".join(verdict.ours for verdict in verdicts)
    if name == "02_large_batch":
        assert "rmsprop-4096-scaled: 10.00 ± 0.00 % (n = 5)" in text  # runs that diverged count, as chance
    if name == "05_distributed_evaluation":
        assert [re.search(r"\((\S+) training images", verdict.claim)[1] for verdict in verdicts] == ["25.5", "25.5"]
    if name == "03_schedules":
        assert "ends at 0.1% of the peak" in verdicts[0].claim and "ends at 1.2% of the peak" in verdicts[1].claim
        assert claims.seeds_to_run(verdicts) == "seeds 5-7 of momentum-4096, momentum-4096-warmup0"


def test_steps_to_the_target_and_their_line_of_perfect_scaling(study, monkeypatch):
    """Top-1 grows in a straight line to its end, so the target takes its share of the epochs, whatever the batch."""
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(study))
    record = tables.suite_records("study", "lars-128-seed0")[0]
    share = 0.5 / record.result["final_top1"]
    assert tables.steps_to(record, 0.5) == pytest.approx(share * record.recipe.total_steps, rel=1e-3)
    shown = draw("16_reality_check", REPORTS["16_reality_check"], monkeypatch)
    (epochs,) = [
        each.data for each in shown if hasattr(each, "data") and "epochs to 50%" in getattr(each.data, "columns", ())
    ]
    rows = epochs.set_index(["protocol", "batch", "optimizer"])["epochs to 50%"]
    assert rows["tuned", 128, "LARS"] == pytest.approx(10 * share, rel=0.02)
    assert rows.isna()["scaled", 4096, "RMSProp"] and rows.notna().sum() == len(rows) - 1


def test_the_index_names_verdicts_and_the_seeds_still_to_run(study, monkeypatch):
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(study))
    shown = draw("03_schedules", REPORTS["03_schedules"], monkeypatch)
    outputs = [
        nbformat.v4.new_output("display_data", each._repr_mimebundle_())
        for each in shown
        if isinstance(each, claims.Verdict)
    ]
    cells = [nbformat.v4.new_markdown_cell("# Schedules"), nbformat.v4.new_code_cell(outputs=outputs)]
    (study / "study/executed").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), study / "study/executed/03_schedules.ipynb")
    Outcome("03_schedules", is_run=False).write(study / "study")
    index = html.render_index(study / "study", "study").read_text()
    assert "The rule asks for more: seeds 5-7 of momentum-4096, momentum-4096-warmup0." in index
    assert index.count('<strong class="supported">✓ supported</strong>') == index.count("? undecided</strong>") == 2
    runs = index.count("<polyline") + index.count("(DivergedError: ")
    assert runs == len(list((study / "study/runs").iterdir())) > 300 and len(index) < 500_000
