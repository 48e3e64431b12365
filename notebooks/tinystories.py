# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What do directions of a story model's weights know that clusters and autoencoders do not?
#
# ![Share of a behaviour's gradient in 1, 5 and 20 rows of each dictionary.](../figures/tinystories_behaviours.png)
#
# *How much of a behaviour's gradient the best 1, 5 or 20 rows of each dictionary hold; above each panel stand the
# weight and the size of the dictionaries.*
#
# They know what changes the model's behaviour: five of 300 directions hold 27% of the gradient of what the model is
# about to say, five rows of the best opponent 20%. As readers of what tokens share, they are behind clusters of
# activations or level with them, except on predictions with 1,000 units.
#
# Words, before any other number:
#
# - The **site** is a weight and what arrives at it: here $W_K$ of block 4 and $W_V$ of block 5. A **use** is one token
#   there: what arrives, and what all later outputs ask of the weight's output. A **direction** is a change of the
#   weight of rank one: a *reader* of what arrives and a *writer*.
# - A **unit** is a direction, a unit of a sparse autoencoder (SAE), a centre of a k-means, and so on; all opponents see
#   the same site and tokens. Its **row** is what it writes in the weight. An autoencoder is read by its *code*, *before
#   its threshold*, or by its *decoder rows*, as directions are.
# - A **concept** of *context* is about the token and what comes before it, one of *prediction* about what the model is
#   about to say. A unit **resolves** it as well as it ranks the tokens that it holds for: average precision, of the
#   unit that is best on validation stories.
# - A **behaviour** is a set of tokens on which the model puts half of its probability. Rows **hold** the share of its
#   gradient that lies in their span.
# - A **push** is a step along a unit until its strongest tokens' predictions have moved by a fixed amount. It is
#   **selective** if others move less.

# %% [markdown]
# ## What comes out
#
# On test stories; intervals are 95%, over concepts (or behaviours) and seeds. Where no size is given there are 300
# units.
#
# - **Behaviours: ahead of every opponent**, at both weights and both sizes. At $W_V$ random single gradients, k-means
#   of inputs, principal components and rows of an autoencoder follow k-means of gradients, in this order. The lead is
#   smallest at $W_K$, over k-means of gradients: two points.
# - **Concepts: behind k-means of inputs on context, by 0.02 at $W_V$, and level with it on predictions.** How an
#   autoencoder is read matters as much. At $W_V$ directions lead its code in both families. They lead its decoder rows,
#   which are read as directions are, by 0.035 on predictions and not on context.
# - **With 100 units directions are behind** k-means of inputs, which needs no gradient, in both families and at both
#   weights. Where only a token's two largest units count, decoder rows are ahead of directions at either size.
# - **With 1,000 units** (three fits, on stories that nothing had been scored on): ahead of autoencoders however read,
#   in both families; level with k-means on context and ahead of it by 0.01 on predictions, barely. Random training
#   inputs are less than 0.03 behind. Thirty directions hold half of a behaviour's gradient; it takes fifty centres of
#   gradients. Used whole, principal components hold more than directions.
# - **Heads.** Ablating one of the five heads that hold most of a behaviour's gradient costs it twice as much, on
#   average, as one of the five that hold most of all behaviours' together.
# - **Pushes: behind.** A step along a direction has a selectivity of 2.3, an autoencoder's unit scaled where it is on
#   one more than seven times as large. Adding the unit's row at every token has 1.1 (six units of one fit).
#
# What gradients add is what changes the model's behaviour. To rank tokens by what they share, cluster activations.

# %% tags=["parameters"]
sizes, weights, seeds = [100, 300], ["W_K", "W_V"], [0, 1, 2]
live_size, live_weight = 100, "W_V"  # fitted here, beside the file's
shown_size, steps_drafted, batch_drafted = 300, 300, 128
counts, top_heads = (1, 5, 20), 5
level, share, pushed = 0.05, 0.02, 6  # total variation; share of the tokens that a unit stands for; units pushed a fit

# %%
import json
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of libraries, some when they are imported

import pandas as pd
import torch
from IPython.display import Markdown, display

import eigendecomp as ed
from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.settings import Settings
from eigendecomp.study.moves import Move, along, probabilities, push_either_way
from eigendecomp.targets.stories import model as stories
from rooms import shared_batches
from rooms.stories import heads as story_heads
from rooms.stories import rivals
from rooms.stories import units as story_units

plots.style()

# %%
smoke = results.profile() == "smoke"
if smoke:
    steps_drafted, pushed = 4, 1
