"""Decompositions in folders laid out for the Hugging Face hub: kept, pushed and found again."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eigendecomp.decomposition import Decomposition
from eigendecomp.support import files
from eigendecomp.support.extras import need

FILE = "decomposition.safetensors"


def save_pretrained(d: Decomposition, folder: str | Path) -> Path:
    """Write a folder with the decomposition and a README.md that says what it is; the folder is made if need be.

    Raises:
        ValueError: if there is a file in its place, or no folder to make it in.
    """
    folder = files.folder(folder)
    folder.mkdir(exist_ok=True)
    d.save(folder / FILE)
    files.replace(folder / "README.md", card(d).encode())
    return folder


def push_to_hub(
    d: Decomposition,
    repo: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a decomposition",
) -> str:
    """Upload what :func:`save_pretrained` writes, making the repository if there is none; returns its address.

    Raises:
        ImportError: without huggingface_hub, naming the extra.
        ValueError: if ``repo`` is no repository's name.
    """
    hub = need("share", "huggingface_hub")
    named(repo)
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(d, folder)
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    return str(address)


def find(repo: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The file in a folder, or else in a repository of the hub, from this machine's cache where it is there.

    Raises:
        ImportError: without huggingface_hub, naming the extra.
        ValueError: if there is no such folder or repository, or it holds no decomposition.
    """
    if Path(repo).is_dir():
        if not (Path(repo) / FILE).is_file():
            raise ValueError(f"the folder {str(repo)!r} holds no {FILE}; give one that save_pretrained wrote")
        return Path(repo) / FILE
    named(repo)
    hub = need("share", "huggingface_hub")
    try:
        return Path(hub.hf_hub_download(str(repo), FILE, revision=revision, token=token))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{FILE} of {str(repo)!r} is neither a local folder's nor to be had from the hub ({error}); check the "
            "name, the access and the connection"
        ) from error


def named(repo: str | Path) -> None:
    """Refuse what can be no repository's name."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(repo), re.ASCII):
        raise ValueError(f"{str(repo)!r} is neither a folder nor a repository's name, such as 'ORG/NAME'")


# ---- the card


def card(d: Decomposition) -> str:
    """A model card in Markdown: how to load it, what decided the fit, what happened in it, and over what it is."""
    model, size = type(d.target.model).__name__, sum(p.numel() for p in d.target.chosen.values())
    decided = {**d.settings.as_json(), "threshold": d.threshold}
    settings = [(key, json.dumps(value, ensure_ascii=False)) for key, value in decided.items()]
    parts = [
        "---\nlibrary_name: eigendecomp\ntags:\n- eigendecomp\n- interpretability\n---\n",
        f"# {d.decoder.n} directions in the parameter space of a {model}\n",
        f"Sparse low-rank directions over {size:,} parameters, learned to rebuild per-sample gradients.\n",
        "```python\nimport eigendecomp as ed\n\nd = ed.Decomposition.from_pretrained(repo_or_folder, model)  "
        "# the model with the weights that were decomposed\n```\n",
        "## Settings\n\n" + table(("setting", "value"), settings),
        "## History\n\n" + table(tuple(d.history.by_step()), history(d)),
        "## Parameters\n\n" + table(("parameter", "shape"), d.decoder.shapes.items()),
    ]
    return "\n".join(parts)


def history(d: Decomposition) -> Iterator[tuple[str, ...]]:
    """At most ten steps, evenly spaced, the last one among them."""
    rows = list(zip(*d.history.by_step().values()))
    every = max(1, -(-len(rows) // 10))
    for row in rows[::-1][::every][::-1]:
        yield tuple(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table whose cells are code, so that a pattern's stars stay stars."""
    lines = [head, ("---",) * len(head), *(tuple(map(cell, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object) -> str:
    """A value as code that cannot end its cell."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"
