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
# embedding is the identity. With one and a half directions a feature, all features own one in most fits, and those
# that own none are hardly computed by the network itself. The neuron contributions of all layers together can be read
# from a feature's direction, at an r² of 0.98; all features own one in 50 of 60 fits. With a random embedding in 200
# dimensions they agree less. Directions fitted to one layer find the features too, but only that layer's third of the
# computation. Goals that were missed: 95% of fits with all features owned, and at most 1% of change elsewhere.

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

from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.study import recovery
from eigendecomp.study.moves import along
from eigendecomp.targets.toys import resid_mlp
from rooms.layers import fitting
from rooms.sequences import switches

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

# %% [markdown]
# ## The networks
#
# $$r_0 = x W_E, \qquad r_{l+1} = r_l + W_\text{out}^l\,\mathrm{ReLU}(W_\text{in}^l r_l), \qquad y = r_L W_E^\top,$$
#
# without biases, $W_E$ frozen: those of stochastic parameter decomposition (SPD), with 100 features and 50 or 2 × 25
# neurons, or 102 and 3 × 17. A feature is on with probability 1%, and then uniform in [−1, 1]. SPD's $W_E$ has random
# rows in 1,000 dimensions; here they have 200. What such networks learn is disputed, since $W_E W_E^\top$ is not the
# identity and the layers undo some of that. With $W_E$ the identity nothing is to be undone: that is the case in
# which the truth is clear, and the other is reported beside it.


# %%
def trained(layers, kind):
    size = {**sizes[layers], "width": 200}
    return resid_mlp.train(layers, kind, seed=seed, steps=training_steps[kind], batch_size=256, **size)


CASES = [(1, "identity"), (2, "identity"), (3, "identity"), (3, "random")]
networks, missed = {}, {}
for layers, kind in CASES:
    networks[layers, kind], missed[layers, kind] = trained(layers, kind)
report.record(missed={f"{layers} {kind}": value for (layers, kind), value in missed.items()})
pd.Series(missed).round(3)

# %% [markdown]
# The share of ReLU(x)'s squared size that a network misses is about a half, since neurons are shared.
#
# ## The fits
#
# One and a half directions a feature, of rank one in every matrix; two coefficients a sample are kept; the reference
# is the mean output.

# %%
fits, seconds = {}, {}
for (layers, kind), model in networks.items():
    started = time.process_time()
    n = round(multiple * sizes[layers]["features"])
    fits[layers, kind] = fitting.fit(model, n, seed=seed, steps=steps[layers])
    seconds[layers, kind] = time.process_time() - started
report.record(fit_cpu_seconds={f"{layers} {kind}": value for (layers, kind), value in seconds.items()})

# %% [markdown]
# ## One feature's direction, lit across the layers
#
# Columns of dots are, from the left, the residual stream (a dimension a feature, since the embedding is the identity)
# and the neurons of a layer, in turn. Grey: all that reaches the neurons from the feature's dimension and goes back
# to it in the network. In colour: the entries of the one direction that the feature owns, blue where they are positive
# and orange where they are negative; a matrix's part is turned so that it agrees with the weights in sign.


# %%
def own_parts(case):
    """By parameter, the part of the direction that each feature owns, and those directions' numbers."""
    model, d = networks[case], fits[case]
    truth = model.truth()
    owner, _ = recovery.owners(d.impact(truth.inputs, references))
    return recovery.owned_parts(d.directions(), owner, truth), owner


case = (3, "identity")
found, owner = own_parts(case)
example = example if int(owner[example]) >= 0 else int((owner >= 0).nonzero()[0])


def heights(n):
    return torch.linspace(1, -1, n)


def edges(ax, x, starts, ends, values, limit, color=None):
    """Lines from each start to each end, as wide as their values are large; the faintest are left out."""
    for k, j in (values.abs() > 0.06 * limit).nonzero().tolist():
        share = min(1.0, abs(float(values[k, j])) / limit)
        shade = color or plots.COLORS[0 if values[k, j] > 0 else 1]
        look = {"lw": 1 + 4 * share, "zorder": 1} if color else {"lw": 0.2 + 1.8 * share, "alpha": 0.2 + 0.8 * share}
        ax.plot(x, [starts[k], ends[j]], color=shade, solid_capstyle="round", **look)


