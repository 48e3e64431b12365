"""The house: its floors, what an evening's reading weighs, what it is light of, and the README, which is executed."""

import ast
import contextlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.support.extras import need

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eigendecomp"
README = (ROOT / "README.md").read_text()
EVENING = {
    "divergence", "reference", "sparsity", "directions", "target", "gradients", "objective", "settings", "batches",
    "start", "fit", "storage", "curvature", "decomposition", "direct",
}  # fmt: skip
LINES = 2155  # of the evening's reading with the door, at most; lower both when lines have gone, raise them never
WHOLE = 12_875  # of the whole package


def modules() -> dict[str, ast.Module]:
    """Every module's syntax tree, by its name inside the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def definitions(tree: ast.AST, inside: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every function and class by its dotted name, with the statement that defines it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield f"{inside}.{node.name}", node
            yield from definitions(node, f"{inside}.{node.name}")
        else:
            yield from definitions(node, inside)


def docstrings(node: ast.AST) -> int:
    """Lines of the docstrings in a definition."""
    inside = [one.body[0] for one in ast.walk(node) if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and one.body]
    texts = [one for one in inside if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)]
    return sum((one.end_lineno or 0) - one.lineno + 1 for one in texts)


def test_a_module_imports_only_from_floors_below_its_own() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_is_one_evenings_reading() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == {*EVENING, "__init__"}
    assert sum(len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in files) <= LINES


def test_the_package_grows_no_longer() -> None:
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")) <= WHOLE


def test_the_package_knows_no_room_of_a_notebook() -> None:
    """Names of the modules of notebooks/, which are not installed with the package."""
    outside = {path.stem for path in (ROOT / "notebooks").rglob("*.py")} | {"rooms", "tools"}
    imported = {
        (module, name.split(".")[0])
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert {(module, name) for module, name in imported if name in outside} == set()


ROOMS = ("edits", "cost"), ("smollm",)  # the upper floors of notebooks/rooms; none of the other folders knows another


def test_a_room_imports_only_from_floors_below_its_own() -> None:
    folder = ROOT / "notebooks" / "rooms"
    names = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert names > {name for floor in ROOMS for name in floor}
    height = {name: len(ROOMS) - n for n, floor in enumerate(ROOMS) for name in floor}
    wrong = set()
    for path in folder.rglob("*.py"):
        own = path.parent.name if path.parent != folder else ""
        for other in re.findall(r"^ *(?:from|import) rooms\.(\w+)", path.read_text(), re.M):
            if other in names - {own} and (not own or height.get(other, 0) >= height.get(own, 0)):
                wrong.add((path.relative_to(folder).as_posix(), other))
    assert wrong == set()


def test_functions_and_classes_stay_small() -> None:
    large = {}
    for module, tree in modules().items():
        for name, node in definitions(tree, module):
            lines = (node.end_lineno or 0) - node.lineno + 1 - docstrings(node)
            if lines > (120 if isinstance(node, ast.ClassDef) else 40):
                large[name] = lines
    assert large == {}


def test_nothing_is_patched() -> None:
    assert {module for module, tree in modules().items() if "unittest" in ast.unparse(tree)} == set()


# ---- light to install


HEAVY = ("scipy", "matplotlib", "pandas", "seaborn", "PIL", "jinja2", "transformers", "transformer_lens",
         "torchvision", "sae_lens", "triton")  # fmt: skip


def test_importing_the_package_loads_what_the_method_needs() -> None:
    code = f"import sys, eigendecomp; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_study_and_the_targets_import_without_the_extras() -> None:
    """Every module but those of the page and the report, with the extras' modules hidden."""
    names = [f"eigendecomp.{name}".removesuffix(".__init__") for name in modules() if name != "__init__"]
    light = [name for name in names if not re.match(r"eigendecomp\.(page|report)\b", name)]
    code = f"""
import sys, importlib
sys.modules.update(dict.fromkeys({HEAVY}))
for name in {light}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def hidden(module: str, *forget: str) -> Iterator[None]:
    """A module that cannot be imported; those to ``forget`` are imported afresh inside, and as they were after."""
    before: dict[str, ModuleType] = dict(sys.modules)
    for name in [name for name in sys.modules if name == module or name.startswith((f"{module}.", *forget))]:
        del sys.modules[name]
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.clear()
        sys.modules.update(before)


def test_a_missing_extra_is_named() -> None:
    assert need("page", "json", "math").__name__ == "json"
    with hidden("jinja2", "eigendecomp.page"), pytest.raises(ImportError, match=r"jinja2.*eigendecomp\[page\]"):
        importlib.import_module("eigendecomp.page.collect")
    with hidden("seaborn", "eigendecomp.report"), pytest.raises(ImportError, match=r"seaborn.*eigendecomp\[report\]"):
        importlib.import_module("eigendecomp.report.results")


def test_a_study_without_scipy_names_it() -> None:
    from eigendecomp.study import scores
    from rooms.interventions import maps

    with hidden("scipy"):
        for call in (lambda: maps.clustered(torch.eye(4)), lambda: scores.matched_cosine(torch.eye(3), torch.eye(3))):
            with pytest.raises(ImportError, match=r"scipy.*eigendecomp\[study\]"):
                call()
    assert maps.clustered(torch.eye(4)).sort().values.tolist() == [0, 1, 2, 3]


# ---- the README


def resolved(name: str) -> object:
    """The function or class at a dotted name inside the package."""
    parts = ["eigendecomp", *name.split(".")]
    depth = next(n for n in range(len(parts), 0, -1) if (PACKAGE.parent / Path(*parts[:n])).with_suffix(".py").exists())
    found: object = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


def test_every_equation_of_the_paper_has_a_function() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| .* \| `([\w.]+)` \|$", README, re.M))
    labels = re.findall(r"<eq-[\w-]+>", (ROOT / "paper" / "method.typ").read_text())
    assert [int(number) for number in rows] == list(range(1, len(labels) + 1))
    assert all(callable(resolved(name)) for name in rows.values())


def test_the_evenings_reading_and_the_folders_are_those_of_the_readme() -> None:
    start = README.index("**An evening's reading**")
    text = README[start : README.index("| eq. |", start)]
    assert set(re.findall(r"`(\w+)`", text)) == {*EVENING, "factored"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(re.findall(r"^  (\w+)/ ", README, re.M))


def test_the_floors_are_those_of_the_readme() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    told = re.search(r"From the top they are\s+(.*?)\.", README, re.S)
    assert told is not None
    floors = [floor.strip().replace(", ", " | ") for floor in re.sub(r"\s+", " ", told[1]).split(">")]
    assert floors == contract["layers"]


class Small(nn.Module):
    """A stand-in for a model of the reader's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"attn": nn.Linear(6, 5)})
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block["attn"](x).tanh())


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
FEWER = {
    "n_directions=100, rank=1": "n_directions=6, rank=1, steps=3, batch_size=8", "n_directions=100": "n_directions=6",
    "n_directions=300": "n_directions=6, steps=2", "8 / 300": "1 / 3",
    "steps=300": "steps=2", "batch_size=128": "batch_size=16", "2000": "64", "128, 16": "8, 16", "topk(10)": "topk(3)",
}  # fmt: skip


