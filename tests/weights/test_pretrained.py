"""Weights in, evaluated, and out again, by the library and by the command line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import save_file

from effnetlib import EffnetlibError, data
from effnetlib.__main__ import main
from effnetlib.runs import checkpoints
from effnetlib.weights import files, names
from effnetlib.weights.pretrained import Pretrained, evaluate_pretrained, import_weights, predict


@pytest.fixture(scope="module")
def nano():
    rng, (_, state) = np.random.default_rng(3), names.skeleton("nano", 10, "float32")
    kinds = (nnx.to_pure_dict(state.filter(kind)) for kind in (nnx.Param, nnx.BatchStat))
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tuple(kinds))


@pytest.fixture
def file(nano, tmp_path):
    files.write(tmp_path / "mine.safetensors", nano, "nano", 10)
    return tmp_path / "mine.safetensors"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_in_and_out_by_the_command_line(nano, file, tmp_path):
    done = run("weights", "import", file)
    folder = tmp_path / "outputs/weights/mine"
    assert done.exit_code == 0 and done.output == f"nano, 10 classes\n{folder}\n", done.output
    loaded = Pretrained.load(folder)
    assert (loaded.variant, loaded.num_classes, loaded.image_size) == ("nano", 10, 32)
    assert loaded.origin["file"] == "mine.safetensors" and len(loaded.origin["sha256"]) == 64
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, nano)
    assert run("weights", "export", folder, tmp_path / "again.safetensors").exit_code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_what_is_there_is_not_overwritten_and_nothing_half_written_stays(file, tmp_path):
    assert run("weights", "import", file, "--to", tmp_path / "a").exit_code == 0
    again = run("weights", "import", file, "--to", tmp_path / "a")
    assert again.exit_code == 2 and "is not empty" in again.output
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:5000])
    broken = run("weights", "import", tmp_path / "broken.safetensors", "--to", tmp_path / "b")
    assert broken.exit_code == 2 and "cannot be read" in broken.output and not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".import-*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "{file}", "out.pth"], "out.pth does not end in .safetensors"),
        (["export", "{file}", "nowhere/out.safetensors"], "there is no folder"),
        (["export", "nothing", "out.safetensors"], "neither a file of weights nor the folder"),
        (["import", "nothing.h5"], "neither a file of weights nor the folder"),
        (["import", "{file}", "--to", "{file}"], "is a file, where a folder is wanted"),
        (["import", "{file}", "--to", "{file}/x"], "is a file, where a folder is wanted"),
        (["import", "{file}", "--to", "/proc/x"], "the folder /proc/x cannot be written: "),
        (["export", "{file}", "/proc/x.safetensors"], "cannot be written: "),
        (
            ["export", "{file}", "x.safetensors", "--best"],
            "mine.safetensors is not the folder of a run, and only a run keeps its best",
        ),
    ],
)
def test_mistakes_are_one_sentence(file, arguments, sentence):
    done = run("weights", *(argument.format(file=file) for argument in arguments))
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output


def test_a_runs_weights_score_again_what_its_record_says(whole, tiny, tmp_path):
    record, loaded = whole, Pretrained.load(whole.directory)
    assert loaded.origin == {"run": whole.name, "step": tiny.total_steps, "recipe_hash": tiny.hash}
    result = evaluate_pretrained(loaded, "digits", tmp_path / "result.json", batch=64, augmentation="shift")
    assert (result.nseen, result.top1) == (360, record.result["final_top1"])
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["result"]["ncorrect"] == result.ncorrect and written["weights"]["recipe_hash"] == tiny.hash
    assert written["data"] == {"source": "digits", "eval_examples": 360,
                               "fingerprint": record.data["fingerprints"]["eval"]}  # fmt: skip


def test_what_cannot_be_evaluated_is_refused(file, tmp_path):
    loaded = Pretrained.load(file)
    with pytest.raises(EffnetlibError, match="a batch of 60 does not divide over 8 devices"):
        evaluate_pretrained(loaded, "digits", tmp_path / "x.json", batch=60)
    (tmp_path / "data/two/val/ant").mkdir(parents=True)
    image = np.zeros((8, 8, 3), np.uint8)
    import cv2

    cv2.imwrite(str(tmp_path / "data/two/val/ant/0.png"), image)
    assert len(data.load("two", "eval")) == 1  # a set of validation images alone will do
    with pytest.raises(EffnetlibError, match="two has 1 classes, and the weights 10"):
        evaluate_pretrained(loaded, "two", tmp_path / "x.json", batch=64)


def test_importing_into_a_folder_of_ones_own(file, tmp_path):
    (tmp_path / "empty").mkdir()
    assert import_weights(file, tmp_path / "empty").variant == "nano"
    (tmp_path / "empty/model.safetensors").write_text("{}")
    with pytest.raises(EffnetlibError, match="model.safetensors cannot be read"):
        Pretrained.load(tmp_path / "empty")


def test_an_import_says_what_nothing_states_and_keeps_it(nano, tmp_path):
    save_file(names.to_timm(nano, "nano", 10), tmp_path / "tf_nano_ap.safetensors")
    done = run("weights", "import", tmp_path / "tf_nano_ap.safetensors", "--to", tmp_path / "a")
    note = "no config states which of timm's networks tf_nano_ap.safetensors holds: "
    assert done.exit_code == 0 and note in done.output, done.output
    assert Pretrained.load(tmp_path / "a").origin["note"].startswith(note)
    for source, target in (("a", "b.safetensors"), ("b.safetensors", "c.SAFETENSORS")):
        assert run("weights", "export", tmp_path / source, tmp_path / target).exit_code == 0
        assert Pretrained.load(tmp_path / target).origin["note"].startswith(note)


def test_image_size_classes_and_tag_go_through_import_and_export(nano, tmp_path):
    classes = tuple("abcdefghij")
    files.write(
        tmp_path / "x.safetensors", nano, "nano", 10, image_size=48, class_names=classes, origin={"tag": "aa_in1k"}
    )
    imported = import_weights(tmp_path / "x.safetensors", tmp_path / "a")
    assert (imported.image_size, imported.class_names, imported.origin["tag"]) == (48, classes, "aa_in1k")
    assert run("weights", "export", tmp_path / "a", tmp_path / "y.safetensors").exit_code == 0
    again = Pretrained.load(tmp_path / "y.safetensors")
    assert again.origin == imported.origin == Pretrained.load(tmp_path / "a").origin
    assert (again.image_size, again.class_names) == (48, classes)


def test_a_run_gives_its_classes_to_what_is_exported(whole, tmp_path):
    Pretrained.load(whole.directory).export(tmp_path / "x.safetensors")
    assert Pretrained.load(tmp_path / "x.safetensors").class_names == tuple("0123456789")


def of(num_classes, names=(), tag=""):
    return Pretrained(({}, {}), "nano", num_classes, 32, tuple(names), {"tag": tag})


SYNSETS = [f"n{i:08}" for i in range(1000)]
NUMBERS = list(map(str, range(1000)))


@pytest.mark.parametrize(("pretrained", "names", "sentence"), [
    (of(3), "ab", "x has 2 classes, and the weights 3"),
    (of(3, "abc"), "abd", "x has d for class 2, and the weights c: name"),
    (of(3, "abc"), "bac", "x has b for class 0, and the weights a; the order differs"),
    (of(2, ["ant", "bee"]), ["ant", "bee "], "x has 'bee ' for class 1, and the weights bee"),
    (of(1000, (), "ns_jft_in1k"), [f"word{i:04}" for i in range(1000)], "x begins with word0000, word0001, word0002"),
    (of(1000, (), "in1k"), SYNSETS[::-1], "x begins with n00000999"), (of(1000), sorted(NUMBERS), "x has numbers out of order"),
    (of(1000, SYNSETS, "in1k"), sorted(NUMBERS), "x has numbers out of order"),
])  # fmt: skip
def test_other_classes_than_the_weights_are_refused(pretrained, names, sentence):
    with pytest.raises(EffnetlibError, match=sentence):
        pretrained.check_classes(names, "x")


@pytest.mark.parametrize(("pretrained", "names", "said"), [
    (of(3, "abc"), "abc", False), (of(3, "abc"), "012", False), (of(2, ["\u00c4", "b"]), ["A\u0308", "b"], False),
    (of(1000, (), "in1k"), SYNSETS, False), (of(1000, (), "aa_in1k"), NUMBERS, False), (of(1000), SYNSETS, False),
    (of(1000), [f"{i:03}" for i in range(1000)], False), (of(10, (), "aa_in1k"), "abcdefghij", True), (of(3), "abc", True),
    (of(1000), [f"word{i:04}" for i in range(1000)], True),
])  # fmt: skip
def test_where_nothing_says_what_the_logits_mean_that_is_said(pretrained, names, said, capsys):
    pretrained.check_classes(names, "x")
    assert capsys.readouterr().out == said * (
        f"The weights do not name the classes of {len(names)} logits: the order of x's classes is assumed\n")  # fmt: skip


def test_evaluating_and_predicting_compare_the_classes(nano, tmp_path):
    files.write(tmp_path / "x.safetensors", nano, "nano", 10, class_names=tuple("abcdefghij"))
    loaded, digits = Pretrained.load(tmp_path / "x.safetensors"), data.load("digits", "eval")
    others = dataclasses.replace(digits, class_names=tuple("abcdefghik"))
    with pytest.raises(EffnetlibError, match="the data set has k for class 9, and the weights j"):
        predict(loaded, others)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EffnetlibError, match="digits has k for class 9"):
        patch.setattr(data, "load", lambda *_: others)
        evaluate_pretrained(loaded, "digits", tmp_path / "x.json", batch=64)


@pytest.fixture
def scored(nano, tmp_path):
    """A run's folder with checkpoints of steps 1 to 4, best at step 2; the bias of each is its step."""
    folder = tmp_path / "run"
    folder.mkdir()
    with checkpoints.open_checkpoints(folder) as manager:
        for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None)):
            marked = jax.tree.map(np.copy, nano[0])
            marked["classifier"]["bias"][:] = step
            checkpoints.save(manager, step, {"ema_params": marked, "ema_batch_stats": nano[1]}, top1=top1)
    return folder


