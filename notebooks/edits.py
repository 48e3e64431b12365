# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Directions as edits: what does it cost to take one behaviour away?
#
# ![What edits cost beside one direction, on four targets.](../figures/edits_targets.png)
#
# *Cost of each edit as a multiple of what one direction costs in the same case; left of the line is cheaper. Points are
# behaviours, ticks means, bars 95% intervals. Blue: directions; orange: autoencoders; brown: neurons; purple: made from
# labels; black: the weight itself, without labels; grey: the floor.*
#
# **On stories a closed form that is made from ten labelled examples costs about half of what one direction costs, and
# on residual networks an eighth. For memorised text a small adapter costs least. Of what is learned without labels one
# direction is the cheaper edit on two targets: an autoencoder's unit, folded into the weight, costs twelve times as
# much on stories, five times with a regressed reader, and thirty times on residual networks. On memorised text and the
# classifier the two are about level.**
# So where there are labelled examples, make the edit from them.
#
# ## Terms
#
# - A **behaviour** is something that a model does on some samples: it says "she", it computes a feature, it knows a
#   story by heart, it takes shirts for T-shirts.
# - An **edit** is a change of the weights (for the rows with *hook*, of what a module gives at run time). Every edit is
#   scaled until a set part of the behaviour is gone on held-out samples: **success is equal**.
# - Its **cost** is what changes elsewhere.
#
# | target | behaviour | gone | cost |
# |---|---|---|---|
# | story model | twelve, such as "she", a name, closing a quotation | half of the mass | KL on all other tokens |
# | residual networks | what three layers compute for a feature | half, or four fifths | squared change without it |
# | memorised text | four stories that a copy was overtrained on | all that was learned | KL on other stories |
# | classifier | one class taken for another; one concept's images | half of the mass | KL on all other images |

# %% tags=["parameters"]
layer = 7  # the block of the story model whose MLP weight W_in is edited
examples = 10  # labelled examples an edit, in the first comparison
draws = 2000  # of the bootstrap over behaviours and seeds

# %%
import json
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # of libraries

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from eigendecomp.report import plots, results
from rooms.edits import summary

pd.set_option("display.max_rows", 200)
plots.style()
runs = Path(results.__file__).resolve().parents[2] / "data" / "runs"
if results.profile() == "smoke":
    draws = 20
report = results.Results("edits", layer=layer, examples=examples, draws=draws)

# %% [markdown]
# ## What is compared
#
# | method | the change | labels |
# |---|---|---|
# | one direction | the best, on validation samples, of the largest $\langle G,u\rangle^2/u^\top Hu$ | pick it |
# | one direction, whitened | the same with its reader times $C^{-1}$, so that other inputs meet it less | pick it |
# | span of directions | $-(U^\top H U + \lambda)^{-1} U^\top G$ in the span of all directions | make it |
# | several directions | $-G$ by least squares from a few directions (matching pursuit) | make it |
# | SAE unit, folded | (encoder row) ⊗ $W^\top$(decoder row) as a change of the weight | pick it |
# | SAE unit, regressed | the same with the linear reader that predicts the unit's activation best | pick it |
# | SAE unit, hook | the unit's own part made smaller at run time, where it is on | pick it |
# | one random row | rows of rank one that nothing was learned from: the floor | pick it |
# | gradient step; rank 1 | $-G$; its leading singular pair | make it |
# | K-FAC step | $-C^{-1} G S^{-1}$, second moments of inputs and of output gradients | make it |
# | gradient, small curvature | $-G$ in the part of the K-FAC basis where curvature is small | make it |
# | weight, small curvature | the weight itself in that part, taken away | none |
# | ROME-like | $-C^{-1}k \otimes G^\top k$, $k$ the examples' mean input | make it |
# | LoRA, rank 1 | Adam on the examples; with a Fisher penalty, or held by KL to the model elsewhere | make it |
# | one neuron | the neuron that does most for the feature in the examples | pick it |
#
# $G$ is the gradient of the behaviour on the labelled examples, a mean. Directions and autoencoders are learned without
# labels. Ridges, penalties, ranks and sizes were chosen on two behaviours, or networks or sets of stories, that are not
# scored here. Fits and edits are kept in `data/runs`: `notebooks/tools/long/edits.py` and `edits_beyond.py` make them.
# Of the story model a block's MLP weight is edited (64 × 256), of the classifier the last layer (64 × 10).