def executed(code: str, **names: object) -> dict[str, Any]:
    """The names that a snippet leaves behind, run with fewer steps, directions and samples."""
    for written, small in FEWER.items():
        code = code.replace(written, small)
    exec(code, names)
    return names


def test_the_first_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    left = executed(SNIPPETS[0], model=Small(), inputs=torch.randn(32, 6))
    assert left["d"].impact(left["inputs"]).shape == (32, 6) and Path("directions.safetensors").exists()
    pytest.importorskip("transformer_lens")
    capsys.readouterr()
    executed(SNIPPETS[1])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines] == [5, 5, 5]


def test_the_first_notebook_begins_with_the_readmes_example() -> None:
    cells = (ROOT / "notebooks" / "start.py").read_text().split("\n# %%\n")
    code = cells[1].split("\n# %%")[0].replace("  # fmt: skip", "")
    assert code.strip() == SNIPPETS[1].strip()


def test_the_snippet_on_uses_runs() -> None:
    pytest.importorskip("transformer_lens")
    from eigendecomp.targets import stories

    model, tokens = stories.load_model(), stories.token_windows(stories.load_stories("train"), 16, 8, seed=0)
    assert executed(SNIPPETS[3], ed=ed, model=model, tokens=tokens)["d"].encode(tokens).shape == (16 * 8, 6)


def test_the_pages_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    y = torch.arange(16) % 3
    names = {"classes": ["a", "b", "c"], "words": list("abcdefg"), "columns": list("uvwxyz"), "y": y}
    cases = [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "images", torch.rand(16, 1, 8, 8)),
        (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), "tokens", torch.randint(7, (16, 5))),
        (Small(), "x", torch.randn(16, 6)),
    ]
    lines = SNIPPETS[2].splitlines()
    assert len(lines) == len(cases) and len(SNIPPETS) == 4
    for line, (model, name, inputs) in zip(lines, cases, strict=True):
        made = ed.decompose(model, inputs, divergence=ed.KLDivergence(), n_directions=4, rank=1, steps=2, batch_size=8)
        executed(line, d=made, **names, **{name: inputs})
        assert "<html" in Path("directions.html").read_text()
        Path("directions.html").unlink()