report = results.Results(
    "tinystories", sizes=sizes, weights=weights, seeds=seeds, live_size=live_size, live_weight=live_weight,
    shown_size=shown_size, steps_drafted=steps_drafted, batch_drafted=batch_drafted, counts=counts,
    top_heads=top_heads, level=level, share=share, pushed=pushed,
)  # fmt: skip

# %% [markdown]
# ## The model, its stories, and two sites
#
# The shipped model has the shape of TinyStories-1M: width 64, 8 blocks of 16 heads. Two weights are looked at: $W_K$ of
# block 4, a middle block as in the draft, and $W_V$ of block 5. A sample is a *use* of a weight, one token with what
# arrives there and what all later outputs ask; it is scaled to norm one. The layers are written with standard inputs,
# which changes no output. What arrives at a weight is what every opponent sees, on the same tokens.

# %%
story = rivals.Story() if not smoke else rivals.Story(60, 24, 24, 16, 2)
logp = story.logits["test"][:, :-1].log_softmax(-1).gather(2, story.tokens["test"][:, 1:, None])
families = {family: story.known["test"].of(family) for family in ("context", "prediction")}
report.record(
    target={"parameters": sum(p.numel() for p in story.model.parameters()), "nats_in_windows": -logp.mean()},
    concepts={family: len(found) for family, found in families.items()},
)
f"{-logp.mean():.2f} nats a token, {len(families['context'])} and {len(families['prediction'])} concepts"

# %% [markdown]
# ## What is tuned on what, said beforehand
#
# *Fits* see training stories. *Settings* (coefficients kept, steps, how clusters start) and *readings* (encoder or
# decoder rows) are chosen at each size, for each method and for each way of reading an autoencoder, on seed 100 and
# validation stories, at $W_V$; they serve both weights. For concepts the criterion is the mean precision of both
# families, for behaviours what five rows hold. The *unit* for each concept is chosen on validation stories. *Test*
# stories are scored once, with the seeds that the files hold. All fits are in `data/runs/stories*.csv`, made by
# `notebooks/tools/long/stories.py`; one is made again below.
#
# Opponents with the same number of units: autoencoders (BatchTopK) read by their code, before their threshold, and by
# decoder rows, as directions are read; spherical k-means of inputs, and of single gradients (centres of rank one);
# inputs of random training tokens; the commonest tokens; principal components; random readers. A ridge probe with the
# labels is the ceiling.

# %%
runs = Path(results.__file__).resolve().parents[2] / "data" / "runs"
tuning: Any = pd.read_csv(runs / "stories_tuning.csv")
concepts: Any = pd.read_csv(runs / "stories.csv").query("size in @sizes and weight in @weights")
behaviours: Any = pd.read_csv(runs / "stories_behaviours.csv").query("size in @sizes and weight in @weights")
names = [name for name in concepts.columns if name.split(": ")[0] in families]
of = {family: [name for name in names if name.startswith(f"{family}: ")] for family in families}
chosen = concepts[(concepts["on"] == "all") & (concepts.weight == live_weight)].drop_duplicates(["label", "size"])
chosen = chosen.set_index(["size", "label"])[["setting", "way"]]
report.record(
    chosen={size: {label: dict(row) for label, row in part.droplevel(0).iterrows()}
            for size, part in chosen.groupby(level=0)},
    fits=len(concepts.drop_duplicates(["weight", "size", "seed", "label"])),
)  # fmt: skip
report.record(seeds_of={w: {s: int(part.seed.nunique()) for s, part in whole.groupby("size")}
                        for w, whole in concepts[concepts.label == "k-means of inputs"].groupby("weight")})  # fmt: skip
report.table("tuning", tuning)
chosen

# %% [markdown]
# ## Concepts
#
# The table has the mean average precision over the concepts of a family, one row a method. The supervised probe is the
# ceiling.

# %%
scored = pd.DataFrame([
    {"weight": row["weight"], "size": row["size"], "method": row["label"], "seed": row["seed"], "on": row["on"],
     "family": family, "precision": row[of[family]].mean()}
    for _, row in concepts.iterrows() for family in families
])  # fmt: skip
report.table("resolution", scored)


def by_seed(weight: str, size: int, method: str, family: str, on: str = "all") -> torch.Tensor:
    """The precision of a method, (seeds, concepts)."""
    keep = (concepts.weight == weight) & (concepts["size"] == size) & (concepts["on"] == on)
    return torch.tensor(concepts[keep & (concepts.label == method)][of[family]].to_numpy(dtype=float))


