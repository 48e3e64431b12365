"""Results of long runs, kept in one JSON file with their settings, so that a command may be stopped and given again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eigendecomp.report.results import plain, versions


def read(path: Path, settings: dict[str, Any], script: str) -> dict[str, Any]:
    """The file's content, {"command", "settings", "versions", "rows"}; without rows if there is no file.

    ``script`` is the path, from the repository's root, of the script that makes the rows.

    Raises:
        SystemExit: for a file made with other settings.
    """
    if not path.exists():
        return {"command": f"make long  # python {script}", "settings": settings, "versions": versions(), "rows": []}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        sys.exit(f"{path} was made with other settings; move it away to make it again")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the content with one line for each row; the file is whole at any time."""
    head = {key: value for key, value in content.items() if key != "rows"}
    lines = ",\n".join(json.dumps(row) for row in content["rows"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n')
    partial.replace(path)


def once(path: Path, settings: dict[str, Any], script: str, make: Callable[[], Any]) -> None:
    """Write one result, {"command", "settings", "versions", "result"}; a file that is there is left as it is.

    Raises:
        SystemExit: for a file made with other settings.
    """
    content = read(path, settings, script)
    if not path.exists():
        del content["rows"]
        path.write_text(json.dumps(content | {"result": plain(make())}, indent=1) + "\n")
