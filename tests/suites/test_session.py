"""A notebook opened alone: what its first cell would add, show and refuse. The whole of it is `make rehearse`."""

import importlib.metadata
import re
import subprocess
import sys
from types import SimpleNamespace

import hosted
import jax
import pytest
from packaging.requirements import Requirement
from test_report import made_up

from effnetlib import EffnetlibError, Recipe, train
from effnetlib.errors import FailedError
from effnetlib.runs import run
from effnetlib.runs.stopping import PreemptedError
from effnetlib.suites import kaggle

SIGNS = ("COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_ACCELERATOR_TYPE", "JAX_PLATFORMS")
NEEDS = {
    "papermill": ["tenacity>=5", "click", 'aiohttp; python_version < "3"', 'boto3; extra == "s3"'],
    "tenacity": ["six"],
}


@pytest.fixture
def image(monkeypatch):
    """A made-up machine: `there` maps its packages to their versions, and pip adds version 99 of everything and notes it."""
    there, asked = {}, []

    def pip(command, **_):
        what = command[command.index("--no-deps") + 1 :]
        asked.append(what)
        there.update({Requirement(each).name: "99" for each in what if what[0] != "--editable"})
        return SimpleNamespace(returncode=0)

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(hosted.subprocess, "run", pip)
    monkeypatch.setattr(hosted.importlib.metadata, "version", version)
    monkeypatch.setattr(hosted.importlib.metadata, "requires", NEEDS.get)
    return SimpleNamespace(there=there, asked=asked)


@pytest.fixture
def environment(monkeypatch):
    """Nothing that says where this runs."""
    for name in (*SIGNS, *hosted.TPU_SIGNS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosted, "glob", lambda pattern: [])
    return monkeypatch


def test_only_what_is_missing_is_added_and_effnetlib_last(image):
    names = [each.name for each in hosted._needs() if each.name not in ("papermill", "safetensors")]
    assert {"jax", "numpy", "packaging"} <= set(names) and "jupyterlab" not in names
    image.there |= dict.fromkeys(names, "1") | {"click": "8"}
    image.there["opencv-contrib-python"] = image.there.pop("opencv-python-headless")
    assert hosted.install() == ["papermill", "safetensors", "tenacity", "six"]
    assert image.asked == [
        ["papermill>=2.6", "safetensors>=0.5"], ["tenacity>=5"], ["six"], ["--editable", str(hosted.CHECKOUT)]
    ]  # fmt: skip
    assert image.there["jax"] == "1"


def test_what_pip_cannot_install_is_named(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found for nothing\n")
    monkeypatch.setattr(hosted.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EffnetlibError, match="not install nothing: No matching distribution found .* internet"):
        hosted._pip("nothing")


def test_the_table_names_versions_devices_and_what_is_too_old(image):
    image.there |= {"jax": "0.7.2", "numpy": "1.26.4", "papermill": "2.7.0"}
    lines = hosted.table(["papermill"], hosted.Devices(8, "cpu", "cpu")).splitlines()
    assert "jax               0.7.2" in lines and "libtpu            none" in lines
    assert "numpy             1.26.4, but >=2.1 is wanted" in lines
    assert lines[-2:] == ["devices           8 x cpu", "added             papermill 2.7.0"]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, ""),
        ({"COLAB_GPU": "", "COLAB_TPU_1VM": "", "COLAB_RELEASE_TAG": "x"}, ""),
        ({"COLAB_TPU_1VM": "1", "TPU_ACCELERATOR_TYPE": "v5e-1"}, "TPU"),
        ({"ISTPUVM": "1"}, "TPU"),
        ({"KAGGLE_ACCELERATOR_TYPE": "TpuV5E8"}, "TPU"),
        ({"COLAB_GPU": "1"}, "GPU"),
        ({"KAGGLE_ACCELERATOR_TYPE": "NvidiaTeslaT4"}, "GPU"),
        ({"COLAB_GPU": "1", "JAX_PLATFORMS": "cpu"}, ""),
    ],
)
def test_falling_back_to_the_cpu_is_refused_where_an_accelerator_was_given(environment, given, kind):
    for name, value in given.items():
        environment.setenv(name, value)
    assert hosted.accelerator_given() == kind
    if not kind:
        hosted.check_accelerator(hosted.Devices(8, "cpu", "cpu"))
        return
    with pytest.raises(EffnetlibError, match=f"^this session was given a {kind}, but jax .* runs on the CPU: restart"):
        hosted.check_accelerator(hosted.Devices(8, "cpu", "cpu"))


