# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Do directions of a classifier's block resolve more than autoencoders do?
#
# ![Images that six directions read most, and what a step does to the logits.](../figures/cnn_directions.png)
#
# *Six directions of the middle block: the images that each reads most, and the logits that a step along it raises.*
#
# **Yes, but no more than gradients that nothing was fitted to.** On concepts that tell readers apart, directions read
# without the prediction reach an average precision of 0.64, an autoencoder 0.55. k-means of gradients and single
# gradients are level with directions there, and ahead on pairs of concepts and on what changes a prediction. Pushed,
# directions are as selective as random ones in probabilities, and more in logits.
#
# Words, before any other number:
#
# - A **direction** is a set of changes of all weights of the block at once, of low rank in each. A **sample** is an
#   image.
# - A direction is **read** in an image by how far a step along it moves the image's logits apart, or by how much of the
#   image's gradient runs along it (its **impact**). The second is told what the network predicts.
# - A unit **resolves** a concept as well as it ranks the images that the concept holds for: average precision, of the
#   unit that is best on validation images, measured on test images.
# - A concept **tells** if random readers, random training images and random directions fall behind on it, on validation
#   images. Other concepts say nothing about a method.
# - A **confusion** is the set of images of one class whose most probable other class is a certain one. A set of rows
#   **holds** the share of the confusion's gradient that lies in their span.
# - A **push** is a step along a unit until its own images' predictions have moved by a fixed amount. It is
#   **selective** if other images' move less.
#
# Beside every number stand sparse autoencoders (of the block's output at each position, and of whole images), k-means
# of images and of gradients, principal components, random directions and readers, training images, single gradients,
# and the ten logits, with 100 units and, under *larger*, with 300. Settings and readings are chosen on validation
# images, scores are of test images. In this order: concepts, read without the prediction and with it; pairs of
# concepts; confusions; pushes. The table of claims at the end has the margins.

# %% tags=["parameters"]
n_directions, more, rank, kept = 100, 300, 4, 8  # more: the larger size; kept: coefficients a sample
seeds = [0, 1, 2]  # settings were chosen on seeds from 100 on, and on validation images
fit_images, choose_images, test_images = 4096, 800, 1200
least, margin, counts, mean_steps = 15, 0.03, (1, 5, 20), 8  # images of a confusion; to be ahead by; rows; of k-means
span = (1, 2, 4, 8)  # rows of an image whose share of the curvature is measured
paired = 6  # images of a pair of concepts in each half of a part
steps, batch_size, learning_rate = 400, 64, 1e-2
warmup, auxiliary = 0.7, 1 / 16  # of BatchTopK: share of the steps, weight of the second error
sae_kept, sae_rate, sae_steps, sae_batch = [2, 8], 1e-2, 2000, 1024  # sae_kept: units on at a position
principal_images, error_images, refitted_images = 512, 512, 256  # on which PCA is done, and errors are measured
references = 16  # that a reading is a mean over
level, top, pushed, off_images = 0.25, 20, 4, 100  # total variation; images a unit stands for; units a fit; others
cap = 1000.0  # a larger selectivity is recorded as this

# %%
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from tempfile import TemporaryDirectory

import pandas as pd
import torch

import eigendecomp as ed
from eigendecomp import study
from eigendecomp.report import plots, results
from eigendecomp.sparsity import cutoff
from eigendecomp.study.moves import Probe, along, displaced, probabilities
from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.fashion import block as cnn_block
from rooms.fashion import concepts as fashion_concepts
from rooms.fashion import jacobians, prepared
from rooms.fashion import pairs as fashion_pairs
from rooms.fashion import patches as cnn_patches

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress not found")
pd.set_option("display.max_rows", 200)
plots.style()

# %%
smoke = results.profile() == "smoke"
if smoke:
    more, least, paired = 30, 4, 1
    n_directions, seeds, steps, sae_kept, sae_steps = 20, seeds[:1], 20, sae_kept[:1], 30
    fit_images, choose_images, test_images, pushed = 256, 200, 200, 2
report = results.Results(
    "cnn", n_directions=n_directions, more=more, least=least, margin=margin, counts=counts, span=span,
    mean_steps=mean_steps,
    paired=paired, rank=rank, kept=kept, seeds=seeds, fit_images=fit_images,
    choose_images=choose_images, test_images=test_images, steps=steps, batch_size=batch_size,
    learning_rate=learning_rate, warmup=warmup, auxiliary=auxiliary, sae_kept=sae_kept, sae_rate=sae_rate,
    sae_steps=sae_steps, sae_batch=sae_batch, principal_images=principal_images, error_images=error_images,
    refitted_images=refitted_images, references=references, level=level, top=top, pushed=pushed,
    off_images=off_images, cap=cap,
)  # fmt: skip

# %% [markdown]
# ## Network and data
#
# The target has three residual stages; the middle block, `block2`, holds two 3 × 3 convolutions of 32 channels, their
# normalisations and an identity skip, at 14 × 14 positions: 18,560 parameters, which are decomposed together. What
# comes before the block does not depend on them, so images are taken through it once. Every image is one sample.
#
# The data are fetched if they are not there. Fits see training images; units, readings and settings are chosen on
# images that the network's training held out (validation images), and scores are of test images.

# %%
given = prepared.prepare(fit_images, choose_images, test_images, subset=smoke)
images, labels, entering, logits = given.images, given.labels, given.entering, given.logits
network, tail = given.network, given.tail

# %%
confidence = logits["test"].softmax(-1).amax(1)
report.record(
    network={
        "accuracy": cnn.accuracy(network, images["test"], labels["test"]),
        "confident": (confidence > 0.99).double().mean(),
        "parameters": sum(p.numel() for p in tail.block2.parameters()),
    }
)
pd.Series(report.values["network"], dtype=object)  # parameters are counted, the others are shares

# %% [markdown]
# Concepts: the ten classes, and 24 more that are computed from image or label (`fashion_concepts`).


# %%
def known(part: str) -> dict[str, torch.Tensor]:
    return fashion_concepts.classes(labels[part]) | fashion_concepts.concepts(images[part], labels[part])


names = list(known("test"))
truth = {part: torch.stack(list(known(part).values()), 1) for part in ("choose", "test")}

