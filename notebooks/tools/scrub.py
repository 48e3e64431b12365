"""What stays of an executed notebook: what its code determines, so that equal results give equal bytes."""

import hashlib
import re

import nbformat
from nbformat import NotebookNode

TRANSIENT = ("papermill", "execution", "ExecuteTime", "collapsed", "scrolled", "widgets")
WIDGET = "application/vnd.jupyter.widget-view+json"


def displayed(text: str) -> str:
    """What a terminal shows in the end of text that goes back, as progress bars do, but for their timing."""
    rows, row, column = [""], 0, 0
    for piece in re.split(r"(\n|\r|\x1b\[A)", text):
        if piece == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[A":
            row = max(row - 1, 0)
        else:
            end = column + len(piece)
            rows[row] = rows[row][:column].ljust(column) + piece + rows[row][end:]
            column = end
    return re.sub(r"\s*\[\d+:\d\d(:\d\d)?[<,][^\]\n]*\]", "", "\n".join(line.rstrip() for line in rows))


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """A cell's outputs without widgets; each stream in one piece between the others, in a fixed order."""
    result: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}
    for output in outputs:
        if output.output_type == "stream":
            stream = streams.setdefault(output.name, nbformat.v4.new_output("stream", name=output.name))
            stream.text += output.text
        else:
            result += [streams[name] for name in ("stdout", "stderr") if name in streams]
            streams.clear()
            if WIDGET not in output.get("data", {}):
                result.append(output)
    return result + [streams[name] for name in ("stdout", "stderr") if name in streams]


def scrub(notebook: NotebookNode, replacements: dict[str, str]) -> NotebookNode:
    """The notebook with only what its code determines, so that equal results give equal bytes.

    Stable cell ids; no times, durations, widget state or paths of the machine; of a progress bar only its
    last state. Tags stay.
    """

    def clean(text: str) -> str:
        for old, new in replacements.items():
            text = text.replace(old, new)
        text = re.sub(r"(?:/[\w.-]+)+/tmp[a-z0-9_]{8}\b", "<temporary>", text)  # of tempfile, another in every run
        text = re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text)
        text = re.sub(r"\S*: TqdmWarning: IProgress not found.*\n.*\n", "", text)  # of the environment, not of the code
        return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x…", text)

    seen: dict[str, int] = {}
    for node in (notebook, *notebook.cells):
        for key in TRANSIENT:
            node.metadata.pop(key, None)
    for cell in notebook.cells:
        seen[cell.source] = count = seen.get(cell.source, 0) + 1
        cell.id = hashlib.sha256(f"{cell.cell_type}{count}{cell.source}".encode()).hexdigest()[:8]
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = clean(displayed(output.text))
                for mime, content in output.get("data", {}).items():
                    if isinstance(content, str) and (mime.startswith("text/") or mime == "image/svg+xml"):
                        output.data[mime] = clean(content)
            cell.outputs = [output for output in cell.outputs if output.get("text", "output").strip()]
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata.get("jupytext", {}).pop("text_representation", None)
    if not notebook.metadata.get("jupytext", True):
        del notebook.metadata["jupytext"]
    notebook.nbformat_minor = 5
    return notebook
