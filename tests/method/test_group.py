"""Axes that share a factor: a weight stored by head is then a matrix to the directions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.directions import Directions, Factorization
from eigendecomp.support.axes import Grouped, axes_in

HEADS, MODEL, D = 3, 4, 2
GROUP = {"w": "head model d -> (head d) model"}


class ByHead(nn.Module):
    """A value matrix stored as (head, model, d), and its outputs mixed; or the same matrix stored flat."""

    def __init__(self, flat: bool, by_loop: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(HEADS, MODEL, D, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(w.movedim(2, 1).reshape(HEADS * D, MODEL) if flat else w)
        self.o = nn.Parameter(torch.randn(HEADS * D, 3, generator=generator, dtype=torch.float64))
        self.flat, self.by_loop = flat, by_loop

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            h = x @ self.w.T
        elif self.by_loop:
            h = torch.stack([x @ w for w in self.w], -2).flatten(-2)
        else:
            h = torch.einsum("btm,hmd->bthd", x, self.w).flatten(-2)
        return torch.tanh(h) @ self.o


def data() -> Tensor:
    return torch.randn(30, 5, MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fitted(model: nn.Module, **options: Any) -> ed.Decomposition:
    return ed.decompose(
        model, data(), parameters=["w"], n_directions=5, steps=40, batch_size=30, progress=False, **options
    )


@pytest.mark.parametrize("factorization", ["cp", "tucker"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("by_loop", [False, True])
@pytest.mark.parametrize("samples", ["outputs", "uses"])
def test_grouped_is_the_flat_weight(factorization: Factorization, rank: int, by_loop: bool, samples: Any) -> None:
    asked: dict[str, Any] = {"factorization": factorization, "rank": rank, "samples": samples}
    if samples == "uses" and by_loop:
        pytest.skip("each head's own use is a sample of its own")
    grouped, flat = fitted(ByHead(False, by_loop), group=GROUP, **asked), fitted(ByHead(True), **asked)
    assert grouped.directions()["w"].shape == (5, HEADS, MODEL, D)
    seen = grouped.directions()["w"].movedim(3, 2).reshape(5, HEADS * D, MODEL)
    torch.testing.assert_close(seen, flat.directions()["w"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grouped.encode(data()), flat.encode(data()), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grouped.activation(data()), flat.activation(data()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factorization", ["cp", "tucker"])
def test_inner_products_of_grouped_directions(factorization: Factorization) -> None:
    shapes = {"w": Grouped.of((3, 4, 2), [(0, 2), (1,)]), "b": (5,)}
    a, b = (
        Directions.random(shapes, 4, 2, factorization, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i in (0, 1)
    )
    torch.testing.assert_close(a.flat().norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(a.gram(b), a.flat() @ b.flat().T)
    plain = Directions.random(dict(shapes, w=(3, 4, 2)), 4, 2, factorization, dtype=torch.float64)
    torch.testing.assert_close(a.gram(plain), a.flat() @ plain.flat().T)
    left, right = a.pair("w", (0, 2))
    formed = torch.einsum("vkr,vkc->vrc", left, right).unflatten(1, (3, 2)).movedim(2, 3)
    torch.testing.assert_close(formed, a.dense("w"))
    assert a.tensor["w"].splits((1,)) and not a.tensor["w"].splits((0, 1))
    with pytest.raises(ValueError, match="two sides"):
        a.pair("w", (0, 1))


def test_a_file_keeps_groups(tmp_path: Any) -> None:
    model = ByHead(False)
    d = fitted(model, group=GROUP)
    d.save(tmp_path / "d.safetensors")
    again = ed.Decomposition.load(tmp_path / "d.safetensors", model)
    torch.testing.assert_close(again.directions()["w"], d.directions()["w"])
    torch.testing.assert_close(again.encode(data()), d.encode(data()))


@pytest.mark.parametrize(
    "group, words",
    [
        ({"v": "a b c -> (a c) b"}, "matches none"),
        ({"w": "a b -> (a b)"}, "each of the 3 axes"),
        ({"w": "a b c -> (a c)"}, "each of the 3 axes"),
        ({"w": "a b c"}, "not understood"),
        ({"w": "a (b c) d -> a b c d"}, "each of the 3 axes"),
    ],
)
def test_wrong_groups_are_refused(group: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fitted(ByHead(False), group=group)
    assert axes_in("a b c -> (c a) b", 3, "w") == [[2, 0], [1]]