# %%
def read(name: str) -> pd.DataFrame:
    """The rows of a target."""
    return pd.read_csv(runs / f"edits{name}.csv")


stories = read("").query("layer == @layer")
residual = read("_residual")
memorised = read("_memorised").assign(behaviour=lambda rows: rows["seed"], seed=0)  # a set of stories is a case
classifier = read("_classifier")
TARGETS = {
    "story model": stories.query("examples == @examples"),
    "residual, half gone": residual.query("examples == @examples and level == 0.25"),
    "residual, four fifths gone": residual.query("examples == @examples and level == 0.04"),
    "memorised text": memorised,
    "classifier": classifier.query("examples == @examples"),
}
report.record(
    cases={name: {"behaviours": rows["behaviour"].nunique(), "seeds": rows["seed"].nunique(),
                  "rows": len(rows)} for name, rows in TARGETS.items()}
)  # fmt: skip
pd.DataFrame(report.values["cases"]).T

# %% [markdown]
# ## Who wins where
#
# *cost* is the ratio to one direction over the cases in which both succeed, a geometric mean, with its interval over
# behaviours and seeds, both drawn anew. *damage* and *worst* are means over all cases in which a method succeeds, so
# they compare only where *reached* is the same. *best in* counts behaviours.

# %%
tables = {name: summary.compared(rows, draws=draws) for name, rows in TARGETS.items()}
wins = pd.concat([table.assign(target=name) for name, table in tables.items()])
wins = report.table("targets", wins[["target", *tables["story model"].columns]])
report.record(
    targets={name: summary.records(table) for name, table in tables.items()},
    cheapest={name: table["method"].iloc[0] for name, table in tables.items()},
)


def spaced(name: str) -> str:
    """A column's name as it is shown."""
    return name.replace("_", " ")


wins.rename(columns=spaced).round(4)

# %%
KINDS = {"direction": plots.OURS, "of the memorised": plots.OURS, "SAE": plots.SAE,
         "random": plots.RANDOM, "neuron": plots.UNITS, "weight, small curvature": plots.TRUTH}  # fmt: skip


def color(method: str) -> str:
    """Directions, autoencoders, the floor, neurons, the weight, and the rest, which are made from labels."""
    return next((shade for word, shade in KINDS.items() if word in method), plots.LABELLED)


def panel(ax, name: str) -> None:
    """One target: points are behaviours, means over seeds; bars are intervals, all as multiples of one direction."""
    table = tables[name].dropna(subset=["cost"]).reset_index(drop=True)
    for place, row in table.iterrows():
        points = np.exp(summary.log_ratios(TARGETS[name], row["method"]).mean(axis=1)).dropna()
        ax.plot(points, [place] * len(points), "o", ms=2.5, alpha=0.5, color=color(row["method"]), mew=0)
        ax.plot([row["low"], row["high"]], [place] * 2, color="black", lw=1)
        ax.plot(row["cost"], place, "|", color="black", ms=7, mew=1.4)
    ax.axvline(1, color="0.6", lw=0.8, zorder=0)
    counts = zip(table["method"], table["reached"].tolist(), table["of"].tolist(), strict=True)
    named = [f"{method} ({reached}/{of})" if reached < of else method for method, reached, of in counts]
    ax.set_yticks(range(len(table)), named)
    ax.set(xscale="log", title=name, ylim=(len(table) - 0.4, -0.6))


# %%
shown = [name for name in TARGETS if name != "residual, four fifths gone"]
figure, axes = plots.panels(2, 2, height=2.7)
for ax, name in zip(axes, shown, strict=True):
    panel(ax, name)
for ax in axes[-2:]:
    ax.set_xlabel("cost, one direction = 1")
report.figure("targets", figure)

# %% [markdown]
# In brackets: in how many cases the edit succeeded, if not in all. On stories a gradient step from the same
# examples costs about what one direction does.
#
# ## The story model, behaviour by behaviour
#
# In nats a token: over all tokens that do not show the behaviour (*damage*), over those of the concept that suffers
# most (*worst*), and over the same words in other contexts (*same words*). The weight is `blocks.7.mlp.W_in` (64 ×
# 256).

# %%
ten = TARGETS["story model"]
methods = report.table("methods", summary.compared(ten, draws=draws, damages=["damage", "worst", "same_words"]))
report.record(methods=summary.records(methods), behaviours=ten["behaviour"].nunique(),
              seeds=sorted(ten["seed"].unique().tolist()))  # fmt: skip
methods.rename(columns=spaced).round(4)

