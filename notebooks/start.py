# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Start here: a model of your own, in ten minutes
#
# ![Error by number of directions; what an edit takes away and changes.](../figures/start_summary.png)
#
# *Left: the share of new gradients that is not rebuilt, beside principal components and random directions. Right: as
# one direction is moved further, the model says "named" less often and little else changes.*
#
# What is in one weight of a small story model? The first cell is all that it takes to ask: a model, inputs, and the
# parameters to look at. It learns a hundred *directions*, changes of that weight of rank one, and prints the ten that
# keep most to themselves with the tokens that use them most. The tokens of each have something in common: "named",
# "to", a closing quotation mark. With two coefficients a token, directions leave .66 of the squared gradients of new
# tokens, as many principal components .80. One of them, moved by one step, halves "named".
#
# The rest asks what one should ask of any decomposition: is it better than PCA, what does a direction do, is it what
# its name says, can it be edited away, how does failure look, what should be set, and how is it kept. Nothing here
# belongs to the story model: `model` may be any `torch.nn.Module`.

# %%
import eigendecomp as ed
from eigendecomp.targets import stories

model = stories.load_model()  # any torch.nn.Module; load_hub_model("tiny-stories-1M") fetches the published one
tokens = stories.token_windows(stories.load_stories("train"), 2000, 16, at_start=0)
d = ed.decompose(
    model, tokens, divergence=ed.KLDivergence(), reference=ed.Mean(), parameters=["blocks.7.mlp.W_in"],
    n_directions=100, sparsity=ed.BatchTopK(0.02), steps=300, batch_size=128,
)  # fmt: skip
new = stories.token_windows(stories.load_stories("test"), 128, 16, at_start=0)
impact = d.impact(new)  # (tokens, directions): how much of each output runs along each direction
own = impact.topk(40, 0).values.sum(0) / impact.sum(0)  # of a direction's impact, how much its 40 strongest tokens have
for v in own.topk(10).indices.tolist():
    best = impact[:, v].topk(4).indices.tolist()
    texts = ["".join(map(stories.readable, new[i // 16, : i % 16 + 1].tolist()))[-20:] for i in best]
    print(f"{v:3} {own[v]:.0%}", *texts, sep=" | ")

# %% [markdown]
# Each line is a direction; each piece of text ends at the token that uses it. They are the ten whose 40 strongest of
# 2,048 tokens have the largest share of their *impact* (how much of what the output does runs along the direction), in
# that order and none left out. The rest of the notebook needs a few settings of its own:

# %% tags=["parameters"]
sizes = [10, 30, 100]  # dictionaries to choose from
choosing_steps = 200
halved = 0.5  # an edit is to leave this share of what the model said

# %%
import tempfile
import warnings

warnings.filterwarnings("ignore")  # of libraries

import pandas as pd
import torch

from eigendecomp import study
from eigendecomp.report import plots, results

plots.style()
if results.profile() == "smoke":
    sizes, choosing_steps, new = [10, 30], 30, new[:32]
    impact = d.impact(new)
report = results.Results("start", sizes=sizes, choosing_steps=choosing_steps, halved=halved)


def text(i: int, length: int = 32) -> str:
    """The window of a sample up to its token, which is marked."""
    window, position = divmod(i, new.shape[1])
    *before, token = map(stories.readable, new[window, : position + 1].tolist())
    return "".join(before)[-length:] + f" [{token.strip()}]"


# %% [markdown]
# ## Is it any good? The error, beside two floors
#
# The share of the squared gradients of *new* samples that is not rebuilt, beside principal components and random
# directions of the same rank. These get as many coefficients, fitted by least squares; ours are read, not fitted. If
# yours is not below both, do not read on: fit longer, or decompose other parameters.

# %%
some, few = new[:32], tokens[:32]
kept = (d.encode(some, sparse=True) != 0).sum(1).double().mean().item()
g, of_fit = study.scores.gradient_rows(d, some), study.scores.gradient_rows(d, few)
principal = study.floors.principal_directions(of_fit, max(sizes))
random = study.floors.random_directions(d.decoder.shapes, max(sizes), 1, seed=0).flat()
errors = {
    "ours": d.reconstruction_error(some),
    "PCA": study.floors.sparse_error(g, principal[: d.decoder.n], kept),
    "random": study.floors.sparse_error(g, random[: d.decoder.n], kept),
}
report.claim("below_pca", "directions rebuild more than principal components", errors["ours"], "<", errors["PCA"])
report.record(error=errors, kept=kept)
print(f"{kept:.1f} coefficients a token:", ", ".join(f"{name} {error:.2f}" for name, error in errors.items()))

# %% [markdown]
# ## Read a direction: three readings
#
# - **impact**: how much of what a sample's output does runs along the direction. Knows what the model said.
# - **activation**: how far the output moves for a unit step. Needs no reference.
# - **reader**: what the direction looks for in the weight's input. Knows nothing of the output.
#
# Here for the direction with the largest mean impact where the model is about to say "named": the six tokens that each
# reading ranks highest, in brackets. Where the three agree, a name is safe.

# %%
with torch.no_grad():
    p = model(new).softmax(-1).flatten(0, 1)  # (tokens, vocabulary)
named = next(i for i in range(p.shape[1]) if stories.readable(i) == " named")
says = p[:, named] > 0.5
v = int(impact[says].mean(0).argmax())
reading = study.readings.apply_readers(d, new)["blocks.7.mlp.W_in"].flatten(0, 1)
reading = reading * reading.pow(3).sum(0).sign()  # a reader's sign is free: its rare, strong side counts
activation = d.activation(new[:48])  # which takes a pass a direction: fewer samples
n = len(activation)
readings = {"impact": impact[:n], "activation": activation, "reader": reading[:n]}
pd.DataFrame({name: [text(i) for i in score[:, v].topk(6).indices.tolist()] for name, score in readings.items()})

# %% [markdown]
# ## Name it
#
# A name is a guess about tokens that were not looked at. Test it as one: by the tokens that it would pick (here: the
# model is about to say "named"), in average precision. Guessing at random scores the share of such tokens. And see what
# a push does: the outputs that it promotes and suppresses at the direction's own tokens.

# %%
precision = {name: study.concepts.average_precision(score, says[:n, None]) for name, score in readings.items()}
where = impact[:, v].topk(40).indices
with d.perturbed({v: 1.0}), torch.no_grad():
    pushed = (model(new).softmax(-1).flatten(0, 1) - p)[where].mean(0)
promotes, suppresses = ([stories.readable(i) for i in (sign * pushed).topk(5).indices.tolist()] for sign in (1, -1))
report.record(
    named={"direction": v, "share_of_tokens": says.double().mean(), "promotes": promotes, "suppresses": suppresses,
           "precision": {name: found[v, 0] for name, found in precision.items()},
           "best_of_the_others": {name: found[:, 0].sort().values[-2] for name, found in precision.items()}},
)  # fmt: skip
print(f"direction {v}, δ = +1: promotes{''.join(promotes)}; suppresses{''.join(suppresses)}")
pd.Series(report.values["named"]["precision"]).round(2)

# %% [markdown]
# ## Edit with it
#
# `d.edit({v: step})` returns a copy of the model that is changed for good: no hook, no extra cost. Take the sign that
# lowers what is to go, raise the step until half of it is gone, and look at what else changed: the Kullback–Leibler
# divergence on all other tokens. Then let the edited model go on with a story.


# %%
@torch.no_grad()
def after(step: float) -> tuple[float, float]:
    """What is left of the model's "named" where it said it, and the damage elsewhere in nats a token."""
    q = d.edit({v: step})(new).softmax(-1).flatten(0, 1)
    damage = (p * (p / q).log()).sum(-1)[~says].mean()
    return (q[says, named].sum() / p[says, named].sum()).item(), damage.item()


sign = min((1.0, -1.0), key=lambda sign: after(sign)[0])
steps = [sign * 2 ** (k / 2) for k in range(-6, 16)]
course, step = {0.0: (1.0, 0.0)}, 0.0
for step in steps:
    course[step] = after(step)
    if course[step][0] < halved:
        break
remains, damage = course[step]
report.record(edit={"step": step, "left": remains, "damage": damage})
report.claim("edit_succeeds", "one direction's step takes half of a behaviour", remains, "<", halved)
print(f"step {step:+.1f}: {remains:.0%} of it is left; elsewhere {damage:.4f} nats a token")


# %%
@torch.no_grad()
def told(storyteller: torch.nn.Module, tokens: torch.Tensor, n: int = 12) -> str:
    """The most probable continuation."""
    for _ in range(n):
        tokens = torch.cat([tokens, storyteller(tokens)[:, -1:].argmax(-1)], 1)
    return "".join(map(stories.readable, tokens[0].tolist()))


start = new[int(where[0]) // 16 : int(where[0]) // 16 + 1, : int(where[0]) % 16 + 1]
report.record(told={"before": told(model, start), "after": told(d.edit({v: step}), start)})
report.values["told"]

# %% [markdown]
# ## How failure looks
#
# - **Dead directions** are never used: too many were asked for, or the learning rate is too high.
# - **Twins** point the same way: one thing was split, or the dictionary is too large.
# - **A prediction that leaks into the score**: under KL a gradient is as long as the model is sure. A direction whose
#   strongest tokens by impact are not those that its reader picks is ranked by what the model said, not by what the
#   direction looks for. Name it by its reader, or not at all.
#
# How many of the hundred fail in each way:

# %%
on = (d.encode(new, sparse=True) != 0).double().mean(0)
rows = torch.cat([row.flatten(1) for row in d.directions().values()], 1)
alike = (rows @ rows.T).abs().fill_diagonal_(0).amax(1)
picked = [score.topk(40, 0).indices for score in (impact, reading)]
agree = torch.tensor([torch.isin(*(one[:, i] for one in picked)).double().mean() for i in range(d.decoder.n)])
failures = {
    "dead": (on == 0).sum().item(),
    "on at more than a tenth": (on > 0.1).sum().item(),
    "twins (|cosine| > 0.9)": (alike > 0.9).sum().item(),
    "reader and impact share under a tenth": (agree < 0.1).sum().item(),
}
report.record(failures=failures, reader_and_impact_share=agree.median(), of_the_named=agree[v])
pd.Series(failures)

# %% [markdown]
# ## Choose size, rank and reference
#
# In the last block an output depends on its own position alone, so a sample is a single *use* of the weight, and
# `samples="uses"` fits a dictionary of uses in seconds. (Elsewhere a sample is a sum of uses; see the notebook
# `tinystories`.) More directions rebuild more; stop where what they add are twins. Higher rank rebuilds more and is
# harder to read. The table: *on* coefficients a token were asked for, *kept* were used, *error* is of new tokens.
#
# **Errors of different references are of different gradients and do not compare**: choose the reference by the
# question. `ed.Mean()` asks what makes an output differ from the average one; `ed.OtherSample()` the same with noise;
# `ed.ModelSample()` what the curvature is made of; `ed.Uniform()` what the model is sure of.


# %%
def fitted(n: int, rank: int = 1, on: float = 2.0) -> dict[str, float]:
    made = ed.decompose(
        model, tokens[:500], divergence=ed.KLDivergence(), parameters=["blocks.7.mlp.W_in"], samples="uses",
        n_directions=n, rank=rank, sparsity=ed.BatchTopK(on / n), steps=choosing_steps, progress=False,
    )  # fmt: skip
    error, used = made.reconstruction_error(new), made.encode(new, sparse=True).count_nonzero().item() / new.numel()
    cosines = made.decoder.gram().abs().fill_diagonal_(0).amax(1)
    return {"directions": n, "rank": rank, "on": on, "error": error, "kept": used, "twins": int((cosines > 0.9).sum())}


choices = pd.DataFrame([fitted(n) for n in sizes] + [fitted(sizes[1], rank=4), fitted(sizes[1], on=4.0)])
report.table("choices", choices).round(3)

# %%
flat = {"PCA": principal, "random": random}
floors = {name: [study.floors.sparse_error(g, rows[:n], 2.0) for n in sizes] for name, rows in flat.items()}
figure, (left, right) = plots.panels(1, 2, width=5.4, height=2.1)
lines = {"directions": choices["error"][: len(sizes)].tolist()} | floors
for (name, values), color in zip(lines.items(), (plots.OURS, plots.PCA, plots.RANDOM), strict=True):
    left.plot(sizes, values, "o-", color=color, ms=3)
    left.annotate(name, (sizes[-1], values[-1]), (5, 0), textcoords="offset points", va="center", color=color, size=7)
left.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="directions, two on a token", ylabel="error, new tokens")
left.minorticks_off()
edits = sorted(course.items(), key=lambda item: abs(item[0]))
right.plot([1e3 * damage for _, (_, damage) in edits], [share for _, (share, _) in edits], "o-", color=plots.OURS, ms=3)
right.axhline(halved, color="0.7", lw=0.8, zorder=0)
right.set(xlabel="KL elsewhere (1/1000 nats a token)", ylabel='"named" that is left', ylim=(0, 1.05))
report.record(floors=floors)
report.figure("summary", figure)

# %% [markdown]
# ## Keep it, share it
#
# `d.save` writes one safetensors file. `d.save_pretrained` writes a folder with a card, which
# `d.push_to_hub("name/repo")` uploads. `d.explain` writes contexts and intruder tests for whoever labels directions.
# For layers that `peft` knows (`Linear`, `Conv1D`, `Conv2d`, `Embedding`) `d.to_lora({v: step}, "adapter")` writes the
# edit as an adapter; this model's weights are bare parameters, so here it says what to do instead.

# %%
with tempfile.TemporaryDirectory() as folder:
    d.save(f"{folder}/directions.safetensors")
    d.save_pretrained(f"{folder}/shared")
    again = ed.Decomposition.from_pretrained(f"{folder}/shared", model)
    d.explain(f"{folder}/label.jsonl", new[:16], names=stories.readable)
assert all(torch.equal(rows, again.directions()[name]) for name, rows in d.directions().items())
try:
    d.to_lora({v: step}, "adapter")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Troubleshooting
#
# | what you see | likely cause | what to do |
# |---|---|---|
# | error above PCA's | too few steps, or too high a rate | twice the steps; a third of `learning_rate` |
# | dead directions | more than the data has things | fewer directions; a lower rate |
# | twins | one thing was split | fewer directions, or one name for the pair |
# | on at over a tenth of samples | too many kept; samples sum over positions | `BatchTopK(2 / n)`; `samples="uses"` |
# | all are of a story's beginning | inputs that begin alike | inputs from everywhere (`at_start=0`) |
# | impact and reader differ | the model's certainty leaks | read by `study.readings.apply_readers` |
# | contexts have nothing in common | another weight does it | `*.W_in`, `*.W_V`, later blocks; `ed.Mean()` |
# | an edit breaks everything | the step is not small | smaller; from labels, a closed form (notebook `edits`) |
# | "… an adapter cannot change" | weights by head, bare parameters | `d.edit(steps)` |
# | a step takes seconds | early layers: a pass for every output | later layers, shorter windows, `samples="uses"` |
#
# Where to go next: `overview` and `xor` for what a direction is, `tms` for one whose truth is known, `tinystories` for
# what directions know and do not know of language, `edits` for what they are worth as edits, `cost` for size and time.

# %%
report.verdicts()

# %%
report.write().name
