"""What people give as a path, at every door."""

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from effnetlib import EffnetlibError, Recipe, Record, data, load_records, train
from effnetlib.__main__ import main
from effnetlib.data.sources import cache_folder
from effnetlib.reports.comparison import load
from effnetlib.reports.pages import report_suite
from effnetlib.reports.tables import show
from effnetlib.runs.paths import name_or_path, outputs_folder, runs_folder, user_path
from effnetlib.suites.parameters import train_recipe
from effnetlib.suites.suite import load_suite
from effnetlib.weights.pretrained import Pretrained, evaluate_pretrained, import_weights


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a home folder beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_path_is_absolute_from_where_the_user_stands(here):
    for given in ("photos", "./photos", "photos/", "../here/photos", Path("photos"), str(here / "photos")):
        assert user_path(given, "x") == here / "photos"
    assert user_path("~/photos", "x") == here.parent / "home/photos"
    assert user_path("lamb", "x", here / "outputs") == here / "outputs/lamb"
    assert user_path("/lamb", "x", here / "outputs") == Path("/lamb")
    for given in ("./a:b/c", "photos/12:30", "a b: c", "price$list", "Mum's", "50%/x"):
        assert user_path(given, "x") == here / given
    Path("a:b").mkdir()
    assert user_path("a:b/c", "x") == here / "a:b/c"  # no address, as it is there


@pytest.mark.parametrize(
    "address",
    ["gs://bucket/run", "s3://bucket", "https://example.org/x.tar", "file:///tmp/x", "hdfs://h:1/x", "abfs://c@a/x", "az://c/x",
     "gs:/bucket/run", "GS://bucket", " gs://bucket", "gs://", "gs:", Path("gs://bucket"), "outputs/gs:/bucket", "/here/s3://bucket",
     "me@vm:/data/x", r"C:\Users\me\shards", "D:/photos", "gs:bucket/x", "host:data/x"],
)  # fmt: skip
def test_an_address_is_refused_in_one_sentence_that_says_what_to_do(here, address):
    sentence = rf"^--to {re.escape(repr(os.fspath(address)))} is an address: mount it, or copy what it holds, and give the path"
    with pytest.raises(EffnetlibError, match=sentence) as refused:
        user_path(address, "--to")
    assert "\n" not in str(refused.value)
    with pytest.raises(EffnetlibError, match="--to .* is an address"):
        name_or_path(os.fspath(address), "--to")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "x '' is not a path"),
        ("  ", "x '  ' is not a path"),
        ("a\0b", r"is not a path: name a file or folder"),
        ("$HOME/photos", r"x '\$HOME/photos' holds a variable, which no shell has replaced"),
        ("${DATA}", "holds a variable"),
        ("/data/$USER/x", "holds a variable"),
        ("$(pwd)/x", "holds a variable"),
        ("`pwd`/x", "holds a variable"),
        ("pre${X}", "holds a variable"),
        ("%HOME%/x", "holds a variable"),
        ("{{x}}/y", "holds a variable"),
        (" /data/x", "begins and ends with quotes, or has a blank at an end: leave them out"),
        ("/data/x\n", "has a blank at an end"),
        ('"/data/x"', "begins and ends with quotes"),
        ("'~/x'", "begins and ends with quotes"),
        ("~nobody-of-that-name/x", "names a user who has no home folder here"),
        ("file/below", "x 'file/below' cannot be used: .*here/file is a file, where a folder is wanted"),
    ],
)
def test_what_is_no_path_is_refused(here, given, sentence):
    Path("file").write_text("")
    with pytest.raises(EffnetlibError, match=sentence):
        user_path(given, "x")


def test_a_working_directory_that_was_deleted(here):
    here.rmdir()
    assert user_path("/photos", "x") == Path("/photos")
    with pytest.raises(EffnetlibError, match="x 'photos' begins in the working directory, which was deleted"):
        user_path("photos", "x")


def test_a_file_is_no_folder(here):
    Path("file").write_text("")
    assert user_path("file", "x") == here / "file"
    for given in ("file", "file/run"):
        with pytest.raises(EffnetlibError, match="where a folder is wanted"):
            user_path(given, "x", folder=True)


def test_a_name_stays_one(here):
    assert [name_or_path(name, "x") for name in ("imagenet", "my-photos", "v1.0")] == ["imagenet", "my-photos", "v1.0"]
    for given in ("./photos", "photos/", "~/photos", "..", "a/b"):
        assert Path(name_or_path(given, "x")).is_absolute()


LIBRARY = {
    "directory": lambda path: train(Recipe.preset("digits"), path),
    "dataset": lambda path: Recipe.preset("digits").replace(dataset=path),
    "dataset ": lambda path: data.load(path, "train"),
    "the suite": load_suite,
    "the run": Record.load,
    "the run ": lambda path: load([path]),
    "the folder": load_records,
    "the folder ": report_suite,
    "the weights": Pretrained.load,
    "the folder  ": lambda path: import_weights("weights.safetensors", path),
    "the file": lambda path: evaluate_pretrained(None, "digits", path),
    "the figure": lambda path: show(__import__("matplotlib.pyplot").pyplot.figure(), path, "nothing"),
    "suite": runs_folder,
}


