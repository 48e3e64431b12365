"""Edited copies and adapters, against the model inside ``perturbed`` and the real peft."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed

peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """Every kind of module whose weight an adapter changes, and names of which one ends as another."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        torch.manual_seed(1)
        self.embed, self.mix = nn.Embedding(9, 6), conv1d(4, 6)
        self.conv, self.out = nn.Conv2d(1, 3, (3, 2), padding=1, stride=2), nn.Linear(9, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.inner.add_module("out", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.embed(x)).tanh()
        image = self.conv(h[:, None]).mean(3).flatten(1)
        return self.out(image) + self.inner(h.sum(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).tanh())


TOKENS = torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(0))
STEPS = {2: -0.8, 0: 1.3}
WEIGHTS = ("embed.weight", "mix.weight", "conv.weight", "out.weight")


def decomposed(model: nn.Module, parameters: tuple[str, ...], x: Tensor = TOKENS, **options: Any) -> ed.Decomposition:
    options = {"rank": 2, "n_directions": 3, "steps": 2, "batch_size": 8, "progress": False} | options
    return ed.decompose(model, x, parameters=parameters, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loaded(path: Path) -> Any:
    return peft.PeftModel.from_pretrained(Mixed().double(), path)


def test_an_edited_copy_is_the_perturbed_model_and_the_model_stays() -> None:
    model = Mixed().double()
    d, before = decomposed(model, ("*",)), weights(model)
    edit = d.edit(STEPS)
    with d.perturbed(STEPS) as moved:
        assert torch.allclose(moved(TOKENS), edit(TOKENS), rtol=0, atol=1e-12)
    dense = d.directions()
    for name, p in edit.named_parameters():
        expected = before[name] + sum(delta * dense[name][v] for v, delta in STEPS.items())
        assert torch.allclose(p, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.allclose(model(TOKENS), edit(TOKENS))
    assert all(p.requires_grad and p.grad is None for p in edit.parameters())


def test_tied_parameters_stay_tied_in_the_copy() -> None:
    model = Tied()
    edit = decomposed(model, ("*",), TOKENS % 7).edit({1: 0.5})
    assert isinstance(edit, Tied) and edit.out.weight is edit.embed.weight
    assert edit.out.weight is not model.out.weight and not torch.equal(edit.out.weight, model.out.weight)


@pytest.mark.parametrize("factorization", ["cp", "tucker"])
@pytest.mark.parametrize("rank", [1, 3])
def test_peft_reads_and_merges_the_adapter(tmp_path: Path, factorization: str, rank: int) -> None:
    d = decomposed(Mixed().double(), WEIGHTS, factorization=factorization, rank=rank)
    path = d.to_lora(STEPS, tmp_path / "adapter")
    assert path == tmp_path / "adapter"
    read, edit = loaded(path), d.edit(STEPS)
    with d.perturbed(STEPS) as moved, torch.no_grad():
        assert torch.allclose(read(TOKENS), moved(TOKENS), rtol=0, atol=1e-6)
        merged = read.merge_and_unload()
        assert torch.allclose(merged(TOKENS), moved(TOKENS), rtol=0, atol=1e-6)
    theirs, ours = weights(merged), weights(edit)
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[name], ours[name], rtol=0, atol=1e-6) for name in ours)


def test_a_module_whose_name_ends_alike_is_left_alone(tmp_path: Path) -> None:
    d = decomposed(Mixed().double(), ("out.weight",), rank=1)
    merged = weights(loaded(d.to_lora({0: 2.0}, tmp_path / "adapter")).merge_and_unload())
    before, edit = weights(d.target.model), weights(d.edit({0: 2.0}))
    assert torch.equal(merged["inner.out.weight"], before["inner.out.weight"])
    assert torch.allclose(merged["out.weight"], edit["out.weight"], rtol=0, atol=1e-6)


def test_single_precision_and_the_rank(tmp_path: Path) -> None:
    d = decomposed(Mixed(), ("out.weight", "embed.weight"))
    path = d.to_lora(STEPS, tmp_path / "adapter")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4  # two directions of rank two
    merged = peft.PeftModel.from_pretrained(Mixed(), path).merge_and_unload()
    assert torch.allclose(merged(TOKENS), d.edit(STEPS)(TOKENS), rtol=0, atol=1e-6)


def test_what_an_adapter_cannot_change_is_named(tmp_path: Path) -> None:
    def refused(model: nn.Module, name: str, x: Tensor = TOKENS) -> None:
        d = decomposed(model, (name,), x, rank=1)
        with pytest.raises(ValueError, match=rf"parameter '{name}'.*parameters=.*d\.edit"):
            d.to_lora({0: 1.0}, tmp_path / "none")

    for name in ("out.bias", "inner.1.weight"):
        refused(Mixed(), name)
    refused(Tied(), "embed.weight", TOKENS % 7)
    refused(nn.Linear(5, 3), "weight", torch.randn(24, 5))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten())
    refused(model, "0.weight", torch.randn(24, 2, 4, 4))
    assert not (tmp_path / "none").exists()


def test_a_weight_by_head_is_refused(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_Q = nn.Parameter(torch.randn(2, 5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nd,hdk->nhk", x, self.W_Q).flatten(1)

    d = decomposed(Heads(), ("*",), torch.randn(24, 5))
    with pytest.raises(ValueError, match="'W_Q'"):
        d.to_lora({0: 1.0}, tmp_path / "none")


def test_bad_steps_and_paths(tmp_path: Path) -> None:
    d = decomposed(copy.deepcopy(Mixed()), ("out.weight",))
    file = tmp_path / "file"
    file.write_text("kept")
    bad = {"direction=3": {3: 1.0}, "step along": {0: float("nan")}, "moves nothing": {}}
    for words, steps in bad.items():
        with pytest.raises(ValueError, match=words):
            d.to_lora(steps, tmp_path / "none")
    with pytest.raises(ValueError, match="is a file"):
        d.to_lora({0: 1.0}, file)
    with pytest.raises(ValueError, match="does not exist"):
        d.to_lora({0: 1.0}, tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="direction=3"):
        d.edit({3: 1.0})
    assert file.read_text() == "kept" and sorted(tmp_path.iterdir()) == [file]
