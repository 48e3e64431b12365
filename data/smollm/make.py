"""Write dictionary.txt.gz and jargon.txt.gz: paragraphs of two texts in the public domain, as Debian carries them.

    apt-get download dict-devil jargon-text
    python data/smollm/make.py dict-devil_*.deb jargon-text_*.deb    # needs dpkg-deb

A paragraph is kept where it is prose: 300 to 1,500 characters, most of them small letters, no phonetic spelling. The
lines of a paragraph are joined, and the Jargon File's curled quotation marks and braces about links become plain.
"""

import gzip
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
WITHIN = {"dictionary": "usr/share/dictd/devil.dict.dz", "jargon": "usr/share/doc/jargon-text/jargon.txt.gz"}
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "{": "", "}": "", "—": "-", "–": "-", "…": "..."})
MOST = 1_200  # paragraphs of a text


def paragraphs(text: str) -> list[str]:
    """The paragraphs of prose."""
    joined = (" ".join(part.split()).translate(PLAIN) for part in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(part for part in joined if prose(part)))[:MOST]


def prose(part: str) -> bool:
    """Whether a paragraph is prose of a fitting length."""
    small = sum("a" <= letter <= "z" for letter in part)
    return 300 <= len(part) <= 1500 and small > 0.72 * len(part) and part.isascii() and "__" not in part


def main(packages: list[str]) -> None:
    """Unpack the packages and write both files, the same bytes every time."""
    with tempfile.TemporaryDirectory() as folder:
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for name, inside in WITHIN.items():
            text = gzip.decompress((Path(folder) / inside).read_bytes()).decode()
            content = "\n\n".join(paragraphs(text)) + "\n"
            (FOLDER / f"{name}.txt.gz").write_bytes(gzip.compress(content.encode(), 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
