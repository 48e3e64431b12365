"""Check that every notebooks/NAME.py and its executed NAME.ipynb are one notebook.

    python notebooks/tools/pairs.py

Complains, and exits with 1, if NAME.ipynb is missing, if their cells disagree, if a cell was not executed or
ended in an error, or if NAME.py has no cell tagged `parameters`; and if a NAME.ipynb has no source.
"""

import sys
from itertools import zip_longest
from pathlib import Path

import jupytext
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1]


def contents(cells: list[nbformat.NotebookNode]) -> list[tuple[str, str, list[str]]]:
    """What has to be the same on both sides: kind, source and tags of each cell."""
    return [(cell.cell_type, cell.source.strip(), sorted(cell.metadata.get("tags", []))) for cell in cells]


def problems(source: Path) -> list[str]:
    """What is wrong with one pair, given its NAME.py; one line each."""
    found = []
    cells = contents(jupytext.read(source).cells)
    if not any("parameters" in tags for _, _, tags in cells):
        found.append(f'{source.name}: no cell is tagged: # %% tags=["parameters"]')
    pair = source.with_suffix(".ipynb")
    if not pair.exists():
        return [*found, f"{pair.name}: missing; make notebooks/{pair.name} writes it"]
    executed = nbformat.read(pair, as_version=4).cells
    for index, (left, right) in enumerate(zip_longest(cells, contents(executed))):
        if left != right:
            here, there = ((cell or ("", "", []))[1].split("\n") for cell in (left, right))
            lines = zip_longest(here, there, fillvalue="(nothing)")
            line, other = next((both for both in lines if both[0] != both[1]), ("another kind or tag",) * 2)
            found.append(f"cell {index} has {line!r} in {source.name}, {other!r} in {pair.name}")
            break
    for index, cell in enumerate(executed):
        if cell.cell_type == "code" and cell.source.strip():
            if cell.execution_count is None:
                found.append(f"{pair.name}: cell {index} was not executed")
            elif any(output.output_type == "error" for output in cell.outputs):
                found.append(f"{pair.name}: cell {index} ended in an error")
    return found


def check(folder: Path) -> list[str]:
    """What is wrong with the pairs of a folder."""
    found = [problem for source in sorted(folder.glob("*.py")) for problem in problems(source)]
    orphans = (pair for pair in sorted(folder.glob("*.ipynb")) if not pair.with_suffix(".py").exists())
    return found + [f"{pair.name}: has no source {pair.with_suffix('.py').name}" for pair in orphans]


if __name__ == "__main__":
    complaints = check(NOTEBOOKS)
    print("\n".join(complaints) or f"{len(list(NOTEBOOKS.glob('*.py')))} pairs agree")
    sys.exit(bool(complaints))
