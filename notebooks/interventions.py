# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a move along a direction do, and which directions share an output?
#
# ![Selectivity of moves for two models, by method.](../figures/interventions_selectivity.png)
#
# *Effect on the samples meant over the effect on all others, every move scaled to the same effect on the first. Points
# are moves, their number in brackets; bars are medians.*
#
# **What comes out: at equal effect a direction disturbs other samples less than a gradient step, a random direction or
# an added row of an autoencoder. A unit of an autoencoder scaled by its activation is level on one model, and about
# thirty times less selective on the other. A map of cross-curvature shows which directions share an output, but not
# whether they interact there.**
#
# Words: the *owner* of a direction is the feature on which it is strongest; *selectivity* is effect where it is meant
# over effect elsewhere; effects are changes of the output in its standard deviation over held-out samples. Two models
# of known truth: the toy model of superposition (five features in two dimensions, all weights decomposed) and six
# circles (the embedding decomposed). What favours us: the embedding's gradients for one circle cannot touch the planes
# of the others; fine-tuning the embedding alone has the same advantage and stands beside ours.

# %% tags=["parameters"]
features, hidden = 5, 2
circles, inputs, width, units = 6, 72, 10, 64
seeds = [0, 1, 2, 3, 4]  # of the fits; targets have seed 0
level = 0.25  # standard deviations: the effect on the samples meant at which moves are compared
samples = 1024

# %%
import warnings
from collections.abc import Iterator

warnings.filterwarnings("ignore")  # of libraries, some when they are imported

import pandas as pd
import torch

import eigendecomp as ed
from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.study.moves import Move, along, displaced
from eigendecomp.targets.toys import manifold, tms
from rooms.interventions import maps, product

# %%
plots.style()
smoke = results.profile() == "smoke"
steps, target_steps, sae_steps = (60, 300, 60) if smoke else (600, 4000, 1500)
if smoke:
    seeds, samples = seeds[:1], 256
report = results.Results(
    "interventions", features=features, hidden=hidden, circles=circles, inputs=inputs, width=width, units=units,
    seeds=seeds, level=level, samples=samples,
)  # fmt: skip


CAP = 1e4  # a selectivity above this is recorded as this


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Two models
#
# For each: the model, a decomposition for every seed, held-out samples, which features each sample has on, the
# feature that owns each direction (by impact on samples with one feature on), and an autoencoder on its hidden layer.

# %%
trained, _ = tms.train(features, hidden, tied=False, seed=0, steps=target_steps)
toy = torch.nn.Sequential(
    torch.nn.Linear(features, hidden, bias=False), torch.nn.Linear(hidden, features), torch.nn.ReLU()
)
with torch.no_grad():
    for p, (_, value) in zip(toy.parameters(), trained.named_parameters(), strict=True):
        p.copy_(value.mT if value.ndim == 2 else value)
toy_x = tms.data(8192, features, draw(1), none_empty=True)
toy_test = tms.data(samples, features, draw(2), none_empty=True)
toy_fits = [
    ed.decompose(
        toy, toy_x, n_directions=features, sparsity=ed.BatchTopK(0.1), steps=steps, learning_rate=3e-2, seed=seed,
        progress=False,
    )
    for seed in seeds
]  # fmt: skip

# %%
planes = manifold.planes(circles, inputs, 0)
doubler, _, explained = manifold.train(planes, width, units, seed=0, steps=target_steps)
circle_x, _ = manifold.data(8192, planes, draw(1), none_empty=True, active=0.05)
circle_on = torch.einsum("ni,cpi->ncp", circle_x, planes).norm(dim=-1) > 0.1
circle_x = circle_x[circle_on.sum(1) == 1]
circle_test, _ = manifold.data(samples, planes, draw(2), none_empty=True)
circle_fits = [
    ed.decompose(
        doubler, circle_x, reference=ed.Constant(0.0), parameters=["embed.weight"], n_directions=24, rank=3,
        factorization="tucker", tied=True, sparsity=ed.BatchTopK(1.6 / 24, warmup=0.1, auxiliary=0.02), steps=steps,
        batch_size=128, learning_rate=3e-2, seed=seed, progress=False,
    )
    for seed in seeds
]  # fmt: skip


