"""Pages that live elsewhere in the repository: the results with their figures, and the changelog."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them under the names that their own links have: nothing is copied into docs/."""
    shown = {f"results/{path.relative_to(RESULTS)}": path for path in sorted(RESULTS.rglob("*.png"))}
    shown |= {f"results/{path.relative_to(RESULTS)}": path for path in RESULTS.rglob("README.md")}
    shown["changelog.md"] = ROOT / "CHANGELOG.md"
    for name, path in shown.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
