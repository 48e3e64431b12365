"""The public door: what a decomposition finds, what it says of new samples, and that it can be kept and acted on."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.batches import LiveBatches
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.factored import samples
from eigendecomp.factored.kept import everything
from eigendecomp.factored.samples import held_gradients
from eigendecomp.gradients import Formed, FunctionalSource, Gradients
from eigendecomp.objective import CANCELLATION, loss_and_error
from eigendecomp.reference import Draws, Reference
from eigendecomp.sparsity import Sparsity
from eigendecomp.study.scores import max_cosine
from eigendecomp.support.examples import Shuffled
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target
from eigendecomp.targets.toys import tms

FACTORIZATIONS: tuple[Factorization, ...] = ("cp", "tucker")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classifier(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three inputs, three outputs, and positions if there are any."""
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).to(dtype).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=10 * seed + i))
    return model


def quick(model: nn.Module, inputs: Any, **options: Any) -> ed.Decomposition:
    return ed.decompose(model, inputs, **{"steps": 20, "n_directions": 6, "progress": False, **options})


def flat(d: ed.Decomposition) -> Tensor:
    return torch.cat([part.flatten(1) for part in d.directions().values()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recovery of what was planted


class Planted(nn.Module):
    """f_k = x_k ⟨u_k, w⟩ with unit u_k: a sample's gradients are sums of the u_k whose features are on."""

    def __init__(self, planted: Directions) -> None:
        super().__init__()
        self.names = list(planted.shapes)
        for i, (name, shape) in enumerate(planted.shapes.items()):
            self.register_parameter(name, nn.Parameter(normal(*shape, seed=i)))
            self.register_buffer(f"{name}_of_u", planted.dense(name).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, f"{name}_of_u") @ getattr(self, name).flatten() for name in self.names]
        return x * torch.stack(parts).sum(0)


def incoherent(seed: int) -> Directions:
    """Six directions of rank one in two tensors, no two with a cosine above ¼."""
    g = torch.Generator().manual_seed(seed)
    drawn = Directions.random({"matrix": (6, 5), "vector": (10,)}, 1000, 1, generator=g)
    cosine, chosen = drawn.gram().abs(), [0]
    for i in range(1, 1000):
        if len(chosen) < 6 and cosine[i][chosen].max() < 0.25:
            chosen.append(i)
    return drawn.select(chosen)


def orthonormal(seed: int) -> Directions:
    rows = torch.linalg.qr(normal(12, 6, seed=seed)).Q.T
    return Directions({"vector": (12,)}, "cp", {"vector": [rows.unsqueeze(1)]})


PLANTED: dict[str, tuple[Callable[[int], Directions], dict[str, Any]]] = {
    "untied": (incoherent, {}),
    "untied, all that is on": (incoherent, {"sparsity": ed.BatchTopK(0.16)}),
    "tied": (incoherent, {"tied": True}),
    "Tucker": (incoherent, {"factorization": "tucker"}),
    "tied with an L1 penalty": (orthonormal, {"tied": True, "sparsity": ed.L1(0.1)}),
}


@pytest.mark.parametrize("plant, options", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_directions_are_recovered(
    plant: Callable[[int], Directions], options: dict[str, Any], seed: int
) -> None:
    planted, g = plant(seed), torch.Generator().manual_seed(seed)
    assert planted.n == 6
    x = torch.rand(1000, 6, generator=g) * (torch.rand(1000, 6, generator=g) < 0.1)
    d = ed.decompose(
        Planted(planted), x[x.any(1)], reference=ed.ModelSample(),
        **{"sparsity": ed.BatchTopK(0.08), "n_directions": 6, "steps": 600, "batch_size": 128, "learning_rate": 2e-2,
           "seed": seed, "progress": False, **options},
    )  # fmt: skip
    assert max_cosine(flat(d), planted.flat()).min() > 0.99
    # Each feature has a direction of its own, which it moves most.
    assert sorted(d.impact(torch.eye(6)).argmax(1).tolist()) == list(range(6))


def test_the_pentagon_of_superposed_features_is_taken_apart() -> None:
    """Five features in two dimensions, by hand: ReLU(x W Wᵀ + b)."""

    class Pentagon(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            angle = 2 * math.pi * torch.arange(5) / 5
            self.W = nn.Parameter(1.2 * torch.stack([angle.cos(), angle.sin()], 1))
            self.b = nn.Parameter(torch.full((5,), -0.35))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.W @ self.W.T + self.b)

    g = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 5, generator=g) * (torch.rand(4000, 5, generator=g) < 0.05)
    model = Pentagon().eval()
    d = ed.decompose(model, x, sparsity=ed.BatchTopK(0.1), steps=700, progress=False, seed=1)
    impact = d.impact(torch.eye(5))
    owner = impact.argmax(0)
    assert sorted(owner.tolist()) == list(range(5))
    top = impact.topk(2, 0).values
    assert (top[0] / top[1]).min() > 3
    for v in range(5):  # moving along a direction moves the output of its own feature most
        before = model(torch.eye(5)).detach()
        with d.perturbed({v: 0.3}):
            moved = (model(torch.eye(5)).detach() - before).norm(dim=1)
        assert moved.argmax() == owner[v]


def test_xor_inputs_own_a_direction_each() -> None:
    from eigendecomp.targets.toys import xor

    model, loss = xor.train(0, steps=300)
    assert loss < 0.01
    d = ed.decompose(
        model, xor.INPUTS, n_directions=3, tied=True, sparsity=ed.L1(0.02), steps=600, reference=ed.Constant(0.5),
        progress=False,
    )  # fmt: skip
    strongest = d.impact(xor.INPUTS)[1:].argmax(0)
    assert len(set(strongest.tolist())) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The objective and what is kept


def objective_by_hand(
    sparsity: Sparsity, g: Tensor, encoder: Tensor, decoder: Tensor, dead: Tensor, progress: float
) -> tuple[Tensor, Tensor]:
    """Loss and error from gradients and directions as rows, every product written out."""
    z = g @ encoder.T
    s = z
    if isinstance(sparsity, ed.BatchTopK):
        share = sparsity.fraction ** (1 if progress >= sparsity.warmup else progress / sparsity.warmup)
        s = largest(z, share)
    error = (g - s @ decoder).square().sum() / g.square().sum()
    loss = error
    if isinstance(sparsity, ed.L1):
        loss = loss + sparsity.weight * z.abs().sum(1).mean() / g.square().sum(1).mean().sqrt()
    if isinstance(sparsity, ed.BatchTopK) and sparsity.auxiliary and dead.any():
        left = g - s.detach() @ decoder
        rebuilt = largest(z[:, dead], sparsity.fraction) @ decoder[dead]
        loss = loss + sparsity.auxiliary * ((left - rebuilt).square().sum() / left.square().sum().detach() - 1)
    return loss, error


def largest(z: Tensor, share: float) -> Tensor:
    count = max(1, round(share * z.numel()))
    kept = torch.zeros(z.numel(), dtype=torch.bool)
    kept[z.abs().flatten().argsort(descending=True)[:count]] = True
    return z * kept.view(z.shape)


rules = st.one_of(
    st.builds(ed.L1, st.sampled_from([0.0, 0.1, 3.0])),
    st.builds(
        ed.BatchTopK, st.sampled_from([0.05, 0.3, 1.0]), warmup=st.sampled_from([0.0, 0.3, 1.0]),
        auxiliary=st.sampled_from([0.0, 0.5]),
    ),
)  # fmt: skip


@settings(max_examples=40)
@given(rules, st.booleans(), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 0.15, 0.5, 1.0]), st.data())
def test_the_objective_is_the_one_written_out(
    sparsity: Sparsity, tied: bool, n: int, v: int, progress: float, data: st.DataObject
) -> None:
    shapes, seed = {"a": (3, 2), "b": (2,)}, data.draw(st.integers(0, 999))
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=v, max_size=v)))
    make = torch.Generator().manual_seed(seed)
    decoder, encoder = (
        Directions.random(shapes, v, 2, generator=make, dtype=torch.float64).map(lambda f: f.requires_grad_())
        for _ in range(2)
    )
    encoder = decoder if tied else encoder
    g = normal(n, 8, seed=seed, dtype=torch.float64)
    batch = everything(sparsity, Gradients(shapes, [Formed(shapes, g)]), encoder, decoder, progress)
    loss, error = loss_and_error(sparsity, batch, dead)
    expected, expected_error = objective_by_hand(sparsity, g, encoder.flat(), decoder.flat(), dead, progress)
    (a, b), (c,) = decoder.factors["a"], decoder.factors["b"]  # matrices are sums of two terms, vectors are one
    terms = torch.einsum("vki,vkj->vkij", a, b).square().flatten(1).sum(1) + c[:, 0].square().sum(1)
    expected = expected + CANCELLATION * (terms - 2).clamp_min(0).mean()
    torch.testing.assert_close(error, expected_error.detach())
    torch.testing.assert_close(loss.detach(), expected.detach())
    assert batch.kept.shape == (n, v)


