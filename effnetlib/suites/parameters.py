"""Reads and checks the parameters of a notebook. Papermill injects any parameter, and only warns of unknown ones."""

import ast
import dataclasses
from collections.abc import Iterable, Mapping

from ruamel.yaml import YAML, YAMLError

from effnetlib.errors import EffnetlibError, require
from effnetlib.recipe import HINTS, Recipe, accepted, check_parameters, typed

INJECTED = "# Parameters\n"

# The parameters of train.ipynb: a preset, options outside the recipe, and every setting.
TRAIN_OPTIONS = dict(directory=str, settings=dict, simulated_devices=int, eval_devices=int, max_minutes=float)
TRAIN_PARAMETERS = ("preset", *TRAIN_OPTIONS, *HINTS)


def read_yaml(text: str, what: str):
    """The value of a YAML 1.2 text. EffnetlibError, which names `what`: it is not YAML, or a key is given twice."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        reason = " ".join(str(error).partition("To suppress this check")[0].split())
        raise EffnetlibError(f"{what} is not YAML: {reason}") from None


def assignments(texts: Iterable[str]) -> dict:
    """The values that `--set` gives, by name: ``["seed=3"]`` is ``{"seed": 3}``."""
    found = {}
    for text in texts:
        key, separator, value = text.partition("=")
        require(separator, f"--set wants KEY=VALUE, not {text!r}")
        found[key] = read_yaml(value, f"--set {text}")
    return found


def notebook_parameters(namespace: Mapping, known: Iterable[str]) -> dict:
    """Reads a notebook's parameters from its ``globals()``.

    They are the known names that a cell annotated with a type, as the parameters cell does, or that the last cell under
    papermill's heading assigned. All other variables belong to the user.

    Raises:
      EffnetlibError: papermill assigned an unknown name, or a value does not have the type of its annotation.
    """
    known, hints = list(known), namespace.get("__annotations__", {})
    injected = next((cell for cell in reversed(namespace.get("In", ())) if cell.startswith(INJECTED)), "")
    names = [node for node in ast.walk(ast.parse(injected)) if isinstance(node, ast.Name)]
    assigned = [node.id for node in names if isinstance(node.ctx, ast.Store)]
    check_parameters(assigned, known)
    found = {name: namespace[name] for name in known if name in namespace and name in {*hints, *assigned}}
    return {name: typed(name, value, hints[name]) if name in hints else value for name, value in found.items()}


def train_recipe(parameters: Mapping) -> Recipe:
    """Makes the recipe from train.ipynb's parameters: `preset`, changed by every setting that is not None.

    A setting is given by its name, or in the mapping `settings`. Raises EffnetlibError: a name is unknown or given twice.
    """
    check_parameters(parameters, TRAIN_PARAMETERS)
    require(parameters.get("preset"), "the parameter 'preset' is missing")
    settings = parameters.get("settings") or {}
    names = isinstance(settings, Mapping) and all(isinstance(name, str) for name in settings)
    require(names, f"settings must map the names of settings to values, and is {settings!r}")
    changes = {name: parameters[name] for name in HINTS if parameters.get(name) is not None}
    twice = [name for name in changes if name in settings]
    require(not twice, f"{', '.join(twice)} is given twice, as a parameter and in settings")
    return Recipe.preset(parameters["preset"]).replace(**changes, **settings)


def settings_table():
    """A table of every setting of a recipe, for a notebook: default, meaning with unit, and accepted values."""
    import pandas as pd

    rows = [
        {"setting": field.name, "default": field.default, "meaning": field.metadata["help"],
         "accepted": accepted(field) or HINTS[field.name].__name__}
        for field in dataclasses.fields(Recipe)
    ]  # fmt: skip
    return pd.DataFrame(rows).set_index("setting").style.set_properties(**{"text-align": "left"})