# %%
by = ten.groupby(["behaviour", "method"])["damage"].apply(summary.geometric).unstack()
costs = by.drop(columns="SAE unit, hook")  # which reaches half in a third of the cases
few = ["one direction", "SAE unit, folded", "gradient step", "ROME-like"]
least = pd.DataFrame({"best": costs.idxmin(axis=1), "its damage": costs.min(axis=1)})
report.table("wins", least.join(costs[few]).reset_index()).round(4)

# %% [markdown]
# A unit scaled down by a hook is another kind of change: it acts where the unit is on and nowhere else, and it reaches
# half of the mass in some cases only. Here are all methods on those cases alone.

# %%
hook = ten[ten["method"] == "SAE unit, hook"].dropna(subset=["damage"])[["behaviour", "seed"]]
same = ten.merge(hook, on=["behaviour", "seed"])
hooked = summary.compared(same, draws=draws, damages=["damage", "worst", "same_words"])
report.record(hook={"cases": len(hook), "of": int((ten["method"] == "SAE unit, hook").sum()),
                    "behaviours": sorted(hook["behaviour"].unique().tolist()),
                    "methods": summary.records(hooked)})  # fmt: skip
report.table("hook", hooked[["method", "damage", "worst", "cost", "low", "high", "reached", "of"]]).round(4)

# %% [markdown]
# ## How many examples?
#
# The same with 1, 10 and 100 labelled examples, over the cases that have all three. On stories, from a single example,
# one direction costs a little less than edits made from labels, within the noise. With more examples the closed form
# overtakes it, and with a hundred a gradient step costs about the same.

# %%
LINES = {"one direction": "-", "one direction, whitened": "--", "gradient step": ":", "ROME-like": "-",
         "K-FAC step": "--", "LoRA, rank 1, KL": "-.", "SAE unit, regressed": "-",
         "gradient step, every layer": ":", "ROME-like, one layer": "-", "one neuron": "--",
         "direction fitted to one layer": "--", "SAE unit folded, one layer": "-"}  # fmt: skip
given = {"story model": stories, "residual, half gone": residual.query("level == 0.25")}
counted = {name: summary.by_examples(rows) for name, rows in given.items()}


def course(ax, name: str) -> None:
    """Cost by examples; ends are named, a name being raised where one below is close; at least three ticks."""
    table, _ = counted[name]
    ends = {method: table.loc[method].dropna() for method in LINES if method in table.index}
    ends = dict(sorted(((m, v) for m, v in ends.items() if len(v) > 1), key=lambda item: item[1].iloc[-1]))
    for method, values in ends.items():
        ax.plot(values.index, values, LINES[method], color=color(method), lw=1.2, marker="o", ms=2.5)
    ax.set(xscale="log", yscale="log", xlabel="labelled examples", title=name)
    (low, high), height = ax.get_ylim(), 0.0
    for method, values in ends.items():
        height = max(values.iloc[-1], height * (high / low) ** 0.075)
        ax.annotate(method, (values.index[-1], values.iloc[-1]), (values.index[-1] * 1.8, height), size=7,
                    color=color(method), va="center",
                    arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6", "relpos": (0, 0.5)})  # fmt: skip
    ax.set_xticks(list(table.columns), [str(n) for n in table.columns])
    ax.minorticks_off()
    if high < 30 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 6)))
        ax.yaxis.set_major_formatter("{x:g}")


# %%
figure, axes = plots.panels(1, 2, height=2.6)
for ax, name in zip(axes, counted, strict=True):
    course(ax, name)
axes[0].set_ylabel("KL elsewhere (nats a token)")
axes[1].set_ylabel("squared change elsewhere")
report.figure("examples", figure)
report.record(
    by_examples={name: {method: {str(n): float(v) for n, v in row.dropna().items()} for method, row in table.iterrows()}
                 for name, (table, _) in counted.items()},
    by_examples_cases={name: cases for name, (_, cases) in counted.items()},
)  # fmt: skip
pd.concat({name: table for name, (table, _) in counted.items()}).round(5)

# %% [markdown]
# ## Memorised text
#
# A copy of the story model saw eight stories again and again beside ordinary ones, until it said them by heart. Edits
# of one MLP weight were made from four of them. *unlabelled left* is what the copy still knows of the other four, which
# no edit has seen; *verbatim* the share of the four that it still says before its first miss; *loss* the rise of the
# loss on other stories. The last row is the model before: what it costs to undo everything. One direction takes the
# other four stories with it and costs as much as a folded unit of an autoencoder; the adapter that costs least leaves
# more than half of them.