means = scored[scored["on"] == "all"].groupby(["weight", "size", "family", "method"])["precision"]
report.record(
    resolution={
        weight: {size: {family: {m: results.spread(means.get_group((weight, size, family, m)).tolist())
                                 for m in means.mean().loc[weight, size, family].index} for family in families}
                 for size in sizes} for weight in weights
    }
)  # fmt: skip
means.mean().unstack(["weight", "size", "family"]).round(3).sort_values(("W_V", sizes[-1], "prediction"))

# %% [markdown]
# Directions less each opponent, on the same concepts: the mean, and the 95% interval of a bootstrap over concepts and
# seeds. The *winner* is the unsupervised method with the highest mean.

# %%
opponents = ["SAE, code", "SAE, before its threshold", "SAE, decoder rows", "k-means of inputs",
             "k-means of gradients", "training inputs", "tokens", "PCA", "random rows"]  # fmt: skip
rows = []
for weight in weights:
    for size in sizes:
        for family in families:
            mine = by_seed(weight, size, "directions", family)
            for other in opponents:
                gap = study.concepts.paired(mine, by_seed(weight, size, other, family))
                rows.append({"weight": weight, "size": size, "family": family, "opponent": other} | vars(gap))
gaps = report.table("gaps", pd.DataFrame(rows))
gaps["text"] = [f"{r['mean']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]" for _, r in gaps.iterrows()]
gaps.pivot_table(index="opponent", columns=["weight", "size", "family"], values="text", aggfunc="first").loc[opponents]

# %%
rows = []
for (weight, size, family), part in means.mean().groupby(level=[0, 1, 2]):  # pyright: ignore
    inner = part.droplevel([0, 1, 2]).drop("ridge probe")
    winner = inner.idxmax()
    rivals_only = inner[[name for name in opponents if name in inner.index]]
    best = rivals_only.idxmax()
    gap = study.concepts.paired(by_seed(weight, size, "directions", family), by_seed(weight, size, best, family))
    rows.append({"weight": weight, "size": size, "family": family, "directions": inner["directions"],
                 "winner": winner, "its precision": inner[winner], "best opponent": best} | vars(gap))  # fmt: skip
winners = report.table("winners", pd.DataFrame(rows))
report.record(
    gaps={w: {s: {f: {r["opponent"]: {k: r[k] for k in ("mean", "low", "high", "error")} for _, r in part.iterrows()}
                  for f, part in one.groupby("family")} for s, one in whole.groupby("size")}
          for w, whole in gaps.groupby("weight")},
    winners={w: {s: {r["family"]: {"winner": r["winner"], "precision": r["its precision"],
                                   "best opponent": r["best opponent"],
                                   "gap": {k: r[k] for k in ("mean", "low", "high", "error")}}
                     for _, r in one.iterrows()} for s, one in whole.groupby("size")}
             for w, whole in winners.groupby("weight")},
)  # fmt: skip
winners.round(3)

# %%
order = ["ridge probe", "k-means of inputs", "k-means of gradients", "directions", "SAE, decoder rows",
         "SAE, before its threshold", "SAE, code", "training inputs", "tokens", "random rows", "PCA"]  # fmt: skip
tint = {"directions": plots.OURS, "SAE": plots.SAE, "k-means of inputs": plots.CLUSTERS_OF_INPUTS,
        "k-means of gradients": plots.CLUSTERS_OF_GRADIENTS, "training inputs": plots.SAMPLES,
        "single gradients": plots.SAMPLES, "PCA": plots.PCA, "PCA of gradients": plots.PCA, "tokens": plots.UNITS,
        "random rows": plots.RANDOM, "ridge probe": plots.TRUTH}  # fmt: skip
tint |= {name: plots.SAE for name in order if "SAE" in name}
called = {"random rows": "random readers", "tokens": "one unit a token", "training inputs": "random training inputs",
          "ridge probe": "ridge probe (supervised)"}  # fmt: skip

# %%
figure, axes = plots.panels(1, 4, height=2.6, sharey=True)
for ax, (weight, family) in zip(axes, [(w, f) for w in weights for f in families], strict=True):
    for position, method in enumerate(order):
        for size in sizes:
            if (weight, size, family, method) in means.groups:
                found = means.get_group((weight, size, family, method))
                ax.plot([found.min(), found.max()], [position] * 2, color=tint[method], lw=1.5)
                plots.dot(ax, found.mean(), position, tint[method], larger=size > sizes[0], size=4.5)
    best = max(means.mean().loc[weight, sizes[-1], family]["directions"], 0)
    ax.axvline(best, color=plots.OURS, lw=0.6, zorder=0)
    ax.set(title=f"{weight}, {family}", xlabel="average precision", ylim=(len(order) - 0.5, -0.5), xlim=(0.1, 0.95))
    ax.grid(axis="x", lw=0.4)
