# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does taking single patches as samples put directions of a convolution ahead?
#
# ![Test images with the patch that each of six directions reads most, framed.](../figures/patches_directions.png)
#
# *Six directions: where each reads most (framed), and how a small step along it changes the logits.*
#
# **No.** For concepts of patches directions are ahead of random readers, but not of k-means of patches, and not
# reliably of autoencoders. Five of 300 directions hold 44% of what changes a prediction, five centres of a k-means of
# single gradients 51%.
#
# Words, before any other number:
#
# - The **site** is the first convolution of the middle block of a residual network for Fashion-MNIST, one matrix that
#   multiplies every 3 × 3 patch. A **use** is one patch: what arrives, and what the output asks of the matrix's output.
#   A **direction** is a change of the matrix of rank one: a *reader*, which is a patch, and a *writer*.
# - A **concept** is a *part or pattern* that a patch shows, or a *decision*: the patches that speak most for one of two
#   classes. A unit **resolves** it as well as it ranks the patches that it holds for: average precision, of the unit
#   that is best on validation images, measured on test images.
# - A concept **tells** if both random readers and random training patches fall behind on validation images.
# - A **confusion** is the set of images of one class whose most probable other class is a certain one. Rows **hold**
#   the share of its gradient that lies in their span.

# %% [markdown]
# ## What comes out
#
# 100 and 300 units, three seeds; ± is the standard error over concepts.
#
# - **There are concepts that tell readers apart**: parts of garments and patterns, judged patch by patch. Random
#   readers reach an average precision of 0.16 on parts and patterns at 300 units, ours 0.31. On decisions between two
#   classes (which patches speak for a sneaker and not for a sandal) no reader gets far: 0.03 to 0.05.
# - **Directions are hardly ahead there.** On the 7 concepts that tell at 300 units ours are level with k-means of
#   patches, and ahead of training patches by 0.04 ± 0.02 and of SAE rows by 0.08 ± 0.04. These leads hang on the
#   processor: elsewhere the first was 0.03 ± 0.03, the second 0.04 ± 0.06 or 0.10 ± 0.03. With four units on at a patch
#   ours are behind SAE rows, and at 100 units behind k-means of patches (by 0.08 ± 0.04).
# - **A few rows hold much of what changes a prediction, if they are made of gradients.** On the mean gradients of 25
#   confusions directions are ahead of SAE rows, which hold 16% in five, of single gradients and of principal
#   components. k-means of patches, with the mean of what is asked, are level at 300 units and behind at 100; k-means of
#   single gradients are ahead.
# - **Steps of equal size** change predictions more along our directions (total variation 0.19) than along SAE rows,
#   single gradients or random ones, and less than along k-means of gradients (0.24) or of patches.
# - **Purity** does not discriminate: one concept holds for 25% of a direction's top patches, for 23% of a random
#   reader's.

# %% tags=["parameters"]
sizes, seeds = [100, 300], [0, 1, 2]
fit_images, choose_images, test_images = 800, 300, 700
drawn = 6  # patches an image, on which readings are judged
kept, steps, batch_size, learning_rate = 4, 250, 256, 1e-2  # kept: coefficients a use
warmup, auxiliary = 0.5, 1 / 16
sae_steps, sae_batch, sae_rate = 400, 512, 3e-3
held_images = 150  # whose single gradients floors are made of
pairs, share, least, margin = 6, 0.05, 8, 0.05  # pairs of classes; of their patches; a concept's patches; be ahead by
confused = 10  # images of a confusion at least
counts, top, moved, images_moved, step_size = (1, 5, 20), 20, 10, 60, 0.2  # step_size: a step's norm over the matrix's

# %%
import warnings
from typing import Any

import pandas as pd
import torch

import eigendecomp as ed
from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.study.moves import Probe, displaced, probabilities, total_variation
from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.fashion import concepts as fashion_concepts
from rooms.fashion import patches as cnn_patches
from rooms.fashion import prepared

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress not found")
plots.style()

# %%
smoke = results.profile() == "smoke"
if smoke:
    sizes, seeds, fit_images, choose_images, test_images, steps, sae_steps = [20], [0], 60, 100, 100, 20, 20
    held_images, moved, images_moved, pairs, confused = 20, 2, 20, 2, 4
