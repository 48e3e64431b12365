"""Units of the story model and their opponents, on a few windows; behaviours' gradients and ablations by hand."""

import pytest
import torch
from torch.nn.functional import normalize

from eigendecomp.study import concepts as resolution
from eigendecomp.targets.stories import model as stories
from rooms.stories import heads, rivals

SETTINGS = {
    "directions": {"kept": 2, "steps": 3}, "SAE": {"kept": 2, "steps": 5}, "k-means of inputs": {"restarts": 1},
    "k-means of gradients": {"signed": True, "by_input": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def story() -> rivals.Story:
    return rivals.Story(fit_windows=40, held_windows=24, behaving_windows=16, length=16, least=2)


@pytest.mark.parametrize("kind", list(rivals.KINDS))
def test_every_kind_has_units_that_can_be_read_and_resolve_concepts(story: rivals.Story, kind: str) -> None:
    site = story.site("W_V")
    units = rivals.KINDS[kind](story, "W_V", 12, 0, SETTINGS.get(kind, {}))
    for way in units.ways:
        z = units.scores(way, {part: site.x[part] for part in ("choose", "test")})
        assert z["test"].shape == (24 * 16, 12)
        validation, test, best = rivals.resolved(story, z)
        assert ((test > 0) & (test <= 1)).all() and len(validation) == len(best) == len(story.known["test"].names)
    if units.writers is not None:
        changes = units.changes()
        used = changes.norm(dim=1) > 0
        assert changes.shape == (12, 64 * 64) and used.any()
        assert (torch.linalg.matrix_rank(changes[used].unflatten(1, (64, 64)), rtol=1e-4) == 1).all()


def test_units_and_seeds(story: rivals.Story) -> None:
    setting = SETTINGS["k-means of gradients"]
    a, b, c = (rivals.gradient_clusters(story, "W_K", 8, seed, setting).changes() for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_arbitrary_signs_are_turned_by_validation_and_others_left(story: rivals.Story) -> None:
    x = {part: story.site("W_V").x[part] for part in ("choose", "test")}
    rows = normalize(torch.randn(4, 64), dim=1)
    z = {sign: rivals.Units({"row": sign * rows}).scores("row", x) for sign in (1, -1)}
    torch.testing.assert_close(z[1]["test"], z[-1]["test"])
    fixed = rivals.Units({"row": rows}, signed=True).scores("row", x)["test"]
    torch.testing.assert_close(fixed, x["test"] @ rows.T)


def test_few_keeps_the_largest_that_are_positive() -> None:
    z = torch.tensor([[3.0, -1.0, 2.0], [-3.0, -1.0, -2.0]])
    torch.testing.assert_close(rivals.few(z, 2), torch.tensor([[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(rivals.few(z, 1)[0], torch.tensor([3.0, 0.0, 0.0]))


def test_a_behaviours_gradient_is_that_of_its_mean_log_mass(story: rivals.Story) -> None:
    name = next(iter(story.behaving["test"]))
    on, members = story.behaving["test"][name], story.rules.sets[name]
    weight = story.model.get_parameter("blocks.5.attn.W_V")
    row = list(story.behaving["test"]).index(name)
    g = story.gradients("test", "W_V")[row].unflatten(0, (64, 16, 4))
    needed = weight.requires_grad
    weight.requires_grad_()
    total = 0
    for window, where in zip(story.tokens["test"][:16], on, strict=True):  # one example at a time
        if where.any():
            mass = story.model(window[None]).softmax(-1)[0][where][:, members].sum(-1)  # pyright: ignore
            assert (mass >= 0.5).all()
            (part,) = torch.autograd.grad(mass.log().sum(), weight)
            total = total + part
    weight.requires_grad_(needed)
    torch.testing.assert_close(g, (total / on.sum()).movedim(1, 0), rtol=1e-3, atol=1e-6)


def test_units_of_tokens_and_probes(story: rivals.Story) -> None:
    z = rivals.of_tokens(story, 5)
    assert (z["test"].sum(1) <= 1).all()
    often = torch.bincount(story.tokens["fit"].flatten()).argmax()
    assert torch.equal(z["test"][:, 0].bool(), story.tokens["test"].flatten() == often)
    probes = rivals.of_probes(story, "W_V")
    truth = story.known["test"].truth
    random = resolution.average_precision(torch.randn(len(truth), 1), truth).mean()
    assert rivals.precision_of(probes, truth).mean() > 2 * random


def test_heads_hold_shares_and_ablation_is_that_of_a_mean(story: rivals.Story) -> None:
    energy, drops = heads.energy(story, "test"), heads.drops(story, "test")
    assert energy.shape == drops.shape == (len(story.behaving["test"]), 8 * 16)
    torch.testing.assert_close(energy.sum(1), torch.ones(len(energy)))
    name = next(iter(story.behaving["test"]))
    on, members, tokens = story.behaving["test"][name], story.rules.sets[name], story.tokens["test"][:16]
    from rooms.stories.standardised import activations

    block, head = 6, 3
    mean = activations(story.model, tokens, [f"blocks.{block}.attn.hook_z"])[f"blocks.{block}.attn.hook_z"].mean(0)[
        head
    ]

    def ablate(z: torch.Tensor, hook: object) -> torch.Tensor:
        z[:, :, head] = mean
        return z

    with torch.no_grad():
        before = story.model(tokens)[on].softmax(-1)[:, members].sum(-1).log().mean()  # pyright: ignore
        after = story.model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{block}.attn.hook_z", ablate)])
        after = after[on].softmax(-1)[:, members].sum(-1).log().mean()  # pyright: ignore
    assert drops[list(story.behaving["test"]).index(name), 16 * block + head] == pytest.approx(
        float(before - after), abs=1e-4
    )


def test_rank_correlation() -> None:
    x = torch.randn(50)
    assert heads.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert heads.rank_correlation(x, -x) == pytest.approx(-1)


def test_fresh_windows_are_of_other_stories_and_have_the_same_concepts_and_behaviours() -> None:
    sizes = {"fit_windows": 40, "held_windows": 24, "behaving_windows": 16, "length": 16, "least": 2}
    plain, more = rivals.Story(**sizes), rivals.Story(**sizes, fresh_windows=300)
    assert torch.equal(plain.tokens["test"], more.tokens["test"])
    texts = stories.load_stories("test")
    drawn = stories.token_windows(texts, 24 + 300, 16, seed=7)  # each of as many stories, in an order
    assert torch.equal(torch.cat([more.tokens["test"], more.tokens["fresh"]]), drawn) and len(texts) > 24 + 300
    assert plain.known["test"].names == more.known["fresh"].names == more.known["test"].names
    assert torch.equal(plain.known["test"].truth, more.known["test"].truth)
    assert list(more.behaving["fresh"]) == list(plain.behaving["test"])

    z = {part: more.site("W_V").x[part] for part in ("choose", "fresh")}
    _, held, unit = rivals.resolved(more, z, part="fresh")
    assert len(held) == len(unit) == len(more.known["fresh"].names) and (held > 0).all()
