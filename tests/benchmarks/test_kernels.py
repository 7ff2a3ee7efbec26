"""The benchmark of the kernels runs, and what it measured is what its page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kernels

ROOT = Path(__file__).parents[2]


def test_it_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NUM_CHAINS", 200)
    monkeypatch.setattr(kernels, "STEPS_PER_LEVEL", (2,))
    results = kernels.measure_all()
    assert len(results["rows"]) == len(kernels.TARGETS) * len(kernels.SETTINGS)
    assert all(0 <= row["total_variation"] <= 1 for row in results["rows"])
    kernels.draw(results, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_the_page_quotes_the_committed_figures() -> None:
    results = json.loads((kernels.RESULTS / "kernels.json").read_text())
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    for label in kernels.SETTINGS:
        cells = []
        for target in kernels.TARGETS:
            rows = [row for row in results["rows"] if (row["target"], row["setting"]) == (target, label)]
            chosen = {row["steps_per_level"]: row for row in rows}
            cells += [f"{chosen[steps]['total_variation']:.2f}" for steps in (2, 20)]
        assert f"| {label} | {' | '.join(cells)} |" in page
