"""The parameters of a notebook, read and checked: papermill injects whatever it is given, and only warns."""

import re
from collections.abc import Iterable, Mapping

import yaml

from effnetlib.errors import EffnetlibError, did_you_mean

# What train.ipynb takes beside the preset and the fields of the recipe.
TRAIN_OPTIONS = ("directory", "simulated_devices", "eval_devices")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3, with no point in it, for text; people mean a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str):
    """The value of a YAML text; a mistake in it is a yaml.YAMLError."""
    return yaml.load(text, _Loader)


def notebook_parameters(namespace: Mapping) -> dict:
    """The plain values among a notebook's ``globals()``, right after its parameters cell."""
    plain = (str, int, float, bool, type(None), list)
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in ("In", "Out") and isinstance(value, plain)
    }


def check_parameters(parameters: Iterable[str], known: Iterable[str]) -> None:
    """Raises EffnetlibError, naming the nearest, if a parameter is not a known one."""
    known = list(known)
    for name in parameters:
        if name not in known:
            raise EffnetlibError(f"there is no parameter {name!r}: {did_you_mean(name, known)}")
