"""A suite: notebooks to execute, and their parameters. It is read from a YAML file and checked before anything runs.

The file::

    runs:                                   # each trains; skipped if its record is completed
      - name: rmsprop-64                    # the folder outputs/SUITE/runs/rmsprop-64
        parameters: {preset: digits-64-rmsprop}
        cores: 1                            # on the CPU, in parallel: as many such runs as there are cores for
      - name: lars-64-{seed}                # several runs: one per value, or per combination of values
        parameters: {preset: digits-64-lars}
        tuned: {lr_per_256: search-lars-64} # takes lr_per_256 (or peak_lr) of the best run named search-lars-64-RATE
        each: {seed: [0, 1, 2]}
    reports:                                # these read the records of the suite; executed after the runs
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

from effnetlib.errors import EffnetlibError, did_you_mean, require
from effnetlib.recipe import Recipe, check_parameters, typed
from effnetlib.runs.paths import name_or_path, outputs_folder, user_path
from effnetlib.suites.parameters import TRAIN_OPTIONS, read_yaml, train_recipe

TRAIN_NOTEBOOK = "train"
WAYS = (["lr_per_256"], ["peak_lr"])
# For each key, a test of its value, and the words for an error.
FORMS = {
    "name": (lambda name: type(name) in (str, int), "text (put it in quotation marks)"),
    "parameters": (lambda given: isinstance(given, dict), "a mapping"),
    "tuned": (lambda way: isinstance(way, dict) and [*way] in WAYS, "lr_per_256 or peak_lr with the name of a search"),
    "each": (
        lambda each: isinstance(each, dict) and all(isinstance(values, list) and values for values in each.values()),
        "a mapping of parameters to lists of values",
    ),
    "cores": (lambda cores: type(cores) is int and cores > 0, "a number above 0"),
}
KEYS = {"runs": tuple(FORMS), "reports": ("name", "parameters")}


@dataclass(frozen=True, eq=False)
class Entry:
    """One notebook to execute: a name, the notebook without its suffix, and the parameters to change.

    `cores` is its least number of CPU cores while other entries run beside it. None: it has the machine to itself.
    `tuned` names the search that gives a run its learning rate, if any (see `effnetlib.suites.tuning`).
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
        return train_recipe(self.parameters)