def test_only_the_dead_learn_from_what_the_others_leave() -> None:
    shapes, dead = {"a": (3, 2)}, torch.tensor([True, False])
    learned = []
    for auxiliary in (0.0, 0.5):
        decoder, encoder = (Directions.random(shapes, 2, 1, dtype=torch.float64) for _ in range(2))
        decoder.map(lambda f: f.requires_grad_())
        g = Gradients(shapes, [Formed(shapes, normal(9, 6, dtype=torch.float64))])
        rule = ed.BatchTopK(0.5, warmup=0.0, auxiliary=auxiliary)
        loss, _ = loss_and_error(rule, everything(rule, g, encoder, decoder, 1.0), dead)
        learned.append(torch.autograd.grad(loss, list(decoder.tensors()))[0])
    torch.testing.assert_close(learned[0][1], learned[1][1])
    assert not torch.allclose(learned[0][0], learned[1][0])


def test_terms_of_a_direction_do_not_grow_against_each_other() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1000, 12, generator=draw) * (torch.rand(1000, 12, generator=draw) < 0.1)
    network = tms.untie(tms.train(12, 4, tied=True, seed=0, steps=300)[0])
    d = quick(network, x, n_directions=20, rank=4, tied=True, sparsity=ed.L1(0.05), steps=1500, batch_size=128)
    assert d.decoder.cancellation().max() < 50  # 1e7 and growing, were nothing to hold them


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0, 99))
def test_top_k_comes_down_from_all_to_its_fraction(n: int, v: int, fraction: float, warmup: float, seed: int) -> None:
    rule, z = ed.BatchTopK(fraction, warmup=warmup), normal(n, v, seed=seed)
    kept = [int((rule.keep_batch(z, progress) != 0).sum()) for progress in torch.linspace(0, 1, 11).tolist()]
    assert kept[-1] == max(1, round(fraction * z.numel()))
    assert kept == sorted(kept, reverse=True)
    if warmup > 0:
        assert kept[0] == z.numel()
    final = rule.keep_batch(z, 1.0)
    assert torch.equal(final[final != 0], z[final != 0])
    assert final[final != 0].abs().min() >= z[final == 0].abs().max() if (final == 0).any() else True
    threshold = rule.threshold([z])
    assert torch.equal(rule.keep(z, threshold), final)


