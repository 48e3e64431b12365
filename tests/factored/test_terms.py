"""Ways to compute with factored gradients: whichever is taken, and however a batch is cut, the results are the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.directions import Directions
from eigendecomp.factored import terms
from eigendecomp.factored.pieces import Recomputed
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, Patches, Side, contract, folding_cost, rows_cost
from eigendecomp.gradients import FunctionalSource, Gradients
from eigendecomp.target import Target
from tests.cases import Chosen, assert_same

EXACT = 1e-12


class Language(nn.Module):
    """Attention between positions and, after it, layers that keep them apart; embeddings tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 6), nn.Parameter(torch.randn(4, 6))
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(h + self.down(F.gelu(self.up(self.norm(h)))))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def language(tied: bool = False) -> tuple[nn.Module, Tensor]:
    return Language(tied).double().eval(), torch.randint(7, (5, 4))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "language": language,
    "tied": lambda: language(True),
    "convolutional": lambda: (Convolutional().double(), torch.randn(5, 1, 7, 6).double()),
    "recurrent": lambda: (Recurrent().double(), torch.randn(5, 3, 2).double()),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def results(gradients: Gradients, directions: Directions) -> list[Tensor]:
    """All that the objective needs, and the derivative of it."""
    leaves = directions.map(lambda factor: factor.detach().requires_grad_())
    z, y, *_ = gradients.products(leaves, directions)
    loss = (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)).sum() + y.sum()
    found = [z.detach(), y, gradients.square_norms(), gradients.flat()]
    return [*found, *torch.autograd.grad(loss, list(leaves.tensors()))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draws", [1, 2])
def test_chunks_change_nothing(case: str, draws: int) -> None:
    model, x = CASES[case]()
    target = Target(model)
    f = target.outputs((x,))
    cotangents = Chosen(torch.randn(*f.shape[:2], draws, f.shape[2], dtype=f.dtype))
    directions = Directions.random(target.shapes, 4, 2, dtype=torch.float64)
    whole = CapturedSource(target, (x,), budget=1 << 40)((x,), cotangents)
    assert not any(isinstance(part, Recomputed) for part in whole.parts)
    expected = results(whole, directions)
    for budget in (1, 20_000, 60_000):
        cut = CapturedSource(target, (x,), budget=budget)((x,), cotangents)
        assert_same(results(cut, directions), expected, EXACT)
        if budget == 1:
            assert [type(part) for part in cut.parts] == [Recomputed]
    truth = FunctionalSource(target, loop=case == "recurrent")((x,), cotangents)
    assert_same(results(truth, directions), expected, EXACT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [0.0, 1e9])
def test_the_way_does_not_matter(case: str, number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model may count intermediate numbers for nothing or for everything."""
    model, x = CASES[case]()
    target = Target(model)
    f = target.outputs((x,))
    cotangents = Chosen(torch.randn(*f.shape[:2], 2, f.shape[2], dtype=f.dtype))
    source = CapturedSource(target, (x,))
    directions = Directions.random(target.shapes, 4, 3, "tucker", dtype=torch.float64)
    expected = results(source((x,), cotangents), directions)
    monkeypatch.setattr(terms, "OPS_PER_ELEMENT", number)
    assert_same(results(source((x,), cotangents), directions), expected, EXACT)
    formed = source((x,), cotangents)
    for part in formed.parts:
        if isinstance(part, Factored):
            part.form()
    assert_same(results(formed, directions), expected, EXACT)


@pytest.mark.parametrize("lookup", [False, True])
def test_both_orders_of_a_contraction_agree(lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.randint(-1, 5, (1, 3, 4)) if lookup else torch.randn(1, 3, 4, 5).double()
    term = Side(shared, 5), Side(torch.randn(6, 3, 4, 2).double(), 7, torch.tensor([5, 1]))
    left, right = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 7).double()
    expected = torch.einsum("cetl,vkl,cetr,vkr->cev", term[0].full().double(), left, term[1].full(), right)
    for cheap, dear in (("folding_cost", "rows_cost"), ("rows_cost", "folding_cost")):
        monkeypatch.setattr(terms, cheap, lambda *_: 0.0)
        monkeypatch.setattr(terms, dear, lambda *_: 1.0)
        torch.testing.assert_close(contract(term, left, right), expected)
        torch.testing.assert_close(contract((term[1], term[0]), right, left), expected)


@pytest.mark.parametrize("stride, dilation", [((1, 1), (1, 1)), ((2, 1), (1, 2))])
@pytest.mark.parametrize("channels", [2, 64])
def test_patches_meet_kernels_as_if_they_were_unfolded(
    stride: tuple[int, int], dilation: tuple[int, int], channels: int
) -> None:
    """Of many channels the patches' inner products are those of pixels, summed."""
    patches = Patches(torch.randn(3, 1, channels, 9, 8).double(), (3, 2), stride, dilation, channels * 6)
    images = patches.images.squeeze(1)
    unfolded = F.unfold(images, (3, 2), dilation, stride=stride).mT.unsqueeze(0)
    kernels = torch.randn(4, 2, channels * 6).double()
    torch.testing.assert_close(patches.values, unfolded, rtol=0, atol=0)
    torch.testing.assert_close(patches.dot(kernels), unfolded @ kernels.flatten(0, 1).T, rtol=EXACT, atol=EXACT * 100)
    torch.testing.assert_close(patches.gram(patches), unfolded @ unfolded.mT, rtol=EXACT, atol=EXACT * 100)
    assert patches.shape == unfolded.shape[:3] and patches.width == unfolded.shape[3]


def test_the_cheaper_way_is_taken() -> None:
    """What was measured: see notebooks/cost."""

    def gradient(c: int, e: int, t: int, left: int, right: int, lookup: bool = False) -> Factored:
        data = torch.zeros(1, e, t, dtype=torch.long) if lookup else torch.zeros(1, e, t, left)
        return Factored("w", (left, right), (0,), [(Side(data, left), Side(torch.zeros(c, e, t, right), right))])

    assert gradient(1, 32, 196, 16, 144).better_formed(100, 1)  # a convolution at many places
    assert not gradient(16, 8, 16, 256, 256).better_formed(100, 1)  # attention
    assert not gradient(1, 128, 1, 784, 512).better_formed(100, 16)  # a wide layer
    assert not gradient(16, 8, 16, 2000, 64, lookup=True).better_formed(100, 4)  # a vocabulary
    wide = gradient(16, 8, 16, 256, 256).terms[0]
    assert rows_cost(wide, 100, 1) < folding_cost(wide, 100, 1)
    assert folding_cost(wide, 100, 16) < rows_cost(wide, 100, 16)


def test_layers_that_keep_positions_apart_are_found() -> None:
    model, x = language()
    source = CapturedSource(Target(model), (x,))
    apart = {plan.name for plan in source.reading.plans if plan.apart is not None}
    assert apart == {
        "out.weight", "out.bias", "norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias",
        "head.weight",
    }  # fmt: skip
    assert source.reading.boundary is not None and source.reading.plans[0].name == "embed.weight"


class Late(nn.Module):
    """Positions meet only for inputs that the first examples are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + torch.where(x.sum((1, 2), keepdim=True) > 0, y.roll(2, 1), 0)


def test_positions_that_meet_later_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Late().double(), torch.randn(7, 4, 3).double().abs()
    x[:3] *= -1
    target = Target(model)
    source = CapturedSource(target, (x,))
    assert all(plan.apart is not None for plan in source.reading.plans)
    cotangents: Any = Chosen(torch.randn(7, 4, 1, 3).double())
    for _ in range(2):
        found, truth = source((x,), cotangents).flat(), FunctionalSource(target)((x,), cotangents).flat()
        torch.testing.assert_close(found, truth)
    assert caplog.text.count("positions meet") == 1