report = results.Results(
    "patches", sizes=sizes, seeds=seeds, fit_images=fit_images, choose_images=choose_images, test_images=test_images,
    drawn=drawn, kept=kept, steps=steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
    auxiliary=auxiliary, sae_steps=sae_steps, sae_batch=sae_batch, sae_rate=sae_rate, held_images=held_images,
    pairs=pairs, confused=confused, share=share, least=least, margin=margin, counts=counts, top=top, moved=moved,
    images_moved=images_moved, step_size=step_size,
)  # fmt: skip

# %% [markdown]
# ## Network, images, samples
#
# The network and the images are those of the notebook `cnn`. The first convolution of the middle block multiplies
# every 3 × 3 patch of 32 channels by one matrix; so written, a direction of rank one is a *reader*, which is a patch,
# and a *writer*, which is what it adds to the layer's output. There are 14 × 14 patches an image.

# %%
given_parts = prepared.prepare(fit_images, choose_images, test_images, subset=smoke)
images, labels, entering, logits = (
    given_parts.images, given_parts.labels, given_parts.entering, given_parts.logits,
)  # fmt: skip
tail = cnn_patches.unfolded(given_parts.tail)
weight = "block2.conv1.matrix.weight"

# %% [markdown]
# ## Directions, and what they are compared with
#
# Ours rebuild the gradients of single uses of the matrix, at norm one, against the mean prediction; the output is their
# error. Beside them, of equal number: **k-means of single gradients** (lines of rank one), spherical **k-means** of
# patches, **training patches** drawn at random, **random** readers, **PCA** of patches, and an **SAE** of patches. All
# of them are read by products with patches, before any threshold, and with four at most left on at a patch.

# %%
fits = {
    (size, seed): ed.decompose(
        tail, entering["fit"], divergence=ed.KLDivergence(), parameters=[weight], n_directions=size, rank=1,
        samples="uses", scale="unit", sparsity=ed.BatchTopK(kept / size, warmup, auxiliary), steps=steps,
        batch_size=batch_size, learning_rate=learning_rate, seed=seed, progress=False,
    )
    for size in sizes
    for seed in seeds
}  # fmt: skip
some = entering["test"][:40]
errors = {size: results.spread([fits[size, s].reconstruction_error(some) for s in seeds]) for size in sizes}
report.record(error=errors)
report.settings["fit"] = fits[sizes[0], seeds[0]].settings.as_json()
{size: round(spread["mean"], 3) for size, spread in errors.items()}

# %% [markdown]
# Single gradients, which some of the floors are made of: what arrives, and what is asked, both at norm one.

# %%
found = study.readings.factors(
    tail, entering["fit"][:held_images], divergence=ed.KLDivergence(), parameters=[weight], scale="unit"
)
arrived, asked = found[weight]
asked = asked * arrived.norm(dim=1, keepdim=True)  # of norm one, with inputs at norm one
given = cnn_patches.unit_rows(arrived)
lines = {key: cnn_patches.gradient_means(given, asked, key[0], seed=key[1]) for key in fits}

# %%
met = cnn_patches.patches(entering["fit"]).flatten(0, 1)
order = torch.randperm(len(met), generator=torch.Generator().manual_seed(0))
some_met = met[order[: 30 * max(sizes) + 1000]]
centred = some_met - some_met.mean(0)
components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T


def readers(size: int, seed: int) -> dict[str, torch.Tensor]:
    """{method: (units, patch)}: what each unit looks for."""
    d, draw = fits[size, seed], torch.Generator().manual_seed(seed)
    rows = {side: study.readings.readers(d, some[:3], side)[weight][:, 0] for side in ("encoder", "decoder")}
    return {
        "ours, encoder": rows["encoder"], "ours, decoder": rows["decoder"],
        "k-means": cnn_patches.input_means(some_met, size, seed=seed)[0],
        "k-means of gradients": lines[size, seed][0],
        "training patches": some_met[torch.randperm(len(some_met), generator=draw)[:size]],
        "random": torch.randn(size, met.shape[1], generator=draw),
        "PCA": components[:size],
    }  # fmt: skip