axes[0].set(yticks=range(len(order)), yticklabels=[called.get(name, name) for name in order])
for label, name in zip(axes[0].get_yticklabels(), order, strict=True):
    label.set_color(tint[name])
plots.name_dots(figure, *(f"{size} units" for size in sizes))
report.figure("concepts", figure)

# %% [markdown]
# With only the two largest units of a token counted, since an autoencoder's code has few on, the order is another.

# %%
two = scored[scored["on"] == "two"].groupby(["weight", "size", "family", "method"])["precision"].mean()
report.record(two_on={w: {s: {f: two.loc[w, s, f].to_dict() for f in families} for s in sizes} for w in weights})
two.unstack(["weight", "size", "family"]).round(3).sort_values(("W_V", sizes[-1], "prediction"))

# %% [markdown]
# One fit of the file again, here (directions of $W_V$, seed 0): does it give what the file has? On one processor
# it did to four digits, on another within 0.01.

# %%
setting, way = chosen.loc[(live_size, "directions")]
units = rivals.directions(story, live_weight, live_size, 0, json.loads(setting) | ({"steps": 20} if smoke else {}))
d = units.fit
assert d is not None
x = {part: story.site(live_weight).x[part] for part in ("choose", "test")}
z = units.scores(way, x)
_, again, best_unit = rivals.resolved(story, z)
filed = {family: by_seed(live_weight, live_size, "directions", family)[0].mean().item() for family in families}
here = {family: again[numbers].mean().item() for family, numbers in families.items()}
report.record(
    again={"file": filed, "here": here},
    error_of_uses=d.reconstruction_error(story.tokens["test"]),
    live_setting=json.loads(setting),
)
pd.DataFrame({"file": filed, "here": here}).round(4)

# %% [markdown]
# ## Other ways to read a direction
#
# By its readers; by the size of its coefficient at the use, which knows what outputs ask; and by how far the output at
# the token moves for a step along it. One fit, on fewer tokens, since outputs take a pass each.