# %%
class Case:
    """A model with its fits, what is on in each held-out sample, and an autoencoder."""

    def __init__(self, name, model, layer, fits, x, test, on, single, kept, rows):
        self.name, self.model, self.layer, self.fits = name, model, layer, fits
        self.probe, self.on, self.single = study.moves.Probe(model, test), on, single
        with torch.no_grad():
            read = model.get_submodule(layer)
            self.sae = study.autoencoders.train(read(x), rows, kept, seed=0, steps=sae_steps, batch_size=256)
            z = self.sae.encode(read(single.flatten(0, 1))).unflatten(0, single.shape[:2])
        self.sae_energy = z.square().mean(1)

    def energy(self, d):
        return d.impact(self.single.flatten(0, 1)).unflatten(0, self.single.shape[:2]).square().mean(1)


one_hot = torch.linspace(0.25, 1, 8).view(1, 8, 1) * torch.eye(features).unsqueeze(1)
around = manifold.around(planes, 48)[1]
test_on = torch.einsum("ni,cpi->ncp", circle_test, planes).norm(dim=-1) > 0.1
cases = [
    Case("toy model", toy, "0", toy_fits, toy_x, toy_test, toy_test > 0.1, one_hot, 0.9, features),
    Case("circles", doubler, "embed", circle_fits, circle_x, circle_test, test_on, around, 1.6, 24),
]
report.record(circles_r2=explained)

# %% [markdown]
# ## How far the local picture holds
#
# Each direction's samples are those where its owner is on. Predicted is the mean of $\delta\,\|J u\|$ over them, real
# the mean change of the output. A thin line is a direction of the first fit, stepped in one sense; the thick one is the
# mean. The prediction holds up to about half a standard deviation.


# %%
def owners(case: Case, d: ed.Decomposition) -> tuple[list[int], torch.Tensor]:
    """The directions that carry at least 5% of their owner's squared impact, and all owners."""
    energy = case.energy(d)
    share = energy.amax(0) / energy.sum(1)[energy.argmax(0)]
    return [int(v) for v in (share > 0.05).nonzero()[:, 0]], energy.argmax(0)


