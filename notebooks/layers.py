# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Layers: does one direction hold a feature's computation in all layers?
#
# A residual network computes $y = x + \mathrm{ReLU}(x)$ for a hundred features with half as many neurons, in one layer
# or spread over two or three. Whatever is done for a feature is done by many neurons of every layer, and no neuron
# works for one feature alone. **One direction of parameter space holds what all layers do for a feature**, where the
# embedding is the identity: what each neuron contributes can be read from it at an r² of .98. A step along its readers
# switches the feature off.
#
# Drawn below is a network of three layers, and one feature's direction in it.

# %% tags=["parameters"]
seed = 0
example = 7  # the feature that is drawn
tested = 24  # features that are switched off
references = 16
sae_steps = 600
sae_kept = [2.0, 4.0]
multiple = 1.5  # directions a feature

# %%
import json
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # of libraries, some when they are imported

import matplotlib.pyplot as plt
import pandas as pd
import torch

from eigendecomp.report import plots, results
from eigendecomp.study import recovery
from eigendecomp.targets.toys import resid_mlp
from rooms.layers import drawing, fitting, switching, tables

# %%
plots.style()
smoke = results.profile() == "smoke"
sizes, training_steps, steps = fitting.SIZES, fitting.TRAINING_STEPS, fitting.STEPS
if smoke:
    sizes = {layers: {"features": 20, "neurons": 12 // layers} for layers in sizes}
    training_steps, steps = dict.fromkeys(training_steps, 150), dict.fromkeys(sizes, 120)
    tested, sae_steps = 4, 40
report = results.Results(
    "layers", seed=seed, example=example, tested=tested, references=references, sae_steps=sae_steps,
    sae_kept=sae_kept, multiple=multiple,
)  # fmt: skip

# %%
CASES = [(3, "identity"), (1, "identity"), (2, "identity"), (3, "random")]
networks, missed, fits, seconds = {}, {}, {}, {}
for layers, kind in CASES:
    size = {**sizes[layers], "width": 200, "steps": training_steps[kind], "batch_size": 256}
    networks[layers, kind], missed[layers, kind] = resid_mlp.train(layers, kind, seed=seed, **size)
    started, n = time.process_time(), round(multiple * sizes[layers]["features"])
    fits[layers, kind] = fitting.fit(networks[layers, kind], n, seed=seed, steps=steps[layers])
    seconds[layers, kind] = time.process_time() - started


# %%
def own_parts(case):
    """By parameter, the part of the direction that each feature owns, and those directions' numbers."""
    model, d = networks[case], fits[case]
    truth = model.truth()
    owner, _ = recovery.owners(recovery.strength(d, truth, references))
    return recovery.owned_parts(d.directions(), owner, truth), owner


case = (3, "identity")
found, owner = own_parts(case)
example = example if int(owner[example]) >= 0 else int((owner >= 0).nonzero()[0])
figure, ax = plt.subplots(figsize=(plots.PAGE, 3.0))
drawing.network(ax, networks[case], found, example)
report.figure("network", figure)

# %% [markdown]
# **One feature's direction, lit across the layers.** Columns of dots are, from the left, the residual stream (a
# dimension a feature, since the embedding is the identity) and the neurons of a layer, in turn. Grey: all that reaches
# the neurons from the feature's dimension and goes back to it in the network. In colour: the entries of the one
# direction that the feature owns, red where they are positive and blue where they are negative; a matrix's part is
# turned so that it agrees with the weights in sign. Lines that neither start nor end at the feature's dimension belong
# to other outputs, which the feature's neurons disturb, and to what later layers read there. They are many and faint.
#
# What came out, with the identity as embedding:
#
# - All features own a direction in 58 of 60 fits, each the better of two that start at samples. Single fits that start
#   at random take as long and do so in 50 of 60. Features that own none are those that the network computes least.
# - Directions fitted to one layer find the features too, but only that layer's third of the computation.
# - A step along its whole direction takes a feature's computation away, and 1.5 to 1.9% changes elsewhere: more than
#   the 1% that was hoped for. A step along the direction's readers alone takes away as much, and .7% changes at most.
#
# **With a random embedding in 200 dimensions and three layers both fail**: contributions agree at an r² of about a
# half, and switching a feature off changes over a tenth of the rest.
#
# ## The networks
#
# $$r_0 = x W_E, \qquad r_{l+1} = r_l + W_\text{out}^l\,\mathrm{ReLU}(W_\text{in}^l r_l), \qquad y = r_L W_E^\top,$$
#
# without biases, $W_E$ frozen: those of stochastic parameter decomposition (SPD), with 100 features and 50 or 2 × 25
# neurons, or 102 and 3 × 17. A feature is on with probability 1%, and then uniform in [−1, 1]. SPD's $W_E$ has random
# rows in 1,000 dimensions; here they have 200. What such networks learn is disputed, since $W_E W_E^\top$ is not the
# identity and the layers undo some of that. With $W_E$ the identity nothing is to be undone: that is the case in which
# the truth is clear, and the other is reported beside it. The share of ReLU(x)'s squared size that a network misses is
# about a half, since neurons are shared.
#
# A fit has one and a half directions a feature, of rank one in every matrix; two coefficients a sample are kept; the
# reference is the mean output. Two fits start at samples, and the one with the lower training error is kept.

# %%
report.record(
    missed={f"{layers} {kind}": value for (layers, kind), value in missed.items()},
    fit_cpu_seconds={f"{layers} {kind}": value for (layers, kind), value in seconds.items()},
)
pd.DataFrame({"missed": missed, "seconds of a fit": seconds}).round(3)

# %% [markdown]
# ## What every neuron does for every feature
#
# The contribution of neuron $j$ to feature $i$ is $\mathrm{NC}_j(i) = (W_U[i] W_\text{out})_j\,(W_\text{in}
# W_E[i])_j$: left, of the network's own weights; right, of each feature's direction alone, put in their place and
# brought to the same size, neurons of all layers side by side.


# %%
def contributions(case):
    """NC of the network and of the features' directions, each of these scaled to the truth by least squares."""
    model = networks[case]
    truth, mine = model.contributions().detach(), model.contributions(own_parts(case)[0])
    scale = (truth * mine).sum(1, keepdim=True) / mine.square().sum(1, keepdim=True).clamp_min(1e-30)
    return truth, scale * mine


truth, mine = contributions(case)
figure, axes = plots.panels(1, 2, height=3.4)
for ax, values, title in zip(axes, (truth, mine), ("in the network", "in each feature's direction"), strict=True):
    plots.heat(ax, values, signed=True, limit=float(truth.abs().quantile(0.998)), label="contribution")
    for layer in range(1, 3):
        ax.axvline(layer * sizes[3]["neurons"], color="black", lw=0.8)
    ax.set(title=title, xlabel="neuron of layer 1 | layer 2 | layer 3", ylabel="feature")
report.figure("contributions", figure)

# %% [markdown]
# ## Scores, and floors beside them
#
# **Owned**: features whose own input, on alone, has the largest impact on some direction. **Selectivity**: that impact
# over the next feature's. **Cosine**: of the owned direction's part in a layer with $\partial y_i/\partial w$ there,
# mean and least over features and layers; **reader** the same of the input sides. **NC r²**: squared correlation of
# the contributions over the neurons of all layers together, mean over features.

# %%
rows = []
for case, model in networks.items():
    scores = recovery.recovery(fits[case], model, references=references)
    rows.append({"layers": case[0], "embedding": case[1], **scores.row(), "cpu seconds": seconds[case]})
    report.record(**{f"by_layer_{case[0]}_{case[1]}": {"cosine": scores.mean_cosine, "least": scores.least_cosine}})
main = report.table("recovery", pd.DataFrame(rows))
NAMES = {
    "mean_cosine": "cosine", "least_cosine": "least cosine", "mean_reader": "reader", "least_reader": "least reader",
    "least_selectivity": "least selectivity", "nc": "NC r²", "least_nc": "least NC r²", "nc sd": "NC r², sd",
    "full": "all owned", "fit_cpu_seconds": "seconds of a fit",
    "cpu seconds": "seconds of a fit", "seconds": "seconds of a fit",
}  # fmt: skip
main.rename(columns=NAMES).round(3)

# %% [markdown]
# Over many seeds, and many sizes of the dictionary, the same is kept in `data/runs/layers.json`, which `make long`
# makes. The *least* scores are over all features of all seeds, and zero where a feature owns no direction. Floors are
# as many random directions of rank one, as many principal components of the gradients, and, for three layers, as many
# directions fitted to one layer alone.

# %%
kept = json.loads(Path("../data/runs/layers.json").read_text())
runs = pd.DataFrame(kept["rows"])
all_layers = runs[runs["only"] < 0]
usual = all_layers[(all_layers["multiple"] == 1.5) & (all_layers["width"] < 1000) & ~all_layers["single"]]
seeds = usual.groupby(["embedding", "layers"]).apply(tables.over_seeds, include_groups=False).reset_index()
report.table("seeds", seeds)
seeds.rename(columns=NAMES).round(3)

# %% [markdown]
# Each fit above is the better of two that start at gradients unlike each other, chosen as k-means++ chooses centres
# (`start="samples", restarts=2`). Beside them single fits from random directions, with more steps, in about as much
# time: how many of the same seeds own all features.

# %%
ways = report.table("ways", tables.ways(all_layers[all_layers["embedding"] == "identity"]))
report.record(complete={
    way: {"fits": int(group["fits"].sum()), "all owned": int(group["all owned"].sum())}
    for way, group in ways.groupby("way")
})  # fmt: skip
ways.round(1)

# %% [markdown]
# Which features own no direction? Those that the network itself hardly computes. Below, what the layers add to a
# feature's output where it is on alone at 1: ReLU would add 1. First the features that were lost in these fits, then
# all features of the network drawn above.

# %%
lost = [value for row in usual.query("embedding == 'identity'")["lost_computed"].dropna() for value in row]
with torch.no_grad():
    computed = {
        layers: networks[layers, "identity"].computed(torch.eye(sizes[layers]["features"])).diagonal()
        for layers in sizes
    }
strengths = {f"all, {layers} layers": values.tolist() for layers, values in computed.items()}
report.record(
    lost={"features": len(lost), "largest": max(lost, default=0.0)},
    computed={str(layers): results.spread(values) | {"values": []} for layers, values in computed.items()},
)
pd.DataFrame({
    name: pd.Series(values, dtype=float).describe() for name, values in {"lost": lost, **strengths}.items()
}).round(3)  # fmt: skip

# %%
floors = report.table("floors", tables.floors(usual, runs[runs["only"] >= 0]))
floors.rename(columns=NAMES).round(3)

# %% [markdown]
# ## How many directions
#
# Directions a feature, from a half to four, with an identity embedding: the share of features that own a direction,
# and NC r². A line for each number of layers; bars are the range over seeds.

# %%
sweep = all_layers[(all_layers["embedding"] == "identity") & ~all_layers["single"]].copy()
sweep["share"], sweep["full"] = sweep["owned"] / sweep["features"], sweep["owned"] == sweep["features"]
figure, axes = plots.panels(1, 2, width=0.8 * plots.PAGE, height=2.1)
TITLES = {"share": "features that own a direction", "nc": "neuron contributions, r²"}
for ax, (key, title) in zip(axes, TITLES.items(), strict=True):
    for (layers, group), dash in zip(sweep.groupby("layers"), (":", "--", "-"), strict=False):
        line = group.groupby("multiple")[key].agg(["mean", "min", "max"])
        name = "1 layer" if layers == 1 else f"{layers} layers"
        ax.plot(line.index, line["mean"], "o", ls=dash, ms=3, lw=1.2, color=plots.OURS, label=name)
        ax.vlines(line.index, line["min"], line["max"], color=plots.OURS, lw=0.8)
    ax.set(xlabel="directions a feature", ylabel=title, xscale="log", ylim=(0, 1.04))
    ax.set_xticks([0.5, 1, 1.5, 2, 4], ["½", "1", "1.5", "2", "4"])
    ax.minorticks_off()
axes[1].legend(loc="lower right")
report.figure("sweep", figure)
counts = sweep.groupby(["layers", "multiple"]).agg(
    seeds=("seed", "count"), full=("full", "sum"), owned=("owned", "mean"), nc=("nc", "mean"),
    seconds=("fit_cpu_seconds", "mean"),
)  # fmt: skip
report.table("sweep", counts.reset_index())
counts.rename(columns=NAMES).rename_axis(["layers", "directions a feature"]).round(3)

# %% [markdown]
# SPD's own size, with random rows in 1,000 dimensions. One of three networks with three layers loses five features. At
# this learning rate, chosen on smaller networks, its fits are unstable, from random directions too. At half the rate,
# tried afterwards on this network alone, all its features own a direction.

# %%
large = all_layers[all_layers["width"] == 1000]
shown = ["layers", "seed", "features", "owned", "selectivity", "mean_cosine", "mean_reader", "nc", "fit_cpu_seconds"]
report.table("large", large[shown])
large[shown].rename(columns=NAMES).round(3)

# %% [markdown]
# ## Switching a feature off
#
# Move the parameters along a feature's direction until what the layers add for it is gone, and see what else has
# changed. **Left**: how much of what the layers add to the feature's output remains, as a share of its squared size,
# with others on too. **Elsewhere**: the squared change of what they add over the data in which the feature is not on
# (negative, or more often zero), as a share of its squared size. **Beside**: the squared change of the other outputs in
# the very samples in which the feature is on, in units of the feature's own; neurons are shared, so that a feature's
# computation disturbs them, and with it goes the disturbance. The step is the one at which left and elsewhere add up to
# least.
#
# Two moves act on all layers at once: the **direction**, and **its readers**, the parts of it in the matrices that read
# the stream. What neurons write is shared, so a change there is felt wherever they are on; a change of what they read
# from the feature's dimension is not. (Readers were chosen on networks that are not reported, of seed 100.)
#
# Beside them stand moves at one site, each with its step looked for in the same way and, for every feature, at the site
# that does best. **One layer of it**: the same direction's part in a single layer, or its reader there. **Neuron**: one
# neuron scaled, of the three that contribute most. **Autoencoder**: a unit of a sparse autoencoder of one layer's
# hidden activations with as many units as there are directions, of the two units that the feature, on alone, excites
# most (in autoencoders that keep two or four).

# %%
draw = torch.Generator().manual_seed(5)
data = {n: resid_mlp.data(20_000 if not smoke else 1000, n, draw) for n in {s["features"] for s in sizes.values()}}
lines = []
for (layers, kind), model in networks.items():
    n = len(model.W_E)
    units = switching.sites(model, data[n], round(multiple * n), sae_kept, seed=seed, steps=sae_steps)
    task = switching.Off(model, fits[layers, kind], data[n], units)
    lines += [{"layers": layers, "embedding": kind, **row} for row in task.rows(tested)]
off = pd.DataFrame(lines).sort_values(["embedding", "layers"], kind="stable")
means = off.groupby(["embedding", "layers", "method"], sort=False)[["left", "beside", "elsewhere"]]
table = means.mean().reset_index().merge(means.median().reset_index(), on=["embedding", "layers", "method"],
                                         suffixes=("", ", median"))  # fmt: skip
report.table("off", table)
table.round(4)

# %%
LOOK = {
    "direction": (plots.OURS, "o"), "its readers": (plots.OURS, "v"), "one layer of it": (plots.PART, "s"),
    "neuron": (plots.UNITS, "^"), "autoencoder": (plots.SAE, "D"),
}  # fmt: skip
figure, axes = plots.panels(1, len(CASES), height=2.1, sharex=True, sharey=True)
for ax, (layers, kind) in zip(axes, sorted(CASES, key=lambda case: (case[1], case[0])), strict=True):
    here = off[(off["layers"] == layers) & (off["embedding"] == kind)]
    for name, group in here.groupby("method", sort=False):
        spots = group[["left", "elsewhere"]].clip(lower=1e-6)
        color, marker = LOOK[name]
        ax.plot(spots["left"], spots["elsewhere"], marker, color=color, label=name, ms=2.5, mew=0, alpha=0.6)
    ax.set(
        title=f"{layers} layer{'s' * (layers > 1)}, {kind}", xscale="log", yscale="log", xlabel="left of the feature"
    )
axes[0].set_ylabel("changed elsewhere")
figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=1.6)
report.figure("off", figure)

# %% [markdown]
# ## What was reached
#
# What was hoped for, and what came out. Not reached: less than 1% elsewhere along whole directions. Not settled:
# networks whose layers must first undo their embedding.
#
# Where to go next: `peers` for other decompositions of small networks, `sequences` for circuits of attention heads.


# %%
def one_row(frame, layers, kind, **more):
    """The one row of a table for a network."""
    rows = frame[(frame["layers"] == layers) & (frame["embedding"] == kind)]
    for key, value in more.items():
        rows = rows[rows[key] == value]
    return rows.iloc[0]


for layers in sizes:
    row = one_row(seeds, layers, "identity")
    report.claim(
        f"owned_{layers}", f"{layers} layers: all features own a direction in 95% of {row['seeds']:.0f} seeds",
        row["all owned"] / row["seeds"], ">=", 0.95, over=f"{row['seeds']:.0f} fits",
    )  # fmt: skip
    report.claim(
        f"contributions_{layers}", f"{layers} layers: directions give neuron contributions, r² at least .97",
        row["nc"], ">=", 0.97, 0.0 if row["seeds"] < 2 else row["nc sd"] / row["seeds"] ** 0.5,
        f"{row['seeds']:.0f} fits",
    )  # fmt: skip

# %%
ALL_LAYERS = {"direction": "off", "its readers": "readers"}
for layers in sizes:
    for method, key in ALL_LAYERS.items():
        each = off[(off["layers"] == layers) & (off["embedding"] == "identity") & (off["method"] == method)]
        for score, bound in (("left", 0.005), ("elsewhere", 0.01)):
            report.claim(
                f"{key}_{score}_{layers}",
                f"switched off along {method.replace('its', 'the')}, {layers} layers: {score} at most {bound:g}",
                each[score].mean(), "<=", bound, each[score].std() / len(each) ** 0.5, f"{len(each)} features",
            )  # fmt: skip


# %%
def times_worse(layers, method):
    """By how much every method at one site is worse in the score in which it is worse."""
    ours = one_row(table, layers, "identity", method=method)
    here = table[(table["layers"] == layers) & (table["embedding"] == "identity")]
    others = here[~here["method"].isin(ALL_LAYERS)]
    return {
        row["method"]: max(row[key] / max(ours[key], 1e-12) for key in ("left", "elsewhere"))
        for _, row in others.iterrows()
    }


# %%
worse = {f"{layers} {method}": times_worse(layers, method) for layers in sizes for method in ALL_LAYERS}
report.record(times_worse=worse, seeds_run=len(usual))
for layers in sizes:
    for method, key in (("direction", "one_site"), ("its readers", "readers_one_site")):
        report.claim(
            f"{key}_{layers}",
            f"{layers} layers: all at one site is three times worse than {method}, left or elsewhere",
            min(worse[f"{layers} {method}"].values()), ">=", 3,
        )  # fmt: skip
weak = max(lost, default=0.0)
report.claim(
    "lost", "a feature that owns no direction is one of which the network computes less than a quarter", weak, "<", 0.25
)
slowest = usual[(usual["layers"] == 3) & (usual["embedding"] == "identity")]["fit_cpu_seconds"]
report.claim("seconds", "a fit of three layers takes at most 60 s of one core", slowest.max(), "<=", 60,
             over=f"the slowest of {len(slowest)} fits")  # fmt: skip
report.verdicts()

# %%
report.write().name
