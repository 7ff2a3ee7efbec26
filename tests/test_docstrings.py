"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import envs
import nclql_torchrl

# The examples of MJX compile a simulation for tens of seconds: tests/envs runs the same calls.
SKIPPED = ("envs.engines.mjx", "envs.batched")
MODULES = [
    module.name
    for package in (nclql_torchrl, envs)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if module.name not in SKIPPED
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", nclql_torchrl.__all__)
def test_public_names_have_an_example(name: str) -> None:
    documentation = getattr(nclql_torchrl, name).__doc__
    assert documentation and ">>> " in documentation