@pytest.mark.parametrize("what", LIBRARY)
def test_the_doors_of_the_library(here, what):
    """None is so late that anything has been read or computed: what the others need is not there."""
    with pytest.raises(EffnetlibError, match=f"^{what.strip()} 's3://bucket/x.png' is an address"):
        LIBRARY[what]("s3://bucket/x.png")
    assert not os.listdir()


COMMANDS = {
    "the suite": ["run", "gs://bucket/x"],
    "the folder": ["report", "gs://bucket/x"],
    "the run": ["report", "gs://bucket/x", "gs://bucket/y"],
    "--archive": ["data", "fetch", "cifar10", "--archive", "gs://bucket/x"],
    "SOURCE": ["data", "prepare", "gs://bucket/x", "to"],
    "DEST": ["data", "prepare", "from", "gs://bucket/x"],
    "DEST ": ["data", "check", "gs://bucket/x"],
    "the weights": ["weights", "import", "gs://bucket/x"],
    "--to": ["weights", "import", "x.safetensors", "--to", "gs://bucket/x"],
    "the weights ": ["weights", "export", "gs://bucket/x", "x.safetensors"],
    "FILE": ["weights", "export", "run", "gs://bucket/x"],
    "dataset": ["plan", "b0-64-lars", "--topology", "v5e:2x4", "--set", "dataset=gs://bucket/x"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_the_doors_of_the_command_line(here, what):
    done = CliRunner().invoke(main, COMMANDS[what])
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
    assert done.output.startswith(f"effnetlib: {what.strip()} 'gs://bucket/x' is an address: mount it")
    assert not os.listdir() and not outputs_folder().exists()


def test_the_doors_of_the_environment(here, monkeypatch):
    for variable, folder in (("EFFNETLIB_OUTPUTS", outputs_folder), ("EFFNETLIB_DATA", cache_folder)):
        monkeypatch.setenv(variable, "gs://bucket")
        with pytest.raises(EffnetlibError, match=f"{variable} 'gs://bucket' is an address"):
            folder()
        monkeypatch.setenv(variable, "below")
        assert folder() == here / "below"
        monkeypatch.setenv(variable, "~/below")
        assert folder() == here.parent / "home/below"


def test_a_data_set_is_a_path_or_a_name_under_the_cache(here):
    assert data.data_folder("photos") == cache_folder() / "photos"
    assert data.data_folder("./photos") == data.data_folder("photos/") == here / "photos"
    assert Recipe.preset("photos").dataset == "photos"
    assert Recipe.preset("photos").replace(dataset="./photos").dataset == str(here / "photos")
    Path("photos.tar").write_text("")
    with pytest.raises(
        EffnetlibError, match="dataset .*photos.tar' cannot be used: .* is a file, where a folder is wanted"
    ):
        data.load("./photos.tar", "train")


SUITE = """
runs: [{name: a, parameters: {preset: photos, dataset: ../photos/}}, {name: b, parameters: {preset: photos}}]
reports:
  - {name: 14_comparison, parameters: {runs: [lars-64, ./outputs/other/runs/lars-64, ~/runs/x]}}
"""


def test_paths_in_a_suite_begin_where_the_command_runs_and_not_where_the_kernels_do(here):
    suites = Path(__file__).parents[2] / "notebooks/suites"
    Path("notebooks/suites").mkdir(parents=True)
    for name in ("train", "14_comparison"):
        Path(f"notebooks/{name}.ipynb").write_bytes((suites.parent / f"{name}.ipynb").read_bytes())
    Path("notebooks/suites/mine.yaml").write_text(SUITE)
    suite = load_suite("notebooks/suites/mine.yaml")
    photos = str(here.parent / "photos")
    assert suite.notebooks == here / "notebooks"
    assert [run.parameters.get("dataset") for run in suite.runs] == [photos, None]
    assert train_recipe(suite.runs[0].parameters).dataset == photos
    wanted = ["lars-64", str(here / "outputs/other/runs/lars-64"), str(here.parent / "home/runs/x")]
    assert suite.reports[0].parameters["runs"] == wanted
    changed = load_suite("notebooks/suites/mine.yaml", {"dataset": "./photos"})
    assert [run.parameters["dataset"] for run in changed.runs] == [str(here / "photos")] * 2
    with pytest.raises(EffnetlibError, match="in the suite .*mine.yaml: dataset 'gs://bucket' is an address"):
        load_suite("notebooks/suites/mine.yaml", {"dataset": "gs://bucket"})
    with pytest.raises(EffnetlibError, match="leave directory out"):
        load_suite("notebooks/suites/mine.yaml", {"directory": "elsewhere"})
