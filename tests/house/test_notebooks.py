"""The notebooks: cells that a reader takes in at a glance, and claims shown in one way."""

import io
import tokenize
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))
LINES = 25  # of code in a cell, at most
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines of a cell that hold code: neither blank nor a comment alone."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept = (token for token in tokens if token.type not in SILENT)
    return len({line for token in kept for line in range(token.start[0], token.end[0] + 1)})


def test_lines_of_code_are_counted() -> None:
    assert code_lines('# a comment\nx = [1,\n     2]  # two lines\n\n\ndef f():\n    """Three\n    more."""\n') == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_is_longer_than_a_glance(path: Path) -> None:
    cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    long = {source.splitlines()[0]: code_lines(source) for source in cells if code_lines(source) > LINES}
    assert long == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_claimed_is_shown_in_one_way(path: Path) -> None:
    text = path.read_text()
    assert ("report.claim(" in text) == ("report.verdicts()" in text)
