# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A story model, beside sparse autoencoders
#
# The draft decomposes $W_K$ of a middle block of a small story model and lists top tokens. Here it is done whole, on a
# model of that shape that the repository ships, and measured beside sparse autoencoders of the same block: as many
# units, as many on, the same stories, three seeds each. What comes out:
#
# - read by their *readers*, directions of $W_K$ resolve the concepts of tokens more than twice as well as autoencoders
#   of the attention's output, and what the model is about to say a little better than autoencoders of the residual
#   stream. Autoencoders of the stream, and of what arrives at the attention, are better on concepts of context; read
#   before their threshold, or three units together, those of the stream are better on both families;
# - read by activation or impact at the predicting token, directions resolve far less: these say how much an output
#   hangs on a direction, not what the direction looks for;
# - a token's use of the weights, taken by itself and at unit norm, in a layer written with standard inputs, gives much
#   better directions than the weights as they were trained;
# - directions are purer than an autoencoder's units and as stable over seeds or more, and nearly every direction of
#   $W_K$ sits in a single attention head, which nothing asks for;
# - a push along directions of the attention weights is on average a little more selective than adding an autoencoder's
#   row, though seeds overlap, and where either acts only at the tokens that the unit reads, an autoencoder's unit of
#   the residual stream is several times more selective: a key that changes is seen by all later tokens. Some directions
#   of $W_K$ alone cannot move outputs by the level asked for, since attention saturates;
# - with a tenth of a hundred coefficients kept, about two thirds of the squared gradients of $W_K$ are not rebuilt:
#   better than the floors, and short of the 40% that L3D reports for a larger model and higher rank. Ten directions of
#   rank one are worse than ten principal components.

# %% tags=["parameters"]
layer, n_directions, kept = 4, 100, 2.0  # kept: coefficients a use, ours; units on at a token, the autoencoders'
seeds = [0, 1, 2]  # settings were chosen on validation stories and on seeds from 100 on
length, fit_windows, held_windows, few_windows = 32, 2000, 256, 48
steps, draft_steps, batch_size, learning_rate = 700, 300, 256, 1e-2
sae_steps, sae_batch, sae_rate = 1200, 1024, 3e-3
level, share, pushed = 0.05, 0.02, 6  # total variation; share of the tokens that a unit stands for; units pushed a fit

# %%
import warnings

warnings.filterwarnings("ignore")  # of libraries, some when they are imported

import pandas as pd
import torch
from IPython.display import Markdown, display
from torch.nn.functional import normalize

import eigendecomp as ed
from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.study.moves import Move, Probe, along, probabilities, push_either_way
from eigendecomp.targets.stories import concepts as story_concepts
from eigendecomp.targets.stories import model as stories
from eigendecomp.targets.stories import units as story_units

plots.style()
smoke, least = results.profile() == "smoke", story_concepts.LEAST
if smoke:
    n_directions, seeds, steps, draft_steps, sae_steps, pushed, least = 20, seeds[:1], 30, 4, 30, 1, 2
    length, fit_windows, held_windows, few_windows = 16, 40, 24, 6
report = results.Results(
    "tinystories", layer=layer, n_directions=n_directions, kept=kept, seeds=seeds, length=length,
    fit_windows=fit_windows, held_windows=held_windows, few_windows=few_windows, steps=steps,
    draft_steps=draft_steps, batch_size=batch_size, learning_rate=learning_rate, sae_steps=sae_steps,
    sae_batch=sae_batch, sae_rate=sae_rate, level=level, share=share, pushed=pushed,
)  # fmt: skip

# %% [markdown]
# ## The model and its stories
#
# The shipped model has the shape of TinyStories-1M: width 64, 8 blocks of 16 heads. Samples are tokens in windows of
# 32. Directions and autoencoders are learned on training stories; units, readings and settings are chosen on
# validation stories; scores are of test stories. `stories.load_hub_model("tiny-stories-1M")` gives the model of the
# hub in its place, and everything below runs on it as well.

# %%
model = stories.load_model()
counts = {"fit": ("train", fit_windows), "choose": ("validation", held_windows), "test": ("test", held_windows)}
tokens = {
    name: stories.token_windows(stories.load_stories(split), n, length, seed=0)
    for name, (split, n) in counts.items()
}  # fmt: skip
with torch.no_grad():
    logits = {name: model(tokens[name]) for name in ("choose", "test")}
logp = logits["test"][:, :-1].log_softmax(-1).gather(2, tokens["test"][:, 1:, None])
report.record(target={"parameters": sum(p.numel() for p in model.parameters()), "nats_in_windows": -logp.mean()})
print(f"{-logp.mean():.3f} nats a token in these windows (1.633 with the whole story before it; a trigram model 2.218)")

