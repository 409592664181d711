"""A suite: which notebooks to execute with which parameters, read from a YAML file and checked before anything runs.

The file::

    runs:                                   # each trains; skipped when its record is completed
      - name: rmsprop-64                    # the folder outputs/SUITE/runs/rmsprop-64
        parameters: {preset: digits-64-rmsprop}
        cores: 1                            # on the CPU; as many such runs at a time as there are cores for
      - name: lars-64-{seed}                # several runs: one for each value, or combination of values
        parameters: {preset: digits-64-lars}
        tuned: {lr_per_256: search-lars-64} # the rate of the best run named search-lars-64-RATE; or peak_lr: its peak
        each: {seed: [0, 1, 2]}
    reports:                                # notebooks that read the records of the suite; executed after the runs
      - 00_overview
      - name: 06_precision                  # a report may have parameters too
        parameters: {runs: [in-float32, in-bfloat16]}

Every run executes `train.ipynb`. A run without `cores` has the machine to itself.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import papermill
import yaml

from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.recipe import TRAIN_OPTIONS, Recipe, check_parameters, typed
from effnetlib.runs.paths import name_or_path, outputs_folder, user_path
from effnetlib.suites.parameters import read_yaml

TRAIN_NOTEBOOK = "train"
KEYS = {"runs": ("name", "parameters", "tuned", "each", "cores"), "reports": ("name", "parameters")}


@dataclass(frozen=True, eq=False)
class Entry:
    """One notebook to execute: a name, the notebook without its suffix, and the parameters that differ.

    `cores` is how many cores it gets at least, on the CPU, while others run beside it. None: it has the machine to itself.
    `tuned` is the search that a run's learning rate comes from, if any (see `effnetlib.suites.tuning`).
    """

    name: str
    notebook: str
    parameters: Mapping
    cores: int | None = None
    tuned: Mapping = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        return self.notebook == TRAIN_NOTEBOOK

    @property
    def directory(self) -> Path:
        """The folder of a run's record."""
        return outputs_folder() / self.parameters["directory"]

    @property
    def recipe(self) -> Recipe:
        """A run's recipe."""
        return Recipe.from_parameters(self.parameters)


@dataclass(frozen=True)
class Suite:
    """A suite file, read and checked: `name` is the file's stem, `notebooks` the folder above `suites/`."""

    name: str
    notebooks: Path
    runs: tuple[Entry, ...]
    reports: tuple[Entry, ...]

    @property
    def directory(self) -> Path:
        return outputs_folder() / self.name

    def notebook_path(self, entry: Entry) -> Path:
        return self.notebooks / f"{entry.notebook}.ipynb"


