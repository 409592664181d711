"""A suite: which notebooks to execute with which parameters, read from a YAML file and checked before anything runs.

The file::

    runs:                                   # each trains; skipped when its record is completed
      - name: rmsprop-64                    # the folder outputs/SUITE/runs/rmsprop-64
        parameters: {preset: digits-64-rmsprop}
      - name: lars-64-{seed}              # several runs: one for each value, or combination of values
        parameters: {preset: digits-64-lars}
        tuned: {lr_per_256: search-lars-64} # with the rate of the best run named search-lars-64-RATE; or peak_lr: with its peak
        each: {seed: [0, 1, 2]}
    reports:                                # notebooks that read the records of the suite; executed after the runs
      - 00_overview
      - name: 06_precision                  # a report may have parameters too
        parameters: {runs: [in-float32, in-bfloat16]}

Every run executes `train.ipynb`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import papermill
import yaml

from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.recipe import Recipe
from effnetlib.runs.paths import name_or_path, outputs_folder, user_path
from effnetlib.suites.parameters import check_parameters, read_yaml

TRAIN_NOTEBOOK = "train"


@dataclass(frozen=True, eq=False)
class Entry:
    """One notebook to execute: a name, the notebook without its suffix, the parameters that differ, and for a run the search
    that its learning rate comes from, if any (see `effnetlib.suites.tuning`)."""

    name: str
    notebook: str
    parameters: Mapping
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
    except UnicodeDecodeError:
        raise EffnetlibError(f"the suite {path} is not a text file") from None
    except OSError as error:
        raise EffnetlibError(f"the suite {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise EffnetlibError(f"the suite {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        _require_keys(content, {"runs", "reports"}, set())
        notebooks = path.parent.parent
        runs = tuple(
            _run_entry(path.stem, run, changes or {}) for item in _items(content, "runs") for run in _each(item)
        )
        reports = tuple(_report_entry(path.stem, report) for report in _items(content, "reports"))
        suite = Suite(path.stem, notebooks, runs, reports)
        names = [entry.name for entry in (*runs, *reports)]
        for name in names:
            if names.count(name) > 1:
                raise EffnetlibError(f"two entries are named {name!r}")
        for entry in (*runs, *reports):
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
    if not (notebooks / f"{notebook}.ipynb").is_file():
        raise EffnetlibError(
            f"this effnetlib has no notebooks beside it ({notebooks}): install it from a checkout, with pip install --editable ."
        )
    return Suite(name, notebooks, (), (Entry(notebook, notebook, {**parameters, "suite": name}),))


def _items(content: Mapping, key: str) -> list:
    items = content.get(key) or []
    if not isinstance(items, list):
        raise EffnetlibError(f"{key} must be a list, and is {items!r}")
    return items


def _named(item) -> tuple[str, dict]:
    _require_keys(item, {"name", "parameters"}, {"name"})
    name, parameters = str(item["name"]), item.get("parameters") or {}
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or name == "index":
        raise EffnetlibError(f"{name!r} cannot name a run: letters, digits, - and _ are wanted, and index is taken")
    if not isinstance(parameters, dict):
        raise EffnetlibError(f"the parameters of {name} must be a mapping, and are {parameters!r}")
    return name, parameters


def _each(item) -> Iterator[dict]:
    """The runs that an item stands for: itself, or one for each combination of the values under `each`."""
    if not isinstance(item, dict) or "each" not in item:
        yield item
        return
    item = dict(item)
    each, parameters = item.pop("each"), item.get("parameters") or {}
    if not isinstance(each, dict) or not all(isinstance(values, list) and values for values in each.values()):
        raise EffnetlibError(f"each must map parameters to lists of values, and is {each!r}")
    for name in each:
        if f"{{{name}}}" not in str(item.get("name")):
            raise EffnetlibError(f"the name {item.get('name')!r} must hold {{{name}}}, for each value of it is a run")
    for values in itertools.product(*each.values()):
        chosen = dict(zip(each, values, strict=True))
        name = item["name"]
        for key, value in chosen.items():
            name = name.replace(f"{{{key}}}", str(value))
        yield item | {"name": name, "parameters": {**parameters, **chosen}}


def _run_entry(suite: str, run, changes: Mapping) -> Entry:
    run = dict(run) if isinstance(run, dict) else run
    tuned = run.pop("tuned", {}) if isinstance(run, dict) else {}
    name, parameters = _named(run)
    parameters = {key: _from_here(key, value) for key, value in {**parameters, **changes}.items()}
    if "directory" in parameters:
        raise EffnetlibError(f"{name}: leave directory out, a suite's runs lie in outputs/{suite}/runs")
    return Entry(name, TRAIN_NOTEBOOK, {**parameters, "directory": f"{suite}/runs/{name}"}, tuned)


def _report_entry(suite: str, report) -> Entry:
    name, parameters = _named(report if isinstance(report, dict) else {"name": report})
    parameters = {key: _from_here(key, value) for key, value in parameters.items()}
    return Entry(name, name, {**parameters, "suite": suite})


def _from_here(name: str, value):
    """A parameter with its paths made absolute: a relative one begins where the command runs, and a kernel runs elsewhere."""
    if isinstance(value, list):
        return [_from_here(name, each) for each in value]
    return name_or_path(value, name) if name in ("dataset", "runs") and isinstance(value, str) else value


def _require_keys(value, allowed: set[str], needed: set[str]) -> None:
    if not isinstance(value, dict):
        raise EffnetlibError(f"a mapping with the keys {', '.join(sorted(allowed))} is wanted, not {value!r}")
    for key in value:
        if key not in allowed:
            raise EffnetlibError(f"there is no key {key!r}: {did_you_mean(key, sorted(allowed))}")
    for key in needed - set(value):
        raise EffnetlibError(f"an entry lacks the key {key!r}: {value!r}")


def _check_entry(suite: Suite, entry: Entry) -> None:
    source = suite.notebook_path(entry)
    if not source.is_file():
        known = [path.stem for path in suite.notebooks.glob("*.ipynb")]
        raise EffnetlibError(f"there is no notebook {entry.notebook!r}: {did_you_mean(entry.notebook, known)}")
    try:
        if entry.is_run:
            Recipe.from_parameters(entry.parameters)
            _check_tuned(suite, entry)
        else:
            check_parameters(entry.parameters, papermill.inspect_notebook(str(source)))
    except EffnetlibError as error:
        raise EffnetlibError(f"{entry.name}: {error}") from None


def _check_tuned(suite: Suite, entry: Entry) -> None:
    if not entry.tuned:
        return
    ways, searches = ("lr_per_256", "peak_lr"), {run.name.rpartition("-")[0] for run in suite.runs}
    if not isinstance(entry.tuned, dict) or len(entry.tuned) != 1 or not set(entry.tuned) <= set(ways):
        raise EffnetlibError(f"tuned must map one of {', '.join(ways)} to a search, and is {entry.tuned!r}")
    (search,) = entry.tuned.values()
    if search not in searches:
        raise EffnetlibError(f"there are no runs named {search}-VALUE: {did_you_mean(str(search), sorted(searches))}")
    if "lr_per_256" in entry.parameters:
        raise EffnetlibError(f"its learning rate comes from {search}: leave lr_per_256 out")