def test_history_says_what_happened_by_step() -> None:
    d = quick(classifier(), normal(200, 3), steps=230, batch_size=64, sparsity=ed.BatchTopK(0.25))
    h = d.history
    assert h.step == [0, 50, 100, 150, 200, 229]
    for values in (h.loss, h.error, h.kept, h.dead):
        assert len(values) == 6 and all(math.isfinite(v) for v in values)
    assert all(0 <= v <= 1 for v in h.dead)
    assert h.kept[0] == 6.0 and h.kept[-1] == pytest.approx(0.25 * 6, rel=0.02)
    assert 0 <= h.error[-1] < h.error[0]
    assert h.loss[-1] == pytest.approx(h.error[-1])  # no penalty, and none is dead


@pytest.mark.parametrize("sparsity", [ed.BatchTopK(0.2), ed.L1(0.1)], ids=["topk", "l1"])
def test_a_batch_without_any_gradient_does_no_harm(sparsity: Sparsity) -> None:
    """Sparse data in small batches: in most of these, no unit is on."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU()).eval()
    x = normal(100, 3) * (torch.arange(100) % 10 == 0)[:, None]
    d = quick(model, x, reference=ed.Constant(0.0), batch_size=2, steps=120, sparsity=sparsity)
    assert all(math.isfinite(value) for value in d.history.loss)
    assert flat(d).isfinite().all() and d.encode(x).isfinite().all()


def test_directions_have_unit_norm_and_the_parameters_shapes() -> None:
    model = classifier()
    for tied in (False, True):
        d = quick(model, normal(50, 3), rank=2, tied=tied, parameters=["0.*", "2.weight"])
        assert {name: u.shape for name, u in d.directions().items()} == {
            "0.weight": (6, 4, 3), "0.bias": (6, 4), "2.weight": (6, 3, 4),
        }  # fmt: skip
        torch.testing.assert_close(flat(d).norm(dim=1), torch.ones(6))


# ---------------------------------------------------------------------------------------------------------------------
# Reading samples

FIXED = ed.Constant(0.2)


def test_codes_are_inner_products_with_the_encoder() -> None:
    model, x = classifier(dtype=torch.float64), normal(9, 2, 3, dtype=torch.float64)
    d = quick(model, x, reference=FIXED)
    target = Target(model)
    draws = Draws.of(FIXED, ed.SquaredError(), d.pool, (9, 2), 1, torch.Generator())
    g = FunctionalSource(target)((x,), draws).flat()
    z = d.encode(x)
    torch.testing.assert_close(z, g @ d.encoder.flat().T)
    torch.testing.assert_close(d.impact(x), z.abs())
    assert d.threshold is not None
    s = d.encode(x, sparse=True)
    assert torch.equal(s, z * (z.abs() >= d.threshold))
    expected = (g - s @ flat(d)).square().sum() / g.square().sum()
    assert d.reconstruction_error(x) == pytest.approx(expected.item())


def test_the_threshold_keeps_the_fitted_share() -> None:
    x = normal(3000, 3)
    d = quick(classifier(), x, steps=100, sparsity=ed.BatchTopK(0.3))
    assert (d.encode(x, sparse=True) != 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert quick(classifier(), x, sparsity=ed.L1(0.1)).threshold is None


@pytest.mark.parametrize("sparse", [False, True])
def test_a_code_does_not_depend_on_its_batch(sparse: bool) -> None:
    x = normal(20, 3, dtype=torch.float64)
    d = quick(classifier(dtype=torch.float64), x, reference=FIXED)
    whole = d.encode(x, sparse=sparse)
    torch.testing.assert_close(torch.cat([d.encode(row[None], sparse=sparse) for row in x]), whole)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d.encode(x[order], sparse=sparse), whole[order])


REFERENCES: list[tuple[Reference, Divergence]] = [
    (ed.Constant(0.2), ed.SquaredError()),
    (ed.Constant([0.2, 0.3, 0.5]), ed.KLDivergence()),
    (ed.Uniform(), ed.KLDivergence()),
    (ed.Mean(), ed.SquaredError()),
    (ed.OtherSample(pool=16), ed.KLDivergence()),
    (ed.ModelSample(), ed.SquaredError()),
    (ed.ModelSample(), ed.KLDivergence()),
    (ed.Constant(0.0), ed.OutputSum()),
]
every_reference = pytest.mark.parametrize("reference, divergence", REFERENCES, ids=lambda v: type(v).__name__)


@every_reference
def test_nothing_depends_on_how_many_examples_are_read_at_a_time(
    reference: Reference, divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = classifier(dtype=torch.float64), normal(11, 2, 3, dtype=torch.float64)
    d = quick(model, x, reference=reference, divergence=divergence, steps=3)

    def read() -> Sequence[Tensor]:
        return (
            d.encode(x, seed=1), d.impact(x, references=3), d.activation(x),
            torch.tensor(d.reconstruction_error(x, seed=2)),
        )  # fmt: skip

    first = read()
    assert samples.CHUNK > 11
    monkeypatch.setattr(samples, "CHUNK", 4)
    monkeypatch.setattr(samples, "LITTLE", 0)
    for a, b in zip(first, read(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(d.encode(x[:3], seed=1), first[0][:6])


def test_seeds_choose_the_references_that_codes_are_read_against() -> None:
    x = normal(12, 3)
    d = quick(classifier(), x)
    assert torch.equal(d.encode(x, seed=3), d.encode(x, seed=3))
    assert not torch.equal(d.encode(x, seed=3), d.encode(x, seed=4))
    torch.testing.assert_close(d.impact(x, references=1, seed=3), d.encode(x, seed=3).abs())
    few, many = (torch.stack([d.impact(x, references=r, seed=s) for s in range(6)]).std(0) for r in (1, 64))
    assert many.mean() < 0.4 * few.mean()  # means over more references vary less


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    x = normal(60, 2, 3)
    one, same, other = (quick(classifier(), x, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(flat(one), flat(same)) and torch.equal(one.encoder.flat(), same.encoder.flat())
    assert one.history == same.history and one.threshold == same.threshold
    assert not torch.equal(flat(one), flat(other))


def test_nothing_outside_decides_or_is_touched() -> None:
    model, x = classifier(), normal(60, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = x.clone()
    torch.manual_seed(1)
    one = quick(model, x)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    with torch.no_grad():
        other = quick(model.requires_grad_(False), x)
    assert torch.equal(flat(one), flat(other))
    assert torch.equal(state, torch.manual_seed(1).get_state())  # torch's own generator was not used
    assert torch.equal(x, inputs)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Gradients kept or taken again


@every_reference
def test_kept_and_live_gradients_of_the_same_samples_are_the_same(reference: Reference, divergence: Divergence) -> None:
    model, x = classifier(dtype=torch.float64), normal(30, 3, dtype=torch.float64)
    target = Target(model)
    source = FunctionalSource(target)
    f = target.outputs((x,))
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator(0, "pool"))
    draws = Draws.of(reference, divergence, pool, (1, 1), 1, generator(0, "probe"))
    cached = held_gradients(source, (x,), Outputs.of(target, (x,)), draws, generator(0, "data"))
    live = LiveBatches(source, Shuffled((x,), 30, generator(0, "data")), draws, 1)
    one, other = generator(0, "references"), generator(0, "references")
    for _ in range(5):  # more than one round through the thirty
        a, b = cached.batch(8, one), live.batch(8, other)
        assert a.flat().shape == (8, target.size)
        torch.testing.assert_close(a.flat(), b.flat())


def test_a_fit_on_live_gradients_is_the_fit_on_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = classifier(dtype=torch.float64), normal(40, 3, dtype=torch.float64)
    kept = quick(model, x, sparsity=ed.L1(0.05))
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    live = quick(model, x, sparsity=ed.L1(0.05))
    torch.testing.assert_close(torch.tensor(live.history.loss), torch.tensor(kept.history.loss))
    torch.testing.assert_close(flat(live), flat(kept), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Acting


class Tied(nn.Module):
    """A scalar, and a matrix that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def test_inside_the_model_has_moved_and_afterwards_it_has_not() -> None:
    torch.manual_seed(0)
    model, x = Tied().double().eval(), normal(10, 3, dtype=torch.float64)
    d = quick(model, x)
    u = d.directions()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = model(x).detach()
    with d.perturbed({3: 0.5, 1: -0.2}) as inside:
        assert inside is model
        for name, p in model.named_parameters():
            moved = before[name] + (0.5 * u[name][3] - 0.2 * u[name][1]).view(p.shape)
            torch.testing.assert_close(p.detach(), moved)
        assert torch.equal(model.first.weight, model.second.weight)
        assert not torch.allclose(model(x), output)
        with d.perturbed({0: 1.0}):
            pass
        torch.testing.assert_close(
            model.scale.detach(), before["scale"] + (0.5 * u["scale"][3] - 0.2 * u["scale"][1])[0]
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_body_that_raises_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model, x = classifier(), normal(10, 3)
    d = quick(model, x)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match="planted"), d.perturbed({0: 1e6}):
        raise error("planted")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_small_step_moves_the_output_as_the_activation_says() -> None:
    model, x = classifier(dtype=torch.float64), normal(8, 2, 3, dtype=torch.float64)
    d = quick(model, x, rank=2)
    output, activation = model(x).detach(), d.activation(x)
    for v in range(6):
        with d.perturbed({v: 1e-6}):
            moved = (model(x).detach() - output).flatten(0, 1) / 1e-6
        torch.testing.assert_close(2**0.5 * moved.norm(dim=1), activation[:, v], rtol=1e-4, atol=1e-6)