# %% [markdown]
# ## Directions
#
# A hundred directions of rank 4, low rank in all four axes of the kernels. The network is sure of most images, and a
# sure image hardly has a gradient against references drawn from its own prediction (`ModelSample`): directions then go
# to the few that it is unsure of. Another image's output (`OtherSample`, the default) asks a sure image for another
# class, so every image counts.
#
# References, rank, the coefficients kept, tied rows and the learning rate were chosen on validation images in earlier
# trials, one fit a setting, which are not repeated here. What keeps directions in use is a long start (`warmup`), in
# which BatchTopK comes down to its share over 70% of the steps.
#
# Against the mean prediction an image has one gradient, whatever the seed. So they are captured once, into a store, and
# fits that differ in seed or size draw the batches that live fits would draw.


# %%
asked = {"divergence": ed.KLDivergence(), "parameters": ["block2.*"]}


def settings_of(size: int, seed: int) -> dict:
    return {
        "n_directions": size, "rank": rank, "sparsity": ed.BatchTopK(kept / size, warmup, auxiliary), "steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "progress": False,
    }  # fmt: skip


with TemporaryDirectory() as folder:
    store = ed.GradientStore.collect(tail, entering["fit"], path=folder, reference=ed.Mean(), progress=False, **asked)
    fits = {seed: store.decompose(**settings_of(n_directions, seed)) for seed in seeds}
    larger = store.decompose(**settings_of(more, seeds[0]))
drawn = ed.decompose(tail, entering["fit"], reference=ed.OtherSample(), **asked, **settings_of(n_directions, seeds[0]))
others = {"ours, drawn reference": drawn, "ours, larger": larger}
first = fits[seeds[0]]
report.settings["fit"] = first.settings.as_json()

# %% [markdown]
# The reference is the mean prediction, the noise-free form of another image's output; one fit with drawn ones and one
# of the larger size stand beside. Floors have the same number of directions and three seeds as well: the leading
# **principal components** of gradients of fit images, dense and of any rank (each seed has its own images), **random**
# directions of the same rank, **single gradients** of training images and a spherical **k-means of gradients**. Of the
# larger size there is one of each.


# %%
def floors_of(g: torch.Tensor, size: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows that are no fits, by method, from gradients of some images."""
    return {
        "PCA": study.floors.principal_directions(g, size), "single gradients": cnn_patches.unit_rows(g[:size]),
        "random": study.floors.random_directions(first.decoder.shapes, size, rank, seed=seed).flat(),
        "k-means of gradients": cnn_patches.input_means(g, min(size, len(g)), seed=seed, steps=mean_steps)[0],
    }  # fmt: skip


some_images = zip(seeds, entering["fit"].split(principal_images), strict=False)
some_gradients = {seed: study.scores.gradient_rows(first, part, seed) for seed, part in some_images}
floor_rows = {seed: floors_of(g, n_directions, seed) for seed, g in some_gradients.items()}
larger_rows = floors_of(some_gradients[seeds[0]], more, seeds[0])
floor_methods = list(larger_rows)
random = {s: study.floors.random_directions(first.decoder.shapes, n_directions, rank, seed=s) for s in seeds}

# %% [markdown]
# Whatever a direction reads in an image follows from the image's Jacobian $J$: a gradient is $J^\top c$ with the
# cotangent $c = p - q$, where $p$ is the image's output and $q$ the reference. So each Jacobian is formed once, and
# all rows meet it.

# %%
rows = {f"read {seed}": d.encoder.flat() for seed, d in fits.items()}
rows |= {f"write {seed}": d.decoder.flat() for seed, d in fits.items()}
rows |= {f"{method} {seed}": u for seed, by_name in floor_rows.items() for method, u in by_name.items()}
rows |= {f"{method}, larger {seeds[0]}": u for method, u in larger_rows.items()}
for name, d in others.items():
    rows |= {f"{name}, read": d.encoder.flat(), f"{name}, write": d.decoder.flat()}
seen = {part: jacobians.read(first.target, entering[part], rows) for part in truth}


# %%
def draw_cotangents(part: str) -> torch.Tensor:
    """p − q with q the outputs of images of the fit, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(first.pool), (len(images[part]), references), generator=draw)
    return logits[part].softmax(-1).unsqueeze(1) - first.pool[chosen]


cotangents = {part: draw_cotangents(part) for part in truth}


def coefficients(part: str, name: str) -> torch.Tensor:
    """⟨g, u⟩ (images, references, directions)."""
    return torch.einsum("nrk,nkv->nrv", cotangents[part], seen[part].along[name])


# %% [markdown]
# Error is the normalised error on test images; kept, the coefficients that pass the fit's threshold, the mean over
# images and references; never used, the share of directions of which none does.

# %%
few = entering["test"][:error_images]
codes = {seed: d.settings.sparsity.keep(coefficients("test", f"read {seed}"), d.threshold) for seed, d in fits.items()}
ours = pd.DataFrame(
    [
        {
            "seed": seed,
            "error": d.reconstruction_error(few),
            "kept": (codes[seed] != 0).double().sum(-1).mean().item(),
            "dead in the fit": d.history.dead[-1],
            "never used on test images": (codes[seed] == 0).all(1).all(0).double().mean().item(),
        }
        for seed, d in fits.items()
    ]
)
report.record(fit={name: results.spread(ours[name].tolist()) for name in ours.columns[1:]})
report.table("fits", ours).round(3)

# %% [markdown]
# Beside the floors, with as many coefficients kept: the largest $\langle g, u\rangle$, refitted by least squares, which
# fits do without; so ours are given in this way as well. Principal components, of any rank, leave less, also than ours
# as fitted. (The published L3D run on a convolutional network left 23%; it is another network, so this is no comparison
# of methods.)

# %%
g = study.scores.gradient_rows(first, few[:refitted_images])
decoders = {seed: d.decoder.flat() for seed, d in fits.items()}
floors = {method: {seed: floor_rows[seed][method] for seed in seeds} for method in ("PCA", "random")}
refitted = {
    method: results.spread([study.floors.sparse_error(g, u, ours["kept"].mean()) for u in sets.values()])
    for method, sets in ({"ours": decoders} | floors).items()
}
report.record(
    refitted_error={method: spread["mean"] for method, spread in refitted.items()},
    refitted_error_spread=refitted,
)
left_over = pd.DataFrame({"ours, as fitted": report.values["fit"]["error"]} | refitted).T[["mean", "sd"]]
left_over.rename(plots.called).astype(float).round(4)

# %% [markdown]
# ## Sparse autoencoders on the block's output
#
# BatchTopK autoencoders of sae-lens on the channels at each position, with as many units. Two numbers of units on at a
# position: as many as our directions have coefficients at an image, and two, which resolved concepts best on validation
# images. Numbers and learning rates were chosen in trials that are not repeated here either.