# %%
def draw_network(ax, model, parts, feature):
    """The network's own weights of a feature in grey and, over them, the entries of a direction."""
    stream, lit = heights(len(model.W_E)), torch.zeros(len(model.W_E), dtype=torch.bool)
    lit[feature] = True
    for number, (name, w_in, w_out) in enumerate(model.weights):
        x, neurons = 2.0 * number, heights(len(w_in))
        for at, weight, key in ((x, w_in.T, "W_in"), (x + 1, w_out.T, "W_out")):
            part = parts[f"{name}.{key}.weight"][feature].T
            side = (stream, neurons) if key == "W_in" else (neurons, stream)
            only = weight * (lit[:, None] if key == "W_in" else lit)
            part = part * (part * only).sum().sign()
            edges(ax, [at, at + 1], *side, only, float(only.abs().max()), "0.85")
            edges(ax, [at, at + 1], *side, part, float(part.abs().max()))
        ax.plot([x + 1] * len(neurons), neurons, "o", ms=5, mfc="white", mec="0.2", mew=0.7, zorder=3)
        ax.text(x + 1, 1.09, f"neurons {number + 1}", ha="center", size=7)
    for number in range(len(model.layers) + 1):
        ax.plot([2 * number] * len(stream), stream, "o", ms=1.2, color="0.45", zorder=3)
        ax.plot(2 * number, stream[feature], "o", ms=4.5, color="black", zorder=4)
    ax.text(-0.12, stream[feature], f"feature {feature}", ha="right", va="center", size=8)
    ax.text(0, 1.09, "stream", ha="center", size=7)
    ax.axis("off")


figure, ax = plt.subplots(figsize=(plots.PAGE, 3.0))
draw_network(ax, networks[case], found, example)
report.figure("network", figure)

# %% [markdown]
# Lines that neither start nor end at the feature's dimension belong to other outputs, which the feature's neurons
# disturb, and to what later layers read there. They are many and faint.
#
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
main.round(3)

# %% [markdown]
# Over many seeds, and many sizes of the dictionary, the same is kept in `data/runs/layers.json`, which `make long`
# makes; four networks take turns. Floors are as many random directions of rank one, as many principal components of
# the gradients, and, for three layers, as many directions fitted to one layer alone.

# %%
kept = json.loads(Path("../data/runs/layers.json").read_text())
runs = pd.DataFrame(kept["rows"])
all_layers = runs[runs["only"] < 0]
usual = all_layers[(all_layers["multiple"] == 1.5) & (all_layers["width"] < 1000)]


def summary(group):
    """A line over seeds."""
    full = int((group["owned"] == group["features"]).sum())
    means = group[["owned", "selectivity", "mean_cosine", "mean_reader", "nc", "fit_cpu_seconds"]].mean()
    least = group[["least_selectivity", "least_cosine", "least_reader", "least_nc"]].min()
    return pd.Series({"seeds": len(group), "all owned": full, **means, **least, "nc sd": group["nc"].std()})


seeds = usual.groupby(["embedding", "layers"]).apply(summary, include_groups=False).reset_index()
report.table("seeds", seeds)
seeds.round(3)

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
def floor_table():
    """Means over the seeds that have floors, with an identity embedding."""
    some = usual[(usual["embedding"] == "identity") & usual["random nc"].notna()]
    lines = []
    for layers, group in some.groupby("layers"):
        for name, before in (("learned", ""), ("principal components", "principal "), ("random", "random ")):
            scores = {key: group[before + key].mean() for key in ("owned", "selectivity", "mean_cosine", "nc")}
            lines.append({"layers": layers, "directions": name, **scores})
    for _, row in runs[runs["only"] >= 0].iterrows():
        scores = {key: row[key] for key in ("owned", "selectivity", "mean_cosine", "nc")}
        lines.append({"layers": row["layers"], "directions": f"fitted to layer {row['only'] + 1} alone", **scores})
    return pd.DataFrame(lines)


floors = report.table("floors", floor_table())
floors.round(3)

# %% [markdown]
# ## How many directions
#
# Directions a feature, from a half to four, with an identity embedding: the share of features that own a direction,
# and NC r². A line for each number of layers; bars are the range over seeds.

# %%
sweep = all_layers[(all_layers["embedding"] == "identity")].assign(
    share=lambda table: table["owned"] / table["features"]
)
figure, axes = plots.panels(1, 2, width=0.8 * plots.PAGE, height=2.1)
for ax, key, title in zip(axes, ("share", "nc"), ("features that own a direction", "NC r²"), strict=True):
    for (layers, group), color in zip(sweep.groupby("layers"), plots.COLORS, strict=False):
        line = group.groupby("multiple")[key].agg(["mean", "min", "max"])
        name = "1 layer" if layers == 1 else f"{layers} layers"
        ax.plot(line.index, line["mean"], "o-", ms=3, lw=1.2, color=color, label=name)
        ax.vlines(line.index, line["min"], line["max"], color=color, lw=0.8)
    ax.set(xlabel="directions a feature", ylabel=title, xscale="log", ylim=(0, 1.04))
    ax.set_xticks([0.5, 1, 1.5, 2, 4], ["½", "1", "1.5", "2", "4"])
    ax.minorticks_off()
