"""The parameters of a notebook, read and checked: papermill injects whatever it is given, and only warns."""

import ast
import re
from collections.abc import Iterable, Mapping

import yaml

from effnetlib.errors import EffnetlibError, did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3, with no point in it, for text; people mean a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str):
    """The value of a YAML text; a mistake in it is a yaml.YAMLError."""
    return yaml.load(text, _Loader)


def check_parameters(parameters: Iterable[str], known: Iterable[str]) -> None:
    """Raises EffnetlibError, naming the nearest, if a parameter is not a known one."""
    known = list(known)
    for name in parameters:
        if name not in known:
            raise EffnetlibError(f"there is no parameter {name!r}: {did_you_mean(name, known)}")


def notebook_parameters(namespace: Mapping, known: Iterable[str]) -> dict:
    """A notebook's known parameters, from its ``globals()``.

    Raises:
      EffnetlibError: its parameters cell, or the one that papermill injected after it, assigns another name. These are the
        run of cells right before the caller's that hold nothing but assignments and imports.
    """
    known = list(known)
    for source in reversed(namespace.get("In", [])[:-1]):
        assigned = _assigned(source)
        if assigned is None:
            break
        check_parameters(assigned, known)
    return {name: namespace[name] for name in known if name in namespace}


def _assigned(source: str) -> list[str] | None:
    """The names that a cell assigns; None if it does anything else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return None
    names = []
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            return None
    return names