@dataclass(frozen=True)
class Suite:
    """A checked suite file. `name` is the file's stem, and `notebooks` is the folder above `suites/`."""

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

    A relative path in the file begins in the working directory. Every run gets the parameters in `changes` (`--set`).
    Raises EffnetlibError, which names the file, the entry and what is wrong.
    """
    path = user_path(path, "the suite")
    try:
        content = read_yaml(path.read_text(), f"the suite {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise EffnetlibError(f"the suite {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        _check_keys(content, KEYS)
        runs, reports = (tuple(_entries(path.stem, kind, content.get(kind) or [], changes or {})) for kind in KEYS)
        suite = Suite(path.stem, path.parent.parent, runs, reports)
        names = [entry.name for entry in (*runs, *reports)]
        for entry in (*runs, *reports):
            require(names.count(entry.name) == 1, f"two entries are named {entry.name!r}")
            _check_entry(suite, entry)
    except EffnetlibError as error:
        raise EffnetlibError(f"in the suite {path}: {error}") from None
    return suite


def report_alone(name: str, notebook: str, **parameters) -> Suite:
    """A suite of one report, from a notebook of this checkout, for existing records.

    `name` is the suite's folder, under outputs/ or absolute. Raises EffnetlibError if this package is in no checkout.
    """
    notebooks = Path(__file__).parents[2] / "notebooks"
    missing = f"this effnetlib has no notebooks beside it ({notebooks}): install it from a checkout"
    require((notebooks / f"{notebook}.ipynb").is_file(), f"{missing}, with pip install --editable .")
    return Suite(name, notebooks, (), (Entry(notebook, notebook, {**parameters, "suite": name}, cores=1),))


def _check_keys(value, allowed) -> None:
    require(isinstance(value, dict), f"a mapping with the keys {', '.join(sorted(allowed))} is wanted, not {value!r}")
    for key in value:
        require(key in allowed, f"there is no key {key!r}: {did_you_mean(key, sorted(allowed))}")


def _entries(suite: str, kind: str, items, changes: Mapping) -> Iterator[Entry]:
    """The entries under `runs` or `reports`: one per item, or one per combination of the values under its `each`."""
    require(isinstance(items, list), f"{kind} must be a list, and is {items!r}")
    for item in items:
        if kind == "reports" and not isinstance(item, dict):
            item = {"name": item}
        _check_keys(item, KEYS[kind])
        require("name" in item, f"an entry lacks the key 'name': {item!r}")
        for key, value in item.items():
            fits, form = FORMS[key]
            require(fits(value), f"{item['name']}: {key} must be {form}, and is {value!r}")
        template, each = str(item["name"]), item.get("each", {})
        for key in each:
            require(f"{{{key}}}" in template, f"the name {template!r} must hold {{{key}}}: each value of it is a run")
        for values in itertools.product(*each.values()):
            chosen, name = dict(zip(each, values, strict=True)), template
            for key, value in chosen.items():
                name = name.replace(f"{{{key}}}", str(value))
            wrong = f"{name!r} cannot name a run: at most 100 letters, digits, - and _ are wanted, and index is taken"
            require(re.fullmatch(r"(?!\.)[\w.-]{1,100}", name) and name != "index", wrong)
            given = {**item.get("parameters", {}), **chosen}
            given = {key: _with_absolute_paths(key, value) for key, value in given.items()}
            if kind == "reports":
                yield Entry(name, name, {**given, "suite": suite}, cores=1)
                continue
            given |= {key: _with_absolute_paths(key, value) for key, value in changes.items()}
            wrong = f"{name}: leave directory out, a suite's runs lie in outputs/{suite}/runs"
            require("directory" not in given, wrong)
            given["directory"] = f"{suite}/runs/{name}"
            yield Entry(name, TRAIN_NOTEBOOK, given, item.get("cores"), item.get("tuned", {}))


def _with_absolute_paths(name: str, value):
    """Makes the paths of a parameter absolute. They begin in the working directory, but kernels run in another."""
    if isinstance(value, list):
        return [_with_absolute_paths(name, item) for item in value]
    if isinstance(value, dict):
        return {key: _with_absolute_paths(key, item) for key, item in value.items()}
    return name_or_path(value, name) if name in ("dataset", "runs") and isinstance(value, str) else value


def _check_entry(suite: Suite, entry: Entry) -> None:
    known = [path.stem for path in suite.notebooks.glob("*.ipynb")]
    missing = f"there are no notebooks in {suite.notebooks}"
    require(known, f"{missing}: a suite file lies in the folder suites/ beside notebooks")
    if entry.notebook not in known:
        raise EffnetlibError(f"there is no notebook {entry.notebook!r}: {did_you_mean(entry.notebook, known)}")
    try:
        if not entry.is_run:
            check_parameters(entry.parameters, papermill.inspect_notebook(str(suite.notebook_path(entry))))
            return
        train_recipe(entry.parameters)
        for name, hint in TRAIN_OPTIONS.items():
            typed(name, entry.parameters.get(name), hint | None)
        for search in entry.tuned.values():
            searches = {run.name.rpartition("-")[0] for run in suite.runs}
            if search not in searches:
                raise EffnetlibError(
                    f"there are no runs named {search}-VALUE: {did_you_mean(search, sorted(searches))}"
                )
            twice = "lr_per_256" in {**entry.parameters, **(entry.parameters.get("settings") or {})}
            require(not twice, f"its learning rate comes from {search}: leave lr_per_256 out")
    except EffnetlibError as error:
        raise EffnetlibError(f"{entry.name}: {error}") from None
