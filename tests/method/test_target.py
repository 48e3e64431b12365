"""Models that are copied, moved or taken by keyword: right by ordinary autograd, or refused in words."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendecomp as ed

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SETTINGS: dict[str, Any] = {"n_directions": 2, "steps": 2, "batch_size": 8, "progress": False}
SETTINGS |= {"reference": ed.Constant(0.0), "tied": True}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()


def products(model: nn.Module, rows: list[Any], u: dict[str, Tensor]) -> Tensor:
    """What encode must be, one example at a time."""
    found = []
    for row in rows:
        f = model(**row) if isinstance(row, dict) else model(row)
        g = torch.autograd.grad(f.square().sum(), list(model.parameters()))
        found.append(sum(u[n].flatten(1) @ part.flatten() for (n, _), part in zip(model.named_parameters(), g)))
    return torch.stack(found)


def right(d: ed.Decomposition, model: nn.Module) -> bool:
    return torch.allclose(d.encode(X), products(model, list(X.split(1)), d.directions()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copy_moves_its_own_model(copied: Any) -> None:
    d = ed.decompose(network(), X, **SETTINGS)
    again, before = copied(d), d.target.model(X)
    with torch.no_grad(), again.perturbed({0: 1.0}) as moved:
        assert not torch.allclose(moved(X), before)
        assert torch.equal(d.target.model(X), before)
    assert right(again, again.target.model)


def test_weights_put_in_the_place_of_others_are_read() -> None:
    model = network()
    d = ed.decompose(model, X, **SETTINGS)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    assert right(d, model)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) / 3, model.parameters())
    assert right(d, model)


def test_another_dtype_is_refused() -> None:
    d = ed.decompose(network(), X, **SETTINGS)
    d.target.model.float()
    with pytest.raises(ValueError, match="decompose it again"):
        d.encode(X.float())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        assert input_ids is not None and attention_mask is not None
        return self.o((self.e(input_ids) * attention_mask.exp()[..., None]).sum(1))


def test_inputs_by_keyword() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(24, 6, dtype=torch.float64)
    mask[:, 4:] = -torch.inf
    batch = {"attention_mask": mask, "input_ids": torch.randint(9, (24, 6))}
    d = ed.decompose(Words().eval(), batch, **SETTINGS)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(24)]
    want = products(d.target.model, rows, d.directions())
    assert torch.allclose(d.encode(batch), want)
    assert torch.allclose(d.encode(dict(reversed(batch.items()))), want)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (network(), DataLoader(TensorDataset(X)), "loader.dataset"),
        (nn.Conv2d(3, 5, 1).eval(), torch.randn(9, 3, 4, 6), "movedim"),
        (nn.Conv1d(3, 5, 1).eval(), torch.randn(9, 3, 7), "movedim"),
        (nn.Linear(5, 2, device="meta").eval(), X.float(), "meta"),
    ],
)
def test_what_has_no_one_reading_is_refused(model: nn.Module, inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ed.decompose(model, inputs, **SETTINGS)


def test_inputs_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x = X.clone()
    d = ed.decompose(network(), x, **SETTINGS)
    assert right(d, d.target.model)