# %%
autoencoders = {
    (size, seed): study.autoencoders.train(
        met, size, kept, seed=seed, steps=sae_steps, batch_size=sae_batch, learning_rate=sae_rate
    )
    for size in sizes
    for seed in seeds
}
signed = ("ours, encoder", "ours, decoder", "k-means of gradients", "random", "PCA")  # their signs are arbitrary


# %%
def readings(size: int, seed: int, x: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """{(method, reading): (patches, units)}, with arbitrary signs turned to the heavier tail on patches of the fit."""
    a, found = autoencoders[size, seed], {}
    rows = {name: cnn_patches.unit_rows(row) for name, row in of[size, seed].items()}
    rows["SAE, decoder rows"] = cnn_patches.unit_rows(a.decoder)
    for name, row in rows.items():
        method, _, side = name.partition(", ")
        product = x @ row.T
        if name in signed:
            product = study.concepts.oriented(product, some_met[:3000] @ row.T)
        found[method, f"{side} product".strip()] = product
        found[method, f"{side} cosine".strip()] = product / x.norm(dim=1, keepdim=True).clamp_min(1e-9)
    return found | {("SAE", "before the threshold"): a.before_threshold(x), ("SAE", "code"): a.encode(x)}


of = {key: readers(*key) for key in fits}

# %% [markdown]
# ## Concepts of patches
#
# **Parts and patterns**: what a patch shows of which garment, from labels and pixels. **Decisions**: for the pairs of
# classes that the network confuses most, the patches that add most to the one's logit less the other's, to first
# order, on images of both.

# %%
p = logits["choose"].softmax(-1)
mistaken = torch.stack([p[labels["choose"] == k].sum(0) for k in range(10)])
mistaken = (mistaken + mistaken.T).triu(1)
decided = [(int(i) // 10, int(i) % 10) for i in mistaken.flatten().topk(pairs).indices]


def decisions(part: str, a: int, b: int) -> dict[str, torch.Tensor]:
    """The patches that speak most for either of two classes on images of both: {name: (images, 196)}."""
    both = ((labels[part] == a) | (labels[part] == b)).nonzero()[:, 0]
    added, _ = cnn_patches.decision(tail, entering[part][both], a, b)
    found = {}
    for sign, one, other in ((1, a, b), (-1, b, a)):
        held = torch.zeros(len(labels[part]), added.shape[1], dtype=torch.bool)
        held[both] = sign * added >= (sign * added).quantile(1 - share)
        found[f"{fashion.CLASSES[one]}, not {fashion.CLASSES[other]}"] = held
    return found


# %%
def draw(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random places of every image: (images, drawn), and the patches there."""
    places = torch.rand(len(images[part]), 196, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :drawn]
    x = cnn_patches.patches(entering[part])
    return places, x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2])).flatten(0, 1)


def known(part: str) -> dict[str, torch.Tensor]:
    found = cnn_patches.parts(images[part], labels[part])
    for pair in decided:
        found |= decisions(part, *pair)
    return {name: held.gather(1, places[part]).flatten() for name, held in found.items()}


places, x = {}, {}
for part in ("choose", "test"):
    places[part], x[part] = draw(part)
truth = {part: known(part) for part in x}
names = [name for name, held in truth["choose"].items() if held.sum() >= least and truth["test"][name].any()]
table = {part: torch.stack([truth[part][name] for name in names], 1) for part in x}
kind = ["decision" if ", not " in name else "part or pattern" for name in names]
report.record(
    concepts={name: truth["test"][name].double().mean() for name in names}, kinds=dict(zip(names, kind, strict=True))
)
len(names)

# %% [markdown]
# ## How well they are resolved
#
# For every concept the unit with the best average precision on patches of validation images, scored on test images.
# Of each method the reading that does best on validation images is taken, at each size.


# %%
def few(z: torch.Tensor) -> torch.Tensor:
    """Only the ``kept`` largest at a patch, where they are positive; the rest is zero."""
    return z.where(z >= z.topk(kept, 1).values[:, -1:], 0.0).clamp_min(0)


def scored(z: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """For every concept, the precision on validation images of the unit that is best there, and on test images."""
    precision = study.concepts.average_precision(z["choose"], table["choose"])
    best = precision.argmax(0)
    on_test = [study.concepts.average_precision(z["test"][:, [u]], table["test"][:, [m]])[0, 0]
               for m, u in enumerate(best.tolist())]  # fmt: skip
    return precision.amax(0), torch.stack(on_test)


# %%
chosen, rows = {}, []
for size, seed in fits:
    z = {part: readings(size, seed, x[part]) for part in x}
    by_method: dict[str, list] = {}
    for method, reading in z["test"]:
        here = {part: z[part][method, reading] for part in x}
        by_method.setdefault(method, []).append((*scored(here), reading, here))
    for method, tried in by_method.items():
        on_choose, on_test, reading, here = max(tried, key=lambda one: one[0].mean())
        chosen[method, size, seed] = reading, here["test"]
        sparse = scored({part: few(value) for part, value in here.items()})[1]
        rows += [
            {"method": method, "size": size, "seed": seed, "reading": reading, "concept": name, "kind": kind[m],
             "validation": on_choose[m].item(), "test": on_test[m].item(), "four on": sparse[m].item()}
            for m, name in enumerate(names)
        ]  # fmt: skip
each = report.table("concepts", pd.DataFrame(rows))
report.record(chosen={f"{method}, {size}": chosen[method, size, seeds[0]][0] for method, size, _ in chosen})
each.pivot_table(index="method", columns=["size", "kind"], values=["test", "four on"]).rename(plots.called).round(3)

# %% [markdown]
# ## Concepts that tell methods apart
#
# A score says something only where random readers and random training patches fall clearly behind. A concept counts
# as such if, on *validation* images, the best of ours, k-means and the SAE is ahead of both floors by the margin.

# %%
wide = each.pivot_table(index=["size", "concept"], columns="method", values=["validation", "test", "four on"])
ahead = wide["validation"][["ours", "k-means", "SAE"]].max(axis=1) - wide["validation"][
    ["random", "training patches"]
].max(axis=1)
ahead_random = wide["validation"][["ours", "k-means", "SAE"]].max(axis=1) - wide["validation"]["random"]
telling = {size: ahead[size][ahead[size] >= margin].index.tolist() for size in sizes}
beyond_random = {size: ahead_random[size][ahead_random[size] >= margin].index.tolist() for size in sizes}
report.record(telling=telling, ahead_of_random_alone=beyond_random)
{size: (len(found), len(beyond_random[size]), found) for size, found in telling.items()}


# %%
def difference(size: int, among: list[str], other: str, measure: str = "test") -> dict[str, float]:
    """Ours less another's precision over concepts: mean, and its standard error over concepts."""
    both = wide[measure].loc[size].loc[among]
    gap = both["ours"] - both[other]
    return {"mean": gap.mean(), "error": gap.sem() if len(gap) > 1 else 0.0, "concepts": len(gap)}


families = {
    size: {
        "all": names, "part or pattern": [n for n, k in zip(names, kind, strict=True) if k != "decision"],
        "decision": [n for n, k in zip(names, kind, strict=True) if k == "decision"],
        "ahead of random": beyond_random[size], "telling": telling[size],
    }
    for size in sizes
}  # fmt: skip

# %%
methods = ["ours", "k-means of gradients", "k-means", "training patches", "SAE", "PCA", "random"]
resolution = pd.DataFrame(
    [
        {"size": size, "family": family, "method": method, "seed": seed, "concepts": len(among),
         "test": part["test"].mean(), "four on": part["four on"].mean()}
        for size in sizes for family, among in families[size].items() if among
        for method in methods for seed in seeds
        for part in [each[(each["size"] == size) & (each["method"] == method) & (each["seed"] == seed)
                          & each["concept"].isin(among)]]
    ]
)  # fmt: skip

# %%
report.table("resolution", resolution)
gaps = {
    size: {family: {other: {m: difference(size, among, other, m) for m in ("test", "four on")} for other in methods[1:]}
           for family, among in families[size].items() if among}
    for size in sizes
}  # fmt: skip
report.record(
    resolution={
        size: {family: {method: results.spread(one["test"].tolist()) for method, one in part.groupby("method")}
               for family, part in whole.groupby("family")}
        for size, whole in resolution.groupby("size")
    },
    gaps=gaps,
)  # fmt: skip
by_family = resolution.pivot_table(index="method", columns=["size", "family"], values="test").loc[methods]
by_family.rename(plots.called).round(3)

# %% [markdown]
# ## Purity
#
# Of each unit's top 20 test patches: the largest share that one concept is true of, and the entropy of the labels of
# their images (nats); means over units.

# %%
pure = []
for (method, size, seed), (_, z) in chosen.items():
    on = z.topk(top, 0).indices
    shares = torch.nn.functional.one_hot(labels["test"][on // drawn], 10).double().mean(0)
    pure.append({
        "method": method, "size": size, "seed": seed,
        "one concept": study.concepts.purity(z, table["test"], top).mean().item(),
        "label entropy": -torch.xlogy(shares, shares).sum(-1).mean().item(),
    })  # fmt: skip
pure = report.table("purity", pd.DataFrame(pure))
report.record(
    purity={size: {method: {m: results.spread(part[m].tolist()) for m in ("one concept", "label entropy")}
                   for method, part in whole.groupby("method")} for size, whole in pure.groupby("size")}
)  # fmt: skip
pure.groupby(["size", "method"])[["one concept", "label entropy"]].mean().rename(plots.called).round(3)

# %% [markdown]
# ## Images: classes and the usual concepts
#
# Classes and the other concepts of the notebook `cnn`, each unit read by its largest product over an image's patches,
# without knowing the prediction. The logits know it. Random readers fall behind here too, but so do ours: an SAE of
# whole images, which sees all patches at once, resolves classes better than any reader of patches, and the logits
# better than both.


# %%
def usual(part: str) -> torch.Tensor:
    found = fashion_concepts.classes(labels[part]) | fashion_concepts.concepts(images[part], labels[part])
    return torch.stack(list(found.values()), 1)


def pooled(row: torch.Tensor, part: str, sign: bool) -> torch.Tensor:
    found = []
    for x_part in entering[part][: half[part]].split(100):
        z = cnn_patches.patches(x_part) @ row.T
        found.append(z.amax(1) if not sign else torch.maximum(z.amax(1), -z.amin(1)))
    return torch.cat(found)


half = {part: len(whole) // (1 if part == "fit" else 2) for part, whole in entering.items()}  # enough here
flat = {part: whole[: half[part]].flatten(1) for part, whole in entering.items()}
mean_image = flat["fit"].mean(0)
basis = torch.linalg.svd(flat["fit"] - mean_image, full_matrices=False).Vh[:256]
turned = {part: (whole - mean_image) @ basis.T for part, whole in flat.items()}
usual_truth = {part: usual(part)[: half[part]] for part in x}

# %%
either_way = ("ours", "k-means of gradients", "random", "PCA")
shortened = {part: logits[part][: half[part]] for part in x}
per_image = []
for size, seed in fits:
    a = study.autoencoders.train(
        turned["fit"], size, kept, seed=seed, steps=sae_steps, batch_size=128, learning_rate=sae_rate
    )
    z = {"SAE of images": {part: a.before_threshold(turned[part]) for part in x}, "logits": shortened}
    rows_of = {n.partition(", ")[0]: row for n, row in of[size, seed].items() if n != "ours, decoder"}
    rows_of["SAE"] = autoencoders[size, seed].decoder
    for method, row in rows_of.items():
        z[method] = {part: pooled(cnn_patches.unit_rows(row), part, method in either_way) for part in x}
    for method, value in z.items():
        one = study.concepts.resolve(*((value[part], usual_truth[part]) for part in ("choose", "test"))).single
        per_image.append({"method": method, "size": size, "seed": seed, "classes": one[:10].mean().item(),
                          "further": one[10:].mean().item()})  # fmt: skip
per_image = report.table("images", pd.DataFrame(per_image))
report.record(
    images={size: {method: {m: results.spread(part[m].tolist()) for m in ("classes", "further")}
                   for method, part in whole.groupby("method")} for size, whole in per_image.groupby("size")}
)  # fmt: skip
per_image.groupby(["size", "method"])[["classes", "further"]].mean().rename(plots.called).round(3)

# %% [markdown]
# ## What would change a prediction, in few directions
#
# A *confusion* is the set of test images of one class whose most probable other class is a certain one. For each with
# ten images or more, the gradient of the one logit less the other, the mean over its images: how much of its squared
# norm do the best 1, 5 or 20 of a dictionary's rows hold? Beside ours: k-means of single
# gradients; k-means of patches with the mean of what is asked of each cluster, and SAE rows with the mean of what is
# asked where the unit is on; single gradients at random; principal components of single gradients (of any rank); and
# random directions of rank one.

# %%
found = prepared.confusions(logits["test"], labels["test"], confused)
behaviours = [cnn_patches.decision(tail, entering["test"][at], *pair)[1].flatten() for pair, at in found.items()]
report.record(confusions={f"{fashion.CLASSES[a]} → {fashion.CLASSES[b]}": len(at) for (a, b), at in found.items()})
behaviours = torch.stack(behaviours)
pick = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))[:1000]
single_rows = torch.einsum("no,ni->noi", asked[pick], given[pick]).flatten(1)
values, vectors = torch.linalg.eigh(single_rows @ single_rows.T)
components_of_gradients = cnn_patches.unit_rows(vectors.flip(1).T[: max(sizes)] @ single_rows)


# %%
def joined(reader: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """Directions of rank one at norm one, as rows of the flattened matrix."""
    return cnn_patches.unit_rows(torch.einsum("vo,vi->voi", writer, reader).flatten(1))


def dictionaries(size: int, seed: int) -> dict[str, torch.Tensor]:
    centres, nearest = cnn_patches.input_means(given, size, seed=seed)
    code = autoencoders[size, seed].encode(arrived)
    draw = torch.Generator().manual_seed(seed)
    at = torch.randperm(len(given), generator=draw)[:size]
    mean_asked = torch.zeros(size, asked.shape[1]).index_add_(0, nearest, asked)
    return {
        "ours": fits[size, seed].decoder.flat(),
        "k-means of gradients": joined(*lines[size, seed]),
        "k-means": joined(centres, mean_asked),
        "single gradients": joined(given[at], asked[at]),
        "SAE": joined(autoencoders[size, seed].decoder, code.T @ asked),
        "PCA": components_of_gradients[:size],
        "random": joined(*(torch.randn(size, side.shape[1], generator=draw) for side in (given, asked))),
    }  # fmt: skip


# %%
dictionary = {key: dictionaries(*key) for key in fits}
held_share = pd.DataFrame(
    [
        {"method": method, "size": size, "seed": seed, "rows": count, "behaviour": i, "held": value}
        for (size, seed), by_name in dictionary.items()
        for method, row in by_name.items()
        for count, values in cnn_patches.rebuilt(behaviours, row, counts).items()
        for i, value in enumerate(values.tolist())
    ]
)
mean_held: Any = held_share.groupby(["size", "method", "rows", "seed"])["held"].mean()
report.table("behaviours", mean_held.reset_index())
report.record(
    behaviours={size: {method: {count: results.spread(mean_held[size, method, count].tolist()) for count in counts}
                       for method in dictionary[sizes[0], seeds[0]]} for size in sizes}
)  # fmt: skip
mean_held.groupby(level=[0, 1, 2]).mean().unstack([0, 2]).rename(plots.called).round(3)

# %% [markdown]
# ## What a step of equal size does
#
# The weight is moved by a fifth of its norm along some directions of each kind, drawn at random: the mean change of
# the probabilities (total variation) over test images, and the share of all change that the tenth of the images that
# change most has (a tenth, if all change alike).

# %%
probe = Probe(tail, entering["test"][:images_moved], probabilities)
step = step_size * tail.get_parameter(weight).norm().item()
stepped = []
for seed in seeds:
    for method, row in dictionary[sizes[-1], seed].items():
        for u in torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))[:moved].tolist():
            change = total_variation(probe, displaced(tail, {weight: row[u]}), step)
            most = change.topk(max(1, images_moved // 10)).values.sum() / change.sum().clamp_min(1e-9)
            stepped.append({"method": method, "seed": seed, "change": change.mean().item(), "most": most.item()})
stepped = report.table("steps", pd.DataFrame(stepped))
by_seed = stepped.groupby(["method", "seed"])[["change", "most"]].mean()
report.record(
    steps={method: {m: results.spread(part[m].tolist()) for m in ("change", "most")}
           for method, part in by_seed.groupby(level=0)}
)  # fmt: skip
by_seed.groupby(level=0).mean().rename(plots.called).round(3)

# %% [markdown]
# ## All in two figures
#
# In the first, filled dots are of 100 units, open ones of 300; bars are the range over seeds. In both, blue are
# directions, light blue clusters of gradients, pink clusters of patches, yellow training patches and single gradients,
# orange autoencoders, green principal components, grey random rows.

# %%
tint = {"ours": plots.OURS, "SAE": plots.SAE, "PCA": plots.PCA, "random": plots.RANDOM,
        "k-means": plots.CLUSTERS_OF_INPUTS, "k-means of gradients": plots.CLUSTERS_OF_GRADIENTS,
        "training patches": plots.SAMPLES, "single gradients": plots.SAMPLES}  # fmt: skip
titles = {"part or pattern": "parts and patterns", "decision": "decisions",
          "ahead of random": "ahead of random readers", "telling": "ahead of both floors"}  # fmt: skip
figure, axes = plots.panels(1, 4, height=1.9, sharey=True)
for ax, (family, title) in zip(axes, titles.items(), strict=True):
    for size in sizes:
        part = resolution[(resolution["size"] == size) & (resolution["family"] == family)]
        for position, method in enumerate(methods):
            value, color = part[part["method"] == method]["test"], tint[method]
            if len(value):
                ax.plot([value.min(), value.max()], [position] * 2, color=color, lw=2)
                plots.dot(ax, value.mean(), position, color, larger=size > sizes[0])
    ax.set(title=title, xlabel="average precision", ylim=(len(methods) - 0.5, -0.5))
    ax.grid(axis="x", lw=0.4)
axes[0].set(yticks=range(len(methods)), yticklabels=map(plots.called, methods))
plots.name_dots(figure, f"{sizes[0]} units", f"{sizes[-1]} units")
report.figure("resolution", figure)

# %%
figure, axes = plots.panels(1, len(sizes), height=2.7, width=plots.PAGE, sharey=False)
for ax, size in zip(axes, sizes, strict=True):
    ends = {}
    for method in dictionary[size, seeds[0]]:
        line = [mean_held[size, method, count].mean() for count in counts]
        ax.plot(counts, line, "o-", color=tint[method], ms=3, lw=1.2)
        ends[plots.called(method)] = line[-1], tint[method]
    plots.name_ends(ax, counts[-1], ends, gap=0.062 * max(end for end, _ in ends.values()))
    ax.set(title=f"{size} rows to choose from", xlabel="rows used", xscale="log", xticks=counts, xticklabels=counts)
axes[0].set_ylabel("share of the gradient held")
report.figure("behaviours", figure)

# %% [markdown]
# ## Some directions
#
# The decisions and parts that our directions resolve best on validation images, each by a direction of its own. Left,
# eight test images: those whose patch, framed, the direction reads most, one patch an image. Right, the change of the
# logits of these eight for a step of a fiftieth of the matrix's norm. Its sign, which is arbitrary, is such that the
# step *raises* what it is named for: the first class of a decision over the second, or the classes that have the part.
# Outlines belong to all classes alike, so there is little that their directions could raise.


# %%
def raised(name: str) -> torch.Tensor:
    """What of the logits a concept is about: one class less another, or the classes of a part's patches."""
    if ", not " in name:
        one, other = name.split(", not ")
        return torch.eye(10)[fashion.CLASSES.index(one)] - torch.eye(10)[fashion.CLASSES.index(other)]
    has = table["test"][:, names.index(name)]
    often = torch.bincount(labels["test"].repeat_interleave(drawn)[has], minlength=10).float()
    return often / often.sum() - 0.1


key = ("ours", sizes[-1], seeds[0])
reading, z = chosen[key]
precision = study.concepts.average_precision(readings(*key[1:], x["choose"])["ours", reading], table["choose"])
shown: dict[str, int] = {}
for wanted, count in (("decision", 3), ("part or pattern", 3)):
    for m in sorted(range(len(names)), key=lambda m: -precision[:, m].max()):
        unit = int(precision[:, m].argmax())
        if (
            kind[m] == wanted
            and unit not in shown.values()
            and sum(kind[names.index(n)] == wanted for n in shown) < count
        ):
            shown[names[m]] = unit


# %%
def turned_move(name: str, unit: int, at: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The sign that raises what a direction is named for, and how a step with it moves the centred logits."""
    row, base = fits[key[1:]].decoder.flat()[unit], cnn.predict(tail, entering["test"][at])
    small, move = 0.02 * tail.get_parameter(weight).norm().item(), {}
    for sign in (1, -1):
        with displaced(tail, {weight: row})(sign * small) as other:
            move[sign] = (cnn.predict(other, entering["test"][at]) - base).mean(0)
    half_way = (move[1] - move[-1]) / 2
    sign = int(prepared.raising(half_way[None], raised(name)[None]))
    return sign, move[sign] - move[sign].mean()


orientation, moves_of, strongest_of = {}, {}, {}
for name, unit in shown.items():
    strength, place = z[:, unit].view(-1, drawn).max(1)
    best, m = strength.topk(8).indices, names.index(name)
    sign, moves_of[name] = turned_move(name, unit, best)
    strongest_of[name] = [(i, int(places["test"][i, place[i]])) for i in best.tolist()]
    found = study.concepts.average_precision(z[:, [unit]], table["test"][:, [m]])[0, 0]
    raises = moves_of[name] @ raised(name)
    orientation[name] = {"unit": unit, "sign": sign, "raised": raises, "precision": found}
report.record(shown=orientation)

# %%
figure, axes = plots.panels(len(shown), 9, height=0.92, width=plots.PAGE, gridspec_kw={"width_ratios": [1] * 8 + [3.2]})
for line, name in enumerate(shown):
    for column, (i, cell) in enumerate(strongest_of[name]):
        ax = axes[9 * line + column]
        ax.imshow(1 - images["test"][i, 0], cmap="gray", vmin=0, vmax=1)
        corner = 2 * (cell % 14) - 2.5, 2 * (cell // 14) - 2.5
        ax.add_patch(plots.plt.Rectangle(corner, 6, 6, fill=False, ec=plots.OURS, lw=1.2))  # pyright: ignore
        ax.set(xlim=(-0.5, 27.5), ylim=(27.5, -0.5))
        ax.axis("off")
    title = f"read most by the direction of “{name}” (average precision {orientation[name]['precision']:.2f})"
    above = axes[9 * line].text(0, 1.05, title, transform=axes[9 * line].transAxes, fontsize=7)
    above.set_in_layout(False)  # it reaches over the other images
    bars, move = axes[9 * line + 8], moves_of[name]
    bars.bar(range(10), move, color=[plots.POSITIVE if v > 0 else plots.NEGATIVE for v in move])
    bars.axhline(0, color="black", lw=0.6)
    limit = 1.1 * move.abs().max().item()
    bars.set(xticks=range(10), xticklabels=[], ylim=(-limit, limit))
    bars.tick_params(axis="x", length=0)
    bars.yaxis.tick_right()
    bars.spines[["left", "bottom"]].set_visible(False)
axes[-1].set_xticklabels(fashion.CLASSES, rotation=90)
report.figure("directions", figure)

# %% [markdown]
# ## What holds
#
# Each claim that directions are ahead; where it is false the opponent is level or ahead.
#
# Where to go next: `cnn` takes whole images of the same network as samples, `tinystories` asks the same of a language
# model, where directions do lead on what changes a prediction.

# %%
for size in sizes:
    for other in ("SAE", "k-means", "training patches", "random"):
        for family in ("telling", "decision", "part or pattern"):
            if family in gaps[size]:
                gap = gaps[size][family][other]["test"]
                report.claim(
                    f"{family}, {size}, {other}",
                    f"{size} directions resolve concepts of patches ({family}) better than {other}",
                    gap["mean"], ">", 0, gap["error"], f"{gap['concepts']} concepts",
                )  # fmt: skip
    by_behaviour = held_share[(held_share["rows"] == 5) & (held_share["size"] == size)]
    five = by_behaviour.pivot_table(index="behaviour", columns="method", values="held")
    for other in ("SAE", "k-means", "k-means of gradients", "single gradients", "random", "PCA"):
        gap = (five["ours"] - five[other]).tolist()
        text = f"five of {size} directions hold more of what changes a prediction than {other}"
        quantity = sum(gap) / len(gap)
        over = f"{len(gap)} behaviours"
        report.claim(f"behaviours, {size}, {other}", text, quantity, ">", 0, results.error_of_mean(gap), over)
report.verdicts()

# %%
report.write().name