# %%
few = {part: story.tokens[part][: 48 if not smoke else 6] for part in x}
count = next(iter(few.values())).numel()
subset = {part: story.known[part].truth[:count] for part in x}
enough = torch.stack([(t.sum(0) >= story.least // 2) & ~t.all(0) for t in subset.values()]).all(0)
ways = {
    "reader of the decoder": {part: found[:count] for part, found in units.scores("decoder", x).items()},
    "reader of the encoder": {part: found[:count] for part, found in units.scores("encoder", x).items()},
    "coefficient of the use": {part: d.encode(found).abs() for part, found in few.items()},
    "activation √(uᵀHu)": {part: d.activation(found) for part, found in few.items()},
}
kept_numbers, rows = enough.nonzero()[:, 0].tolist(), []
for name, found in ways.items():
    one = study.concepts.resolve(*((found[part], subset[part][:, enough]) for part in ("choose", "test"))).single
    of_family = {f: [j for j, i in enumerate(kept_numbers) if i in numbers] for f, numbers in families.items()}
    rows.append({"reading": name} | {f: one[js].mean().item() for f, js in of_family.items()})
table = report.table("readings", pd.DataFrame(rows))
report.record(
    readings={row["reading"]: {f: row[f] for f in families} for row in rows}, readings_concepts=len(kept_numbers)
)
table.round(3)

# %% [markdown]
# ## What gradients know and activations do not: behaviours in few directions
#
# A behaviour is a set of tokens that the model is about to say, with half of its probability or more: a girl's name,
# "and", a closing quotation mark. Its gradient is that of the mean log mass of the set, over the test tokens where the
# model is about to show it. How much of its squared norm is in the span of the best 1, 5 or 20 rows of a dictionary,
# each a change of rank one? An autoencoder's row and a cluster of inputs write what is asked, on average, where they
# are on. No rows of rank one can hold more than the gradient's own singular directions.

# %%
shared = [
    name for name in behaviours.columns if name not in ("weight", "size", "kind", "seed", "label", "setting", "rows")
]
behaviours["held"] = behaviours[shared].mean(axis=1)
held = behaviours.groupby(["weight", "size", "label", "rows"])["held"]
report.table("behaviours", behaviours)
own = {}
for weight in weights:
    g = story.gradients("test", weight).unflatten(1, (64, 64))
    energy = torch.linalg.svdvals(g).square()
    own[weight] = {n: (energy[:, :n].sum(1) / energy.sum(1)).mean().item() for n in counts}
report.record(
    behaviours_told=len(shared), own=own,
    behaviours={w: {s: {m: {n: results.spread(held.get_group((w, s, m, n)).tolist()) for n in counts}
                        for m in held.mean()[w, s].index.unique(0)} for s in sizes} for w in weights},
)  # fmt: skip
held.mean().unstack(["weight", "size", "rows"]).round(3)

# %%
rows = []
for (weight, size, label), part in behaviours.query("rows == 5 and label != 'directions'").groupby(
    ["weight", "size", "label"]
):
    mine = behaviours.query("rows == 5 and label == 'directions' and weight == @weight and size == @size")
    gap = study.concepts.paired(torch.tensor(mine[shared].to_numpy()), torch.tensor(part[shared].to_numpy()))
    rows.append({"weight": weight, "size": size, "opponent": label} | vars(gap))
held_gaps = report.table("behaviours_gaps", pd.DataFrame(rows))
report.record(
    behaviours_gaps={w: {s: {r["opponent"]: {k: r[k] for k in ("mean", "low", "high", "error")}
                             for _, r in one.iterrows()} for s, one in whole.groupby("size")}
                     for w, whole in held_gaps.groupby("weight")}
)  # fmt: skip
held_gaps.round(3)

# %%
lines = ["directions", "k-means of gradients", "k-means of inputs", "SAE", "single gradients", "PCA of gradients",
         "random rows"]  # fmt: skip
told = {"SAE": "SAE rows", "random rows": "random rank one", "single gradients": "random single gradients"}
figure, axes = plots.panels(1, len(weights) * len(sizes), height=2.7, sharey=True)
for ax, (weight, size) in zip(axes, [(w, s) for w in weights for s in sizes], strict=True):
    for method in lines:
        found = [held.get_group((weight, size, method, n)) for n in counts]
        ax.plot(counts, [y.mean() for y in found], "o-", color=tint[method], ms=3, lw=1.2,
                label=told.get(method, method))  # fmt: skip
        for n, y in zip(counts, found, strict=True):
            ax.plot([n, n], [y.min(), y.max()], color=tint[method], lw=2.5, alpha=0.5)
    ax.set(title=f"{weight}, of {size} rows", xscale="log", xticks=counts, xticklabels=counts, xlabel="rows used")
    ax.minorticks_off()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
axes[0].set(ylabel="share of a behaviour's gradient", ylim=(0, None))
report.figure("behaviours", figure)

# %% [markdown]
# ## Up to a thousand units, fresh stories, larger shares
#
# The scores above are from test stories on which earlier forms of this notebook had been scored too. Here $W_V$ is
# scored once more on *fresh* stories: windows of other test stories, which nothing had been scored on. There are up to
# 1,000 units, and up to 64 of an autoencoder's are on. Settings, readings and units are chosen on validation stories as
# before.

# %%
fresh: Any = pd.read_csv(runs / "stories_fresh.csv")
fresh_sizes = [int(size) for size in sorted(fresh["size"].unique())]
report.record(fresh_seeds={size: int(part[part.label == "directions"].seed.nunique())
                           for size, part in fresh.groupby("size")})  # fmt: skip


def on_fresh(size: int, method: str, family: str) -> torch.Tensor:
    """The precision of a method on fresh stories, (seeds, concepts)."""
    keep = (fresh["size"] == size) & (fresh["label"] == method) & (fresh["on"] == "all")
    return torch.tensor(fresh[keep][of[family]].to_numpy(dtype=float))


rows = []
for size in fresh_sizes:
    for family in families:
        mine = on_fresh(size, "directions", family)
        for method in ["directions", *opponents, "ridge probe"]:
            theirs = on_fresh(size, method, family)
            gap = {} if method in ("directions", "ridge probe") else vars(study.concepts.paired(mine, theirs))
            rows.append({"size": size, "family": family, "method": method, "precision": theirs.mean().item()} | gap)
table = report.table("fresh", pd.DataFrame(rows))
report.record(fresh={s: {f: {r["method"]: r.drop(["size", "family", "method"]).dropna().to_dict()
                             for _, r in part.iterrows()} for f, part in one.groupby("family")}
                     for s, one in table.groupby("size")})  # fmt: skip
table.pivot_table(index="method", columns=["size", "family"], values="precision").round(3)

# %% [markdown]
# How much of a behaviour's gradient do more rows hold, up to all of a dictionary's? *Half* is the number of rows, added
# one at a time, the most aligned first, at which a dictionary holds half of the gradient, read off between the numbers
# tried; it is empty where all rows together hold less. Random rows hold something because there are many of them: any
# 1,000 span a quarter of the 4,096 dimensions. Principal components are slow at first and hold most once nearly all are
# used.

# %%
more_rows: Any = pd.read_csv(runs / "stories_fresh_behaviours.csv")
more_rows["held"] = more_rows[shared].mean(axis=1)
share_of = more_rows.groupby(["size", "label", "rows"])["held"].mean()


def half_at(size: int, method: str) -> float | None:
    """At how many rows the mean share is a half, between those tried; None if all hold less."""
    line = share_of[size, method]
    above = line[line >= 0.5]
    if above.empty:
        return None
    after = above.index[0]
    before = [n for n in line.index if n < after]
    if not before:
        return float(after)
    low, n = line[before[-1]], before[-1]
    return n * (after / n) ** ((0.5 - low) / (line[after] - low))


halves = {s: {m: half_at(s, m) for m in share_of[s].index.unique(0)} for s in fresh_sizes}
report.record(half_of_a_behaviour=halves,
              shares={s: {m: share_of[s, m].to_dict() for m in halves[s]} for s in fresh_sizes})  # fmt: skip
report.table("shares", share_of.reset_index())
pd.DataFrame(halves).round(0)

# %%
width = plots.COLUMN if len(fresh_sizes) == 1 else plots.PAGE
figure, axes = plots.panels(1, len(fresh_sizes), width=width, height=2.5, sharey=True)
for ax, size in zip(axes, fresh_sizes, strict=True):
    ends = {}
    for method in [name for name in lines if name in halves[size]]:
        line = share_of[size, method]
        ax.plot(line.index, line, "o-", color=tint[method], ms=2.5, lw=1.2)
        ends[told.get(method, method)] = line.iloc[-1], tint[method]
    ax.axhline(0.5, color="black", lw=0.6, ls=":")
    ticks = [n for n in (1, 10, 100, 1000) if n <= size]
    ax.set(title=f"{size:,} units", xscale="log", xticks=ticks, xticklabels=ticks, xlabel="rows used", ylim=(0, 1))
    ax.minorticks_off()
# Of the last panel alone, the others have the same colours.
plots.name_ends(ax, size, ends, gap=0.065)  # pyright: ignore[reportPossiblyUnboundVariable]
axes[0].set_ylabel("share of a behaviour's gradient")
report.figure("shares", figure)

# %% [markdown]
# ## In which heads a behaviour lies, checked by ablation
#
# Each behaviour's gradient in all attention weights of all blocks is split by head. The check: a head's output is
# replaced by its mean, and the behaviour's mean log mass falls, on test tokens where the model is about to show it.
# Averaged are the falls of five heads, each ablated alone: the *own five* hold most of the behaviour's gradient, the
# *general five* most of all behaviours' together, and *any five* stands for the mean over all heads. If the gradient
# knows *which* heads, its own five cost more than the general five. *Rank correlation* is that of gradient and fall
# over heads; *specific* divides the gradient by the mean over behaviours first. The picture has the 24 heads in which
# some behaviour's share stands out most, each row as a share of its largest value over all heads.

# %%
energy = story_heads.energy(story, "test")  # (behaviours, blocks · heads), shares
general = energy.mean(0)
drop = story_heads.drops(story, "test")  # (behaviours, blocks · heads)
own_heads = energy.topk(top_heads, 1).indices
general_heads = general.topk(top_heads).indices
of_own = drop.gather(1, own_heads).mean(1)
of_general = drop[:, general_heads].mean(1)
specific = [story_heads.rank_correlation(energy[b] / general, drop[b]) for b in range(len(drop))]
alike = [story_heads.rank_correlation(energy[b], drop[b]) for b in range(len(drop))]
difference = of_own - of_general
report.record(
    heads={
        "own five": of_own.mean(), "general five": of_general.mean(), "any five": drop.mean(),
        "own less general": {"mean": difference.mean(), "error": results.error_of_mean(difference)},
        "rank correlation": results.spread(alike), "rank correlation, specific": results.spread(specific),
        "share of the first": energy.amax(1).mean(),
        "for half": study.scores.fewest(energy, 0.5).double().mean(), "behaviours": len(drop), "of": energy.shape[1],
    }
)  # fmt: skip
report.values["heads"]

# %%
order_b = (energy @ torch.arange(float(energy.shape[1]))).argsort()
labels = list(story.behaving["test"])
picked = (energy / general).amax(0).topk(24).indices.sort().values
figure, axes = plots.panels(1, 2, height=5.2)
titles = ("share of the gradient in a head", "loss of log mass when the head is ablated")
for ax, values, title in zip(axes, (energy, drop.clamp_min(0)), titles, strict=True):
    scale = values[:, picked] / values.amax(1, keepdim=True).clamp_min(1e-9)
    rows_told = [labels[b] for b in order_b.tolist()] if ax is axes[0] else []
    columns = [f"{int(h) // 16}.{int(h) % 16}" for h in picked]
    plots.heat(ax, scale[order_b], signed=False, rows=rows_told, columns=columns)
    ax.set(title=title, xlabel="block.head")
axes[0].set_ylabel("behaviours, from those in early heads to those in late ones")
figure.colorbar(
    axes[1].collections[0], ax=axes, label="as a share of the row's largest", location="bottom", shrink=0.5, aspect=40
)
report.figure("ablation", figure)

# %% [markdown]
# ## Does a direction keep to a head?
#
# The largest share of a direction's squared norm in one head, beside single uses and random directions. Directions here
# have rank one as a matrix over all heads, so nothing in the fit asks them to keep to one.

# %%
rows = []
for weight in weights:
    site = story.site(weight)
    made = units if weight == live_weight else rivals.directions(story, weight, live_size, 0, json.loads(setting))
    draw = torch.Generator().manual_seed(0)
    writers = {
        "directions": made.writers,
        "single uses": site.asked[::50],
        "random": torch.randn(500, 64, generator=draw),
    }
    for name, writer in writers.items():
        assert writer is not None
        part = writer.unflatten(1, (16, 4)).square().sum(2)
        largest = (part / part.sum(1, keepdim=True)).amax(1)
        rows.append({"weight": weight, "of": name, "median": largest.median().item()})
table = report.table("heads", pd.DataFrame(rows))
report.record(largest_head={w: dict(zip(p["of"], p["median"], strict=True)) for w, p in table.groupby("weight")})
table.pivot(index="of", columns="weight", values="median").round(2)

# %% [markdown]
# ## What directions look like
#
# The draft's table: the tokens at which a direction of $W_V$ reads most on test stories, and the next tokens that a
# push promotes and suppresses there. Shown are the ten with the best concepts by their precision on these same stories,
# so this is the best side of one fit; all are in `figures/tinystories_directions.csv`.

# %%
layer = int(rivals.SITES[live_weight].split(".")[1])
windows = story.tokens["test"][: 8 if smoke else 24]
with torch.no_grad():
    entering = story.model(windows, stop_at_layer=layer)  # pyright: ignore[reportCallIssue]
probe = story_units.FromBlock(story.model, entering, probabilities, layer)
rows_of, known = slice(0, windows.numel()), story.known["test"]
precision, which = study.concepts.average_precision(z["test"], known.truth).max(1)
strength = story_units.heads(d)
rows = []
for unit in range(live_size if not smoke else 4):
    on = story_units.strongest(z["test"][rows_of][:, unit], share)
    up, down = story_units.promoted(probe, along(d, unit), 4.0, on)
    head = strength[unit].topk(3)
    seen = story_units.contexts(story.tokens["test"], z["test"][:, unit], 6)
    rows.append({
        "direction": unit, "concept": known.names[int(which[unit])], "precision": precision[unit].item(),
        "contexts": " / ".join(story_units.bold(c) for c in seen),
        "promotes": " · ".join(up), "suppresses": " · ".join(down),
        "heads": ", ".join(f"{h} ({v:.0%})" for v, h in zip(*(y.tolist() for y in head), strict=True)),
    })  # fmt: skip
directions = report.table("directions", pd.DataFrame(rows))
best = directions.sort_values("precision", ascending=False).drop_duplicates("concept").head(10)
best = best.assign(contexts=[" <br> ".join(c.split(" / ")[:4]) for c in best.contexts])
display(Markdown(story_units.markdown(best, ["direction", "concept", "contexts", "promotes", "suppresses", "heads"])))

# %% [markdown]
# ## Selectivity of pushes
#
# A unit is pushed until next-token distributions at its strongest tokens (2%) have moved by 0.05 in total variation;
# selectivity is that over the mean change elsewhere, with the better sign. A step of the weights acts at every token,
# as adding an autoencoder's decoder row to what arrives does; scaling the autoencoder's unit acts only where it is on.
# The first units of one fit each.

# %%
module = f"{rivals.SITES[live_weight]}.ln1"
sae_setting = json.loads(chosen.loc[(live_size, "SAE, before its threshold"), "setting"])
sae = study.autoencoders.train(
    story.site(live_weight).x["fit"],
    live_size,
    sae_setting["kept"],
    seed=0,
    steps=20 if smoke else sae_setting["steps"],
)
open_scores = sae.before_threshold(x["test"])


def steering(unit: int, how: Any) -> Move:
    return lambda delta: sae.steered(story.model, module, {unit: delta}, how=how)


moves = {
    "directions": ([along(d, u) for u in range(pushed)], z["test"]),
    "SAE, row added": ([steering(u, "add") for u in range(pushed)], open_scores),
    "SAE, unit scaled": ([steering(u, "scale") for u in range(pushed)], open_scores),
}

# %%
rows = []
for name, (several, strong) in moves.items():
    for unit, move in enumerate(several):
        on = story_units.strongest(strong[rows_of][:, unit], share)
        at, others = probe.among(on), {"others": probe.among(~on)}
        push = push_either_way(at, others, move, level, by="others", first=1.0, tolerance=0.05)
        rows.append({"units": name, "unit": unit, "selectivity": push and push.selectivity("others")})
table = report.table("selectivity", pd.DataFrame(rows).astype({"selectivity": float}))
reached = table.dropna().groupby("units")["selectivity"]
report.record(
    selectivity=reached.median().to_dict(),
    reached=reached.size().to_dict(),
    pushed_units=pushed,
)
reached.median().round(2)

# %% [markdown]
# ## The draft's own setting: outputs as samples
#
# As in the draft: $W_K$ of a middle block, KL divergence, one output as a sample, 10 and 100 directions of rank one by
# head, a tenth of the coefficients kept. The table has the error, beside principal components of 1,024 training
# gradients and random directions with as many coefficients, refitted by least squares, which ours are not. With ten
# directions principal components are ahead.

# %%
name_k = f"{rivals.SITES['W_K']}.attn.W_K"
short = {part: found[:, :16] for part, found in story.tokens.items()}
settings = Settings(
    ed.KLDivergence(), ed.OtherSample(), (name_k,), n_directions=100, rank=1, factorization="cp", tied=False,
    sparsity=ed.BatchTopK(0.1), steps=steps_drafted, batch_size=batch_drafted, learning_rate=1e-2, seed=0,
)  # fmt: skip
drafts, some = shared_batches.fits(story.model, short["fit"], settings, (10, 100)), short["test"][:64]
g = study.scores.gradient_rows(drafts[10], some)
principal = study.floors.principal_directions(study.scores.gradient_rows(drafts[10], short["fit"][:64]), 100)
random = study.floors.random_directions(drafts[10].decoder.shapes, 100, 1, seed=0).flat()
errors = {
    n: {"ours": one.reconstruction_error(some), "PCA": study.floors.sparse_error(g, principal[:n], 0.1 * n),
        "random": study.floors.sparse_error(g, random[:n], 0.1 * n)}
    for n, one in drafts.items()
}  # fmt: skip
report.record(draft_error=errors)
pd.DataFrame(errors).T.rename_axis("directions").round(3)

# %% [markdown]
# ## A page to look at
#
# `figures/tinystories_browse.html` shows the directions fitted here on test stories: contexts, promoted tokens, heads.

# %%
page = results.folder() / "tinystories_browse.html"
strong = d.encode(story.tokens["choose"][:16]).abs()
d.browse(story.tokens["test"][: 4 if smoke else 20], page, title="Directions of a story model's W_V",
         names=stories.readable, threshold=strong.flatten().quantile(0.95).item(), references=4)  # fmt: skip
f"{page.stat().st_size / 1e6:.1f} MB"

# %% [markdown]
# ## What holds
#
# Each claim that directions are ahead, against each opponent. *Fails* means that the opponent is level or ahead.
#
# Where to go next: `smollm` asks the same of a model made by others, `edits` what a direction is worth as an edit, and
# `cost` what gradients take.

# %%
for weight in weights:
    for size in sizes:
        for family in families:
            for other in ("SAE, code", "SAE, before its threshold", "SAE, decoder rows", "k-means of inputs",
                          "k-means of gradients", "training inputs", "random rows"):  # fmt: skip
                gap = report.values["gaps"][weight][str(size)][family][other]
                text = f"{size} directions of {weight} resolve {family} better than {called.get(other, other)}"
                over = f"{by_seed(weight, size, other, family).shape[-1]} concepts"
                report.claim(f"{family}, {weight}, {size}, {other}", text, gap["mean"], ">", 0, gap["error"], over)
        for other in lines[1:]:
            gap = report.values["behaviours_gaps"][weight][str(size)][other]
            text = f"five of {size} directions of {weight} hold more of a behaviour than {told.get(other, other)}"
            over = f"{len(shared)} behaviours"
            report.claim(f"behaviours, {weight}, {size}, {other}", text, gap["mean"], ">", 0, gap["error"], over)
gap = report.values["heads"]["own less general"]
text = "ablating the five heads with most of a behaviour's gradient costs it more than those of all behaviours"
report.claim("heads", text, gap["mean"], ">", 0, gap["error"], f"{len(drop)} behaviours")
report.verdicts()

# %%
report.write().name
