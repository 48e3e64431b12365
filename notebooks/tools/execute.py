"""Execute a notebook from its source: notebooks/NAME.py becomes NAME.ipynb, with outputs, and figures/NAME*.

    python notebooks/tools/execute.py NAME [--force]

Does nothing if build/NAME.stamp still agrees. The stamp lists, in the format of sha256sum, everything that
the last run read (source, package, rooms, data, pins) and everything that it wrote. It is not in git,
so a clean clone computes every figure itself, whatever modification times its checkout happened to give.

Figures are written to build/figures/NAME and moved to figures/ with the notebook when the last cell has run:
a run that fails leaves the earlier results alone, and itself, as far as it came, as build/NAME.failed.ipynb.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def digest(path: Path) -> str:
    """SHA-256 of a file; empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def input_files(name: str) -> list[str]:
    """What a notebook's results depend on, from the repository's root; no downloads, no prose."""
    files = [ROOT / "notebooks" / f"{name}.py", ROOT / "requirements.txt"]
    for folder in ("eigendecomp", "notebooks/rooms", "data"):
        found = (path for path in (ROOT / folder).rglob("*") if path.suffix not in (".pyc", ".md"))
        files += (path for path in found if path.is_file())
    relative = (path.relative_to(ROOT).as_posix() for path in files)
    return [path for path in relative if "/." not in path and not path.startswith("data/downloads/")]


def read_stamp(name: str) -> dict[str, str]:
    """Digest by path of what the last complete run read and wrote; empty if there was none."""
    stamp = ROOT / "build" / f"{name}.stamp"
    lines = stamp.read_text().splitlines() if stamp.exists() else []
    return {path: sha for sha, path in (line.split("  ", 1) for line in lines)}


def changes(name: str) -> list[str]:
    """Why to execute the notebook: the files that are not as the last complete run read or left them."""
    recorded = read_stamp(name)
    if not recorded:
        return ["not executed here yet"]
    files = {*recorded, *input_files(name)}
    return sorted(path for path in files if digest(ROOT / path) != recorded.get(path))


def execute(name: str) -> None:
    """Run the notebook; on success put its results in place, on failure exit with the traceback."""
    import jupytext  # imported here: they take longer than finding out that there is nothing to do
    import nbformat
    import papermill
    import zmq
    from scrub import scrub
    from traitlets.config import Config

    source, build = ROOT / "notebooks" / f"{name}.py", ROOT / "build"
    figures, running = build / "figures" / name, build / f"{name}.running.ipynb"
    failed = build / f"{name}.failed.ipynb"
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    os.environ.update(EIGENDECOMP_PROFILE="paper", EIGENDECOMP_FIGURES=str(figures), TQDM_MININTERVAL="5")
    if name != "cost":  # memory of large tensors is kept for the next ones: giving it back took a fifth of the time
        os.environ.update(MALLOC_MMAP_THRESHOLD_="33554432", MALLOC_TRIM_THRESHOLD_="4294967296")
    # A kernel warns of talking in plain text, even to this very process. Where it can be told to encrypt, it is.
    encryption = "auto" if zmq.has("curve") else "disabled"
    before, stamp = read_stamp(name), {path: digest(ROOT / path) for path in input_files(name)}
    try:
        notebook = papermill.execute_notebook(
            jupytext.read(source),
            running,
            cwd=source.parent,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            # A kernel that has run its cells is interrupted before it is shut down, and says so as an error.
            config=Config(
                KernelManager={"transport_encryption": encryption},
                NotebookClient={"extra_arguments": ["--log-level=CRITICAL"]},
            ),
        )
    except Exception as error:
        if running.exists():
            running.replace(failed)
        sys.exit(f"{error}\n{name}: failed. What it ran before that is in {failed.relative_to(ROOT)}")

    staged = {
        figures.relative_to(ROOT).as_posix(): "figures",
        f"{ROOT}/": "",
        str(ROOT): ".",
        sys.prefix: "<environment>",
        str(Path.home()): "~",
    }
    nbformat.write(scrub(notebook, staged), running)
    modified = source.stat().st_mtime
    os.utime(running, (modified, modified))  # jupytext refuses to open a .py whose .ipynb is newer
    failed.unlink(missing_ok=True)
    files = (path for path in figures.rglob("*") if path.is_file())
    written = {path: Path("figures") / path.relative_to(figures) for path in files}
    written[running] = Path("notebooks") / f"{name}.ipynb"
    for new, place in written.items():
        stamp[place.as_posix()] = digest(new)
        (ROOT / place).parent.mkdir(parents=True, exist_ok=True)
        new.replace(ROOT / place)
    for path in before.keys() - stamp.keys():
        if path.startswith("figures/"):  # the last run wrote it, this one did not
            (ROOT / path).unlink(missing_ok=True)
    shutil.rmtree(figures)
    lines = "".join(f"{sha}  {path}\n" for path, sha in stamp.items())
    (build / f"{name}.stamp").write_text(lines)


def expected(name: str) -> str:
    """How long the run took whose results are in figures/; empty if they do not say."""
    path = ROOT / "figures" / f"{name}.json"
    found = re.search(r'^ "wall_seconds": ([\d.]+)', path.read_text(), re.M) if path.exists() else None
    return f", which took {float(found[1]) / 60:.1f} minutes last time" if found else ""


def main() -> None:
    """Execute the notebook named on the command line if anything it depends on, or made, is not as it was."""
    parser = argparse.ArgumentParser(description="Execute one notebook from its source.")
    parser.add_argument("name", help="NAME of notebooks/NAME.py")
    parser.add_argument("--force", action="store_true", help="execute even if nothing changed")
    arguments = parser.parse_args()
    name = arguments.name
    if not (ROOT / "notebooks" / f"{name}.py").exists():
        sys.exit(f"notebooks/{name}.py does not exist")
    reasons = ["forced"] if arguments.force else changes(name)
    if not reasons:
        print(f"{name}: up to date")
        return
    more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    print(f"{name}: executing{expected(name)}", flush=True)
    start, outcome = time.perf_counter(), "failed after"
    try:
        execute(name)
        outcome = "executed in"
    finally:
        print(f"{name}: {outcome} {(time.perf_counter() - start) / 60:.1f} minutes ({reasons[0]}{more})", flush=True)


if __name__ == "__main__":
    main()
