"""The scripts behind the Makefile: executing, scrubbing, pairing and verifying."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pairs
import pytest
from execute import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from scrub import displayed, scrub
from tqdm import tqdm
from verify import moved, read

SOURCE = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A notebook

# %% tags=["parameters"]
count = 3

# %%
import os
import sys

folder = os.environ["EIGENDECOMP_FIGURES"]
with open(folder + "/toy.json", "w") as file:
    file.write('{"count": %d}' % count)
print(os.getcwd(), folder)
print("a warning", file=sys.stderr)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one notebook and the real tools."""
    tools = tmp_path / "notebooks" / "tools"
    tools.mkdir(parents=True)
    for tool in (ROOT / "notebooks" / "tools").glob("*.py"):
        (tools / tool.name).write_text(tool.read_text())
    (tmp_path / "notebooks" / "toy.py").write_text(SOURCE)
    (tmp_path / "eigendecomp").mkdir()
    (tmp_path / "eigendecomp" / "core.py").write_text("")
    return tmp_path


def execute(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / "notebooks" / "tools" / "execute.py", "toy", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_executes_once_and_leaves_nothing_when_it_fails(repository: Path) -> None:
    source, pair = repository / "notebooks" / "toy.py", repository / "notebooks" / "toy.ipynb"
    first = execute(repository)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert re.fullmatch(r"toy: executed in \d+\.\d minutes \(not executed here yet\)\n", first.stdout)
    assert json.loads((repository / "figures" / "toy.json").read_text()) == {"count": 3}
    assert pairs.problems(source) == []
    assert str(repository) not in pair.read_text()
    assert nbformat.read(pair, 4).cells[2].outputs[0].text == "notebooks figures\n"
    assert execute(repository).stdout == "toy: up to date\n"

    (repository / "figures" / "toy.json").write_text("touched")
    (repository / "eigendecomp" / "core.py").write_text("changed = True")
    source.write_text(SOURCE.replace("count)", "count)\n    raise KeyError('planted')"))
    before = pair.read_bytes()
    second = execute(repository)
    assert second.returncode == 1
    assert "eigendecomp/core.py and 2 more" in second.stdout
    assert "planted" in second.stderr and "build/toy.failed.ipynb" in second.stderr
    assert pair.read_bytes() == before
    assert (repository / "figures" / "toy.json").read_text() == "touched"
    assert "planted" in (repository / "build" / "toy.failed.ipynb").read_text()


def executed(seconds: str, address: str) -> nbformat.NotebookNode:
    """A notebook as two runs on two machines would leave it."""
    bar = f"\rfit:   0%| | 0/9 [00:00<?, ?it/s]\rfit: 100%|█| 9/9 [00:0{seconds}<00:00, 4.{seconds}it/s]\n"
    outputs = [new_output("stream", name="stderr", text=bar), new_output("stream", name="stdout", text="1\n")]
    outputs = outputs if seconds < "5" else outputs[::-1]
    warning = f"/var/ipykernel_{seconds}/12{seconds}.py:3: UserWarning\n"
    outputs += [
        new_output("display_data", {"text/plain": f"<object at {address}>"}),
        new_output("stream", name="stderr", text=f"/srv/{seconds}/repository/x.py {warning}"),
    ]
    cells = [
        new_code_cell("n = 1", metadata={"tags": ["parameters"], "papermill": {"duration": seconds}}),
        new_code_cell("n", execution_count=2, outputs=outputs, metadata={"tags": []}),
        new_markdown_cell("same"),
        new_markdown_cell("same"),
    ]
    metadata = {"papermill": {"start_time": seconds}, "widgets": {seconds: {}}}
    return new_notebook(cells=cells, metadata=metadata)


def test_scrub_leaves_what_the_code_determines() -> None:
    one, other = (
        scrub(executed(seconds, address), {f"/srv/{seconds}/repository/": ""})
        for seconds, address in (("3", "0x7f00aa11"), ("8", "0x7f33bb22"))
    )
    assert nbformat.writes(one) == nbformat.writes(other)
    assert one.cells[0].metadata.tags == ["parameters"]
    assert len({cell.id for cell in one.cells}) == 4
    texts = [output.get("text") or output.data["text/plain"] for output in one.cells[1].outputs]
    assert texts == ["1\n", "fit: 100%|█| 9/9\n", "<object at 0x…>", "x.py <cell>:3: UserWarning\n"]
    nbformat.validate(one)


def test_nested_progress_bars_end_as_one_line_each() -> None:
    stream = io.StringIO()
    for _ in tqdm(range(3), desc="outer", file=stream, mininterval=0, ascii=False):
        for _ in tqdm(range(4), desc="inner", file=stream, mininterval=0, leave=False):
            pass
    tqdm.write("done", file=stream)
    assert displayed(stream.getvalue()).split("\n") == ["outer: 100%|██████████| 3/3", "done", ""]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """The .py of a pair that agrees."""
    source = tmp_path / "toy.py"
    source.write_text(SOURCE)
    notebook = jupytext.read(source)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return source


def test_pairs_that_agree(pair: Path) -> None:
    assert pairs.check(pair.parent) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("count = 3", "count = 4", "cell 1 has 'count = 4' in toy.py, 'count = 3' in toy.ipynb"),
        ("# # A notebook", "# # Another", "cell 0 has '# Another' in toy.py, '# A notebook' in toy.ipynb"),
        ("import sys\n", "", "cell 2 has '' in toy.py, 'import sys' in toy.ipynb"),
        ("# %%\nimport", "# %% [markdown]\n# end\n# %%\nimport", "cell 2 has 'end' in toy.py, 'import os'"),
        ("file=sys.stderr)\n", "file=sys.stderr)\n\n# %%\n1\n", "cell 3 has '1' in toy.py, '' in toy.ipynb"),
        (' tags=["parameters"]', "", "no cell is tagged"),
    ],
)
def test_pairs_that_disagree(pair: Path, old: str, new: str, complaint: str) -> None:
    pair.write_text(SOURCE.replace(old, new))
    assert complaint in "\n".join(pairs.check(pair.parent))


