"""The direct method, the draft's propositions, and directions from the mean Hessian."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.curvature import hessian_root, push_forward
from eigendecomp.direct import losses
from eigendecomp.directions import Directions
from eigendecomp.study import scores
from eigendecomp.study.scores import matched_cosine
from eigendecomp.target import Target
from rooms.curvature.criteria import drawn_gradients, explained_share, mean_hessian_directions, orthonormal

SE, KL = ed.SquaredError(), ed.KLDivergence()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Gated(nn.Module):
    """Sample i turns on row i of W alone, with output ⟨a_i, W_i⟩: rank-one circuits, orthogonal to each other."""

    def __init__(self, circuits: int = 4, width: int = 5) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(circuits, width))
        self.a = nn.functional.normalize(torch.randn(circuits, width, generator=draw()), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.a * self.W).sum(1)

    def circuits(self) -> Tensor:
        return torch.diag_embed(torch.ones(len(self.a))).unsqueeze(-1).mul(self.a.unsqueeze(1)).flatten(1)


def one_at_a_time(n: int = 64, circuits: int = 4) -> Tensor:
    strength = 1 + torch.rand(n, 1, generator=draw(1))
    return strength * torch.eye(circuits)[torch.arange(n) % circuits]


def decompose(seed: int = 0, **settings) -> ed.Decomposition:
    options = {"n_directions": 4, "steps": 120, "batch_size": 32, "progress": False, **settings}
    return ed.decompose_curvature(Gated(), one_at_a_time(), seed=seed, **options)


class Linear(nn.Module):
    """f = x w, one matrix x a sample, so that J is x itself."""

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


# ---------------------------------------------------------------------------------------------------------------------
# The direct method


def test_losses_are_those_of_dense_hessians() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 3).double()
    target = Target(model)
    scaled = Directions.random(target.shapes, 5, 2, generator=draw(), dtype=torch.float64)
    scaled = scaled.map(lambda factor: 1.3 * factor)  # neither loss depends on the norm
    u = torch.nn.functional.normalize(scaled.flat(), dim=1)
    c = torch.einsum("vi,nij,vj->nv", u, ed.per_sample_hessian(model, x, KL), u)
    off = (torch.einsum("nv,vi->nvi", c.sqrt(), u) @ torch.einsum("nv,vi->nvi", c.sqrt(), u).mT).square()
    interference = off.sum((1, 2)) - off.diagonal(dim1=1, dim2=2).sum(1)
    steep, overlap = losses(push_forward(target, KL, scaled, (x,)), scaled.gram())
    torch.testing.assert_close(steep, -c.square().sum(1).mean())
    torch.testing.assert_close(overlap, interference.mean())


@pytest.mark.parametrize("divergence", [SE, KL])
def test_losses_have_the_gradient_of_finite_differences(divergence: ed.SquaredError | ed.KLDivergence) -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 2).double()
    target = Target(model)
    directions = Directions.random(target.shapes, 3, 1, generator=draw(), dtype=torch.float64)
    factors = [factor.requires_grad_() for factor in directions.tensors()]

    def value(*values: Tensor) -> Tensor:
        given = iter(values)
        made = directions.map(lambda _: next(given))
        steep, overlap = losses(push_forward(target, divergence, made, (x,)), made.gram())
        return steep + 3 * overlap

    assert torch.autograd.gradcheck(value, factors)


def test_curvature_grows_as_the_loss_falls() -> None:
    d = decompose()
    random = Directions.random(d.decoder.shapes, 4, 1, generator=draw(5))
    x, loss = one_at_a_time(), d.history.loss
    start = push_forward(d.target, SE, random, (x,)).square().sum(-1).square().mean()
    assert loss[-1] < min(loss[0], 0)
    assert d.activation(x).pow(4).mean() > 10 * start


def test_planted_circuits_are_found() -> None:
    """In most seeds all of them; each direction is either on one circuit or on none."""
    found = []
    for seed in range(4):
        d = decompose(seed)
        close = scores.cosines(d.decoder.flat(), Gated().circuits()).abs() > 0.999
        assert (close.sum(0) <= 1).all() and (close.sum(1) <= 1).all()
        found.append(int(close.sum()))
    assert sorted(found)[1:] == [4, 4, 4] and min(found) >= 3


def test_directions_have_unit_norm_and_are_tied() -> None:
    d = decompose(steps=3)
    assert d.encoder is d.decoder
    torch.testing.assert_close(d.decoder.flat().norm(dim=1), torch.ones(4))


def test_a_seed_decides_everything() -> None:
    same, again, other = decompose(3, steps=20), decompose(3, steps=20), decompose(4, steps=20)
    assert torch.equal(same.decoder.flat(), again.decoder.flat())
    assert same.history == again.history
    assert not torch.allclose(same.decoder.flat(), other.decoder.flat())


def test_units_of_the_output_change_nothing() -> None:
    """Outputs a million times smaller have the same directions."""

    class Small(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return 1e-6 * super().forward(x)

    small = ed.decompose_curvature(Small(), one_at_a_time(), n_directions=4, steps=120, batch_size=32, progress=False)
    assert matched_cosine(small.decoder.flat(), decompose().decoder.flat()).min() > 0.999


def test_it_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    d, x = decompose(interference=2.5, steps=10), one_at_a_time()
    d.save(tmp_path / "d.safetensors")
    loaded = ed.Decomposition.load(tmp_path / "d.safetensors", Gated())
    assert loaded.settings == d.settings and loaded.settings.interference == 2.5
    assert torch.equal(loaded.activation(x), d.activation(x))
    assert torch.equal(loaded.encode(x, seed=1), d.encode(x, seed=1))
    assert d.reconstruction_error(x) >= 0
    with d.perturbed({0: 0.1}) as model:
        assert not torch.equal(model(x), Gated()(x))


def test_batches_count_samples_not_examples() -> None:
    model, x = nn.Linear(2, 3), torch.randn(10, 4, 2, generator=draw())
    d = ed.decompose_curvature(model, x, divergence=KL, n_directions=2, steps=2, batch_size=8, progress=False)
    assert d.activation(x).shape == (40, 2)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"interference": -1.0}, "interference=-1.0"),
        ({"interference": math.nan}, "interference=nan"),
        ({"rank": 9}, "rank=9"),
        ({"n_directions": 0}, "n_directions=0"),
        ({"steps": 0}, "steps=0"),
        ({"parameters": ["q"]}, "'q' matches none"),
        ({"divergence": "kl"}, "divergence='kl'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decompose(**settings)


def test_outputs_that_do_not_move_are_refused() -> None:
    with pytest.raises(ValueError, match="do not move"):
        ed.decompose_curvature(Gated(), torch.zeros(8, 4), steps=2, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# The propositions


def left_out(root: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Share of tr H outside the gradients' span, and the largest curvature in their complement."""
    basis = orthonormal(g)
    return 1 - explained_share(root, g), torch.linalg.matrix_norm(root - root @ basis.mT @ basis, 2).square()


