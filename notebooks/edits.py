# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Directions as edits: one behaviour less, and what it costs
#
# A direction is a change of the weights that one can keep. What is it worth as an edit, beside edits that are made from
# labelled examples? Behaviours of the story model ("she" and "her", closing a quotation, the name Lily, …), told
# by rules, are to lose half of their mass on test stories, each by a change of one and the same weight; the cost is
# what happens to all other tokens.
#
# The first table says who wins, the last one where; nothing is claimed beyond them. One weight, one block, one small
# model; LoRA is trained by Adam on the examples alone, without a term that holds it to the model elsewhere.
#
# The fits and edits behind this take a quarter of an hour of one core: `python notebooks/tools/long/edits.py` makes
# `data/runs/edits.csv`, which is read here.

# %% tags=["parameters"]
layer = 7  # the block whose MLP weight W_in is edited
examples = 10  # labelled examples an edit, in the first comparison
draws = 2000  # of the bootstrap over behaviours

# %%
import json
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of libraries

import numpy as np
import pandas as pd

from eigendecomp.report import plots, results

plots.style()
runs = Path(results.__file__).resolve().parents[2] / "data" / "runs"
rows: Any = pd.read_csv(runs / "edits.csv").query("layer == @layer")
tuning = [json.loads(row) for row in pd.read_csv(runs / "edits_tuning.csv")["setting"]]
if results.profile() == "smoke":
    draws = 50
report = results.Results("edits", layer=layer, examples=examples, draws=draws)

# %% [markdown]
# ## What is compared
#
# All edits are of `blocks.7.mlp.W_in` (64 × 256) and made from the same labelled examples: training tokens at which the
# model gives the behaviour at least half of its mass. $G$ is the gradient of their mean log mass.
#
# | method | the change |
# |---|---|
# | one direction | of the three with the largest $\langle G,u\rangle^2/u^\top Hu$, the best on validation stories |
# | SAE unit, folded | the same with $u$ = (encoder row) ⊗ $W^\top$(decoder row), an SAE of what arrives at the weight |
# | one random row | the same with random rows of rank one: the floor |
# | SAE unit, hook | the unit's own part scaled down where it is on, at run time; below zero where that must be |
# | several directions | $-G$ fitted by least squares from a few directions (matching pursuit) |
# | span of directions | the closed form $-(U^\top H U + \lambda)^{-1} U^\top G$ in the span of all directions |
# | gradient step; rank 1 | $-G$; its leading singular pair |
# | K-FAC step | $-C^{-1} G S^{-1}$, moments of what arrives and of what is asked |
# | ROME-like | $-C^{-1}k \otimes G^\top k$, $k$ the examples' mean input |
# | LoRA, rank 1 | Adam on the examples until they are halved; with a penalty $\lambda \sum F \Delta^2$ (EWC) |
#
# Sizes of dictionaries (100 or 300), ridges, ranks, rates and penalties were chosen on two other behaviours, another
# seed and validation stories. Every change is then scaled until half of the behaviour's mass is left on test tokens
# that show it, so that success is equal. Directions and SAE are learned without a label; labels pick the row.

# %%
tried = pd.DataFrame([row for row in tuning if "chosen" not in row])
sizes, settings = tuning[-1]["chosen"]
report.record(sizes=sizes, chosen=settings, settings_tried=len(tried))
report.table("tuning", tried).round(4)

# %% [markdown]
# ## The cost of halving a behaviour
#
# Means over seeds, then geometric means over behaviours, in nats a token: over all tokens that do not show the
# behaviour; over those of the concept that suffers most; over the same words in other contexts. *Best in* counts the
# behaviours in which a method costs least. Intervals are 95% over behaviours, by bootstrap, of the ratio to one
# direction. Edits that never reach half are left out of a method's means, and counted.

# %%
ten = rows[rows.examples == examples]
DAMAGES = ["damage", "worst", "same_words"]
by = ten.groupby(["method", "behaviour"])[DAMAGES].mean()
damage: Any = by["damage"].unstack(0)
reached = ten.groupby("method")["damage"].apply(lambda values: int(values.notna().sum()))
draw = np.random.default_rng(0)


def ratio(method: str, other: str = "one direction") -> tuple[float, float, float]:
    """Geometric mean of damage over another method's, over behaviours that both reach, and its 95% interval."""
    logs = np.log(damage[method] / damage[other]).dropna().to_numpy()
    means = logs[draw.integers(len(logs), size=(draws, len(logs)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values.dropna()).mean()))