def test_the_first_cell_runs_where_nothing_is_installed_and_holds_no_device():
    code = f"""
import runpy, sys
from pathlib import Path
sys.path[:] = [place for place in sys.path if not Path(place, "effnetlib").is_dir()]
sys.modules["jax"] = None  # looking at devices here would keep them from every other process
print(runpy.run_path({hosted.__file__!r})["_devices"]())
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"Devices\(count=\d+, platform='cpu', kind='cpu'\)\n", done.stdout)


def test_an_error_of_jax_is_one_sentence(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nothing")
    with pytest.raises(FailedError, match=r"^jax .* finds no devices: Unable to initialize backend 'nothing'"):
        hosted._devices()


@pytest.mark.parametrize("preset", ["colab", "kaggle"])
def test_what_is_for_an_accelerator_does_not_start_on_a_cpu_that_nobody_asked_for(preset, monkeypatch, tmp_path):
    class Unasked:
        config = SimpleNamespace(jax_platforms=None)

        def __getattr__(self, name):
            return getattr(jax, name)

    recipe = Recipe.preset(preset).replace(seed=1)
    with pytest.raises(EffnetlibError, match="imagenet is not in|CIFAR-10 in .* is missing"):  # JAX_PLATFORMS is cpu
        train(recipe, tmp_path / "run")
    monkeypatch.setattr(run, "jax", Unasked())
    with pytest.raises(EffnetlibError, match=f"^preset {preset} is for a TPU or a GPU, and jax finds only a CPU: "):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run._require_accelerator(Recipe.preset("b0-64-lars").replace(dataset="digits", image_size=32), jax.devices())


def test_device_files_count_on_hosted_notebooks_alone(environment):
    environment.setattr(hosted, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    assert hosted.accelerator_given() == ""
    environment.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert hosted.accelerator_given() == "TPU"


def test_a_notebook_shows_the_sentence_of_an_error_alone():
    assert EffnetlibError("what is wrong")._render_traceback_() == ["EffnetlibError: what is wrong"]


def test_elsewhere_than_on_kaggle_a_session_is_nothing(environment, tmp_path):
    with pytest.raises(PreemptedError), kaggle.session(tmp_path):
        raise PreemptedError("stopped")


def test_on_kaggle_a_run_goes_on_with_what_is_attached_and_stops_without_an_error(environment, tmp_path, capsys):
    environment.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    environment.setattr(kaggle, "INPUT", tmp_path / "input")
    mine, other = made_up("mine").directory, made_up("other").directory
    attached = tmp_path / "input/notebooks/me/version/outputs/runs"
    mine.rename(tmp_path / "mine")
    attached.mkdir(parents=True)
    (tmp_path / "mine").rename(attached / "mine")
    (attached.parent / ".compiled").mkdir()
    (attached.parent / ".compiled/program").touch()
    directory = tmp_path / "working/outputs/runs/mine"
    with pytest.raises(SystemExit) as stopped, kaggle.session(directory):
        assert (directory / "run.json").exists() and (directory / "metrics.jsonl").exists()
        assert (tmp_path / "working/outputs/.compiled/program").exists()
        raise PreemptedError("stopped at step 1")
    assert stopped.value.code is None and "attach the output of this version" in capsys.readouterr().out
    with kaggle.session(other):  # has a record, and none is attached
        pass