# %%
with torch.no_grad():
    written = {part: torch.cat([tail.block2(x) for x in whole.split(500)]) for part, whole in entering.items()}
outputs = {part: x.flatten(2).mT for part, x in written.items()}  # (images, positions, channels)


def autoencoder(size: int, k: int, seed: int) -> study.autoencoders.Autoencoder:
    return study.autoencoders.train(
        outputs["fit"].flatten(0, 1), size, k, seed=seed, steps=sae_steps, batch_size=sae_batch, learning_rate=sae_rate
    )


autoencoders = {(k, seed): autoencoder(n_directions, k, seed) for k in sae_kept for seed in seeds}
named_autoencoders = {(f"SAE, {k} on", seed): a for (k, seed), a in autoencoders.items()}
named_autoencoders |= {(f"SAE, {k} on, larger", seeds[0]): autoencoder(more, k, seeds[0]) for k in sae_kept}
report.settings["autoencoder"] = {
    "library": f"sae-lens {version('sae-lens')}", "kind": "batchtopk", "site": "output of block2, every position",
    "units": n_directions, "kept": sae_kept, "steps": sae_steps, "batch_size": sae_batch, "learning_rate": sae_rate,
    "decay": "linear to 0 over the last half", "dead_feature_window": 100, "normalize": "expected_average_only_in",
}  # fmt: skip

# %%
flat = outputs["test"][:100].flatten(0, 1)
theirs = pd.DataFrame(
    [
        {
            "on at a position": k,
            "seed": seed,
            "error": a.reconstruction_error(flat),
            "measured on": (a.encode(flat) > 0).double().sum(1).mean().item(),
            "never on": (~(a.encode(flat) > 0).any(0)).double().mean().item(),
        }
        for (k, seed), a in autoencoders.items()
    ]
)
report.record(
    autoencoder={
        k: {name: results.spread(values) for name, values in part.drop(columns=["seed"]).to_dict("list").items()}
        for k, part in theirs.groupby("on at a position")
    }
)
report.table("autoencoders", theirs).round(3)

# %% [markdown]
# ## What is read
#
# Of a direction: **impact**, mean $|\langle g, u\rangle|$ over references; **activation** $\sqrt{u^\top H u}$; and
# **logit move**, the activation if all classes were as likely, which is not told what the network predicts. Sure
# images have small gradients, so each also comes as a **share** of what the image's whole gradient or curvature
# offers: $|\langle g, u\rangle| / \|g\|$ and $\sqrt{u^\top H u / \mathrm{tr} H}$.
#
# Of an autoencoder's unit or a channel: its **mean** and **largest** value over positions. And, since gradients know
# the logits and the block's output alone does not, **attribution**: what the unit adds to the logits, to first order,
# read like impact. Floors of this side are the **channels** themselves and their principal components. The ten
# **logits** are no units of the block; they show what the prediction alone gives.


# %%
def direction_readings(part: str, read: str, write: str) -> dict[str, torch.Tensor]:
    s, c = seen[part], cotangents[part]
    return {
        "impact": s.impact(read, c), "impact, share": s.impact(read, c, share=True),
        "activation": s.activation(write), "activation, share": s.activation(write, share=True),
        "logit move": s.logit_move(write), "logit move, share": s.logit_move(write, share=True),
    }  # fmt: skip


# %%
def unit_readings(part: str) -> dict[tuple[str, str, int], torch.Tensor]:
    """Those of all autoencoders, for which the gradients of the logits are the same."""
    found = {(name, how, s): [] for name, s in named_autoencoders for how in ("mean", "largest", "attribution")}
    for x, c in zip(written[part].split(250), cotangents[part].split(250), strict=True):
        gradients = cnn_block.logit_gradients(tail.after, x)
        for (name, seed), a in named_autoencoders.items():
            z = a.encode(x.flatten(2).mT)
            moves = torch.einsum("nrk,nkv->nrv", c, cnn_block.attribution(gradients, z, a.decoder))
            for how, value in {"mean": z.mean(1), "largest": z.amax(1), "attribution": moves.abs().mean(1)}.items():
                found[name, how, seed].append(value)
    return {key: torch.cat(values) for key, values in found.items()}


def channel_readings(part: str) -> dict[tuple[str, str], torch.Tensor]:
    x = outputs[part]
    turned = (x - channel_mean) @ principal_channels
    return {
        ("channels", "mean"): x.mean(1), ("channels", "largest"): x.amax(1),
        ("PCA of channels", "mean"): study.concepts.oriented(turned.mean(1)),
        ("PCA of channels", "largest"): turned.abs().amax(1),
    }  # fmt: skip


# %% [markdown]
# Of whole images, as they enter the block: **training images** drawn at random, spherical **k-means of images**,
# **random readers**, and an **SAE of images**, read by products and before the threshold.

# %%
entered = {part: cnn_patches.unit_rows(x.flatten(1)) for part, x in entering.items()}
basis = torch.linalg.svd(entered["fit"][:1000] - entered["fit"].mean(0), full_matrices=False).Vh[:256]
reduced = {part: (x - entered["fit"].mean(0)) @ basis.T for part, x in entered.items()}


def sizes_of() -> Iterator[tuple[int, int, str]]:
    """(size, seed, what follows the method's name)."""
    yield from ((n_directions, seed, "") for seed in seeds)
    yield more, seeds[0], ", larger"


image_saes = {key: study.autoencoders.train(reduced["fit"], key[0], kept, seed=key[1], steps=sae_steps // 4,
                                            batch_size=128, learning_rate=sae_rate) for key in sizes_of()}  # fmt: skip
image_means = {
    key: cnn_patches.input_means(entered["fit"][: 10 * key[0]], key[0], seed=key[1])[0] for key in sizes_of()
}


# %%
def image_readings(part: str) -> dict[tuple[str, str, int], torch.Tensor]:
    found, x = {}, entered[part]
    for key in sizes_of():
        (size, s, end), draw = key, torch.Generator().manual_seed(key[1])
        at = torch.randperm(len(entered["fit"]), generator=draw)[:size]
        readers = torch.randn(size, x.shape[1], generator=draw)
        found |= {
            (f"training images{end}", "product", s): x @ entered["fit"][at].T,
            (f"k-means of images{end}", "product", s): x @ image_means[key].T,
            (f"random readers{end}", "product", s): study.concepts.oriented(x @ readers.T, entered["fit"] @ readers.T),
            (f"SAE of images{end}", "before the threshold", s): image_saes[key].before_threshold(reduced[part]),
        }  # fmt: skip
    return found


