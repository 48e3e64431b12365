"""Folders to write into."""

from pathlib import Path


def folder_at(path: str | Path) -> Path:
    """The path, if there is a folder or one can be made there; ValueError otherwise."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"{path!r} is not the path of a folder")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give the path of a folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"the folder {str(folder.parent)!r} does not exist; make it first")
    return folder