# %%
copies = memorised.groupby("behaviour").first()
kept = memorised.groupby("method")[["damage", "worst"]].agg(summary.geometric)
kept = kept.join(memorised.groupby("method")[["unlabelled_left", "verbatim", "loss"]].mean()).sort_values("damage")
kept.loc["the model before"] = [
    summary.geometric(copies["copy_damage"]),
    None,
    0.0,
    copies["copy_spoken_before"].mean(),
    None,
]
report.record(
    memorised=summary.records(kept.reset_index()),
    copies={"sets": len(copies), "known": copies["copy_known"].mean(), "before": copies["copy_goal"].mean(),
            "spoken": copies["copy_spoken"].mean(), "spoken_before": copies["copy_spoken_before"].mean()},
)  # fmt: skip
report.table("memorised", kept.reset_index()).rename(columns=spaced).round(3)

# %% [markdown]
# ## What was tried
#
# Settings on the tuning cases, with the cost there.


# %%
def tuning(name: str) -> list[dict]:
    """The settings tried on a target, and those chosen."""
    return [json.loads(row) for row in pd.read_csv(runs / f"edits{name}_tuning.csv")["setting"]]


FILES = {
    "story model": "",
    "residual networks": "_residual",
    "memorised text": "_memorised",
    "classifier": "_classifier",
}
tried = {name: tuning(file) for name, file in FILES.items()}
report.record(chosen={name: rows[-1]["chosen"] for name, rows in tried.items()},
              sizes=tried["story model"][-1]["chosen"][0],
              settings_tried={name: len(rows) - 1 for name, rows in tried.items()})  # fmt: skip
rows = [{"target": name, **row} for name, found in tried.items() for row in found if "chosen" not in row]
report.table("tuning", pd.DataFrame(rows)).rename(columns=spaced).round(4).astype(object).fillna("")

# %% [markdown]
# ## What is claimed
#
# That one edit costs less than another: the mean of ln(the other's cost / its own) over the cases in which both succeed
# is above zero. A margin is in standard errors over behaviours and seeds.

# %%
CLAIMS = [
    ("sae", "story model", "one direction", "SAE unit, folded"),
    ("sae_regressed", "story model", "one direction", "SAE unit, regressed"),
    ("random", "story model", "one direction", "one random row"),
    ("rome", "story model", "ROME-like", "one direction"),
    ("kl", "story model", "one direction", "LoRA, rank 1, KL"),
    ("rome_from_one", "story model, one example", "one direction", "ROME-like"),
    ("unit", "residual, half gone", "one direction", "SAE unit folded, one layer"),
    ("neuron", "residual, half gone", "one direction", "one neuron"),
    ("lora", "residual, half gone", "one direction", "LoRA, every layer"),
    ("site", "residual, half gone", "ROME-like, one layer", "one direction"),
    ("part", "residual, four fifths gone", "one direction", "direction's part, one layer"),
    ("layer", "residual, four fifths gone", "one direction", "direction fitted to one layer"),
    ("memorised", "memorised text", "LoRA, rank 1, KL", "one direction"),
    ("classes", "classifier", "one direction", "SAE unit, folded"),
    ("classes_regressed", "classifier", "one direction", "SAE unit, regressed"),
    ("classes_random", "classifier", "one direction", "one random row"),
]
# %%
sets = TARGETS | {"story model, one example": stories.query("examples == 1")}
for key, name, cheap, dear in CLAIMS:
    middle, low, high = summary.ratio(sets[name], dear, cheap, draws=draws)
    over = f"{len(sets[name].groupby(['behaviour', 'seed']))} cases"
    words = f"{name}: {cheap} costs less than {dear}"
    report.claim(f"cheaper_{key}", words, middle, ">", 0.0, (high - low) / (2 * 1.96), over)

# %% [markdown]
# A gradient step and one direction cost about the same on stories, and which is cheaper these cases do not tell: the
# claim is that they are within a factor of two.
#
# Where to go next: `interventions` for moves whose truth is known, `start` for an edit of your own.

# %%
middle, low, high = summary.ratio(TARGETS["story model"], "gradient step", draws=draws)
report.claim("gradient_alike", "story model: a gradient step and one direction cost the same within a factor of two",
             abs(middle), "<", float(np.log(2)), (high - low) / (2 * 1.96))  # fmt: skip
report.verdicts()

# %%
report.write().name
