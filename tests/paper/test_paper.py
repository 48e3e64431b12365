"""The manuscript: it builds, the same bytes each time; what it says in numbers is read; what is missing is named."""

import io
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import typst
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "paper"
SOURCES = {path.name: path.read_text() for path in sorted(PAPER.glob("*.typ"))}
# Results and what is concluded from them. Definitions, proofs and what others did may hold numbers of their own.
HELPERS = {"main.typ", "template.typ", "results.typ"}
RESULTS = sorted(set(SOURCES) - HELPERS - {"proofs.typ", "method.typ", "theory.typ", "background.typ"})
# Sections that wait for their notebook, commented out in main.typ.
WAITING = set(re.findall(r'^// #include "(\w+)\.typ"', SOURCES["main.typ"], re.M))
INCLUDED = {name: text for name, text in SOURCES.items() if name.removesuffix(".typ") not in WAITING}


def build(root: Path = ROOT, strict: str = "1") -> bytes:
    main, inputs = str(root / "paper" / "main.typ"), {"strict": strict}
    pdf = typst.compile(main, root=str(root), ignore_system_fonts=True, sys_inputs=inputs)
    assert isinstance(pdf, bytes)
    return pdf


def fails(text: str, root: Path = ROOT) -> str:
    """What the build of a small text says that must not build."""
    start = '#import "/paper/results.typ": *\n'
    with pytest.raises(typst.TypstError) as error:
        typst.compile((start + text).encode(), root=str(root), ignore_system_fonts=True)  # pyright: ignore
    return str(error.value)


def test_builds_and_builds_the_same_bytes() -> None:
    first = build()
    assert first.startswith(b"%PDF")
    assert max(map(int, re.findall(rb"/Count (\d+)", first))) >= 12  # pages
    assert len(first) < 4_000_000
    assert build() == first


