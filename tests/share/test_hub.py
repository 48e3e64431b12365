"""Folders laid out for the hub: written, found here and in a cache, and pushed to a stand-in for the hub."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigendecomp as ed

huggingface_hub = pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def d() -> ed.Decomposition:
    return ed.decompose(model(), X, n_directions=4, rank=1, steps=3, batch_size=8, progress=False)


def test_a_folder_is_read_back(d: ed.Decomposition, tmp_path: Path) -> None:
    folder = d.save_pretrained(tmp_path / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "decomposition.safetensors"]
    for place in (folder, str(folder)):
        again = ed.Decomposition.from_pretrained(place, model())
        assert torch.equal(again.encode(X), d.encode(X)) and again.settings == d.settings
    d.save_pretrained(folder)  # over what is there


def test_the_card_says_what_it_is(d: ed.Decomposition, tmp_path: Path) -> None:
    card = (d.save_pretrained(tmp_path / "folder") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: eigendecomp\n")
    assert "4 directions in the parameter space of a Sequential" in card and "57 parameters" in card
    assert "| `n_directions` | `4` |" in card and '| `parameters` | `["*"]` |' in card
    assert "| `0.weight` | `(6, 5)` |" in card and "SquaredError" in card
    assert f"| `{d.history.step[-1]}` | `{d.history.loss[-1]:.4g}` |" in card


CODE = """
import sys, torch, eigendecomp as ed
from torch import nn
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
d = ed.Decomposition.from_pretrained("ORG/NAME", model)
torch.save(d.encode(torch.load(sys.argv[1])), sys.argv[2])
try:
    ed.Decomposition.from_pretrained("ORG/OTHER", model)
except ValueError as error:
    assert "'ORG/OTHER'" in str(error)
else:
    raise AssertionError
"""


def test_the_hubs_cache_is_read_without_a_network(
    d: ed.Decomposition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "hub" / "models--ORG--NAME"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (at / "refs").mkdir(parents=True)
    (at / "snapshots").mkdir()
    (at / "refs" / "main").write_text(commit)
    d.save_pretrained(at / "snapshots" / commit)
    torch.save(X, tmp_path / "x.pt")
    for name, value in {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": 1, "PYTHONPATH": ROOT}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", CODE, str(tmp_path / "x.pt"), str(tmp_path / "z.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "z.pt"), d.encode(X), rtol=0, atol=1e-6)


def test_what_is_pushed_is_what_is_read(d: ed.Decomposition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def create(self: Any, repo_id: str, **options: Any) -> str:
        made["repo"] = (repo_id, self.token, options)
        return f"https://hub/{repo_id}"

    def upload(self: Any, *, repo_id: str, folder_path: str, **options: Any) -> None:
        made["upload"] = (repo_id, options)
        for path in Path(folder_path).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert d.push_to_hub("ORG/NAME", private=True, token="secret", message="first") == "https://hub/ORG/NAME"
    assert made["repo"] == ("ORG/NAME", "secret", {"private": True, "exist_ok": True})
    assert made["upload"] == ("ORG/NAME", {"revision": None, "commit_message": "first"})
    assert torch.equal(ed.Decomposition.from_pretrained(tmp_path, model()).encode(X), d.encode(X))
    with pytest.raises(ValueError, match="'a b'"):
        d.push_to_hub("a b")


def test_what_cannot_be_found_is_named(d: ed.Decomposition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"holds no decomposition\.safetensors"):
        ed.Decomposition.from_pretrained(tmp_path, model())
    with pytest.raises(ValueError, match="neither a folder nor"):
        ed.Decomposition.from_pretrained(tmp_path / "none", model())
    folder = d.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="other weights"):
        ed.Decomposition.from_pretrained(folder, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        d.save_pretrained(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: d.push_to_hub("ORG/NAME"), lambda: ed.Decomposition.from_pretrained("ORG/NAME", model())):
        with pytest.raises(ImportError, match=r"huggingface_hub.*eigendecomp\[share\]"):
            call()
    assert torch.equal(ed.Decomposition.from_pretrained(folder, model()).encode(X), d.encode(X))  # needs none