# %% [markdown]
# Concepts are told by rules: of the *context* (the token is a name, a sentence's end, inside quotation marks, follows
# "Once upon a", …) and of the *prediction* (the model is about to say a name, "she" rather than "he", a word that it
# said before, …). Those that hold for at least 20 tokens of either split count.

# %%
rules = story_concepts.Rules(stories.load_tokenizer())
told = [rules(tokens[part], logits[part]) for part in logits]
known = dict(zip(logits, story_concepts.common(*told, least=least), strict=True))
families = {family: known["test"].of(family) for family in ("context", "prediction")}
report.record(concepts={family: len(found) for family, found in families.items()})
report.values["concepts"]

# %% [markdown]
# ## The draft's decomposition: $W_K$ of a middle block
#
# As in the draft, through the package's front door: `blocks.4.attn.W_K` (4,096 weights), KL divergence, 10 and 100
# directions of rank 1. A sample is an output; its gradient is a sum over all tokens before it. A tenth of the
# coefficients is kept. Beside it two floors with as many coefficients, refitted by least squares, which ours are not:
# principal components of 1,024 training gradients (of any rank) and random directions of rank 1. All rebuild the same
# test gradients.

# %%
name = f"blocks.{layer}.attn.W_K"
short = {part: tokens[part][:, : length // 2] for part in tokens}


def draft(n: int) -> ed.Decomposition:
    return ed.decompose(
        model, short["fit"], divergence=ed.KLDivergence(), reference=ed.OtherSample(), parameters=[name],
        n_directions=n, sparsity=ed.BatchTopK(0.1), steps=draft_steps, batch_size=128,
        learning_rate=learning_rate, progress=False,
    )  # fmt: skip


drafts = {n: draft(n) for n in (10, n_directions)}
some = short["test"][:64]
g = study.scores.gradient_rows(drafts[10], some)
principal = study.floors.principal_directions(study.scores.gradient_rows(drafts[10], short["fit"][:64]), n_directions)
random = study.floors.random_directions(drafts[10].decoder.shapes, n_directions, 1, seed=0).flat()
errors = {
    n: {
        "ours": d.reconstruction_error(some),
        "PCA": study.floors.sparse_error(g, principal[:n], 0.1 * n),
        "random": study.floors.sparse_error(g, random[:n], 0.1 * n),
    }
    for n, d in drafts.items()
}
report.record(draft_error=errors)
pd.DataFrame(errors).T.rename_axis("directions").round(3)

# %% [markdown]
# ## Uses, and how a layer is written
#
# An output's gradient is a sum over all tokens before it, which hides each of them, and takes a backward pass of its
# own. From here on a sample is a *use* of the weights: one token, with what arrived there and what all outputs, each
# with a drawn reference, ask of the weights there. One backward pass gives the uses of a whole window
# (`eigendecomp.study.positions`). The directions are directions in the same parameter space. Two more choices, both
# worth much (measured below, in "What it depends on"): every use counts alike (its gradient is scaled to norm 1),
# since otherwise few surprising tokens decide; and the layer is written with standard inputs. A weight's gradient is
# an outer product with what arrives, so what all tokens share is in every gradient; `stories.standardised` moves mean
# and scale of the inputs into biases and normalisation, and the function stays what it was.
#
# Two dictionaries of 100 directions of rank 1, three seeds each: of $W_K$ alone, and of queries, keys and values
# together; and one of all four attention weights, for its error.

# %%
written = stories.standardised(model, [layer], tokens["fit"][:500])
kl, reference = ed.KLDivergence(), ed.OtherSample()
weights = {letter: f"blocks.{layer}.attn.W_{letter}" for letter in "QKVO"}
drawn = {"divergence": kl, "reference": reference}
of_fit, pool = study.positions.collect(written, tokens["fit"], parameters=list(weights.values()), **drawn)
of_test, _ = study.positions.collect(
    written, tokens["test"], parameters=list(weights.values()), pool=pool, seed=1, **drawn
)
dictionaries = {"K": ["K"], "Q, K, V": ["Q", "K", "V"], "Q, K, V, O": ["Q", "K", "V", "O"]}


# %%
def decompose(
    found: study.positions.Uses, letters: list[str], seed: int, alike: bool = True, **changes
) -> ed.Decomposition:
    chosen = found.select([weights[letter] for letter in letters])
    setting = drawn | {
        "n_directions": n_directions, "seed": seed, "steps": steps, "sparsity": ed.BatchTopK(kept / n_directions),
        "batch_size": batch_size, "learning_rate": learning_rate,
    } | changes  # fmt: skip
    return study.positions.decompose(chosen.alike() if alike else chosen, pool, **setting)


fits = {
    (key, seed): decompose(of_fit, letters, seed)
    for key, letters in dictionaries.items()
    for seed in (seeds if key != "Q, K, V, O" else seeds[:1])
}


# %%
def spreads(table: pd.DataFrame, by: str, columns: list[str]) -> dict:
    """Mean and spread over seeds of some columns, for each kind of row."""
    return {
        key: {column: results.spread(part[column].tolist()) for column in columns} for key, part in table.groupby(by)
    }


rows = []
for (key, seed), d in fits.items():
    error, on = study.positions.reconstruction_error(d, of_test.select(d.target.names).alike())
    rows.append({"weights": key, "seed": seed, "error": error, "kept": on, "dead": d.history.dead[-1]})
table = pd.DataFrame(rows)
report.record(error_of_uses=spreads(table, "weights", ["error", "kept", "dead"]))
report.table("fits", table).round(3)

# %% [markdown]
# The floors on 2,048 of the same uses of $W_K$, with as many coefficients, refitted by least squares; principal
# components are of 1,024 training uses.

# %%
rare = of_test.select([weights["K"]]).alike().gradients(slice(0, 2048)).flat()
principal = study.floors.principal_directions(
    of_fit.select([weights["K"]]).alike().gradients(slice(0, 1024)).flat(), n_directions
)
random_d = study.floors.random_directions(fits["K", seeds[0]].decoder.shapes, n_directions, 1, seed=0)
floor_errors = {
    "PCA": study.floors.sparse_error(rare, principal, kept),
    "random": study.floors.sparse_error(rare, random_d.flat(), kept),
}
report.record(floor_error_of_uses=floor_errors)
pd.Series(floor_errors).round(3)

# %%
ours = table[table.weights == "K"]["error"].mean()
shown = {f"{n} directions, outputs": errors[n] for n in errors} | {
    f"{n_directions} directions, uses": {"ours": ours} | floor_errors
}
figure, (ax,) = plots.panels(1, 1, width=plots.PAGE * 0.6, height=1.9)
for place, (kind, tint) in enumerate((("ours", plots.OURS), ("PCA", plots.PCA), ("random", plots.RANDOM))):
    ax.bar([i + 0.27 * (place - 1) for i in range(len(shown))], [x[kind] for x in shown.values()], 0.25, color=tint,
           label=kind)  # fmt: skip
ax.set_xticks(range(len(shown)), list(shown))
ax.set(ylabel="share not rebuilt", ylim=(0, 1.05))
ax.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
report.figure("errors", figure)

# %% [markdown]
# ## Sparse autoencoders
#
# BatchTopK autoencoders of sae-lens with as many units and as many on, on the block's attention output, on its
# residual stream, and, which is what our readers see, on what arrives at the attention's weights. Learning rates of
# 3e-3 and 1e-2, 1,200 to 2,000 steps, and 1, 2 and 5 units on were compared on validation stories and other seeds: the
# rate and the steps hardly matter, two on served the residual stream's autoencoder best, and one or two our directions.

# %%
sites = {
    "residual stream": f"blocks.{layer}.hook_resid_post",
    "attention output": f"blocks.{layer}.hook_attn_out",
    "attention input": f"blocks.{layer}.ln1",
}
met = {part: stories.activations(written, tokens[part], list(sites.values())) for part in tokens}
autoencoders = {
    (site, seed): study.autoencoders.train(
        met["fit"][module], n_directions, kept, seed=seed, steps=sae_steps, batch_size=sae_batch,
        learning_rate=sae_rate,
    )
    for site, module in sites.items()
    for seed in seeds
}  # fmt: skip
rows = []
for (site, seed), a in autoencoders.items():
    z = a.encode(met["test"][sites[site]]) != 0
    error = a.reconstruction_error(met["test"][sites[site]])
    rows.append({"site": site, "seed": seed, "error": error, "kept": z.double().sum(1).mean().item(),
                 "never on": (~z.any(0)).double().mean().item()})  # fmt: skip
table = pd.DataFrame(rows)
report.record(autoencoders=spreads(table, "site", ["error", "kept", "never on"]))
report.table("autoencoders", table).round(3)

# %% [markdown]
# ## Concepts
#
# For every concept the unit with the best average precision on validation stories, scored on test stories, and
# three units together, weighted by least squares. A direction is read by its *reader*, the input-side factor of its row
# applied to what arrives at the weight: the natural opponent of an autoencoder's encoder (of $W_K$ for the first
# dictionary, of $W_V$ for the second, both of the decoder's rows, as validation stories chose). It is a dense
# reading; an autoencoder is given both ways, as it is and before its threshold, which breaks the ties among the tokens
# on which a unit is off and serves it better. Queries, keys and values all meet the attention's input, so a reader is
# applied to what `stories.activations` remembered of it.

# %%
Scores = dict[str, torch.Tensor]  # by split: (tokens, units)


def oriented(found: Scores) -> Scores:
    return {part: study.concepts.oriented(scores, on=found["choose"]) for part, scores in found.items()}


arriving = {part: met[part][sites["attention input"]] for part in known}


def readers(d: ed.Decomposition, letter: str) -> torch.Tensor:
    """(directions, rank, width)"""
    return study.readings.readers(d, tokens["fit"][:3], "decoder")[weights[letter]]


def along_readers(rows: torch.Tensor, x: Scores = arriving) -> Scores:
    met_by = {part: torch.einsum("ni,vki->nvk", x[part], rows) for part in known}
    return oriented({part: y.norm(dim=-1) if rows.shape[1] > 1 else y[..., 0] for part, y in met_by.items()})


def resolve(found: Scores) -> study.concepts.Resolution:
    return study.concepts.resolve((found["choose"], known["choose"].truth), (found["test"], known["test"].truth))


# %%
reader = {(key, seed): readers(fits[key, seed], letter) for key, letter in (("K", "K"), ("Q, K, V", "V"))
          for seed in seeds}  # fmt: skip
scores: dict[tuple[str, int], Scores] = {}
for seed in seeds:
    for key in ("K", "Q, K, V"):
        scores[f"ours, {key}", seed] = along_readers(reader[key, seed])
    for site, module in sites.items():
        a = autoencoders[site, seed]
        scores[f"SAE, {site}", seed] = {part: a.encode(met[part][module]) for part in known}
        scores[f"SAE, {site}, before its threshold", seed] = {
            part: a.before_threshold(met[part][module]) for part in known
        }
    draw = torch.Generator().manual_seed(seed)
    scores["random readers", seed] = along_readers(torch.randn(n_directions, 1, 64, generator=draw))
matrices = principal.unflatten(1, (16, 64, 4)).transpose(2, 3).flatten(1, 2)
scores["PCA's readers", seeds[0]] = along_readers(torch.linalg.svd(matrices, full_matrices=False).Vh[:, :1])

# %%
resolved = {key: resolve(found) for key, found in scores.items()}
rows = [
    {"units": key, "seed": seed, "family": family, "one unit": found.single[of].mean().item(),
     "three units": found.team[of].mean().item()}
    for (key, seed), found in resolved.items() for family, of in families.items()
]  # fmt: skip
table = pd.DataFrame(rows)
report.record(
    chance={family: known["test"].truth[:, of].double().mean() for family, of in families.items()},
    resolution={
        key: spreads(part, "family", ["one unit", "three units"]) for key, part in table.groupby("units")
    },
)  # fmt: skip
summary = report.table("resolution", table).groupby(["units", "family"])[["one unit", "three units"]].mean().unstack()
summary.sort_values(("one unit", "prediction"), ascending=False).round(3)


# %%
def color(units: object) -> str:
    known_by = {"ours": plots.OURS, "SAE": plots.SAE, "PCA": plots.PCA, "random": plots.RANDOM}
    return next(found for start, found in known_by.items() if str(units).startswith(start))


order = list(summary.sort_values(("one unit", "prediction")).index)
figure, axes = plots.panels(1, 2, height=2.6, sharey=True)
for ax, family in zip(axes, families, strict=True):
    part = table[table.family == family]
    means = part.groupby("units")["one unit"].mean().to_dict()
    ax.barh(order, [means[key] for key in order], color=[color(key) for key in order], height=0.7)
    ax.plot(part["one unit"], part["units"], "o", color="black", ms=2.5)
    ax.axvline(report.values["chance"][family], color="black", lw=0.8, ls=":")
    ax.set(title=f"{family} ({len(families[family])} concepts)", xlabel="average precision of the best unit")
report.figure("concepts", figure)

# %% [markdown]
# Concept by concept, mean over seeds: ours beside the autoencoder that is best on predictions.


# %%
def by_concept(key: str) -> torch.Tensor:
    return torch.stack([found.single for (name, _), found in resolved.items() if name == key]).mean(0)


rival = "SAE, residual stream, before its threshold"
mine, theirs = by_concept("ours, K"), by_concept(rival)
each = pd.DataFrame(
    {"concept": known["test"].names, "family": known["test"].families, "true of": known["test"].truth.sum(0),
     "ours, K": mine, "ours, Q, K, V": by_concept("ours, Q, K, V"), rival: theirs,
     "SAE, attention output": by_concept("SAE, attention output, before its threshold")}
)  # fmt: skip
report.table("by_concept", each)
report.record(better_than_residual_sae={f: (mine[of] > theirs[of]).double().mean() for f, of in families.items()})
figure, axes = plots.panels(1, 2, height=2.9)
for ax, (family, of) in zip(axes, families.items(), strict=True):
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    ax.plot(theirs[of], mine[of], "o", color=plots.OURS, ms=3)
    placed: list[tuple[float, float]] = []
    for i in sorted(of, key=lambda i: -abs(float(mine[i] - theirs[i])))[:9]:
        x, y = float(theirs[i]), float(mine[i])
        if all(abs(y - v) > 0.035 or abs(x - u) > 0.35 for u, v in placed):  # labels that would overlap are left out
            placed.append((x, y))
            side = {"xytext": (-3, -2), "ha": "right"} if x > 0.7 else {"xytext": (3, -2)}
            ax.annotate(known["test"].names[i], (x, y), fontsize=5.5, textcoords="offset points", **side)
    ax.set(title=family, xlabel="SAE, residual stream, before its threshold", ylabel="ours, W_K's reader",
           xlim=(0, 1.02), ylim=(0, 1.02))  # fmt: skip
report.figure("by_concept", figure)

# %% [markdown]
# ### Other ways to read a direction
#
# By its activation √(uᵀHu) at the predicting token, or the share of that among all directions; by its impact there
# (mean |⟨g, u⟩| over two drawn references); by the contribution of each source token (the size of its use's
# coefficient, mean over two draws); and by its reader, of either row. **One fit**, and fewer tokens, since outputs take
# a pass each, hence only the concepts that hold for enough of these; the differences that count are those far above
# the spread over seeds in the table before.

# %%
d = fits["K", seeds[0]]
few = {part: tokens[part][:few_windows] for part in known}
rows_of = slice(0, few_windows * length)
subset = {part: c.truth[rows_of] for part, c in known.items()}
enough = torch.stack([(x.sum(0) >= least // 2) & ~x.all(0) for x in subset.values()]).all(0).nonzero()[:, 0].tolist()
activation = {part: d.activation(x) for part, x in few.items()}
contributed = {}
for part, x in few.items():
    again = [
        study.positions.collect(written, x, parameters=d.target.names, pool=pool, seed=s, **drawn)[0] for s in (2, 3)
    ]
    contributed[part] = sum(study.positions.coefficients(d, u.alike()).abs() for u in again)


def read(side: str) -> Scores:
    return oriented({part: study.readings.read(d, x, side)[weights["K"]].flatten(0, 1) for part, x in few.items()})


# %%
ways = {
    "activation √(uᵀHu)": activation,
    "activation, share among directions": {part: normalize(x) for part, x in activation.items()},
    "impact on the predicted token": {part: d.impact(x, references=2) for part, x in few.items()},
    "contribution of the source token": contributed,
    "reader": read("decoder"),
    "reader, of the encoder": read("encoder"),
}
rows = []
for way, found in ways.items():
    r = study.concepts.resolve(
        (found["choose"], subset["choose"][:, enough]), (found["test"], subset["test"][:, enough])
    )
    of = {f: [j for j, i in enumerate(enough) if known["test"].families[i] == f] for f in families}
    rows.append({"reading": way} | {f: r.single[j].mean().item() for f, j in of.items()})
table = pd.DataFrame(rows)
report.record(readings={row["reading"]: {f: row[f] for f in families} for row in rows}, readings_concepts=len(enough))
report.table("readings", table).round(3)

# %% [markdown]
# ## Selectivity: pushing along a unit
#
# At equal effect: pushed until the next-token distributions at a unit's strongest tokens (2%) have moved by 0.05 in
# total variation on average (to 5% of that); selectivity is that over the mean change elsewhere. Both signs were tried
# and the better one counts, for every method. There are two ways to push, and each has its opponent: a step of the
# weights acts at every token, as adding an autoencoder's row at every position does; a *gated* step changes queries,
# keys and values only of tokens that the direction reads (as much as 2% of validation tokens), as scaling an
# autoencoder's unit acts only where it is on. Pushed are the first six units of every fit, whose order means nothing.
# All moves are of this block or after it, so earlier blocks run once.

# %%
windows = tokens["test"][: 8 if smoke else 24]
with torch.no_grad():
    entering = written(windows, stop_at_layer=layer)
probe = story_units.FromBlock(written, entering, probabilities, layer)
rows_of = slice(0, windows.numel())


def pushes(key: str, moves: list[Move], found: torch.Tensor, seed: int) -> list[dict]:
    rows = []
    for unit, move in enumerate(moves):
        on = story_units.strongest(found[rows_of][:, unit], share)
        at, others = probe.among(on), {"others": probe.among(~on)}
        push = push_either_way(at, others, move, level, by="others", first=1.0, tolerance=0.05) if on.any() else None
        rows.append({"units": key, "seed": seed, "unit": unit, "selectivity": push and push.selectivity("others")})
    return rows


def steering(site: str, seed: int, how: str) -> list[Move]:
    def move(unit: int) -> Move:
        return lambda delta: autoencoders[site, seed].steered(written, sites[site], {unit: delta}, how=how)

    return [move(unit) for unit in range(pushed)]


def gates(seed: int) -> list[Move]:
    d, x, rows = fits["Q, K, V", seed], met["choose"][sites["attention input"]], reader["Q, K, V", seed][:, 0]
    rows = rows * torch.where((x @ rows.T).pow(3).sum(0) < 0, -1.0, 1.0).unsqueeze(1)
    least_on = (x @ rows.T).quantile(1 - share, dim=0).tolist()
    return [story_units.gated(d, layer, u, rows[u], least_on[u]) for u in range(pushed)]


# %%
rows = []
for seed in seeds:
    rows += pushes("ours, Q, K, V, gated", gates(seed), scores["ours, Q, K, V", seed]["test"], seed)
    for key in ("K", "Q, K, V"):
        moves = [along(fits[key, seed], u) for u in range(pushed)]
        rows += pushes(f"ours, {key}", moves, scores[f"ours, {key}", seed]["test"], seed)
    for site, how in (("residual stream", "add"), ("residual stream", "scale"), ("attention output", "add")):
        rows += pushes(f"SAE, {site}, {how}", steering(site, seed, how), scores[f"SAE, {site}", seed]["test"], seed)
d = fits["K", seeds[0]]
flat = ed.Decomposition(d.target, d.settings, random_d, random_d, None, pool, d.history)
moves = [along(flat, u) for u in range(pushed)]
rows += pushes("random, K", moves, along_readers(readers(flat, "K"))["test"], seeds[0])
table = pd.DataFrame(rows).astype({"selectivity": float})
report.table("selectivity", table)
by_seed = table.groupby(["units", "seed"])["selectivity"].median().unstack(0)
report.record(
    selectivity={
        key: results.spread(by_seed[key].dropna().tolist()) for key in by_seed if bool(by_seed[key].notna().any())
    },
    not_reached=table[table.selectivity.isna()].groupby("units").size().to_dict(),
    pushed_units=table.groupby("units").size().to_dict(),
)
by_seed.T.round(2)

# %% [markdown]
# Medians over the units of a fit that reach the level. One point is a unit, the line their median.

# %%
figure, (ax,) = plots.panels(1, 1, width=plots.PAGE * 0.7, height=2.2)
order = list(table.groupby("units")["selectivity"].median().sort_values().index)
for place, key in enumerate(order):
    values = table[table.units == key]["selectivity"].dropna()
    ax.plot(values, [place] * len(values), "o", ms=3, alpha=0.6, color=color(key), mew=0)
    ax.plot(values.median(), place, "|", color="black", ms=14, mew=1.6)
ax.set(yticks=range(len(order)), yticklabels=order, xscale="log", xlabel="change where meant / change elsewhere")
ax.set_ylim(-0.6, len(order) - 0.4)
report.figure("selectivity", figure)

# %% [markdown]
# ## Purity, and stability over seeds
#
# Purity: of a unit's 20 strongest test tokens, the largest share of one concept (among those true of at most 5% of the
# tokens), mean over units. Stability: the share of units that have a match of cosine ≥ 0.8 in another run: over all
# the decomposed weights for ours, decoder rows for autoencoders.

# %%
pure = {
    key: [study.concepts.purity(found["test"], known["test"].truth).mean().item()
          for (name, _), found in scores.items() if name == key]
    for key in dict.fromkeys(name for name, _ in scores)
}  # fmt: skip
pairs = [(s, t) for s in seeds for t in seeds if s != t] or [(seeds[0], seeds[0])]


def rows_of_fit(key: str, seed: int) -> torch.Tensor:
    return fits[key, seed].decoder.flat() if key in dictionaries else autoencoders[key, seed].decoder


places = {"ours, K": "K", "ours, Q, K, V": "Q, K, V"} | {f"SAE, {site}": site for site in sites}
stable = {
    label: [story_units.found_again(rows_of_fit(key, s), rows_of_fit(key, t)) for s, t in pairs]
    for label, key in places.items()
}
of_readers = [story_units.found_again(reader["K", s][:, 0], reader["K", t][:, 0]) for s, t in pairs]
report.record(
    purity={key: results.spread(values) for key, values in pure.items()},
    stability={key: results.spread(values) for key, values in stable.items()},
    stability_of_readers=results.spread(of_readers),
)
table = pd.DataFrame({"purity": {k: sum(v) / len(v) for k, v in pure.items()},
                      "stability": {k: sum(v) / len(v) for k, v in stable.items()}})  # fmt: skip
report.table("purity", table.rename_axis("units").reset_index()).round(3)

# %%
figure, axes = plots.panels(1, 2, height=2.1)
for ax, (title, values) in zip(axes, {"purity": pure, "stability": stable}.items(), strict=True):
    labels = [key for key in values if "threshold" not in key]
    for place, key in enumerate(labels):
        found = values[key]
        ax.barh(place, sum(found) / len(found), color=color(key), height=0.7)
        ax.plot(found, [place] * len(found), "o", color="black", ms=2.5)
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel=title, xlim=(0, 1))
report.figure("purity", figure)

# %% [markdown]
# ## What directions look like
#
# The draft's table: the tokens at which a direction of $W_K$ reads most on test stories, and the next tokens that a
# push promotes and suppresses there. Shown are the ten with the best concepts by their precision on these same stories,
# so they are the best face of one fit; all hundred are in `figures/tinystories_directions.csv`.

# %%
d, found = fits["K", seeds[0]], scores["ours, K", seeds[0]]["test"]
precision = study.concepts.average_precision(found, known["test"].truth)
best, which = precision.max(1)
strength = story_units.heads(d)
rows = []
for unit in range(n_directions):
    on = story_units.strongest(found[rows_of][:, unit], share)
    up, down = story_units.promoted(probe, along(d, unit), 4.0, on)
    seen = story_units.contexts(tokens["test"], found[:, unit], 6)
    top_heads = strength[unit].topk(3)
    rows.append({
        "direction": unit, "concept": known["test"].names[int(which[unit])], "precision": best[unit].item(),
        "contexts": " / ".join(story_units.bold(c) for c in seen), "promotes": " · ".join(up),
        "suppresses": " · ".join(down),
        "heads": ", ".join(f"{h} ({v:.0%})" for v, h in zip(*(x.tolist() for x in top_heads), strict=True)),
    })  # fmt: skip
directions = report.table("directions", pd.DataFrame(rows))
shown = directions.sort_values("precision", ascending=False).drop_duplicates("concept").head(10)
shown = shown.assign(contexts=[" <br> ".join(c.split(" / ")[:4]) for c in shown.contexts])
display(Markdown(story_units.markdown(shown, ["direction", "concept", "contexts", "promotes", "suppresses", "heads"])))

# %% [markdown]
# The heads that directions use: the share of each direction's squared norm in every head of $W_K$.

# %%
report.record(largest_head_share=results.spread([strength.amax(1).median().item()]),
              heads_for_90_percent=study.scores.fewest(strength).double().mean())  # fmt: skip
figure, (ax,) = plots.panels(1, 1, width=plots.PAGE * 0.75, height=2.2)
order = strength.argmax(1).argsort(stable=True)
plots.heat(ax, strength[order].T, signed=False, rows=[str(h) for h in range(strength.shape[1])],
           label="share of squared norm")  # fmt: skip
ax.set(xlabel=f"{n_directions} directions of W_K, by their largest head", ylabel="head")
report.figure("heads", figure)

# %% [markdown]
# ## A story changed by pushing a direction
#
# Of the directions of $Q$, $K$ and $V$, the one that changes most what this prompt goes on with, "girl" or "boy", when
# moved either way by a step of ten. The same random numbers draw every story. The best of a hundred: an example of what
# a direction can do, not of what they all do.

# %%
d, prompt = fits["Q, K, V", seeds[0]], "Once upon a time, there was a little"
ids = [stories.END_ID, *stories.load_tokenizer().encode(prompt)]
asked = Probe(written, torch.tensor([ids]), view=probabilities)
girl, boy = (stories.load_tokenizer().encode(word)[0] for word in (" girl", " boy"))


def turned(unit: int) -> float:
    change = asked.change(along(d, unit), 10.0)[-1] - asked.change(along(d, unit), -10.0)[-1]
    return (change[girl] - change[boy]).abs().item()


unit, told = max(range(n_directions), key=turned), {}
for delta in (-10.0, 0.0, 10.0):
    with d.perturbed({unit: delta}) as changed:
        told[delta] = stories.continued(changed, prompt, 12 if smoke else 60, seed=1)
report.record(pushed_story={"unit": unit, "texts": {f"{delta:+g}": text for delta, text in told.items()}})
display(Markdown("\n\n".join(f"**δ = {delta:+.0f}.** {text}" for delta, text in told.items())))

# %% [markdown]
# ## What it depends on
#
# $W_K$ alone, units chosen on validation stories and scored on test stories. **One fit a row** (seed 100): differences
# of a hundredth or two, as between seeds in the table of concepts, mean nothing. Other references, and the weights as
# they were trained, are fitted on half of the windows: their opponent is the second row, not the first. A reader is
# applied to what arrives in the layer that it was fitted in.

# %%
halved = tokens["fit"][: fit_windows // 2]
variants = {
    "as above": (of_fit, {}),
    "half of the windows": (of_fit.first(len(halved)), {}),
    "half as many kept": (of_fit, {"sparsity": ed.BatchTopK(kept / 2 / n_directions)}),
    "rank 2": (of_fit, {"rank": 2}), "tied": (of_fit, {"tied": True}),
}  # fmt: skip
kinds = {"mean output": ed.Mean(), "model-drawn": ed.ModelSample()}
if smoke:
    variants, kinds = {"rank 2": variants["rank 2"]}, {"mean output": kinds["mean output"]}
for label, kind in kinds.items():
    other, _ = study.positions.collect(written, halved, divergence=kl, reference=kind, parameters=[weights["K"]])
    variants[f"reference: {label}"] = (other, {"reference": kind})
plain, _ = study.positions.collect(model, halved, parameters=[weights["K"]], pool=pool, **drawn)
variants["as the weights were trained"] = (plain, {})
variants["gradients at their own norms"] = (of_fit, {"alike": False})

# %%
as_trained = {
    part: stories.activations(model, tokens[part], [sites["attention input"]])[sites["attention input"]]
    for part in known
}  # fmt: skip
rows = []
for label, (found_uses, changes) in variants.items():
    d = decompose(found_uses, ["K"], 100, **changes)
    r = resolve(along_readers(readers(d, "K"), as_trained if d.target.model is model else arriving))
    rows.append({"setting": label} | {family: r.single[of].mean().item() for family, of in families.items()})
settings = pd.DataFrame(rows)
report.record(settings={row["setting"]: {f: row[f] for f in families} for row in rows})
report.table("settings", settings).round(3)

# %% [markdown]
# ## Every block at once
#
# All attention and MLP weights of the eight blocks, 393,216 numbers: no gradient is formed, and a use is a token with
# its inputs and output gradients in all 48 weights. The layers are as they were trained: with standard inputs the
# first block's $W_O$, whose inputs are small, would hold three quarters of a use's gradient. One fit; its error is on
# the 4,000 uses that it was fitted to.

# %%
of_all, all_pool = study.positions.collect(
    model, tokens["fit"][: fit_windows // 16], divergence=kl, reference=reference,
    parameters=["blocks.*.attn.W_*", "blocks.*.mlp.W_*"],
)  # fmt: skip
whole = study.positions.decompose(
    of_all.alike(), all_pool, divergence=kl, reference=reference, n_directions=n_directions // 2,
    sparsity=ed.BatchTopK(0.1), steps=max(2, steps // 2), batch_size=64, learning_rate=learning_rate,
)  # fmt: skip
error, on = study.positions.reconstruction_error(whole, of_all.alike())
part = whole.decoder.norms(by_tensor=True).square()
report.record(every_block={"weights": len(of_all.rows), "parameters": whole.target.size, "error": error, "kept": on})
print(f"{whole.target.size:,} parameters, error {error:.3f} with {on:.1f} coefficients a use")

# %%
places = [(int(n.split(".")[1]), n.split(".")[-1]) for n in whole.decoder.shapes]
kinds = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"]
grid = torch.stack([part[:, [places.index((block, kind)) for kind in kinds]] for block in range(8)], 1)
of_block = grid.sum(2)
order = (of_block @ torch.arange(8.0)).argsort()
figure, (left, right) = plots.panels(1, 2, height=2.2, width_ratios=[2, 1])
plots.heat(left, of_block[order].T, signed=False, rows=[str(b) for b in range(8)], label="share of squared norm")
left.set(xlabel=f"{len(order)} directions, by their mean block", ylabel="block")
plots.heat(right, grid.mean(0), signed=False, rows=[str(b) for b in range(8)],
           columns=[kind.replace("W_", "") for kind in kinds], label="mean share")  # fmt: skip
report.figure("blocks", figure)

# %% [markdown]
# ## A page to look at
#
# `figures/tinystories_browse.html` shows the directions of $W_K$ on test stories.

# %%
d = fits["K", seeds[0]]
page = results.folder() / "tinystories_browse.html"
z = d.encode(few["choose"][:16]).abs()
d.browse(few["test"][: 4 if smoke else 20], page, title="Directions of a story model's W_K",
         names=stories.readable, threshold=z.flatten().quantile(0.95).item(), references=4)  # fmt: skip
f"{page.stat().st_size / 1e6:.1f} MB"

# %%
report.write().name
