"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import envs
import nclql_torchrl

PACKAGES = (nclql_torchrl, envs)
# The examples of MJX compile a simulation for tens of seconds: tests/envs runs the same calls.
SKIPPED = ("envs.engines.mjx", "envs.batched")


def _ignore_broken_package(name: str) -> None:
    """Lets the walk go on: what cannot be imported is reported by its own test below."""


MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=_ignore_broken_package)
    if not f"{module.name}.".startswith(tuple(f"{name}." for name in SKIPPED))
]


@pytest.mark.parametrize("name", [*(package.__name__ for package in PACKAGES), *MODULES])
def test_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module of our own that is missing is a mistake, not an extra that nobody installed.
        if error.name is None or error.name.split(".")[0] in {package.__name__ for package in PACKAGES}:
            raise
        pytest.skip(f"{name} needs {error.name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", nclql_torchrl.__all__)
def test_public_names_have_an_example(name: str) -> None:
    documented = getattr(nclql_torchrl, name)
    examples = [
        example for found in doctest.DocTestFinder(recurse=False).find(documented, name) for example in found.examples
    ]
    assert examples, f"nclql_torchrl.{name} has no example in its docstring"