def test_a_step_along_nothing_is_no_step() -> None:
    model, x = classifier(), normal(10, 3)
    d = quick(model, x)
    output = model(x).detach()
    for steps in ({}, {2: 0.0}):
        with d.perturbed(steps):
            assert torch.equal(model(x), output)


# ---------------------------------------------------------------------------------------------------------------------
# Keeping


def loaded_equals(d: ed.Decomposition, again: ed.Decomposition, x: Tensor) -> None:
    assert again.settings == d.settings
    assert again.history == d.history and again.threshold == d.threshold
    assert torch.equal(again.pool, d.pool)
    for name, u in d.directions().items():
        assert torch.equal(again.directions()[name], u)
    for sparse in (False, True):
        assert torch.equal(again.encode(x, seed=5, sparse=sparse), d.encode(x, seed=5, sparse=sparse))
    assert torch.equal(again.impact(x), d.impact(x))
    assert torch.equal(again.activation(x), d.activation(x))
    assert again.reconstruction_error(x) == d.reconstruction_error(x)


@every_reference
def test_what_is_saved_is_what_is_loaded(reference: Reference, divergence: Divergence, tmp_path: Path) -> None:
    x = normal(30, 3)
    d = quick(classifier(), x, reference=reference, divergence=divergence, seed=3)
    d.save(tmp_path / "d.safetensors")
    loaded_equals(d, ed.Decomposition.load(tmp_path / "d.safetensors", classifier()), x)


