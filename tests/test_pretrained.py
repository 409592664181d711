"""Weights in, evaluated, and out again, by the library and by the command line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import run_once
from flax import nnx

from effnetlib import EfficientNet, EffnetlibError, data, weights
from effnetlib.__main__ import main
from effnetlib.pretrained import Pretrained, evaluate_pretrained, import_weights


@pytest.fixture(scope="module")
def nano():
    def init():
        model = EfficientNet("nano", 10, rngs=nnx.Rngs(3))
        return tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))

    return jax.device_get(run_once(init))


@pytest.fixture
def file(nano, tmp_path):
    weights.write(tmp_path / "mine.safetensors", nano, "nano", 10)
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
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


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
        (["export", "{file}", "out.pth"], "ends in neither of .safetensors and .stablehlo"),
        (["export", "{file}", "nowhere/out.safetensors"], "there is no folder"),
        (["export", "nothing", "out.safetensors"], "neither a file of weights nor the folder"),
        (["import", "nothing.h5"], "neither a file of weights nor the folder"),
        (["import", "{file}", "--to", "{file}"], "is a file, where a folder is wanted"),
        (["import", "{file}", "--to", "{file}/x"], "is a file, where a folder is wanted"),
        (["export", "{file}", "/proc/x.safetensors"], "cannot be written: "),
    ],
)
def test_mistakes_are_one_sentence(file, arguments, sentence):
    done = run("weights", *(argument.format(file=file) for argument in arguments))
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output


ALONE = """
import sys, numpy, jax, jax.export
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
numpy.save(sys.argv[3], program.call(numpy.load(sys.argv[2])))
assert not {"flax", "effnetlib", "optax"} & set(sys.modules)
"""


def test_stablehlo_gives_the_same_logits_in_a_python_that_knows_only_jax(nano, file, tmp_path):
    assert run("weights", "export", file, tmp_path / "nano.stablehlo").exit_code == 0
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    paths = [tmp_path / name for name in ("nano.stablehlo", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, paths)], check=True, cwd=tmp_path)
    model = weights.build(nano, "nano", 10, dtype=jnp.float32)
    wanted = jax.jit(lambda images: model(images))(images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)


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
    (tmp_path / "empty/weights.json").write_text("{}")
    with pytest.raises(EffnetlibError, match="weights.json is damaged"):
        Pretrained.load(tmp_path / "empty")