def load_suite(path: Path | str, changes: Mapping | None = None) -> Suite:
    """Reads and checks a suite before anything is run: keys, names, notebooks, parameters, recipes.

    Args:
      path: the YAML file. A relative path in it begins in the working directory.
      changes: parameters that every run gets (`--set key=value`).

    Raises:
      EffnetlibError: what is wrong, in which file and entry.
    """
    path = user_path(path, "the suite")
    try:
        content = read_yaml(path.read_text())
    except OSError as error:
        raise EffnetlibError(f"the suite {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise EffnetlibError(f"the suite {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        _check_keys(content, KEYS)
        runs = tuple(_entries(path.stem, "runs", content.get("runs") or [], changes or {}))
        reports = tuple(_entries(path.stem, "reports", content.get("reports") or [], {}))
        suite = Suite(path.stem, path.parent.parent, runs, reports)
        names = [entry.name for entry in (*runs, *reports)]
        for entry in (*runs, *reports):
            _require(names.count(entry.name) == 1, f"two entries are named {entry.name!r}")
            _check_entry(suite, entry)
    except EffnetlibError as error:
        raise EffnetlibError(f"in the suite {path}: {error}") from None
    return suite


def report_alone(name: str, notebook: str, **parameters) -> Suite:
    """A suite of one report and no runs, for records that are there already.

    Args:
      name: the suite's folder, under outputs/ or absolute.
      notebook: one of this checkout's.

    Raises:
      EffnetlibError: this package runs from no checkout.
    """
    notebooks = Path(__file__).parents[2] / "notebooks"
    _require(
        (notebooks / f"{notebook}.ipynb").is_file(),
        f"this effnetlib has no notebooks beside it ({notebooks}): install it from a checkout, with pip install --editable .",
    )
    return Suite(name, notebooks, (), (Entry(notebook, notebook, {**parameters, "suite": name}, cores=1),))


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise EffnetlibError(sentence)


def _check_keys(value, allowed) -> None:
    _require(isinstance(value, dict), f"a mapping with the keys {', '.join(sorted(allowed))} is wanted, not {value!r}")
    for key in value:
        _require(key in allowed, f"there is no key {key!r}: {did_you_mean(key, sorted(allowed))}")


def _entries(suite: str, kind: str, items, changes: Mapping) -> Iterator[Entry]:
    """The entries under `runs` or `reports`: one for each item, or for each combination of the values under its `each`."""
    _require(isinstance(items, list), f"{kind} must be a list, and is {items!r}")
    for item in items:
        if kind == "reports" and not isinstance(item, dict):
            item = {"name": item}
        _check_keys(item, KEYS[kind])
        _require("name" in item, f"an entry lacks the key 'name': {item!r}")
        _require(
            type(item["name"]) in (str, int), f"a name must be text, and is {item['name']!r}: put it in quotation marks"
        )
        template, cores = str(item["name"]), item.get("cores")
        parameters, each = item.get("parameters") or {}, item.get("each", {})
        _require(
            isinstance(parameters, dict), f"the parameters of {template} must be a mapping, and are {parameters!r}"
        )
        lists = isinstance(each, dict) and all(isinstance(values, list) and values for values in each.values())
        _require(lists, f"each must map parameters to lists of values, and is {each!r}")
        for key in each:
            _require(f"{{{key}}}" in template, f"the name {template!r} must hold {{{key}}}: each value of it is a run")
        valid = cores is None or type(cores) is int and cores > 0
        _require(valid, f"{template}: cores must be a number above 0, and is {cores!r}")
        for values in itertools.product(*each.values()):
            chosen, name = dict(zip(each, values, strict=True)), template
            for key, value in chosen.items():
                name = name.replace(f"{{{key}}}", str(value))
            _require(
                re.fullmatch(r"(?!\.)[\w.-]{1,100}", name) and name != "index",
                f"{name!r} cannot name a run: at most 100 letters, digits, - and _ are wanted, and index is taken",
            )
            given = {**parameters, **chosen, **changes}
            given = {key: _from_here(key, value) for key, value in given.items()}
            if kind == "reports":
                yield Entry(name, name, {**given, "suite": suite}, cores=1)
                continue
            _require(
                "directory" not in given, f"{name}: leave directory out, a suite's runs lie in outputs/{suite}/runs"
            )
            yield Entry(
                name, TRAIN_NOTEBOOK, {**given, "directory": f"{suite}/runs/{name}"}, cores, item.get("tuned", {})
            )


def _from_here(name: str, value):
    """A parameter with its paths made absolute: a relative one begins where the command runs, and kernels run elsewhere."""
    if isinstance(value, list):
        return [_from_here(name, each) for each in value]
    if isinstance(value, dict):
        return {key: _from_here(key, each) for key, each in value.items()}
    return name_or_path(value, name) if name in ("dataset", "runs") and isinstance(value, str) else value


def _check_entry(suite: Suite, entry: Entry) -> None:
    source = suite.notebook_path(entry)
    known = [path.stem for path in suite.notebooks.glob("*.ipynb")]
    _require(
        known, f"there are no notebooks in {suite.notebooks}: a suite file lies in the folder suites/ beside notebooks"
    )
    _require(source.is_file(), f"there is no notebook {entry.notebook!r}: {did_you_mean(entry.notebook, known)}")
    try:
        if not entry.is_run:
            check_parameters(entry.parameters, papermill.inspect_notebook(str(source)))
            return
        Recipe.from_parameters(entry.parameters)
        for name, hint in TRAIN_OPTIONS.items():
            typed(name, entry.parameters.get(name), hint | None)
        if entry.tuned:
            _check_tuned(suite, entry)
    except EffnetlibError as error:
        raise EffnetlibError(f"{entry.name}: {error}") from None


def _check_tuned(suite: Suite, entry: Entry) -> None:
    ways, searches = ("lr_per_256", "peak_lr"), {run.name.rpartition("-")[0] for run in suite.runs}
    _require(
        isinstance(entry.tuned, dict) and len(entry.tuned) == 1 and set(entry.tuned) <= set(ways),
        f"tuned must map one of {', '.join(ways)} to a search, and is {entry.tuned!r}",
    )
    (search,) = entry.tuned.values()
    _require(search in searches, f"there are no runs named {search}-VALUE: {did_you_mean(search, sorted(searches))}")
    twice = "lr_per_256" in {**entry.parameters, **(entry.parameters.get("settings") or {})}
    _require(not twice, f"its learning rate comes from {search}: leave lr_per_256 out")