@pytest.mark.parametrize("sparsity", [ed.L1(0.03), ed.BatchTopK(0.2, warmup=0.5, auxiliary=0.0)], ids=["l1", "topk"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_every_form_of_directions_is_saved(
    factorization: Factorization, tied: bool, sparsity: Sparsity, tmp_path: Path
) -> None:
    x, path = normal(30, 2, 3, dtype=torch.float64), tmp_path / "d.safetensors"
    d = quick(
        classifier(dtype=torch.float64), x, factorization=factorization, tied=tied, sparsity=sparsity, rank=2,
        parameters=["0.*", "2.weight"],
    )  # fmt: skip
    d.save(path)
    again = ed.Decomposition.load(str(path), classifier(dtype=torch.float64))
    loaded_equals(d, again, x)
    assert (again.encoder is again.decoder) == tied
    again.save(path)
    loaded_equals(d, ed.Decomposition.load(path, classifier(dtype=torch.float64)), x)


def test_loading_needs_no_code_from_the_file(tmp_path: Path) -> None:
    """The file is plain safetensors with JSON: nothing in it is a pickle, and settings name only our own classes."""
    from safetensors import safe_open

    d = quick(classifier(), normal(30, 3))
    d.save(tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert "decoder/0.weight/0" in file.keys()  # noqa: SIM118
        assert "OtherSample" in file.metadata()["eigendecomp"]


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weights": (lambda: classifier(1), "other weights"),
    "other shapes": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).eval(), r"another model.*0\.bias"
    ),
    "other names": (lambda: nn.Sequential(nn.Linear(3, 4)).eval(), "another model"),
    "other precision": (lambda: classifier(dtype=torch.float64), "other weights"),
}  # fmt: skip


