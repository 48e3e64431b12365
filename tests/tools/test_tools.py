"""The scripts behind the Makefile: executing, scrubbing, pairing and verifying."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pairs
import pytest
from execute import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from scrub import displayed, scrub
from tqdm import tqdm
from verify import compare, read

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
    told = [line for line in first.stderr.splitlines() if "KeyboardInterrupt caught in kernel" not in line]
    assert told == []  # a kernel that is slow to end may say how it was ended
    assert re.fullmatch(r"toy: executing\ntoy: executed in \d+\.\d minutes \(not executed here yet\)\n", first.stdout)
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
    found = compare(old, new)
    assert (found.failures, found.warnings, found.within) == ([], [], 0)
    new |= {"fit_seconds": 9.0, "versions": {"torch": "3", "numpy": "2"}, "tiny": 1e-7}
    new["score"] = {"mean": 0.504, "by_seed": [1.0, 2.03]}
    found = compare(old, new)
    assert (found.failures, found.warnings, found.within) == ([], ["score.by_seed[1]: 2.0, now 2.03"], 2)
    assert compare(old, new, rtol=0.02).warnings == []
    assert len(compare(old, new, rtol=0.02, exact=True).warnings) == 3
    new["score"] = {"by_seed": [1.0]}
    new |= {"name": "b", "bad": 0.0, "extra": True}
    found = compare(old, new)
    assert found.failures == ["score.mean: 0.5, now missing"]
    assert found.warnings == [
        "score.by_seed: 2 entries, now 1",
        "name: 'a', now 'b'",
        "bad: nan, now 0.0",
        "extra: new, True",
    ]


def test_results_that_are_named_by_what_they_chose_may_choose_otherwise_on_another_processor():
    old = {"shown": {"top": {"unit": 1}, "left": {"unit": 2}}, "kept": {"a": 1.0, "b": 2.0}}
    new = {"shown": {"top": {"unit": 1}, "right": {"unit": 5}}, "kept": {"a": 1.0}}
    found = compare(old, new)
    assert found.warnings == ["shown: ['left'], now ['right']"]
    assert found.failures == ["kept.b: 2.0, now missing"]  # nothing stands in its place
    assert "shown.left.unit: 2, now missing" in compare(old, new, exact=True).failures


def test_verify_allows_what_the_spread_beside_a_number_allows() -> None:
    old = {"a": {"mean": 1.0, "sd": 0.2, "min": 0.8, "values": [0.8, 1.2], "other": 1.0}, "b": 1.0, "b_std": 0.3}
    new = {"a": {"mean": 1.19, "sd": 0.1, "min": 0.7, "values": [0.7, 1.5], "other": 1.1}, "b": 1.29, "b_std": 0.3}
    found = compare(old, new)
    assert found.warnings == ["a.values[1]: 1.2, now 1.5", "a.other: 1.0, now 1.1"]
    assert found.within == 5
    assert compare({"mean": 5.0, "sd": 0.0}, {"mean": 4.0, "sd": 0.0}).warnings == ["mean: 5.0, now 4.0"]


def test_verify_reads_tables() -> None:
    old = read('setting,score,step seconds\nplain,0.5,1\n"a, b",,2\n', "toy_table.csv")
    assert old == [
        {"setting": "plain", "score": 0.5, "step seconds": 1.0},
        {"setting": "a, b", "score": "", "step seconds": 2.0},
    ]
    new = read('setting,score,step seconds\nplain,0.51,9\n"a, b",,9\n', "toy_table.csv")
    assert compare(old, new).warnings == ["[0].score: 0.5, now 0.51"]
    assert isinstance(old, list) and isinstance(new, list)
    assert compare(old, new[:1], rtol=0.1).warnings == [": 2 entries, now 1"]
    assert compare(old[:1], new, rtol=0.1).warnings == [": 1 entries, now 2"]  # told once, not entry by entry
    assert compare(old[:1], new, rtol=0.01).warnings == [": 1 entries, now 2", "[0].score: 0.5, now 0.51"]


TOY = {"settings": {}, "results": {"score": {"mean": 0.5, "sd": 0.1}, "values": list(range(1, 31)), "text": "a"}}
CLAIM = {"name": "more", "statement": "it is more", "quantity": 3.0, "comparison": ">", "bound": 2.0, "spread": 0.5,
         "verdict": True, "margin": 2.0}  # fmt: skip
VERSIONS = {"torch": "2", "processor": "a processor", "kernels": {"torch": "AVX2"}}


def put(repository: Path, toy: dict[str, Any], claim: dict[str, Any] = CLAIM) -> None:
    (repository / "figures").mkdir(exist_ok=True)
    (repository / "figures" / "toy.json").write_text(json.dumps(toy))
    (repository / "figures" / "toy_claims.json").write_text(json.dumps([claim]))


def scored(mean: float, **more: Any) -> dict[str, Any]:
    return {**TOY, "results": {**TOY["results"], "score": {"mean": mean, "sd": 0.1}}, **more}


@pytest.fixture
def committed(repository: Path) -> Path:
    """A repository with a paper of one claim, and its results, committed."""
    (repository / "paper").mkdir()
    (repository / "paper" / "results.typ").write_text((ROOT / "paper" / "results.typ").read_text())
    text = '#import "results.typ": *\n#claim((val("toy", "score.mean"), ">", 0.45), "scores are high")\nText.\n'
    (repository / "paper" / "main.typ").write_text(text)
    put(repository, {**TOY, "versions": VERSIONS})
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "results"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    return repository


def verify(repository: Path) -> tuple[int, str]:
    command = [sys.executable, repository / "notebooks" / "tools" / "verify.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_verify_of_the_same_results(committed: Path) -> None:
    code, said = verify(committed)
    assert code == 0 and "warning" not in said and "FAILURE" not in said
    assert "the paper's claims: 1, of which 1 hold" in said and "the recorded one" in said
    assert re.search(r"everything else: \d+ entries are the same bit for bit\n$", said)


def test_verify_fails_if_a_claims_verdict_changed_and_not_if_a_number_moved(committed: Path) -> None:
    put(committed, scored(0.48, versions=VERSIONS))
    code, said = verify(committed)
    assert code == 0 and "warning toy.json: results.score.mean: 0.5, now 0.48" in said  # the same kind of processor
    put(committed, scored(0.48, versions={**VERSIONS, "kernels": {"torch": "AVX512"}}))
    code, said = verify(committed)
    assert code == 0 and "warning" not in said and "kind of processor: another" in said
    assert "everything else: 1 moved within their spreads or tolerances" in said
    put(committed, scored(0.48))
    assert "kind of processor: not known" in verify(committed)[1]
    put(committed, scored(0.44))
    code, said = verify(committed)
    assert code == 1 and "FAILURE claim held (0.5 > 0.45), now fails (0.44 > 0.45): scores are high" in said
    put(committed, TOY, {**CLAIM, "quantity": 1.0, "verdict": False})
    code, said = verify(committed)
    assert code == 1 and "FAILURE toy_claims.json: claim held (3.0 > 2.0), now fails (1.0 > 2.0): more" in said


def test_verify_warns_if_a_claim_that_was_near_its_bound_changed(committed: Path) -> None:
    put(committed, TOY, {**CLAIM, "quantity": 2.1, "close": True})
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *identity, "commit", "-qam", "nearer"], cwd=committed, check=True)
    put(committed, TOY, {**CLAIM, "quantity": 1.9, "verdict": False, "close": True})
    code, said = verify(committed)
    assert code == 0 and "warning toy_claims.json: claim held (2.1 > 2.0, near its bound), now fails" in said


def test_verify_fails_if_a_key_or_a_file_is_gone(committed: Path) -> None:
    put(committed, {**TOY, "results": {"text": "a", "values": TOY["results"]["values"]}})
    code, said = verify(committed)
    assert code == 1 and "FAILURE toy.json: results.score.mean: 0.5, now missing" in said
    assert "FAILURE the paper cannot be built from the new results" in said
    put(committed, TOY)
    (committed / "figures" / "toy_claims.json").unlink()
    code, said = verify(committed)
    assert code == 1 and "FAILURE toy_claims.json: missing" in said


def test_verify_shows_twenty_warnings_and_counts_the_rest(committed: Path) -> None:
    put(committed, {**TOY, "results": {**TOY["results"], "values": list(range(101, 131)), "text": "b"}})
    code, said = verify(committed)
    assert code == 0 and said.count("warning toy.json") == 20 and "warning … and 11 more" in said