axes[1].legend(loc="lower right")
report.figure("sweep", figure)
counts = sweep.groupby(["layers", "multiple"]).agg(
    seeds=("seed", "count"), owned=("owned", "mean"), nc=("nc", "mean"), seconds=("fit_cpu_seconds", "mean")
)
report.table("sweep", counts.reset_index())
counts.round(3)

# %% [markdown]
# SPD's own size, with random rows in 1,000 dimensions:

# %%
large = all_layers[all_layers["width"] == 1000]
shown = ["layers", "seed", "features", "owned", "selectivity", "mean_cosine", "mean_reader", "nc", "fit_cpu_seconds"]
report.table("large", large[shown])
large[shown].round(3)

# %% [markdown]
# ## Switching a feature off
#
# Move the parameters along a feature's direction until what the layers add for it is gone, and see what else has
# changed. **Left**: the share of the squared size of what its output gains by it, with others on too.
# **Elsewhere**: the squared change of what they add over the data in which the feature is not on (negative, or more
# often zero), as a share of its squared size. **Beside**: the squared change of the other outputs in the very samples
# in which the feature is on, in units of the feature's own; neurons are shared, so that a feature's computation
# disturbs them, and with it goes the disturbance. The step is the one at which left and elsewhere add up to least.
#
# Against all that acts at one site, with its step looked for in the same way, and for every feature the site that does
# best: the same direction's part in a single layer; a neuron, scaled (of the three that contribute most); a unit of a
# sparse autoencoder of one layer's hidden activations, with as many units as there are directions (of the two units
# that the feature, on alone, excites most, in autoencoders that keep two or four).


# %%
def hidden(model, layer, x):
    """A layer's activations after the ReLU."""
    caught = []
    handle = model.layers[layer].relu.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return caught[0]


def autoencoders(model, x, units):
    """By (layer, kept), an autoencoder of a layer's activations, and how active its units are on one feature."""
    made = {}
    alone = torch.eye(len(model.W_E))
    for layer in range(len(model.layers)):
        inputs = hidden(model, layer, x)
        for k in sae_kept:
            sae = study.autoencoders.train(inputs, units, k, seed=seed, steps=sae_steps, batch_size=512)
            made[layer, k] = sae, sae.encode(hidden(model, layer, alone))
    return made


draw = torch.Generator().manual_seed(5)
data = {n: resid_mlp.data(20_000 if not smoke else 1000, n, draw) for n in {s["features"] for s in sizes.values()}}
saes = {
    case: autoencoders(model, data[len(model.W_E)], round(multiple * len(model.W_E)))
    for case, model in networks.items()
}


# %%
def moves_for(case, feature, v, parts, nc):
    """By method, the moves that a feature may be switched off by, each with its largest step and its signs."""
    model = networks[case]
    reach = 2 * sum(p.norm() ** 2 for p in own_weights(model, feature)).sqrt().item()
    moves = {"direction": [(along(fits[case], v), reach, True)]}
    mine = {name: part[feature] for name, part in parts.items()}
    if case[0] > 1:
        layers = model.truth().layers.values()
        moves["one layer of it"] = [(switches.restricted(model, mine, names), 2 * reach, True) for names in layers]
    sites = [(name, j) for name, w_in, _ in model.weights for j in range(len(w_in))]
    strongest = [sites[j] for j in nc[feature].abs().topk(3).indices.tolist()]
    moves["neuron"] = [(switches.without(model, f"{name}.W_out.weight", j), 3.0, False) for name, j in strongest]
    moves["autoencoder"] = [
        (switches.scaled_unit(sae, model, f"layers.{layer}.relu", unit), 3.0, False)
        for (layer, _), (sae, strength) in saes[case].items()
        for unit in strength[feature].topk(2).indices.tolist()
        if strength[feature, unit] > 0
    ]
    return moves


def own_weights(model, feature):
    """What of the weights touches the feature's embedding."""
    return [w @ model.W_E[feature] for _, w_in, w_out in model.weights for w in (w_in, w_out.T)]


# %%
def on_samples(n, feature, size):
    """Samples of the data with one feature on, positive."""
    x = resid_mlp.data(size, n, torch.Generator().manual_seed(6 + feature))
    x[:, feature] = torch.rand(size, generator=torch.Generator().manual_seed(7 + feature))
    return x