@pytest.mark.parametrize("make, words", OTHERS.values(), ids=OTHERS.keys())
def test_a_file_of_another_model_is_refused(make: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    quick(classifier(), normal(30, 3)).save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=words):
        ed.Decomposition.load(tmp_path / "d.safetensors", make())


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"not a decomposition at all, but text of some length",
    "cut": cut,
    "one bit": flipped,
    "longer": lambda content: content + b"0",
    "pickle": lambda content: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused_by_name(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    quick(classifier(), normal(30, 3)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"d\.safetensors"):
        ed.Decomposition.load(path, classifier())


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file.*nowhere"):
        ed.Decomposition.load(tmp_path / "nowhere", classifier())
    d = quick(classifier(), normal(30, 3))
    with pytest.raises(ValueError, match=r"folder.*nowhere"):
        d.save(tmp_path / "nowhere" / "d.safetensors")


def test_a_result_shows_what_it_is() -> None:
    d = ed.decompose(nn.Linear(4, 3), torch.randn(40, 4), n_directions=6, steps=60, batch_size=16, progress=False)
    for text in (repr(d), d._repr_html_()):
        for word in ("Decomposition", "6 of rank 1", "weight (3, 4)", "SquaredError", "OtherSample", "BatchTopK"):
            assert word in text
        assert f"{d.history.error[-1]:.3f} of the squared gradients left after 60 steps" in text
    assert "coefficients a sample" in repr(d.history) and "<table>" in d.history._repr_html_()
