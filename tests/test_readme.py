"""The README says what is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from nclql_torchrl.training import TrainConfig, config

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES)
def test_examples_run(source: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_there_is_a_library_example() -> None:
    assert EXAMPLES and "NCLQLLoss" in EXAMPLES[0] and EXAMPLES[0].count("\n") <= 20


def attribute_docstrings() -> dict[tuple[str, str], str]:
    """(class, attribute) -> the docstring under it."""
    found = {}
    for node in ast.parse(Path(config.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            for attribute, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(attribute, ast.AnnAssign) and isinstance(following, ast.Expr):
                    assert isinstance(attribute.target, ast.Name) and isinstance(following.value, ast.Constant)
                    found[node.name, attribute.target.id] = str(following.value.value)
    return found


def configuration_rows(part: object, prefix: str = "") -> Iterator[str]:
    """Lines of the README's table, one for each configuration key."""
    documentation = attribute_docstrings()
    for entry in fields(part):  # pyright: ignore[reportArgumentType]
        value = getattr(part, entry.name)
        if is_dataclass(value):
            yield from configuration_rows(value, f"{prefix}{entry.name}.")
        else:
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            yield f"| `{prefix}{entry.name}` | {text} | {documentation[type(part).__name__, entry.name]} |"


def test_the_configuration_table_is_complete() -> None:
    expected = list(configuration_rows(TrainConfig()))
    section = README.split("## Configuration")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == expected


def test_files_that_it_names_exist() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:nclql_torchrl|envs|benchmarks|tests)/[\w./]*)`", README)
    assert len(named) > 5
    assert [name for name in named if not (root / name).exists()] == []


def test_importing_the_package_imports_no_more_simulators_than_torchrl_does() -> None:
    # TorchRL 0.14 imports mujoco itself where it is installed.
    source = "import sys, {}; print([name for name in ('jax', 'mujoco', 'mujoco.mjx') if name in sys.modules])"
    printed = [
        subprocess.run(
            [sys.executable, "-c", source.format(package)], capture_output=True, text=True, check=True
        ).stdout
        for package in ("torchrl.objectives", "nclql_torchrl")
    ]
    assert "jax" not in printed[1] and printed[0] == printed[1]