def switched(case):
    """What each method leaves of each tested feature, and does to the rest."""
    model, (parts, owner) = networks[case], own_parts(case)
    nc, lines = model.contributions().detach(), []
    for feature in [k for k in range(len(owner)) if owner[k] >= 0][:tested]:
        x = on_samples(len(owner), feature, 60)
        task = switches.Switch(model, lambda m, x: m.computed(x), x, data[len(owner)][:600], feature)
        for name, moves in moves_for(case, feature, int(owner[feature]), parts, nc).items():
            effects = [task.off(move, largest, both=both) for move, largest, both in moves]
            if effects:
                effect = switches.best(effects)
                lines.append({"layers": case[0], "embedding": case[1], "feature": feature, "method": name,
                              "left": effect.left, "beside": effect.beside, "elsewhere": effect.elsewhere})  # fmt: skip
    return lines


off = pd.DataFrame([line for case in CASES for line in switched(case)])
means = off.groupby(["embedding", "layers", "method"], sort=False)[["left", "beside", "elsewhere"]]
table = means.mean().reset_index().merge(means.median().reset_index(), on=["embedding", "layers", "method"],
                                         suffixes=("", ", median"))  # fmt: skip
report.table("off", table)
table.round(4)

# %%
COLORS = {
    "direction": plots.OURS, "one layer of it": plots.COLORS[5], "neuron": "0.45", "autoencoder": plots.SAE,
}  # fmt: skip
MARKERS = {"direction": "o", "one layer of it": "s", "neuron": "^", "autoencoder": "D"}
figure, axes = plots.panels(1, len(CASES), height=2.1, sharex=True, sharey=True)
for ax, (layers, kind) in zip(axes, CASES, strict=True):
    here = off[(off["layers"] == layers) & (off["embedding"] == kind)]
    for name, group in here.groupby("method", sort=False):
        spots = group[["left", "elsewhere"]].clip(lower=1e-6)
        look = {"color": COLORS[name], "ms": 2.5, "mew": 0, "alpha": 0.6}
        ax.plot(spots["left"], spots["elsewhere"], MARKERS[name], label=name, **look)
    ax.set(title=f"{layers} layer{'s' * (layers > 1)}, {kind}", xscale="log", yscale="log", xlabel="left")
axes[0].set_ylabel("changed elsewhere")
figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, markerscale=1.6)
report.figure("off", figure)

# %% [markdown]
# ## What was reached
#
# What was hoped for, and what came out.


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
        row["all owned"] / row["seeds"], ">=", 0.95,
    )  # fmt: skip
    report.claim(
        f"contributions_{layers}", f"{layers} layers: directions give neuron contributions, r² at least .97",
        row["nc"], ">=", 0.97, 0.0 if row["seeds"] < 2 else row["nc sd"] / row["seeds"] ** 0.5,
    )  # fmt: skip
    each = off[(off["layers"] == layers) & (off["embedding"] == "identity") & (off["method"] == "direction")]
    for key, bound in (("left", 0.005), ("elsewhere", 0.01)):
        report.claim(
            f"off_{key}_{layers}", f"switched off along its direction, {layers} layers: {key} at most {bound:g}",
            each[key].mean(), "<=", bound, each[key].std() / len(each) ** 0.5,
        )  # fmt: skip


# %%
def times_worse(layers):
    """By how much every method at one site is worse in the score in which it is worse."""
    ours = one_row(table, layers, "identity", method="direction")
    others = table[(table["layers"] == layers) & (table["embedding"] == "identity") & (table["method"] != "direction")]
    return {
        row["method"]: max(row[key] / max(ours[key], 1e-12) for key in ("left", "elsewhere"))
        for _, row in others.iterrows()
    }


worse = {layers: times_worse(layers) for layers in sizes}
report.record(times_worse={str(layers): value for layers, value in worse.items()}, seeds_run=len(usual))
for layers, methods in worse.items():
    report.claim(
        f"one_site_{layers}", f"{layers} layers: all that acts at one site is three times worse, left or elsewhere",
        min(methods.values()), ">=", 3,
    )  # fmt: skip
weak = max(lost, default=0.0)
report.claim(
    "lost", "a feature that owns no direction is one of which the network computes less than a quarter", weak, "<", 0.25
)
slowest = usual[(usual["layers"] == 3) & (usual["embedding"] == "identity")]["fit_cpu_seconds"]
report.claim("seconds", "a fit of three layers takes at most 60 s of one core", slowest.max(), "<=", 60)
pd.DataFrame([{"claim": c.statement, "found": c.quantity, "holds": c.verdict} for c in report.claims.values()]).round(4)

# %%
report.write().name