def test_one_output_or_two_classes_are_spanned_by_one_gradient() -> None:
    one, two = (torch.randn(20, k, 4, generator=draw(k)).double() for k in (1, 2))
    model = Linear([0.3, -0.2, 0.5, 1.0])
    for x, divergence, reference in ((one, SE, ed.Constant(9.0)), (two, KL, ed.Uniform())):
        g = drawn_gradients(model, x, divergence, reference, 1, draw())
        share, rest = left_out(hessian_root(model, x, divergence), g)
        assert share.abs().max() < 1e-10 and rest.max() < 1e-10


def test_the_counterexample_has_the_numbers_of_the_proof() -> None:
    model, x = Linear([math.log(2), 0.0]), torch.tensor([[[1.0, 0], [0, 3], [0, -3]]]).double()
    h, g = ed.per_sample_hessian(model, x, KL)[0], drawn_gradients(model, x, KL, ed.Uniform(), 1, draw())
    torch.testing.assert_close(h, torch.tensor([[1 / 4, 0], [0, 9 / 2]]).double())
    torch.testing.assert_close(g[0, 0], torch.tensor([1 / 6, 0]).double())
    share, rest = left_out(hessian_root(model, x, KL), g)
    assert math.isclose(share.item(), 18 / 19) and math.isclose(rest.item(), 9 / 2)


@pytest.mark.parametrize("divergence, needed", [(SE, 4), (KL, 3)])
def test_enough_drawn_references_span_the_hessian(divergence: ed.SquaredError | ed.KLDivergence, needed: int) -> None:
    """K for a squared error and K − 1 for KL; one fewer leaves something, and a fixed reference never gets further."""
    x, model = torch.randn(30, 4, 6, generator=draw()).double(), Linear([0.1, 0.4, -0.5, 0.2, 0.3, -0.1])
    root = hessian_root(model, x, divergence)
    g = drawn_gradients(model, x, divergence, ed.OtherSample(), 12, draw(1))
    assert explained_share(root, g[:, : needed - 1]).median() < 1 - 1e-3
    assert (1 - explained_share(root, g)).abs().max() < 1e-8
    fixed = drawn_gradients(model, x, divergence, ed.Mean(), 12, draw())
    torch.testing.assert_close(explained_share(root, fixed), explained_share(root, fixed[:, :1]))
    assert explained_share(root, fixed).max() < 1 - 1e-3


def test_gradients_against_all_classes_add_up_to_the_hessian() -> None:
    """Σ_y p_y g_y g_yᵀ = H, where g_y is the gradient against the model's own draw y."""
    x, model = torch.randn(5, 3, 4, generator=draw()).double(), Linear([0.1, 0.4, -0.5, 0.2])
    p = model(x).softmax(-1)
    g = (p.unsqueeze(1) - torch.eye(3)) @ x
    expected = torch.einsum("ny,nyi,nyj->nij", p, g, g)
    torch.testing.assert_close(ed.per_sample_hessian(model, x, KL), expected)


def test_what_linear_maps_leave_of_gradients_is_what_they_leave_of_the_hessian() -> None:
    """E‖(I − A)g‖² = tr((I − A) H (I − A)ᵀ), for any A, over the model's own draws of each class."""
    x, model = torch.randn(5, 3, 4, generator=draw()).double(), Linear([0.1, 0.4, -0.5, 0.2])
    p, rest = model(x).softmax(-1), torch.eye(4) - torch.randn(4, 4, generator=draw(2)).double()
    g = (p.unsqueeze(1) - torch.eye(3)) @ x @ rest.mT
    left = rest @ ed.per_sample_hessian(model, x, KL) @ rest.mT
    torch.testing.assert_close((p * g.square().sum(-1)).sum(1), left.diagonal(dim1=1, dim2=2).sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# The baseline


def test_mean_hessian_directions_are_its_leading_eigenvectors() -> None:
    root = torch.randn(50, 3, 6, generator=draw()).double()
    rows, mean = mean_hessian_directions(root, 4), (root.mT @ root).mean(0)
    values = torch.linalg.eigvalsh(mean).flip(0)[:4]
    torch.testing.assert_close(rows @ mean, values[:, None] * rows)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4).double())