def bias(found):
    return found[1][0]["classifier"]["bias"][0]


def test_the_best_checkpoint_and_the_latest(scored, nano):
    assert bias(checkpoints.latest_weights(scored)) == 4
    step, _ = found = checkpoints.latest_weights(scored, best=True)
    assert step == 2 and bias(found) == 2
    with checkpoints.open_checkpoints(scored) as manager:  # as a run that goes on: the best one stays
        checkpoints.save(manager, 5, {"ema_params": nano[0], "ema_batch_stats": nano[1]}, top1=0.7)
    assert checkpoints.latest_weights(scored, best=True)[0] == 2
    for file in (scored / "checkpoints").glob("*/timing/*"):
        file.write_text("")
    assert checkpoints.latest_weights(scored)[0] == 5
    shutil.rmtree(scored / "checkpoints/2")
    with pytest.raises(EffnetlibError, match="holds no checkpoint whose top-1 was measured"):
        checkpoints.latest_weights(scored, best=True)


def test_an_older_checkpoint_is_taken_where_the_latest_cannot_be_read_and_that_is_said(scored, capsys):
    def spoil(step):
        for file in (scored / f"checkpoints/{step}/state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"x")

    spoil(4)
    assert bias(checkpoints.latest_weights(scored)) == 3
    said = capsys.readouterr().out
    assert (
        "the checkpoint of step 4 in" in said
        and "is damaged: " in said
        and said.endswith("the one before is taken instead\n")
    )
    spoil(2)
    with pytest.raises(EffnetlibError, match="the checkpoint of step 2 in .* is damaged: ."):
        checkpoints.latest_weights(scored, best=True)
    spoil(3)
    with pytest.raises(EffnetlibError, match="the checkpoint of step 2 in .* is damaged: ."):
        checkpoints.latest_weights(scored)


def test_a_checkpoint_without_a_moving_average_is_named(nano, tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, 1, {"params": nano[0]})
    with pytest.raises(EffnetlibError, match="the checkpoint of step 1 in .* is damaged: it has no 'ema_params'"):
        checkpoints.latest_weights(tmp_path)


def test_the_best_of_a_run_is_exported(whole, tmp_path):
    done = run("weights", "export", whole.directory, tmp_path / "x.safetensors", "--best")
    assert done.exit_code == 0, done.output
    best, exported = Pretrained.load(whole.directory, best=True), Pretrained.load(tmp_path / "x.safetensors")
    jax.tree.map(np.testing.assert_array_equal, exported.weights, best.weights)
    rows = whole.frame("eval").set_index("step")["ema_top1"]
    assert rows[best.origin["step"]] == rows.max()
