import json

import pytest

from effnetlib import EffnetlibError, Recipe, Record, load_records, train
from effnetlib.reports.tables import results
from effnetlib.runs.files import write_atomically
from effnetlib.runs.paths import outputs_folder
from effnetlib.runs.record import environment


def rows(record):
    record.directory.mkdir(parents=True, exist_ok=True)
    for step, top1 in ((2, 0.5), (4, 0.9), (6, 0.8)):
        record.log(
            kind="train",
            step=step,
            epoch=step / 2,
            loss=1 / step,
            top1=0.1,
            lr=0.1,
            images_per_second=10.0,
            seconds=step,
        )
        record.log(kind="eval", step=step, epoch=step / 2, nseen=360, top1=top1 - 0.1, top5=1.0, loss=1.0,
                   ema_top1=top1, ema_top5=1.0, ema_loss=1.0, seconds=float(step))  # fmt: skip


@pytest.fixture
def record(tmp_path):
    record = Record(
        tmp_path / "run",
        Recipe.preset("digits-64-lars"),
        timing={"images": 100, "train_seconds": 4.0, "input_wait_seconds": 1.0},
    )
    rows(record)
    record.summarize()
    record.save()
    return record


def test_what_is_written_is_read(record):
    assert Record.load(record.directory) == record
    assert load_records(record.directory.parent) == [record]
    run = json.loads((record.directory / "run.json").read_text())
    assert list(run) == ["schema", "status", "recipe", "recipe_hash", "environment", "data", "timing", "result"]


def test_summary(record):
    result = record.result
    assert (result["peak_top1"], result["peak_step"], result["seconds_to_peak"]) == (0.9, 4, 4.0)
    assert (result["final_top1"], result["raw_final_top1"], result["images_per_second"]) == (0.8, 0.7, 25.0)


def test_rewinding_drops_what_will_be_written_again(record):
    record.rewind(4)
    assert [row["step"] for row in Record.load(record.directory).metrics] == [2, 2, 4, 4]


def test_a_line_cut_off_by_a_crash_is_left_out(record):
    with open(record.directory / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert Record.load(record.directory).metrics == record.metrics


def test_a_missing_or_damaged_record(tmp_path, record):
    with pytest.raises(EffnetlibError, match=r"holds no record \(run.json is missing\)"):
        Record.load(tmp_path)
    (record.directory / "run.json").write_text("{")
    with pytest.raises(EffnetlibError, match="run.json is damaged"):
        Record.load(record.directory)


@pytest.mark.parametrize("content", ["[]", '"text"', "{}", '{"recipe": 3}', "\x00\x00"])
def test_a_damaged_record_is_a_sentence_and_is_never_written_over(content, record):
    file = record.directory / "run.json"
    file.write_text(content)
    with pytest.raises(EffnetlibError, match="run.json is damaged"):
        train(record.recipe, record.directory)
    assert file.read_text() == content


def test_a_record_of_another_version_or_of_an_optimizer_of_a_notebook_is_read_and_kept(record):
    file = record.directory / "run.json"
    run = json.loads(file.read_text())
    run |= {"schema": 2, "weather": "fair", "recipe_hash": "0123456789ab", "status": "preempted"}
    run["recipe"] |= {"optimizer": "lamb", "mixup": 0.2}
    del run["recipe"]["drop_path"]
    file.write_text(json.dumps(run))
    found = Record.load(record.directory)
    assert (found.recipe.optimizer, found.recipe.drop_path, found.recipe.hash) == ("lamb", 0.2, "0123456789ab")
    assert results([found]).loc["run", "optimizer"] == "lamb"
    with pytest.raises(EffnetlibError, match=r"another recipe \(.*mixup.* differ\)"):
        train(record.recipe, record.directory)
    found.save()
    kept = json.loads(file.read_text())
    assert kept["recipe"].pop("drop_path") == 0.2 and kept == run


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_environment_names_versions_and_hardware():
    found = environment()
    assert found["devices"] == 8 and found["processes"] == 1 and "cores" in found["host"]


def test_outputs_folder(tmp_path, monkeypatch):
    assert outputs_folder() == tmp_path / "outputs"
    monkeypatch.delenv("EFFNETLIB_OUTPUTS")
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(tmp_path / "file/below"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EffnetlibError, match="EFFNETLIB_OUTPUTS .* is a file, where a folder is wanted"):
        outputs_folder()
    monkeypatch.delenv("EFFNETLIB_OUTPUTS")
    (tmp_path / "notebooks/suites").mkdir(parents=True)
    (tmp_path / "notebooks/deeper").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks/deeper")
    assert outputs_folder() == tmp_path / "outputs"
