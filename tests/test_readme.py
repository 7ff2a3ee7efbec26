"""The README and the pages of docs/ say what is true."""

from __future__ import annotations

import ast
import csv
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nclql_torchrl.commands.evaluate import EvaluateConfig
from nclql_torchrl.commands.export import ExportConfig
from nclql_torchrl.commands.profile import as_list, as_override
from nclql_torchrl.profiling import ProfileConfig
from nclql_torchrl.profiling.config import validate as validate_profile
from nclql_torchrl.training import TrainConfig, config, validate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
RESULTS_PAGE = (RESULTS / "README.md").read_text()
PAGES = {"README.md": README} | {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def examples(page: str) -> list[str]:
    """A page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: a new one would spend most of its time on importing. A later block may go on from an earlier one.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(examples(page)):
        exec(compile(block, f"{page}, example {number}", "exec"), namespace)
        # Each ends by printing a figure.
        assert re.search(r"-?\d+\.\d+", capsys.readouterr().out), f"{page}, example {number} printed no figure"


def test_there_is_a_library_example() -> None:
    first = examples("README.md")[0]
    assert "NCLQLLoss" in first and first.count("\n") <= 20


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
            # Markdown would take <task> for an HTML tag and hide it.
            meaning = documentation[type(part).__name__, entry.name].replace("<", "&lt;")
            yield f"| `{prefix}{entry.name}` | {text} | {meaning} |"


def test_the_configuration_table_is_complete() -> None:
    expected = list(configuration_rows(TrainConfig()))
    section = README.split("## Configuration")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == expected


def test_files_that_they_name_exist() -> None:
    named = re.findall(r"`((?:nclql_torchrl|envs|benchmarks|tests|examples)/[\w./]*)`", "".join(PAGES.values()))
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def commands(program: str) -> list[list[str]]:
    """Arguments of every call of a program in the shell blocks of all pages."""
    text = "".join([*PAGES.values(), RESULTS_PAGE])
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    calls = [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()]
    return [call[1:] for call in calls if call and call[0] == program]


def test_commands_are_accepted() -> None:
    assert len(commands("nclql-train")) > 3 and commands("nclql-evaluate")
    for arguments in commands("nclql-train"):
        config.check_override_keys(arguments)
        # What only Hydra understands is left out: flags, presets (files), and sweeps over several values.
        options = [text for text in arguments if not re.match(r"-m$|preset=|seed=.*,", text)]
        validate(config.load_config({}, options))
    for arguments in commands("nclql-evaluate"):
        config.check_override_keys(arguments, EvaluateConfig)
    assert commands("nclql-export")
    for arguments in commands("nclql-export"):
        config.check_override_keys(arguments, ExportConfig)
    assert commands("nclql-profile")
    for arguments in commands("nclql-profile"):
        options = [as_list(as_override(text), "-m" in arguments) for text in arguments]
        config.check_override_keys(options, ProfileConfig)
        options = [text for text in options if not re.match(r"-m$|.*\],\[", text)]
        values = OmegaConf.merge(OmegaConf.structured(ProfileConfig), OmegaConf.from_dotlist(options))
        validate_profile(OmegaConf.to_object(values))  # pyright: ignore[reportArgumentType]


def test_presets_and_make_targets_are_all_there_are() -> None:
    section = README.split("| Preset |")[1].split("\n\n")[0]
    presets = {path.stem for path in (ROOT / "nclql_torchrl" / "conf" / "preset").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == presets
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE))
    assert {"train", "test"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def evaluations(run: str) -> dict[int, tuple[float, float]]:
    """Updates -> (mean, standard deviation) of a committed run's evaluations."""
    with (RESULTS / run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["evaluation_return"]]
    return {int(row["updates"]): (float(row["evaluation_return"]), float(row["evaluation_return_std"])) for row in rows}


def test_returns_are_those_of_the_committed_runs() -> None:
    def cells(name: str) -> list[int]:
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", RESULTS_PAGE, re.MULTILINE)
        return [int(cell.replace(",", "")) for cell in row.split(" | ")]

    half_cheetah = evaluations("halfcheetah")
    assert cells("This project") == [round(half_cheetah[updates][0]) for updates in cells("Updates")]
    for updates in (20_000, 25_000):
        mean, deviation = half_cheetah[updates]
        assert re.search(rf"{updates:,} updates \| {mean:,.0f} ± {deviation:.0f} ", README)
    last = [evaluations(f"pendulum/seed{seed}") for seed in cells("Seed")]
    assert cells("5 episodes") == [round(run[max(run)][0]) for run in last]


def test_importing_the_package_imports_no_more_simulators_than_torchrl_does() -> None:
    # TorchRL 0.14 imports mujoco itself where it is installed; so what is asked here is what comes on top.
    source = (
        "import sys, torchrl.objectives; before = set(sys.modules); import nclql_torchrl; "
        "added = set(sys.modules) - before; "
        "print('nclql_torchrl' in added, {'jax', 'mujoco', 'mujoco.mjx', 'gymnasium'} & added, 'jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "set()", "False"], result.stderr


def test_docstrings_become_markdown_on_the_site() -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Reads :class:`~nclql_torchrl.LangevinActor` by :meth:`act`, as ``this``::\n\n    code"
    assert module.to_markdown(text) == "Reads `LangevinActor` by `act`, as ``this``:\n\n    code"
    table = "Choices.\n\n===  ===\na    one\nb    two\n===  ==="
    assert module.to_markdown(table) == "Choices.\n\n```text\n===  ===\na    one\nb    two\n===  ===\n```"