# %%
def readings(part: str) -> dict[tuple[str, str, int], torch.Tensor]:
    """{(method, reading, seed): (images, units)}."""
    found = {}
    for seed in seeds:
        of = {"ours": ("read", "write")} | {m: (m, m) for m in floor_methods}
        of |= {f"{m}, larger": (f"{m}, larger",) * 2 for m in floor_methods if seed == seeds[0]}
        for method, (reader, writer) in of.items():
            by_name = direction_readings(part, f"{reader} {seed}", f"{writer} {seed}")
            found |= {(method, name, seed): r for name, r in by_name.items()}
    for name in others:
        by_name = direction_readings(part, f"{name}, read", f"{name}, write")
        found |= {(name, reading, seeds[0]): value for reading, value in by_name.items()}
    found |= unit_readings(part) | image_readings(part)
    found |= {(*key, seeds[0]): r for key, r in channel_readings(part).items()}
    return found | {("logits", "value", seeds[0]): logits[part]}


channel_mean = outputs["fit"].mean((0, 1))
principal_channels = torch.linalg.svd(outputs["fit"][::8].flatten(0, 1) - channel_mean, False).Vh.T
read = {part: readings(part) for part in truth}

# %% [markdown]
# ## How well concepts are resolved
#
# For every concept the unit with the best average precision on 800 validation images, scored on 1,200 test images;
# and a weighted sum of three units, chosen and weighted in the same way. First the readings, on validation images
# alone: units chosen on one half, scored on the other.


# %%
def resolution(key: tuple[str, str, int], found: study.concepts.Resolution) -> dict:
    return {
        "method": key[0], "reading": key[1], "seed": key[2],
        "classes": found.single[:10].mean().item(), "further": found.single[10:].mean().item(),
        "all": found.single.mean().item(), "all, best three": found.team.mean().item(),
        "classes, best three": found.team[:10].mean().item(), "further, best three": found.team[10:].mean().item(),
    }  # fmt: skip


half, known_half = choose_images // 2, truth["choose"].split(choose_images // 2)
on_halves = {
    key: study.concepts.resolve((r[:half], known_half[0]), (r[half:], known_half[1]))
    for key, r in read["choose"].items()
}
validation = pd.DataFrame([resolution(key, found) for key, found in on_halves.items()])
mean = validation.groupby(["method", "reading"])[["classes", "further", "all", "all, best three"]].mean()
chosen = {str(method): str(table["all"].droplevel(0).idxmax()) for method, table in mean.groupby(level=0)}
LEAKS = ("impact", "activation", "attribution")  # these are told what the network predicts
plainly = mean[[not reading.startswith(LEAKS) for _, reading in mean.index]]  # pyright: ignore
honest = {str(method): str(table["all"].droplevel(0).idxmax()) for method, table in plainly.groupby(level=0)}
report.record(chosen=chosen, without_prediction=honest)
report.table("validation", validation)
mean.rename(plots.called).round(3)

# %% [markdown]
# Readings that are not told the prediction come first: of every method the best of them on validation images. A score
# counts only where random readers, random training images and random directions fall behind: a concept *tells* if on
# validation images (units chosen on one half, scored on the other) the best of ours, k-means and SAEs is ahead of all
# three by the margin.

# %%
scores = {
    key: study.concepts.resolve((z, truth["choose"]), (read["test"][key], truth["test"]))
    for key, z in read["choose"].items()
}
halves, held = (
    {key: found.single for key, found in all_readings.items() if honest[key[0]] == key[1]}
    for all_readings in (on_halves, scores)
)


def over_seeds_of(found: dict, method: str) -> torch.Tensor:
    return torch.stack([value for key, value in found.items() if key[0] == method]).mean(0)


rivals = ["ours", "k-means of images", "k-means of gradients", "SAE of images", *(f"SAE, {k} on" for k in sae_kept)]
best_rival = torch.stack([over_seeds_of(halves, method) for method in rivals]).amax(0)
floor = torch.stack([over_seeds_of(halves, m) for m in ("random readers", "training images", "random")]).amax(0)
telling = [m for m in range(len(names)) if best_rival[m] - floor[m] >= margin]
plain_scores = pd.DataFrame({method: over_seeds_of(held, method).numpy() for method in honest}, names)
gaps = plain_scores.rsub(plain_scores["ours"], axis=0).iloc[telling]
report.record(
    telling=[names[m] for m in telling],
    told={m: plain_scores[m].iloc[telling].mean() if telling else 0.0 for m in honest},
    told_gap={m: {"mean": gaps[m].mean(), "error": gaps[m].sem()} if len(gaps) > 1 else {} for m in honest},
)
summary = {"classes": plain_scores[:10], "others": plain_scores[10:], "telling": plain_scores.iloc[telling]}
pd.DataFrame({name: part.mean() for name, part in summary.items()}).rename(plots.called).sort_values("others").round(3)

# %% [markdown]
# ## Pairs of concepts
#
# A logit knows classes, so it resolves them. It cannot tell a dark trouser from a light one. A *pair* is a class and
# another concept that hold at once, where neither implies the other. Units are chosen for pairs as for concepts, by the
# same readings; a pair tells by the same rule. Gradients that nothing was fitted to, single or clustered, are ahead of
# directions here.

# %%
pair_names, pair_truth = fashion_pairs.both(names, truth, 10, least=paired)