def response(case: Case, d: ed.Decomposition, v: int, on: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Real effects of both senses at steps whose predicted effects are ``wanted``."""
    unit = study.moves.predicted(d, case.probe)[on, v].mean()
    return torch.stack([case.probe.effect(along(d, v), float(s / unit))[on].mean() for s in wanted])


# %%
wanted = torch.logspace(-2, 0.5, 11)
figure, axes = plots.panels(1, 2, height=1.9, width=plots.PAGE, sharey=True)
local = {}
for ax, case in zip(axes, cases, strict=True):
    d = case.fits[0]
    numbers, owner = owners(case, d)
    both_senses = [(v, sign) for v in numbers for sign in (1, -1)]
    real = torch.stack([response(case, d, v, case.on[:, owner[v]], sign * wanted) for v, sign in both_senses])
    ratio = real / wanted
    ax.axhline(1, color="black", lw=0.8, ls=":")
    ax.plot(wanted, ratio.T, color=plots.OURS, lw=0.6, alpha=0.4)
    ax.plot(wanted, ratio.mean(0), color=plots.OURS, lw=2)
    ax.text(0.0105, 1.03, "as predicted", size=7)
    ax.set(xscale="log", xlabel="predicted effect (standard deviations)", title=case.name, ylim=(0, 1.3))
    local[case.name] = {"predicted": wanted, "real_over_predicted": ratio.mean(0), "lowest": ratio.amin(0),
                        "highest": ratio.amax(0)}  # fmt: skip
axes[0].set_ylabel("real over predicted effect")
report.figure("local", figure)
report.record(local=local)

# %% [markdown]
# ## Selectivity at equal effect
#
# Every move is scaled until the samples meant (the owner is on) move by a quarter of a standard deviation on average;
# selectivity is that over the mean effect on all other samples. For a direction the sense is the one that is more
# selective, and so it is for every other move. Compared:
#
# - **direction**: a decoder row; **encoder row**: the row that reads (the same where the fit is tied);
# - **gradient**: one step that raises the squared output of the samples meant, on the same weights;
# - **random**: rows of the same rank;
# - **SAE, add**: the unit's row added to the hidden layer on every sample, as steering is usually done;
# - **SAE, scale**: only where the unit is on, in proportion to its activation.


# %%
def best(case: Case, move, on: torch.Tensor) -> float | None:
    """The more selective sense of a move; None if neither reaches the level."""
    found = []
    for sign in (1.0, -1.0):
        try:
            found.append(case.probe.selectivity(lambda s, sign=sign: move(sign * s), on, level))
        except ValueError:  # no step has this effect
            continue
    return max(found, default=None)


def steering(case: Case, unit: int, how):
    return lambda s: case.sae.steered(case.model, case.layer, {unit: s}, how=how)


# %%
def weight_moves(case: Case, d: ed.Decomposition, seed: int) -> Iterator[tuple[str, int, Move]]:
    """(method, feature, move) for everything that changes weights."""
    numbers, owner = owners(case, d)
    rows = study.scores.encoder_rows(d)
    patterns, s = list(d.settings.parameters), d.settings
    random = study.floors.random_directions(d.decoder.shapes, len(numbers), s.rank, s.factorization, seed=seed)
    for i, v in enumerate(numbers):
        feature = int(owner[v])
        yield "direction", feature, along(d, v)
        if not s.tied:
            yield "encoder row", feature, along(rows, v)
        yield "random", feature, displaced(case.model, study.moves.low_rank(random, i))
    for feature in sorted({int(owner[v]) for v in numbers}):
        x = case.probe.inputs[case.on[:, feature]]
        change = study.moves.gradient(case.model, x, lambda f: -f.square().sum(-1).mean(), patterns)
        yield "gradient", feature, displaced(case.model, change)


def unit_moves(case: Case) -> Iterator[tuple[str, int, Move]]:
    """(method, feature, move) for every unit of the autoencoder that carries 5% of its owner's energy."""
    energy = case.sae_energy
    share = energy.amax(0) / energy.sum(1)[energy.argmax(0)].clamp_min(1e-12)
    for unit in (share > 0.05).nonzero()[:, 0].tolist():
        for how in ("add", "scale"):
            yield f"SAE, {how}", int(energy.argmax(0)[unit]), steering(case, unit, how)


# %%
rows = []
for case in cases:
    moves = [(seed, *move) for seed, d in zip(seeds, case.fits, strict=True) for move in weight_moves(case, d, seed)]
    for seed, method, feature, move in moves + [(0, *move) for move in unit_moves(case)]:
        value = best(case, move, case.on[:, feature])
        rows.append({"model": case.name, "method": method, "seed": seed, "feature": feature, "selectivity": value})
selectivity = pd.DataFrame(rows)
report.table("moves", selectivity)
selectivity["selectivity"] = selectivity["selectivity"].clip(upper=CAP)
pd.DataFrame(selectivity.groupby(["model", "method"])["selectivity"].describe()).round(2)

# %%
METHODS = {"direction": plots.OURS, "encoder row": plots.OURS, "gradient": plots.LABELLED, "random": plots.RANDOM,
           "SAE, add": plots.SAE, "SAE, scale": plots.SAE}  # fmt: skip


def strips(ax, rows: pd.DataFrame, key: str, value: str, colors: dict[str, str]) -> list[str]:
    """One row of points for each kind, with a bar at the median."""
    here = [kind for kind in colors if kind in set(rows[key])]
    for i, kind in enumerate(here):
        values = torch.tensor(rows.loc[rows[key] == kind, value].tolist())
        shift = 0.5 * (torch.rand(len(values), generator=draw(i)) - 0.5)
        few = len(values) < 12
        ax.plot(values, i + shift, "o", color=colors[kind], ms=4.5 if few else 2.5, alpha=0.9 if few else 0.5, mew=0)
        ax.plot([values.median()] * 2, [i - 0.36, i + 0.36], color="black", lw=1.5)
    ax.set(yticks=range(len(here)), yticklabels=here)
    ax.invert_yaxis()
    return here


# %%
figure, axes = plots.panels(1, 2, height=2.2)
for ax, case in zip(axes, cases, strict=True):
    strips(ax, selectivity.query("model == @case.name").dropna(), "method", "selectivity", METHODS)
    ax.axvline(1, color="0.7", lw=0.8, zorder=0)
    here = [kind for kind in METHODS if kind in set(selectivity.query("model == @case.name").dropna()["method"])]
    counted = selectivity.query("model == @case.name").dropna()["method"].value_counts()
    ax.set_yticklabels([f"{kind} ({counted[kind]})" for kind in here])
    ax.set(xscale="log", title=case.name, xlabel="effect on the samples meant / on the others")
report.figure("selectivity", figure)


# %%
def summary(rows: pd.DataFrame, columns: list[str]) -> dict:
    """Spread and median of each column by what the rows' ``key`` says, leaving out what is missing."""
    found = {key: {} for key in sorted(set(rows["key"]))}
    for key, entry in found.items():
        for name in columns:
            values = [float(v) for k, v in zip(rows["key"], rows[name], strict=True) if k == key and v == v]
            entry[name] = results.spread(values) | {"median": torch.tensor(values).median()}
    return found


selectivity["key"] = selectivity["model"] + ", " + selectivity["method"]
report.record(
    selectivity=summary(selectivity, ["selectivity"]),
    moves_without_enough_effect=len(selectivity) - len(selectivity.dropna()),
)

# %% [markdown]
# ## Turning a feature off
#
# One scalar for each direction that the feature owns, learned so that its own outputs vanish on samples that have it on
# alone; and the autoencoder's way, its owned units set to zero. *Left* is what remains of the feature's own output,
# *elsewhere* what happened to the samples that do not have it.


# %%
def own_outputs(case: Case, feature: int) -> slice:
    wide = case.probe.base.shape[1] // case.on.shape[1]
    return slice(feature * wide, (feature + 1) * wide)


def aftermath(case: Case, move, feature: int) -> dict:
    part, on = own_outputs(case, feature), case.on[:, feature]
    change = case.probe.change(move, 1.0) * case.probe.unit
    left = (case.probe.base + change)[on, part].norm() / case.probe.base[on, part].norm()
    return {"left": left.item(), "elsewhere": (change[~on].norm(dim=-1).mean() / case.probe.unit).item()}


def turn_off(case: Case, d: ed.Decomposition, feature: int) -> dict:
    numbers, owner = owners(case, d)
    mine, part = [v for v in numbers if owner[v] == feature], own_outputs(case, feature)
    tuned = study.moves.tune(
        d.target, study.moves.Subspace(d, mine), case.single[feature], lambda f: f[:, part].square().sum(-1).mean(),
        steps=200, learning_rate=0.05,
    )  # fmt: skip
    return aftermath(case, displaced(case.model, tuned.change), feature)


# %%
def silence(case: Case, feature: int) -> dict:
    mine = (case.sae_energy.argmax(0) == feature).nonzero()[:, 0].tolist()
    steps = dict.fromkeys(mine, -1.0)
    return aftermath(case, lambda s: case.sae.steered(case.model, case.layer, steps, how="scale"), feature)


rows = []
for case in cases:
    for feature in range(case.on.shape[1]):
        for d in case.fits:
            if any(owners(case, d)[1][v] == feature for v in owners(case, d)[0]):
                rows.append({"model": case.name, "method": "directions", **turn_off(case, d, feature)})
        rows.append({"model": case.name, "method": "SAE", **silence(case, feature)})
off = pd.DataFrame(rows)
off["key"] = off["model"] + ", " + off["method"]
report.record(turned_off=summary(off, ["left", "elsewhere"]))
report.table("off", pd.DataFrame(off.groupby("key")[["left", "elsewhere"]].mean()).reset_index()).round(3)

# %% [markdown]
# ## Two at once
#
# Two moves, each of half a standard deviation on its own samples. The table gives $\|\Delta_{ab} - \Delta_a -
# \Delta_b\| / \|\Delta_a + \Delta_b\|$: zero where effects add.

# %%
rows = []
for case in cases:
    d = case.fits[0]
    numbers, owner = owners(case, d)
    sizes = {v: case.probe.matched(along(d, v), case.on[:, owner[v]], 2 * level)[0] for v in numbers}
    for i, a in enumerate(numbers):
        for b in numbers[i + 1 :]:
            value = study.moves.interference(d, (a, sizes[a]), (b, sizes[b]), case.probe)
            kind = "one feature" if owner[a] == owner[b] else "two features"
            rows.append({"model": case.name, "directions of": kind, "does not add": value})
both = pd.DataFrame(rows)
both["key"] = both["model"] + ", " + both["directions of"]
report.record(two_at_once=summary(both, ["does not add"]))
pd.DataFrame(both.groupby("key")["does not add"].describe()).round(3)

# %% [markdown]
# ## Fine-tuning in a subspace
#
# The behaviour to change: one feature's own output is to be half of what it is. Only samples with this feature on
# alone are given. Each method stops when the squared error is down to 10% of what it was, so that success is equal;
# damage is the mean change on held-out samples without the feature. Full fine-tuning and LoRA are run on all weights,
# and, for the circles, also on the embedding alone, which is what our directions move.


# %%
def halve(case: Case, feature: int, change, patterns=("*",)) -> dict:
    part, x = own_outputs(case, feature), case.single[feature]
    with torch.no_grad():
        goal = case.model(x)
    goal[:, part] *= 0.5

    def loss(f):
        return (f - goal).square().sum(-1).mean()

    start = goal[:, part].square().sum(-1).mean().item()
    target = study.moves.Target(case.model, list(patterns))
    tuned = study.moves.tune(target, change(target), x, loss, until=0.1 * start, steps=1000, learning_rate=0.01)
    effect = case.probe.effect(displaced(case.model, tuned.change), 1.0)
    with displaced(case.model, tuned.change)(1.0) as model, torch.no_grad():
        reached = loss(model(x)).item() / start
    return {"numbers": tuned.size, "error left": reached, "damage": effect[~case.on[:, feature]].mean().item()}


# %%
def ways(case: Case, feature: int):
    patterns = case.fits[0].settings.parameters
    for d in case.fits:
        numbers, owner = owners(case, d)
        mine = [v for v in numbers if owner[v] == feature]
        if mine:
            yield "own directions", halve(case, feature, lambda t, d=d, m=mine: study.moves.Subspace(d, m), patterns)
    for seed in seeds:
        yield "LoRA, rank 1", halve(case, feature, lambda t, seed=seed: study.moves.LoRA(t, 1, seed))
    yield "all weights", halve(case, feature, study.moves.Full)
    if patterns != ("*",):
        yield "embedding only", halve(case, feature, study.moves.Full, patterns)


tuning = pd.DataFrame([
    {"model": case.name, "feature": feature, "way": way, **outcome}
    for case in cases for feature in range(case.on.shape[1]) for way, outcome in ways(case, feature)
])  # fmt: skip
report.table("tuning", tuning)
tuning["key"] = tuning["model"] + ", " + tuning["way"]
pd.DataFrame(tuning.groupby("key")[["numbers", "error left", "damage"]].mean()).round(4)

# %%
report.record(tuning=summary(tuning, ["numbers", "error left", "damage"]))
figure, axes = plots.panels(1, 2, height=1.9)
WAYS = {"own directions": plots.OURS} | dict.fromkeys(("embedding only", "LoRA, rank 1", "all weights"), plots.LABELLED)
for ax, case in zip(axes, cases, strict=True):
    rows = tuning.query("model == @case.name")
    here = strips(ax, rows, "way", "damage", WAYS)  # bars are medians, as the numbers recorded for the paper
    count = dict(zip(rows["way"], rows["numbers"], strict=True))
    ax.set_yticklabels([f"{way} ({count[way]})" for way in here])
    ax.set(title=case.name, xlabel="damage elsewhere (standard deviations)")
    ax.set_xlim(left=-0.005)
report.figure("tuning", figure)

# %% [markdown]
# In brackets: how many numbers are learned.
#
# ## Interactions
#
# A network with nine features and five outputs. Three pairs (0, 1), (2, 3) and (4, 5) share an output, $a + b + 2ab$,
# for which their product is needed. A fourth pair (6, 7) shares the output $a + b$: it is a control, since nothing
# there interacts. Feature 8 is alone. Every output has hidden units of its own, in random order, so the truth is known.
# Directions are learned on sparse data, one fit a seed, and the map, the normalised cross-curvature
# $\mathrm{E}[u_a^\top H u_b]$, is taken on denser samples in which features meet.
#
# In every fit the three pairs stand out from directions that share no output. The control stands out as much: the map
# shows a shared output, not a product.

# %%
pairs, control = ((0, 1), (2, 3), (4, 5)), ((6, 7),)
coupled, coupled_r2 = product.train(9, 8, pairs, seed=0, steps=target_steps // 2, sums=control)
sparse_x, _ = product.data(4096, 9, pairs, draw(1), active=0.05, sums=control)
dense_x, _ = product.data(2 * samples, 9, pairs, draw(2), active=0.3, sums=control)


def attempt(seed: int) -> ed.Decomposition:
    return ed.decompose(
        coupled, sparse_x, reference=ed.Constant(0.0), parameters=["hidden.weight"], n_directions=9, rank=2,
        factorization="tucker", tied=True, sparsity=ed.BatchTopK(1.1 / 9), steps=steps, batch_size=128,
        learning_rate=3e-2, seed=seed, progress=False,
    )  # fmt: skip


coupled_fits = [attempt(seed) for seed in seeds]


# %%
def margin(d: ed.Decomposition) -> dict:
    owner = d.impact(torch.eye(9)).argmax(0)
    size = ed.interactions(d, dense_x).abs()
    known, shared = product.interacting(owner, pairs), product.interacting(owner, control)
    other = ~known & ~shared & (owner.unsqueeze(0) != owner.unsqueeze(1))
    return {
        "features owned": owner.unique().numel(), "weakest pair": size[known].min().item() if known.any() else 0.0,
        "control pair": size[shared].min().item() if shared.any() else 0.0, "strongest other": size[other].max().item(),
    }  # fmt: skip


margins = pd.DataFrame([{"seed": seed, **margin(d)} for seed, d in zip(seeds, coupled_fits, strict=True)])
separated = margins["weakest pair"] > margins["strongest other"]
report.record(
    interactions={key: results.spread(margins[key].tolist()) for key in margins if key != "seed"}
    | {"fits": len(seeds), "separated": int(separated.sum())},
    interactions_r2=coupled_r2,
)
report.table("interactions", margins).round(3)

# %%
d = coupled_fits[0]
owner, matrix = d.impact(torch.eye(9)).argmax(0), ed.interactions(d, dense_x)
order = torch.argsort(owner, stable=True).tolist()  # by feature
names = [str(int(owner[v])) for v in order]
spot = {int(v): torch.tensor(2 * torch.pi * i / len(order)) for i, v in enumerate(order)}
TINT = {"product": plots.OURS, "sum": plots.TRUTH, "neither": plots.RANDOM}


def join(ax, a: int, b: int) -> None:
    """A line between two directions, as wide as their cross-curvature, named by what joins their features."""
    features, ends = tuple(sorted((int(owner[a]), int(owner[b])))), torch.stack([spot[a], spot[b]])
    kind = "product" if features in pairs else "sum" if features in control else "neither"
    middle = 0.55 * ends.cos().mean(), 0.55 * ends.sin().mean()
    ax.text(*map(float, middle), kind, color=TINT[kind], size=7, ha="center", va="center")
    ax.plot(ends.cos(), ends.sin(), color=TINT[kind], lw=10 * abs(float(matrix[a, b])), zorder=1)


# %%
figure, (left, center, right) = plots.panels(1, 3, height=2.2)
shown = matrix[order][:, order].clone()
plots.heat(left, shown.fill_diagonal_(0), signed=True, rows=names, columns=names, limit=0.5, label=" ")
used = maps.together(d, dense_x)[order][:, order]
plots.heat(center, used, signed=False, rows=names, columns=names, limit=1.0, label=" ")
for a in spot:
    for b in spot:
        if a < b and abs(float(matrix[a, b])) > 0.1:
            join(right, a, b)
for v, place in spot.items():
    plots.node(right, float(place.cos()), float(place.sin()), "white", 13, str(int(owner[v])))
right.set(aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
right.set_title("|cross-curvature| > 0.1")
right.axis("off")
left.set_ylabel("direction of feature")
left.set_title("cross-curvature (diagonal left out)")
center.set_title("used together")
report.figure("interactions", figure)

# %% [markdown]
# ## What is claimed
#
# A margin is in standard errors over moves or fits. Selectivities are compared by their logarithms, since they span
# orders of magnitude. Not reached: a map that tells a product from a sum.
#
# Where to go next: `edits` for moves of trained networks at equal success, with labels or without.


# %%
def logs(model, method):
    """Natural logarithms of the selectivities of a method's moves."""
    rows = selectivity.query("model == @model and method == @method")["selectivity"].dropna()
    return torch.tensor(rows.tolist()).clamp_min(1e-6).log()


def claim_difference(name, words, a, b, bound=0.0):
    """That the mean of ``a`` is above that of ``b`` by more than a bound."""
    error = (results.error_of_mean(a) ** 2 + results.error_of_mean(b) ** 2) ** 0.5
    over = f"{len(a)} and {len(b)} moves"
    report.claim(name, words, (a.mean() - b.mean()).item(), ">", bound, error, over)


for case in cases:
    ours = logs(case.name, "direction")
    for method in ("gradient", "random", "SAE, add"):
        claim_difference(f"{case.name}, {method}", f"{case.name}: directions are more selective than {method}",
                         ours, logs(case.name, method))  # fmt: skip
    mine = tuning.query("model == @case.name and way == 'own directions'")["damage"]
    lora = tuning.query("model == @case.name and way == 'LoRA, rank 1'")["damage"]
    claim_difference(f"{case.name}, damage", f"{case.name}: own directions do less damage than LoRA of rank one",
                     torch.tensor(lora.tolist()), torch.tensor(mine.tolist()))  # fmt: skip
rate = study.rates.told(int(separated.sum()), len(separated))
report.claim("pairs", "pairs with a product stand out of pairs that share no output, in more than half of the fits",
             rate["rate"], ">", 0.5, rate["error"], f"{len(separated)} fits")  # fmt: skip
report.verdicts()

# %%
report.write().name