# %%
best = damage.idxmin(axis=1).value_counts()
table = []
for method in damage.columns:
    middle, low, high = ratio(method)
    one = ten[ten.method == method]
    row = {"method": method} | {name: geometric(by.loc[method, name]) for name in DAMAGES}
    row |= {"to_one_direction": middle, "low": low, "high": high, "best_in": int(best.get(method, 0))}
    row |= {"reached": int(reached[method]), "of": len(one), "seconds": float(one["seconds"].median())}
    table.append(row | {"bytes": int(one["bytes"].iloc[0])})
table = pd.DataFrame(table).sort_values("damage")
report.record(
    methods=table.set_index("method").to_dict("index"), behaviours=len(damage),
    seeds=sorted(ten.seed.unique().tolist()),
)  # fmt: skip
report.table("methods", table).round(4)

# %% [markdown]
# One point is a behaviour, the mean over seeds; the line is the geometric mean.

# %%
KINDS = {"one direction": plots.OURS, "several directions": plots.OURS, "span of directions": plots.OURS,
         "SAE unit, folded": plots.SAE, "SAE unit, hook": plots.SAE, "one random row": plots.RANDOM}  # fmt: skip
figure, (ax, right) = plots.panels(1, 2, height=2.9, width_ratios=[1.7, 1])
order = table["method"].tolist()
for place, method in enumerate(order):
    color = KINDS.get(method, plots.PCA)
    values = damage[method].dropna()
    ax.plot(values, [place] * len(values), "o", ms=3, alpha=0.6, color=color, mew=0)
    ax.plot(geometric(values), place, "|", color="black", ms=11, mew=1.6)
ax.set(xscale="log", xlabel="KL elsewhere (nats a token) at half the mass", ylim=(len(order) - 0.4, -0.6))
ax.set_yticks(range(len(order)), [f"{m} ({reached[m]}/{len(ten[ten.method == m])})" for m in order])

# %% [markdown]
# ## How many examples?
#
# The same with 1, 10 and 100 labelled examples, over the seeds and behaviours that all three have.

# %%
counts = rows.groupby(["seed", "behaviour"])["examples"].nunique()
full = rows.set_index(["seed", "behaviour"]).loc[counts[counts == counts.max()].index].reset_index()
by_examples: Any = full.groupby(["method", "examples", "behaviour"])["damage"].mean()
by_examples = by_examples.groupby(["method", "examples"]).apply(geometric).unstack()
report.record(by_examples={m: {str(n): float(v) for n, v in row.dropna().items()} for m, row in by_examples.iterrows()},
              by_examples_cases=int((counts == counts.max()).sum()))  # fmt: skip
LINES = {"one direction": "-", "span of directions": "--", "gradient step": ":", "ROME-like": "-", "K-FAC step": "--",
         "LoRA, rank 1, Fisher": "-."}  # fmt: skip
for method, style in LINES.items():
    values = by_examples.loc[method].dropna()
    right.plot(values.index, values, style, color=KINDS.get(method, plots.PCA), lw=1.2, marker="o", ms=2.5)
    above = {"gradient step": 4, "K-FAC step": -3}.get(method, 0)  # their ends are close
    label, end = method.replace(", rank 1", ""), (values.index[-1], values.iloc[-1])
    right.annotate(label, end, (4, above), textcoords="offset points", va="center", size=6)
right.set(xscale="log", yscale="log", xlabel="labelled examples", ylabel="KL elsewhere (nats a token)")
right.set_xticks(list(by_examples.columns), [str(n) for n in by_examples.columns])
right.minorticks_off()
report.figure("damage", figure)
by_examples.sort_values(examples).round(4)

# %% [markdown]
# ## Who wins where
#
# The method that costs least, behaviour by behaviour.

# %%
wins = pd.DataFrame({"best": damage.idxmin(axis=1), "its damage": damage.min(axis=1),
                     "one direction": damage["one direction"], "SAE unit, folded": damage["SAE unit, folded"],
                     "ROME-like": damage["ROME-like"]}).rename_axis("behaviour").reset_index()  # fmt: skip
report.table("wins", wins).round(4)

# %%
for name, other, statement in (
    ("sae", "SAE unit, folded", "one direction costs less than a folded SAE unit"),
    ("random", "one random row", "one direction costs less than a random row"),
    ("gradient", "gradient step", "one direction costs less than a gradient step"),
    ("rome", "ROME-like", "one direction costs less than a ROME-like edit from ten examples"),
):
    middle, low, high = (float(np.log(value)) for value in ratio(other))
    over = f"{len(damage)} behaviours"
    report.claim(f"cheaper_than_{name}", statement, middle, ">", 0.0, (high - low) / (2 * 1.96), over)
report.verdicts()

# %%
report.write().name