def precision_of_pairs(z: torch.Tensor, choose: slice, of: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The precision for every pair, on other images, of the unit that is best on some validation images."""
    unit = study.concepts.average_precision(z[choose], pair_truth["choose"][choose]).argmax(0)
    return torch.stack([study.concepts.average_precision(of[:, [u]], held[:, [m]])[0, 0]
                        for m, u in enumerate(unit.tolist())])  # fmt: skip


plain = {key: z for key, z in read["choose"].items() if honest[key[0]] == key[1]}
on_half = {key: precision_of_pairs(z, slice(half), z[half:], pair_truth["choose"][half:]) for key, z in plain.items()}
on_test_pairs = {key: precision_of_pairs(z, slice(None), read["test"][key], pair_truth["test"])
                 for key, z in plain.items()}  # fmt: skip
ahead = torch.stack([over_seeds_of(on_half, method) for method in rivals]).amax(0)
behind = torch.stack([over_seeds_of(on_half, m) for m in ("random readers", "training images", "random")]).amax(0)
telling_pairs = (ahead - behind >= margin).nonzero()[:, 0].tolist()

# %%
pair_scores = pd.DataFrame({method: over_seeds_of(on_test_pairs, method).numpy() for method in honest}, pair_names)
among = {"all": pair_scores, "telling": pair_scores.iloc[telling_pairs]}
pair_gaps = {name: part.rsub(part["ours"], axis=0) for name, part in among.items()}
report.record(
    pairs={name: {"number": len(part), "precision": part.mean().to_dict() if len(part) else {},
                  "gap": {m: {"mean": pair_gaps[name][m].mean(), "error": pair_gaps[name][m].sem()} for m in honest}
                  if len(part) > 1 else {}} for name, part in among.items()},
    pairs_base_rate=pair_truth["test"].double().mean(),
)  # fmt: skip
pd.DataFrame({name: part.mean() for name, part in among.items()}).rename(plots.called).sort_values("all").round(3)

# %% [markdown]
# What follows takes of every method the best reading of all, told the prediction or not; ours as well.
# Entropy is that of the labels of a unit's top 20 images, in nats, the mean over units: low where a unit stands for few
# classes.


# %%
def purity(strength: torch.Tensor) -> float:
    on = strength.topk(top, 0).indices
    share = torch.nn.functional.one_hot(labels["test"][on], 10).double().mean(0)
    return -torch.xlogy(share, share).sum(-1).mean().item()


test = pd.DataFrame([resolution(key, found) for key, found in scores.items()])
test["entropy"] = [purity(read["test"][key]) for key in scores]
report.table("resolution", test)
columns = list(test.columns[3:])
report.record(
    resolution={
        method: {
            reading: {"chosen": chosen[method] == reading} | {c: results.spread(part[c].tolist()) for c in columns}
            for reading, part in table.groupby("reading")
        }
        for method, table in test.groupby("method")
    }
)

# %% [markdown]
# The chosen readings, mean and standard deviation over seeds (channels and logits have no seed):

# %%
headline = test[[chosen[method] == reading for method, reading in zip(test["method"], test["reading"], strict=True)]]
by_method = headline.groupby(["method", "reading"])[["classes", "further", "all", "entropy"]].agg(["mean", "std"])
by_method.rename(plots.called).sort_values(("all", "mean"), ascending=False).round(3)

# %% [markdown]
# All readings, chosen or not:

# %%
test.groupby(["method", "reading"])[columns].mean().rename(plots.called).round(3)

# %% [markdown]
# Concept by concept, the chosen reading, told the prediction or not, mean over seeds:


# %%
def by_concept(method: str) -> list[float]:
    found = [score.single for key, score in scores.items() if key[:2] == (method, chosen[method])]
    return torch.stack(found).mean(0).tolist()


compared = ["ours", *(f"SAE, {k} on" for k in sae_kept), "logits"]
each = pd.DataFrame({method: by_concept(method) for method in compared}, names)
report.record(by_concept=each.to_dict())
report.table("concepts", each.reset_index(names="concept")).rename(columns=plots.called).round(3)

# %% [markdown]
# ## What would change a prediction, in few directions
#
# A *confusion* is the set of test images of one class whose most probable other class is a certain one. How much of the
# squared norm of its mean gradient, of the one logit less the other, do the best 1, 5 or 20 of a set's rows hold?
# Principal components, single gradients and their k-means hold more in five rows than directions do.

# %%
block = [q for name, q in tail.named_parameters() if name in first.target.names]
behaviours = []
for (a, b), at in prepared.confusions(logits["test"], labels["test"], least).items():
    with torch.enable_grad():
        f = tail(entering["test"][at])
        parts_of = torch.autograd.grad((f[:, a] - f[:, b]).mean(), block)
    behaviours.append(torch.cat([q.flatten() for q in parts_of]))
behaviours = torch.stack(behaviours)
sets = {("ours", s): d.decoder.flat() for s, d in fits.items()}
sets |= {(m, s): rows[f"{m} {s}"] for m in floor_methods for s in seeds}
sets |= {(name, seeds[0]): d.decoder.flat() for name, d in others.items()}
sets |= {(f"{m}, larger", seeds[0]): u for m, u in larger_rows.items()}
shares = pd.DataFrame([
    {"method": m, "seed": s, "rows": count, "behaviour": i, "held": value}
    for (m, s), u in sets.items() for count, found in cnn_patches.rebuilt(behaviours, u, counts).items()
    for i, value in enumerate(found.tolist())
])  # fmt: skip
by_rows = report.table("behaviours", shares.groupby(["method", "rows", "seed"])["held"].mean().reset_index())
report.record(behaviours={m: {k: results.spread(part["held"].tolist()) for k, part in whole.groupby("rows")}
                          for m, whole in by_rows.groupby("method")})  # fmt: skip
by_rows.pivot_table(index="method", columns="rows", values="held").rename(plots.called).round(3)

# %% [markdown]
# ## How much of the curvature they hold
#
# Under KL divergence an image's $H = J^\top (\mathrm{diag}(p) - pp^\top) J$ has at most nine dimensions here, so its
# trace is known exactly. Below is the share of $\mathrm{tr} H$ in the span of an image's rows of largest activation,
# the mean over test images. The leading eigenvectors of the image's own $H$ hold the most that any rows can. Of 100
# units, directions hold little more than half in eight rows. Principal components and k-means of gradients hold more
# there, and in one row k-means hold most of these.

# %%
written_rows = {("ours", s): f"write {s}" for s in seeds} | {(m, s): f"{m} {s}" for m in floor_methods for s in seeds}
written_rows |= {(name, seeds[0]): f"{name}, write" for name in others}
written_rows |= {(f"{m}, larger", seeds[0]): f"{m}, larger {seeds[0]}" for m in larger_rows}
spans = {at: seen["test"].held(name, rows[name], span) for at, name in written_rows.items()}
spans["own eigenvectors", seeds[0]] = seen["test"].largest(span)
of_trace = pd.DataFrame([
    {"method": m, "seed": s, "rows": count, "held": part.mean().item()}
    for (m, s), by_count in spans.items() for count, part in by_count.items()
])  # fmt: skip
report.table("curvature", of_trace)
report.record(share_of_trace={m: {k: results.spread(part["held"].tolist()) for k, part in whole.groupby("rows")}
                              for m, whole in of_trace.groupby("method")})  # fmt: skip
of_trace.pivot_table(index="method", columns="rows", values="held").rename(plots.called).sort_values(kept).round(3)

# %% [markdown]
# ## What units do when they are pushed
#
# Units are pushed, forwards and backwards, until the class probabilities of their own 20 images have changed by 0.25 on
# average (total variation); *reached* is the share of units for which some step does. Selectivity is this change over
# that of other images, the median over units: of *others*, whose class is another than most of the own images', and of
# the *quiet* half, which the unit reads least in. The better of the two ways is taken, by the former. Share is the part
# of the change on the own images that their most frequent class gains or loses; *logits, others* is selectivity in
# centred logits, which do not saturate.


# %%
def samples_of(strength: torch.Tensor) -> dict[str, torch.Tensor]:
    """The images that a unit stands for, images of other classes, and some of the half that it reads least in."""
    order, draw = strength.argsort(descending=True), torch.Generator().manual_seed(0)
    others = (labels["test"] != labels["test"][order[:top]].mode().values).nonzero()[:, 0]
    found = {"others": others, "quiet": order[len(order) // 2 :]}
    return {"on": order[:top]} | {
        name: index[torch.randperm(len(index), generator=draw)[:off_images]] for name, index in found.items()
    }


# %%
def logit_change(move: study.moves.Move, step: float, inputs: tuple, base: torch.Tensor) -> float:
    with move(step) as model, torch.no_grad():
        change = model(*inputs) - base
    return (change - change.mean(1, keepdim=True)).norm(dim=1).mean().item()


def pushed_unit(strength: torch.Tensor, model: torch.nn.Module, inputs: tuple, move: study.moves.Move) -> dict:
    index = samples_of(strength)
    at = {name: Probe(model, tuple(x[i] for x in inputs), probabilities) for name, i in index.items()}
    logit = {name: (at[name].inputs, logits["test"][index[name]]) for name in ("on", "others")}
    on, main = at.pop("on"), int(labels["test"][index["on"]].mode().values)
    found = study.moves.push_either_way(on, at, move, level, by="others")
    row = {"reached": found is not None, "confidence": on.base.amax(1).mean().item()}
    if found is None:
        return row
    changed = {name: logit_change(move, found.step, *given) for name, given in logit.items()}
    return row | {
        "others": min(found.selectivity("others"), cap), "quiet": min(found.selectivity("quiet"), cap),
        "logits, others": min(changed["on"] / max(changed["others"], 1e-9), cap), "share": found.share(main),
        "step": found.step,
    }  # fmt: skip


# %% [markdown]
# Directions and the floors' rows move the weights, for all images alike: along the decoder's row, which rebuilds, or
# the encoder's, which reads. What is pushed is given as a function from a unit to a model, its inputs on the test
# images, and the move.


# %%
def row_of(matrix: torch.Tensor, unit: int) -> dict[str, torch.Tensor]:
    parts = matrix[unit].split([p.numel() for p in first.target.chosen.values()])
    return dict(zip(first.target.names, parts, strict=True))


def weights(directions):
    return lambda u: (tail, (entering["test"],), displaced(tail, study.moves.low_rank(directions, u)))


def dense_weights(matrix: torch.Tensor):
    return lambda u: (tail, (entering["test"],), displaced(tail, row_of(matrix, u)))


# %% [markdown]
# An autoencoder's unit can be pushed in two ways: its row is **added** at every position, or its own part of the
# output is **scaled**, where the unit is on and nowhere else. Scaling looks at each image first, so its effect on
# images where the unit is off is zero by construction. Neither changes the block, so both start from its output.


# %%
def unit(a: study.autoencoders.Autoencoder, how):
    def move(u: int) -> study.moves.Move:
        return lambda step: a.steered(tail.after, "written", {u: step}, how=how, axis=1)

    return lambda u: (tail.after, (written["test"],), move(u))


def channel(u: int):
    return tail.after, (written["test"],), cnn_block.shifted(tail.after, torch.eye(outputs["test"].shape[-1])[u])


# %% [markdown]
# A change of the weights has no such switch, but can be given one: **gated**, every image has the weights moved in
# proportion to the coefficients that its own code keeps for the direction. Random directions are gated beside them: the
# switch alone makes much of the selectivity.


# %%
def gates(name: str, strength: torch.Tensor) -> torch.Tensor:
    """(images, directions): mean |coefficient| over references of the largest ``kept`` an image, others being zero.

    Scaled to 1 on average over the images that a direction stands for.
    """
    z = coefficients("test", name).abs()
    z = (z * (z >= cutoff(z, kept / n_directions))).mean(1)
    return z / z.gather(0, strength.topk(top, 0).indices).mean(0).clamp_min(1e-9)


gated = cnn_block.Gated(tail)


def gated_weights(directions, name: str, strength: torch.Tensor):
    gate = gates(name, strength)
    return lambda u: (gated, (entering["test"], gate[:, u]), gated.along(study.moves.low_rank(directions, u)))


# %%
def key(method: str, seed: int = seeds[0]) -> tuple[str, str, int]:
    return method, chosen[method], seed


ways = [("ours", key("ours", s), weights(d.decoder)) for s, d in fits.items()]
ways += [("ours, encoder rows", key("ours", s), weights(study.scores.encoder_rows(d).decoder)) for s, d in fits.items()]
ways += [("ours, gated", key("ours", s), gated_weights(d.decoder, f"read {s}", read["test"][key("ours", s)]))
         for s, d in fits.items()]  # fmt: skip
ways += [(f"SAE, {k} on, {how}", key(f"SAE, {k} on", s), unit(a, how))
         for (k, s), a in autoencoders.items() for how in ("add", "scale")]  # fmt: skip
ways += [("PCA", key("PCA", s), dense_weights(floor_rows[s]["PCA"])) for s in seeds]
ways += [("random", key("random", s), weights(u)) for s, u in random.items()]
ways += [("random, gated", key("random", s), gated_weights(u, f"random {s}", read["test"][key("random", s)]))
         for s, u in random.items()]  # fmt: skip
ways += [("channels", key("channels"), channel)]


# %%
def some(strength: torch.Tensor) -> list[int]:
    """Units that read anything, drawn at random."""
    units = (strength.std(0) > 0).nonzero()[:, 0]
    return units[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))[:pushed]].tolist()


pushes = pd.DataFrame(
    [
        {"method": method, "seed": of[2], "unit": u, **pushed_unit(read["test"][of][:, u], *way(u))}
        for method, of, way in ways
        for u in some(read["test"][of])
    ]
)
report.table("pushes", pushes)
measures = ["others", "quiet", "logits, others", "share", "confidence"]
medians = pushes.groupby(["method", "seed"])[measures].median()
medians.insert(0, "reached", pushes.groupby(["method", "seed"])["reached"].mean())
report.record(
    pushes={
        method: {name: results.spread(values) for name, values in part.dropna(axis=1).to_dict("list").items()}
        for method, part in medians.groupby(level=0, sort=False)
    }
)
over_seeds = medians.groupby(level=0).agg(["mean", "std"]).sort_values(("others", "mean"), ascending=False)
over_seeds.drop(columns=[("reached", "std"), ("confidence", "std")]).rename(plots.called).round(2)

# %% [markdown]
# ## Some directions
#
# The directions of the first fit that resolve a concept best on validation images: three classes and three other
# concepts. Left the test images that each reads most in; right what a unit step along it does to the logits of its
# 20 top images, to first order, relative to the logits' mean: red raises, blue lowers. The sign of a direction is
# arbitrary; here the step raises what it is named for: the classes of the images that the concept holds for.

# %%
strength = read["test"][key("ours")]
precision = study.concepts.average_precision(read["choose"][key("ours")], truth["choose"])
on_test = study.concepts.average_precision(strength, truth["test"])


def best(among: range, count: int, taken: set[int]) -> dict[int, int]:
    """{unit: concept}: the concepts that one unit resolves best, each by a unit of its own."""
    found: dict[int, int] = {}
    for concept in sorted(among, key=lambda m: -precision[:, m].max()):
        unit = int(precision[:, concept].argmax())
        if unit not in taken | set(found) and len(found) < count:
            found[unit] = concept
    return found


# %%
shown = best(range(10), 3, set())
shown |= best(range(10, len(names)), 3, set(shown))
y = seen["test"].along[f"write {seeds[0]}"]
y = y - y.mean(1, keepdim=True)
strongest_of = {v: strength[:, v].argsort(descending=True)[:top] for v in shown}
moves = torch.stack([y[at, :, v].mean(0) for v, at in strongest_of.items()])
of_concept = [torch.bincount(labels["test"][truth["test"][:, m]], minlength=10).float() for m in shown.values()]
signs = prepared.raising(moves, torch.stack([n / n.sum() for n in of_concept]))
sign = dict(zip(shown, signs, strict=True))
report.record(shown={names[m]: {"unit": v, "precision": on_test[v, m]} for v, m in shown.items()})
{names[m]: round(on_test[v, m].item(), 3) for v, m in shown.items()}

# %%
figure, axes = plots.panels(len(shown), 9, height=0.72, width=plots.PAGE, gridspec_kw={"width_ratios": [1] * 8 + [3.4]})
for row, (v, m) in enumerate(shown.items()):
    strongest = strength[:, v].argsort(descending=True)[:top]
    for column, i in enumerate(strongest[:8]):
        ax = axes[9 * row + column]
        ax.imshow(1 - images["test"][i, 0], cmap="gray", vmin=0, vmax=1)
        ax.axis("off")
    title = f"read most by the direction of “{names[m].replace('_', ' ')}” (average precision {on_test[v, m]:.2f})"
    above = axes[9 * row].text(0, 1.05, title, transform=axes[9 * row].transAxes, fontsize=7)
    above.set_in_layout(False)  # it reaches over the other images
    bars, move = axes[9 * row + 8], sign[v] * y[strongest, :, v].mean(0)
    bars.bar(range(10), move, color=[plots.POSITIVE if value > 0 else plots.NEGATIVE for value in move])
    bars.axhline(0, color="black", lw=0.6)
    bars.set(xticks=range(10), xticklabels=[], ylim=(-1.15 * move.abs().max(), 1.15 * move.abs().max()))
    bars.tick_params(axis="x", length=0)
    bars.yaxis.tick_right()
    bars.spines[["left", "bottom"]].set_visible(False)
axes[-1].set_xticklabels(fashion.CLASSES, rotation=90)
report.figure("directions", figure)

# %% [markdown]
# Where in the image they act. With $c$ the unit vector of the classes that a direction is named for, less all others,
# $\langle J^\top c, u\rangle$ is how far a step raises them, and a sum over the 14 × 14 positions of the block. The
# direction has the sign from above, with which it raises them on its top images. Red raises, blue lowers.

# %%
figure, axes = plots.panels(3, len(shown), height=1.15, width=plots.PAGE)
for column, (v, m) in enumerate(shown.items()):
    strongest = strength[:, v].argsort(descending=True)[:3]
    c = torch.nn.functional.normalize(of_concept[column] / of_concept[column].sum() - 0.1, dim=0)
    change = {name: sign[v] * part for name, part in study.moves.low_rank(first.decoder, v).items()}
    maps = cnn_block.contribution_maps(tail, change, entering["test"][strongest], c.expand(3, -1))
    for row, (i, one) in enumerate(zip(strongest, maps, strict=True)):
        ax, limit = axes[row * len(shown) + column], one.abs().max().item()
        ax.imshow(1 - images["test"][i, 0], cmap="gray", vmin=-1.2, vmax=1, extent=(0, 28, 28, 0))
        ax.imshow(
            one, cmap=plots.SIGNED, vmin=-limit, vmax=limit, extent=(0, 28, 28, 0), interpolation="bilinear",
            alpha=(one.abs() / limit).clamp(0, 1).sqrt().numpy(),
        )  # fmt: skip
        ax.axis("off")
    axes[column].set_title(names[m].replace("_", " "), fontsize=8)
report.figure("places", figure)

# %% [markdown]
# ## What a direction does when it is pushed
#
# Mean probabilities of the top 20 images of four of these directions as the weights move along, the three classes
# that change most; dotted, how far the outputs of images of other classes have moved (total variation). One way along
# a direction of a class takes its own images to other classes; the other way leaves them and moves all others.


# %%
def course(v: int, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean probabilities of the direction's own images, and how far others have moved, at each step."""
    index = samples_of(strength[:, v])
    on, others = (Probe(tail, entering["test"][index[name]], probabilities) for name in ("on", "others"))
    means, moved = [], []
    for step in steps.tolist():
        with along(first, v)(step * float(sign[v])) as model:
            means.append(on.outputs(model).mean(0))
            moved.append((others.outputs(model) - others.base).abs().sum(-1).mean() / 2)
    return torch.stack(means), torch.stack(moved)


figure, axes = plots.panels(1, 4, height=1.9, sharey=True)
drawn_units = sorted(shown, key=lambda v: names[shown[v]] not in ("sandal", "trouser", "footwear", "wide"))[:4]
for ax, v in zip(axes, drawn_units, strict=True):
    steps_along = torch.linspace(-2, 2, 17)
    p, moved = course(v, steps_along)
    looks = ((plots.OURS, "-"), ("0.35", "-"), ("0.35", "--"))
    three = (p.amax(0) - p.amin(0)).topk(3).indices.tolist()
    for (color, dash), k in zip(looks, sorted(three, key=lambda k: -float(p[8, k])), strict=True):  # its own is blue
        ax.plot(steps_along, p[:, k], color=color, ls=dash, label=fashion.CLASSES[k])
    ax.plot(steps_along, moved, color="black", ls=":", label="others")
    ax.set(title=names[shown[v]].replace("_", " "), xlabel="step along the direction")
    ax.set(ylim=(-0.03, 1.4), yticks=[0, 0.5, 1])
    ax.legend(loc="upper center", ncols=2, columnspacing=0.8, handlelength=1.2)
axes[0].set_ylabel("mean probability")
report.figure("pushes", figure)

# %% [markdown]
# ## All in one figure
#
# Blue are directions, orange autoencoders, light blue clusters of gradients, pink clusters of images, yellow single
# gradients and training images, green principal components of gradients, grey random rows, brown the channels, black
# the logits. Points are means over seeds, lines reach from the least to the largest; open points have 300 units, and
# one seed. For selectivity, points are medians over units and lines hold the middle half of them.

# %%
order = ["ours", "ours, drawn reference", *compared[1:-1], "SAE of images", "k-means of gradients",
         "k-means of images", "single gradients", "training images", "PCA", "random", "random readers", "channels",
         "PCA of channels", "logits"]  # fmt: skip
tint = {method: plots.SAE for method in order} | {
    "ours": plots.OURS, "PCA": plots.PCA, "random": plots.RANDOM, "channels": plots.UNITS,
    "PCA of channels": plots.UNITS, "logits": plots.TRUTH, "random readers": plots.RANDOM,
    "k-means of gradients": plots.CLUSTERS_OF_GRADIENTS, "k-means of images": plots.CLUSTERS_OF_INPUTS,
    "single gradients": plots.SAMPLES, "training images": plots.SAMPLES, **dict.fromkeys(others, plots.OURS),
}  # fmt: skip
kinds = pushes["method"].unique().tolist()


# %%
def resolution_panel(ax, column: str, label: str) -> None:
    for position, method in enumerate(order):
        values = headline[headline["method"] == method][column]
        ax.plot([values.min(), values.max()], [position] * 2, color=tint[method], lw=2)
        plots.dot(ax, values.mean(), position, tint[method])
        for value in headline[headline["method"] == f"{method}, larger"][column]:
            plots.dot(ax, value, position, tint[method], larger=True)
    ax.set(yticks=range(len(order)), yticklabels=[], ylim=(len(order) - 0.5, -0.5), xlabel=label)
    ax.margins(x=0.12)


def selectivity_panel(ax) -> None:
    for position, kind in enumerate(kinds):
        part, color = pushes[pushes["method"] == kind], tint[next(m for m in order if kind.startswith(m))]
        for name, marker, shift in (("others", "o", -0.18), ("quiet", "s", 0.18)):
            low, median, high = part[name].quantile([0.25, 0.5, 0.75])
            ax.plot([low, high], [position + shift] * 2, color=color, lw=1.5)
            plots.dot(ax, median, position + shift, color, marker=marker, size=3.5)
    ax.set(yticks=range(len(kinds)), yticklabels=map(plots.called, kinds), ylim=(len(kinds) - 0.5, -0.5), xscale="log")
    ax.set_xlabel("effect on own images over\nthat on other classes (●) and\non the half read least (■)", loc="right")


# %%
figure, axes = plots.panels(1, 4, height=3.4, gridspec_kw={"width_ratios": [1, 1, 1, 1.35]})
resolution_panel(axes[0], "classes", "precision,\nten classes")
resolution_panel(axes[1], "further", "precision, 24\nfurther concepts")
resolution_panel(axes[2], "entropy", "label entropy,\ntop 20 (nats)")
axes[0].set_yticklabels(map(plots.called, order))
plots.name_dots(figure, f"{n_directions} units", f"{more} units", loc="outside upper left")
selectivity_panel(axes[3])
for ax in axes:
    ax.grid(axis="x", lw=0.4)
report.figure("comparison", figure)

# %% [markdown]
# ## A page to look at all directions
#
# `figures/cnn_browse.html` opens without a server: top images, logits, places and pushes of every direction of the
# first fit.

# %%
some_images = slice(0, 32 if smoke else 600)
page = first.browse(
    entering["test"][some_images], results.folder() / "cnn_browse.html", kind="image", title="Directions of a CNN",
    names=fashion.CLASSES, labels=[fashion.CLASSES[k] for k in labels["test"][some_images]],
    images=images["test"][some_images],
)  # fmt: skip
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## What holds
#
# Directions are ahead of what is learned from images or activations, and of random rows. They are not ahead of rows
# made of gradients without a fit: in five rows these hold more of a confusion's gradient.
#
# Where to go next: `patches` takes single patches of one convolution as samples; `edits` edits this classifier.

# %%
for other in ("k-means of images", "SAE of images", f"SAE, {sae_kept[0]} on", "training images", "random readers"):
    if len(gaps) > 1:
        text = f"on concepts that tell, directions, not told the prediction, are ahead of {other}"
        report.claim(f"telling, {other}", text, gaps[other].mean(), ">", 0, gaps[other].sem(), f"{len(gaps)} concepts")
    if telling_pairs:
        gap = report.values["pairs"]["telling"]["gap"].get(other)
        text = f"on pairs of concepts that tell, directions, not told the prediction, are ahead of {other}"
        if gap:
            report.claim(f"pairs, {other}", text, gap["mean"], ">", 0, gap["error"])
five = shares[shares["rows"] == 5].pivot_table(index="behaviour", columns="method", values="held")
for other in floor_methods:
    gap = (five["ours"] - five[other]).tolist()
    text = f"five directions hold more of a confusion's gradient than {other}"
    over = f"{len(gap)} confusions"
    report.claim(f"behaviours, {other}", text, sum(gap) / len(gap), ">", 0, results.error_of_mean(gap), over)
report.verdicts()

# %%
report.write().name