def test_pairs_of_which_one_is_missing_or_not_executed(pair: Path) -> None:
    notebook = pair.with_suffix(".ipynb")
    cells = nbformat.read(notebook, 4)
    cells.cells[1].execution_count = None
    nbformat.write(cells, notebook)
    assert pairs.check(pair.parent) == ["toy.ipynb: cell 1 was not executed"]
    notebook.rename(pair.with_name("lone.ipynb"))
    assert pairs.check(pair.parent) == [
        "toy.ipynb: missing; make notebooks/toy.ipynb writes it",
        "lone.ipynb: has no source lone.py",
    ]


def test_verify_finds_what_moved_and_passes_over_the_run() -> None:
    old = {
        "score": {"mean": 0.5, "by_seed": [1.0, 2.0]},
        "tiny": 0.0,
        "none": None,
        "name": "a",
        "bad": float("nan"),
        "fit_seconds": 1.0,
        "versions": {"torch": "2"},
    }
    new = json.loads(json.dumps(old))
    assert moved(old, new) == []
    new |= {"fit_seconds": 9.0, "versions": {"torch": "3", "numpy": "2"}, "tiny": 1e-7}
    new["score"] = {"mean": 0.504, "by_seed": [1.0, 2.03]}
    assert moved(old, new) == ["score.by_seed[1]: 2.0, now 2.03"]
    assert moved(old, new, rtol=0.02) == []
    new["score"] = {"mean": 0.5, "by_seed": [1.0]}
    new |= {"name": "b", "bad": 0.0, "extra": True}
    assert moved(old, new) == [
        "score.by_seed[1]: 2.0, now missing",
        "extra: new, True",
        "name: 'a', now 'b'",
        "bad: nan, now 0.0",
    ]


def test_verify_reads_tables() -> None:
    old = read('setting,score,step seconds\nplain,0.5,1\n"a, b",,2\n', "toy_table.csv")
    assert old == [
        {"setting": "plain", "score": 0.5, "step seconds": 1.0},
        {"setting": "a, b", "score": "", "step seconds": 2.0},
    ]
    new = read('setting,score,step seconds\nplain,0.51,9\n"a, b",,9\n', "toy_table.csv")
    assert moved(old, new) == ["[0].score: 0.5, now 0.51"]
    assert moved(old, new[:1] if isinstance(new, list) else new, rtol=0.1) == [
        "[1].setting: 'a, b', now missing",
        "[1].score: '', now missing",
    ]
