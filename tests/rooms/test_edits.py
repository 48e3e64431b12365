"""Edits: the closed forms against a slow, obvious way, and the bench that scores them."""

import math

import pytest
import torch
from torch import Tensor, nn

from eigendecomp.study.moves import Probe, displaced
from eigendecomp.target import Target
from rooms.edits import editors
from rooms.edits.edits import Behaviour, Bench, divergence, log_probabilities, mass

INPUTS, OUTPUTS, ROWS = 5, 7, 6


class Classifier(nn.Module):
    """softmax(x W) with W (in, out), the weight that is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(INPUTS, OUTPUTS, generator=draw(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def site() -> editors.Site:
    x, asked = (torch.randn(200, n, generator=draw(n)).double() for n in (INPUTS, OUTPUTS))
    return editors.Site(x + 0.5, asked)


@pytest.fixture
def rows() -> editors.Rows:
    sides = (torch.randn(ROWS, n, generator=draw(n)).double() for n in (INPUTS, OUTPUTS))
    return editors.Rows(*sides)


@pytest.fixture
def g() -> Tensor:
    return torch.randn(INPUTS, OUTPUTS, generator=draw(3)).double()


def dense(rows: editors.Rows) -> Tensor:
    return torch.stack([torch.outer(a, b) for a, b in zip(rows.readers, rows.writers, strict=True)])


# ---- rows


def test_rows_are_unit_changes_of_rank_one(rows: editors.Rows, g: Tensor, site: editors.Site) -> None:
    u = dense(rows).flatten(1)
    assert torch.allclose(u.norm(dim=1), torch.ones(ROWS).double())
    assert torch.allclose(rows.inner(g), u @ g.flatten())
    assert torch.allclose(rows.gram(), u @ u.T)
    steps = torch.arange(ROWS).double()
    assert torch.allclose(rows.sum(steps).flatten(), steps @ u)
    gradients = torch.stack([torch.outer(x, d) for x, d in zip(site.x, site.asked, strict=True)]).flatten(1)
    z = gradients @ u.T
    assert torch.allclose(rows.fisher(site), z.T @ z / len(z))
    assert torch.allclose(site.diagonal.flatten(), gradients.square().mean(0))


def test_a_row_is_taken_in_the_sense_that_lowers_the_mass(rows: editors.Rows, g: Tensor) -> None:
    for number in range(ROWS):
        change = editors.along_row(g, rows, number)
        assert (change * g).sum() < 0
        assert torch.allclose(change.abs(), dense(rows)[number].abs())


def test_candidates_are_those_that_halve_the_mass_at_the_least_cost(rows: editors.Rows, g: Tensor) -> None:
    fisher = torch.diag(torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 3.0]).double())
    cost = [fisher[v, v].item() / rows.inner(g)[v].item() ** 2 for v in range(ROWS)]  # ½ s²F with s⟨G, u⟩ = c
    order = sorted(range(ROWS), key=lambda v: cost[v])
    assert editors.candidates(g, rows, fisher, 3).tolist() == order[:3]
    assert len(editors.candidates(g, rows, fisher, 100)) == ROWS


def test_a_folded_unit_does_to_the_weights_output_what_the_unit_does() -> None:
    encoder, decoder = (torch.randn(3, INPUTS, generator=draw(i)) for i in (4, 5))
    weight, x = torch.randn(INPUTS, OUTPUTS, generator=draw(6)), torch.randn(4, INPUTS, generator=draw(7))
    change = dense(editors.folded(encoder, decoder, weight))[1]
    moved = torch.outer(x @ encoder[1], decoder[1]) @ weight
    assert torch.nn.functional.cosine_similarity((x @ change).flatten(), moved.flatten(), dim=0) > 1 - 1e-6


# ---- closed forms


def test_all_rows_fit_the_gradients_projection(rows: editors.Rows, g: Tensor) -> None:
    u = dense(rows).flatten(1)
    projected = u.T @ torch.linalg.lstsq(u.T, g.flatten()).solution
    assert torch.allclose(editors.fitted(g, rows, ROWS).flatten(), -projected)
    assert torch.allclose(editors.fitted(g, rows, 10 * ROWS).flatten(), -projected)


def test_more_rows_fit_better(rows: editors.Rows, g: Tensor) -> None:
    left = [(g + editors.fitted(g, rows, k)).norm().item() for k in range(ROWS + 1)]
    assert left == sorted(left, reverse=True) and left[0] == g.norm().item()


def test_the_natural_step_lowers_most_at_a_given_cost(rows: editors.Rows, g: Tensor, site: editors.Site) -> None:
    """Against a search: no random change in the span has more ⟨G, Δ⟩² per ΔᵀFΔ."""
    u, fisher = dense(rows).flatten(1), rows.fisher(site)
    s = torch.linalg.lstsq(u.T, editors.natural(g, rows, fisher, 0.0).flatten()).solution

    def worth(s: Tensor) -> float:
        return ((s @ u @ g.flatten()) ** 2 / (s @ fisher @ s)).item()

    assert (s @ u @ g.flatten()) < 0
    others = 0.3 * s.norm() * torch.randn(200, ROWS, generator=draw(0)).double()
    assert all(worth(s) >= worth(s + other) for other in others)


def test_whitening_is_the_kronecker_solve(g: Tensor, site: editors.Site) -> None:
    kron = torch.kron(editors.damped(site.inputs, 0.1), editors.damped(site.outputs, 0.1))
    expected = -torch.linalg.solve(kron, g.flatten())
    assert torch.allclose(editors.whitened(g, site, 0.1).flatten(), expected)


def test_romes_reader_meets_the_key_most_and_others_least(g: Tensor, site: editors.Site) -> None:
    key = torch.randn(INPUTS, generator=draw(8)).double()
    change = editors.rome(g, key, site, 0.0)
    assert torch.linalg.matrix_rank(change) == 1 and (change * g).sum() < 0
    reader = change @ change.mT @ key
    worth = (reader @ key) ** 2 / (site.x @ reader).square().mean()  # on the key, per mean square elsewhere
    others = torch.randn(200, INPUTS, generator=draw(9)).double()
    assert ((others @ key) ** 2 / (others @ site.x.T).square().mean(1) <= worth + 1e-9).all()


def test_rank_one_is_the_closest(g: Tensor) -> None:
    change = editors.rank_one(g)
    assert torch.linalg.matrix_rank(change) == 1
    assert torch.isclose((change + g).norm() ** 2, torch.linalg.svdvals(g)[1:].square().sum())


# ---- the bench


@pytest.fixture
def model() -> Classifier:
    return Classifier()


@pytest.fixture
def bench(model: Classifier) -> tuple[Bench, Behaviour]:
    x = torch.randn(400, INPUTS, generator=draw(10))
    probe = Probe(model, x, log_probabilities)
    members = torch.zeros(OUTPUTS, dtype=torch.bool)
    members[2] = True
    on = probe.base[:, 2].exp() > 0.5
    concepts = torch.stack([x[:, 0] > 0, x[:, 1] > 5], 1)  # the second has too few samples to count
    return Bench(probe, (x[:, 0] > 0).long(), concepts), Behaviour("2", on, members)


def change_of(model: Classifier, behaviour: Behaviour, bench: Bench) -> Tensor:
    x = bench.probe.inputs
    assert isinstance(x, Tensor)
    loss = model(x[behaviour.on]).log_softmax(-1)[:, 2].mean()
    return -torch.autograd.grad(loss, model.weight)[0]


def test_success_is_reached_and_damage_is_what_it_says(model: Classifier, bench: tuple[Bench, Behaviour]) -> None:
    scored, behaviour = bench
    x, change = scored.probe.inputs, change_of(model, behaviour, scored)
    before = model.weight.detach().clone()
    score = scored.score(displaced(model, {"weight": change}), behaviour)
    assert score is not None and abs(score.left - 0.5) < 0.02 and torch.equal(model.weight, before)
    assert isinstance(x, Tensor)
    p, q = (torch.softmax(x @ w, -1).detach() for w in (before, before + score.step * change))
    kl = (p * (p / q).log()).sum(-1)
    off = ~behaviour.on
    assert math.isclose(score.damage, kl[off].mean().item(), rel_tol=1e-3)
    assert math.isclose(score.worst, kl[off & (x[:, 0] > 0)].mean().item(), rel_tol=1e-3)
    words = scored.words[behaviour.on].unique()
    same = off & (scored.words.unsqueeze(1) == words).any(1)
    assert math.isclose(score.same_words, kl[same].mean().item(), rel_tol=1e-3)


def test_no_edit_does_no_damage(model: Classifier, bench: tuple[Bench, Behaviour]) -> None:
    scored, behaviour = bench
    move = displaced(model, {"weight": torch.ones(INPUTS, OUTPUTS)})
    assert scored.damage(move, 0.0, behaviour) == (0.0, 0.0, 0.0)


def test_an_edit_that_does_nothing_never_succeeds(model: Classifier, bench: tuple[Bench, Behaviour]) -> None:
    scored, behaviour = bench
    assert scored.score(displaced(model, {"weight": torch.zeros(INPUTS, OUTPUTS)}), behaviour) is None
    worse = displaced(model, {"weight": -change_of(model, behaviour, scored)})
    assert scored.score(worse, behaviour) is None


def test_what_cannot_be_scored_is_refused(model: Classifier, bench: tuple[Bench, Behaviour]) -> None:
    scored, behaviour = bench
    nowhere = Behaviour("nowhere", torch.zeros_like(behaviour.on), behaviour.members)
    with pytest.raises(ValueError, match="no sample shows 'nowhere'"):
        scored.score(displaced(model, {"weight": torch.ones(INPUTS, OUTPUTS)}), nowhere)
    with pytest.raises(ValueError, match="words has 3 rows, but the probe has 400"):
        Bench(scored.probe, scored.words[:3], scored.concepts)


def test_divergence_and_mass() -> None:
    p, q = (torch.rand(2, OUTPUTS, generator=draw(i)).log_softmax(-1) for i in (11, 12))
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(divergence(p, q - p), expected)
    assert torch.isclose(mass(p, torch.ones(OUTPUTS, dtype=torch.bool)), torch.tensor(1.0))


# ---- learned


def test_lora_reaches_its_loss_and_a_penalty_keeps_it_where_it_is_cheap(model: Classifier) -> None:
    x = torch.randn(20, INPUTS, generator=draw(13))

    def loss(f: Tensor) -> Tensor:
        return f.log_softmax(-1)[:, 2].mean()

    start = loss(model(x)).item()
    target = Target(model, ["weight"])
    plain = editors.learned(target, x, loss, until=start - 0.5, learning_rate=0.03)
    assert loss(x @ (model.weight + plain.change["weight"])).item() <= start - 0.5
    assert torch.linalg.matrix_rank(plain.change["weight"]) == 1
    fisher = torch.ones(INPUTS, OUTPUTS)
    fisher[0] = 1e3
    held = editors.learned(
        target, x, loss, until=start - 0.5, learning_rate=0.03, fisher=fisher, penalty=10.0, steps=300
    )
    rest = [change["weight"][0].norm() / change["weight"].norm() for change in (held.change, plain.change)]
    assert rest[0] < 0.2 * rest[1]


def test_whitened_readers_meet_what_they_met_at_the_least_cost(rows: editors.Rows, site: editors.Site) -> None:
    made = editors.whitened_readers(rows, site, 0.0)
    for old, new in zip(rows.readers, made.readers, strict=True):
        others = old + 0.3 * torch.randn(100, INPUTS, generator=draw(5)).double()
        worth = (new @ old) ** 2 / (site.x @ new).square().mean()
        assert (((others @ old) ** 2) / (others @ site.x.T).square().mean(1) <= worth + 1e-9).all()
    assert torch.allclose(made.writers, rows.writers)


def test_a_regressed_unit_reads_what_least_squares_reads(site: editors.Site) -> None:
    z = torch.relu(site.x @ torch.randn(INPUTS, 3, generator=draw(6)).double())
    decoder, weight = (torch.randn(*shape, generator=draw(7)).double() for shape in ((3, INPUTS), (INPUTS, OUTPUTS)))
    made = editors.regressed(z, decoder, weight, site, 0.0)
    expected = torch.linalg.lstsq(site.x, z).solution.T
    assert torch.allclose(made.readers, torch.nn.functional.normalize(expected, dim=1))
    assert torch.allclose(made.writers, torch.nn.functional.normalize(decoder @ weight, dim=1))