def test_nothing_is_printed_in_the_margins() -> None:
    """A table that is longer than its page, or wider than its column of text, would be."""
    main, two_a_millimetre = str(PAPER / "main.typ"), 50.8
    pages = typst.compile(main, root=str(ROOT), ignore_system_fonts=True, format="png", ppi=two_a_millimetre)
    for number, page in enumerate(cast("list[bytes]", pages), 1):
        ink = np.asarray(Image.open(io.BytesIO(page)).convert("L")) < 200
        height, width = ink.shape
        assert not ink[:, :28].any() and not ink[:, -28:].any(), f"page {number}: something is beside the text"
        below = ink[height - 36 :].copy()
        below[:, width // 2 - 10 : width // 2 + 10] = False  # the page's number
        assert not below.any(), f"page {number}: something is below the text"


ROOMS = {False: 86.3 / 25.4 * 72, True: 178 / 25.4 * 72}  # points: a column of the template, the page's width
PLOTS = {
    name: (options, "wide: true" in options or section == "appendix.typ")
    for section, text in INCLUDED.items()
    for name, options in re.findall(r'^#plot\("(\w+)"(.*)\)\[', text, re.M)
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_figures_type_is_seven_points_as_printed(name: str) -> None:
    """Indices of formulas may be smaller, seven tenths of their line."""
    (options, wide), pdf = PLOTS[name], (ROOT / "figures" / f"{name}.pdf").read_bytes()
    own = float(re.findall(rb"/MediaBox \[ [\d.]+ [\d.]+ ([\d.]+)", pdf)[0])
    asked = ROOMS[wide] * float((re.findall(r"width: (\d+)%", options) or ["0"])[0]) / 100
    scale = min(ROOMS[wide], max(own, asked)) / own
    drawings = [zlib.decompress(stream) for stream in re.findall(rb"stream\n(x.*?)\nendstream", pdf, re.S)]
    sizes = {float(size) * scale for drawing in drawings for size in re.findall(rb"/F\d\S* ([\d.]+) Tf", drawing)}
    lines = {size for size in sizes if not any(abs(size - 0.7 * other) < 0.02 for other in sizes)}
    assert lines and min(lines) > 6.9, sorted(sizes)


def test_what_is_missing_stops_the_build_and_is_named() -> None:
    assert "figures/tms.json, results" in fails('#num("tms", "main.erro.mean")')
    assert '"erro" is none of owned | ' in fails('#num("tms", "main.erro.mean")')
    assert "only 5 entries" in fails('#num("tms", "main.error.values.7")')
    assert "nothing lies under" in fails('#num("tms", "seeds.mean")')
    assert '"tempo" is none of' in fails('#setting("tms", "tempo")')
    assert "figures/nothing.json" in fails('#num("nothing", "seeds")')
    assert "figures/tms_nothing.pdf" in fails('#plot("tms_nothing")[A figure.]')
    assert "figures/tms_floors.csv: no column" in fails('#csv-table("tms_floors", (("own", [own], 0),))')
    assert "0 rows with (case: " in fails('#record("cost", "step_seconds", (case: "none"), "vmap")')
    assert "`<nobody2020>` does not exist" in fails('@nobody2020 #bibliography("/paper/references.bib")')


def claims(root: Path) -> list[dict[str, Any]]:
    main = str(root / "paper" / "main.typ")
    found = json.loads(typst.query(main, "<claim>", root=str(root), ignore_system_fonts=True))
    return [claim["value"] for claim in found]


def altered(tmp_path: Path, alter: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the paper for which one result of the circles is another."""
    shutil.copytree(PAPER, tmp_path / "paper")
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    results = json.loads((tmp_path / "figures" / "manifold.json").read_text())
    alter(results["results"])
    (tmp_path / "figures" / "manifold.json").write_text(json.dumps(results))
    return tmp_path


def test_a_claim_that_no_longer_holds_is_marked_and_stops_only_a_strict_build(tmp_path: Path) -> None:
    root = altered(tmp_path, lambda results: results.update(most_directions=4))
    with pytest.raises(typst.TypstError, match=r"no longer say that no circle has more than three.*: 4 == 3"):
        build(root)
    assert build(root, strict="").startswith(b"%PDF")
    assert build(root, strict="0").startswith(b"%PDF")
    failed = [claim for claim in claims(root) if not claim["holds"]]
    assert [(claim["name"], claim["found"], claim["bound"]) for claim in failed] == [
        ("no circle has more than three directions", 4, 3)
    ]


def test_a_missing_key_stops_every_build(tmp_path: Path) -> None:
    root = altered(tmp_path, lambda results: results.pop("most_directions"))
    with pytest.raises(typst.TypstError, match=r"figures/manifold\.json, results: no key"):
        build(root, strict="")


def test_every_claim_of_the_text_is_listed_and_holds() -> None:
    found = claims(ROOT)
    assert len(found) == sum(len(re.findall(r"^#claim\(", text, re.M)) for text in INCLUDED.values()) > 50
    assert all(claim["holds"] for claim in found)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("fmt(0.000718)", "0.00072"), ("fmt(1281.57)", "1300"), ("fmt(0.0996)", "0.10"), ("fmt(28.42)", "28"),
        ("fmt(-0.507, digits: 2)", "−0.51"), ("fmt(0)", "0"), ("fixed(2.0, 1)", "2.0"), ("fixed(-0.001, 2)", "0.00"),
        ("fixed(680576, 0)", "680,576"), ("percent(0.947368)", "95%"), ("percent(0.0438, places: 1)", "4.4%"),
        ("word(3)", "three"), ("word(40)", "40"), ('capital("word")', "Word"), ("fmt(9.99)", "10"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_asked(call: str, text: str) -> None:
    source = f'#import "/paper/results.typ": *\n#assert.eq({call}, {json.dumps(text, ensure_ascii=False)})'
    typst.compile(source.encode(), root=str(ROOT), ignore_system_fonts=True)  # pyright: ignore


# ---- what is shown


def notebooks() -> set[str]:
    return {path.stem for path in (ROOT / "notebooks").glob("*.py")}


def of_notebook(name: str) -> str:
    return name.split("_")[0].split(".")[0]


def test_every_figure_and_table_is_a_notebooks_and_all_are_shown() -> None:
    text = "\n".join(text for name, text in INCLUDED.items() if name != "results.typ")
    shown = set(re.findall(r'plot\("(\w+)"', text))
    assert {of_notebook(name) for name in shown} <= notebooks()
    printed = re.findall(r'(?:csv-table|rows|cell)\(\s*"(\w+)"', text) + re.findall(r"figures/(\w+)\.csv", text)
    for suffix, used in (("pdf", shown), ("csv", set(printed))):
        made = {path.stem for path in (ROOT / "figures").glob(f"*.{suffix}") if of_notebook(path.stem) not in WAITING}
        assert made - used == set(), f"made by a notebook, not in the paper: {sorted(made - used)}"
        assert used - made == set(), f"in the paper, made by no notebook: {sorted(used - made)}"


def test_the_claims_of_every_notebook_that_keeps_some_are_printed() -> None:
    named = re.search(r"^#let claiming = \((.*?)\)", SOURCES["results.typ"], re.M)
    assert named is not None
    made = {path.name.removesuffix("_claims.json") for path in (ROOT / "figures").glob("*_claims.json")}
    assert set(re.findall(r'"(\w+)"', named[1])) == made - WAITING


def test_every_section_is_included() -> None:
    included = set(re.findall(r'include "(\w+\.typ)"', SOURCES["main.typ"]))
    assert set(SOURCES) - HELPERS == included
    for name in WAITING:
        executed = (ROOT / "notebooks" / f"{name}.ipynb").exists() and (ROOT / "figures" / f"{name}.json").exists()
        assert not executed, f"the notebook {name} has been executed: write paper/{name}.typ and include it"


def test_every_source_is_cited_and_can_be_found() -> None:
    entries = re.findall(r"@\w+\{(\w+),(.*?)\n\}", (PAPER / "references.bib").read_text(), re.S)
    assert len(entries) == len({key for key, _ in entries}) > 20
    for key, fields in entries:
        assert re.search(r"doi = \{10\.\d{4,}/\S+\}|eprint = \{\d{4}\.\d{4,5}\}", fields), f"{key}: no DOI or arXiv id"
        eprint, doi = re.search(r"eprint = \{(.*?)\}", fields), re.search(r"doi = \{10\.48550/arXiv\.(.*?)\}", fields)
        assert not (eprint and doi) or eprint[1] == doi[1], f"{key}: two arXiv ids"
    cited = {key for text in SOURCES.values() for key in re.findall(r"@([a-z]+\d{4})\b", text)}
    assert cited == {key for key, _ in entries}


def test_equations_have_the_numbers_that_the_package_refers_to() -> None:
    labels = re.findall(r"<(eq-[\w-]+)>", SOURCES["method.typ"])
    number = {label: str(n) for n, label in enumerate(labels, 1)}
    equations = re.findall(r"^\$ .*?\$(?: <|$)", SOURCES["method.typ"], re.M | re.S)
    assert len(labels) == len(equations), "an equation has no label"
    expected = {
        "divergence.py": {"eq-divergence", "eq-cotangent", "eq-hessian", "eq-model-sample"},
        "reference.py": {"eq-model-sample"},
        "gradients.py": {"eq-gradient"}, "curvature.py": {"eq-hessian", "eq-activation"},
        "objective.py": {"eq-objective"}, "decomposition.py": {"eq-objective"}, "directions.py": {"eq-cp", "eq-gram"},
        "factored/terms.py": {"eq-inner", "eq-norm"}, "direct.py": {"eq-direct"},
    }  # fmt: skip
    package = ROOT / "eigendecomp"
    used = {
        path.relative_to(package).as_posix(): set(
            re.findall(r"\d+", " ".join(re.findall(r"\(eq\. ([\d, and]+)\)", path.read_text())))
        )
        for path in package.rglob("*.py")
    }
    for name, numbers in used.items():
        assert numbers <= set(number.values()), f"{name} refers to an equation that the paper does not have"
    for name, wanted in expected.items():
        assert used[name] >= {number[label] for label in wanted}, name


# ---- nothing is typed


def balanced(text: str, start: int) -> int:
    """The end of the code bracket that opens at ``start``, strings skipped."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, i).end()  # pyright: ignore[reportOptionalMemberAccess]
            continue
        depth += text[i] in "([{"
        depth -= text[i] in ")]}"
        i += 1
        if depth == 0:
            return i
    raise AssertionError("a bracket is not closed")


def contents(code: str) -> Iterator[str]:
    """The prose in the [content] blocks of a piece of code."""
    i = 0
    while i < len(code):
        if code[i] == '"':
            i = re.compile(r'"(?:[^"\\]|\\.)*"').match(code, i).end()  # pyright: ignore[reportOptionalMemberAccess]
        elif code[i] == "[":
            end = balanced(code, i)
            yield from [*prose(code[i + 1 : end - 1]), " "]
            i = end
        else:
            i += 1


def prose(text: str) -> Iterator[str]:
    """What a reader sees of Typst source that is typed: no code, references, labels or formulas with letters."""
    i, word = 0, re.compile(r"[A-Za-z_][\w-]*")
    while i < len(text):
        if match := re.compile(r"//[^\n]*|/\*.*?\*/|@[\w-]+|<[a-z][\w-]*>|\\.", re.S).match(text, i):
            i = match.end()
        elif match := re.compile(r"\$(?:[^$\\]|\\.)*\$", re.S).match(text, i):
            if not re.search(r"[A-Za-z]", match[0]):
                yield match[0]
            i = match.end()
        elif text[i] == "#" and (match := re.compile(r"let|set|show|import|include|if|for").match(text, i + 1)):
            end = match.end()
            while end < len(text) and text[end] != "\n":
                end = balanced(text, end) if text[end] in "([{" else end + 1
            yield from contents(text[i:end])
            i = end
        elif text[i] == "#":
            end = i + 1
            if match := word.match(text, end):
                end = match.end()
            while end < len(text) and (
                text[end] in "([{" or (text[end] == "." and word.match(text, end + 1)) or text[i + 1 : end] == ""
            ):
                if text[end] in "([{":
                    end = balanced(text, end)
                elif match := word.match(text, end + 1):
                    end = match.end()
                else:
                    break
            assert text[end : end + 1] != ";", f"Typst swallows the semicolon after {text[i:end]!r}; write \\\\;"
            yield from contents(text[i:end])
            i = end
        else:
            yield text[i]
            i += 1


def test_the_reader_of_sources_sees_what_a_reader_sees() -> None:
    source = '#let a = f("1", [2])\n3 @eq-4 $x_5$ $6$ #num("7", (8,))[9]. <l-10> #a.at(11).b '
    source += "#if x { [12] } else [13]\n14"
    assert re.findall(r"\d+", "".join(f" {part} " if len(part) > 1 else part for part in prose(source))) == [
        "2", "3", "6", "9", "12", "13", "14",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_no_number_of_a_result_is_typed(name: str) -> None:
    typed = "".join(f" {part} " if len(part) > 1 else part for part in prose(SOURCES[name]))
    typed = re.sub(r"\bR\^2|\bL[13]D?\b|SmolLM2-135M|TinyStories-1M|(?:Lemma|Proposition) \d", "", typed)  # names
    found = [typed[max(0, match.start() - 30) : match.end() + 20] for match in re.finditer(r"\d+", typed)]
    assert found == []
    literal = r"#(?:fmt|fixed|percent|word|grouped|power)\(\s*[-−]?[\d.]+\s*[,)]"
    assert re.findall(literal, SOURCES[name]) == [], "a helper is given a number instead of a key"


def test_nothing_of_the_machine_is_in_the_sources() -> None:
    for name, text in {**SOURCES, "references.bib": (PAPER / "references.bib").read_text()}.items():
        assert not re.search(r"/(?:work|root|home|tmp|srv|Users)/", text), name
