# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Overview: what does the method do with one sample?
#
# ![A network, its gradient, a sparse code times directions, a step.](../figures/overview_sample.png)
#
# *The toy model of superposition, five features in two dimensions, on one held-out sample. Red is positive, blue
# negative. Right: the outputs before (grey) and after half a step (blue).*
#
# **What comes out: two of five directions rebuild the gradient of a sample with two features on, but for a fifth of its
# squared size. A step along one of them changes one output and hardly the other.**
#
# Words: a *sample* is one output vector, a *reference* the output that it is compared with; the *gradient* is that of
# the divergence between them; a *direction* is a learned change of all weights; the *code* is how much of each
# direction is taken.

# %% tags=["parameters"]
seed, training_steps, steps, kept = 0, 4000, 600, 0.25  # kept: share of a batch's coefficients

# %%
import warnings

warnings.filterwarnings("ignore")  # of libraries, some when they are imported

import torch

import eigendecomp as ed
from eigendecomp.report import plots, results
from eigendecomp.targets.toys import tms

plots.style()
if results.profile() == "smoke":
    training_steps, steps = 200, 60
report = results.Results("overview", seed=seed, training_steps=training_steps, steps=steps, kept=kept)

# %% [markdown]
# ## The network and its directions
#
# Five features are stored in two dimensions, by one matrix that writes and another that reads. They are decomposed into
# five directions of rank one; each sample's reference is another sample's output.

# %%
model = tms.untie(tms.train(5, 2, tied=True, seed=seed, steps=training_steps, instances=8)[0])
train, test = (tms.data(n, 5, torch.Generator().manual_seed(k), none_empty=True) for n, k in ((4096, 1), (2048, 2)))
d = ed.decompose(
    model, train, divergence=ed.SquaredError(), sparsity=ed.BatchTopK(kept), n_directions=5, steps=steps, seed=seed,
    progress=False,
)  # fmt: skip
d

# %% [markdown]
# ## One sample
#
# Held out, with two features on: of these the one that the network gives back best. Its gradient against another
# sample's output is written as a sum of the directions whose coefficients pass the fit's threshold.

# %%
pairs = test[((test > 0.4).sum(1) == 2) & ((test > 0).sum(1) == 2)]
with torch.no_grad():
    x = pairs[(model(pairs) - pairs).square().sum(1).argmin()][None]
f = model(x)
loss = ed.SquaredError().value(f, model(test[:1]).detach()).sum()
names = d.target.names
weights = dict(model.named_parameters())
gradient = dict(zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True))
flat = torch.cat([part.flatten() for part in gradient.values()])
z = d.encoder.flat() @ flat
code = d.settings.sparsity.keep(z, d.threshold)
owner = d.impact(tms.one_hot(5)).argmax(0)  # the feature that each direction answers to
left = (flat - code @ d.decoder.flat()).square().sum() / flat.square().sum()
used = code.abs().argsort(descending=True)[: int((code != 0).sum())].tolist()
unit, sign = used[0], float(code[used[0]].sign())
with d.perturbed({unit: 0.5 * sign}), torch.no_grad():
    moved = model(x)
report.record(
    input=x[0], output=f[0], code=code, owner=owner, moved=moved[0], left=left, kept=len(used),
    own_change=(moved - f)[0, owner[unit]], other_change=(moved - f)[0][torch.arange(5) != owner[unit]].abs().max(),
)  # fmt: skip
print(f"{len(used)} directions leave {left:.1%} of this gradient")


# %%
def drawn(ax, of, title, nodes=None):
    limit = max(float(part.abs().max()) for part in of.values())
    biases = [None, None, of["b"].detach()]
    plots.layered(ax, [of["W_in"].detach(), of["W_out"].detach()], biases, limit=limit, nodes=nodes)
    ax.set_title(title, fontsize=7.5)


def between(ax, text):
    ax.axis("off")
    ax.text(0.5, 0.42, text, ha="center", va="center", size=11)


# %% [markdown]
# The picture. A direction's sign is free, and each is drawn with the sign that makes its coefficient positive.
# Directions are numbered by the feature they answer to.
#
# Where to go next: `xor` says why a direction has two rows, and `tms` tests over many seeds whether every feature owns
# a direction.

# %%
shown = used[:3]
widths = [1.15, 0.2, 1.15, 0.2, 0.65, *[0.2, 1.0] * len(shown), 0.3, 0.95]
figure, axes = plots.panels(1, len(widths), height=1.75, gridspec_kw={"width_ratios": widths})
drawn(axes[0], weights, "a network,\none sample", nodes=(x[0], f[0].detach()))
between(axes[1], "→")
drawn(axes[2], gradient, "its gradient\n$g$")
between(axes[3], "≈")
by_feature = owner.argsort()
axes[4].barh(range(5), z[by_feature].abs(), color="0.85", height=0.7)
axes[4].barh(range(5), code[by_feature].abs(), color=plots.OURS, height=0.7)
axes[4].set(
    yticks=range(5), yticklabels=[f"$u_{i}$" for i in owner[by_feature].tolist()], xticks=[0, 1], ylim=(4.6, -0.6)
)
axes[4].set_title("sparse\ncode", fontsize=7.5)
rows = d.directions()
for place, v in enumerate(shown):
    between(axes[5 + 2 * place], "" if place == 0 else "+")
    part = {name: rows[name][v] * code[v].sign() for name in names}
    drawn(axes[6 + 2 * place], part, f"{abs(float(code[v])):.1f} × $u_{int(owner[v])}$\nof feature {int(owner[v])}")
between(axes[-2], "")
axes[-1].barh([i - 0.19 for i in range(5)], f[0].detach(), color="0.7", height=0.36)
axes[-1].barh([i + 0.19 for i in range(5)], moved[0], color=plots.OURS, height=0.36)
axes[-1].set(yticks=range(5), yticklabels=[f"$f_{i}$" for i in range(5)], ylim=(4.6, -0.6), xticks=[0, 1])
axes[-1].set_title(f"half a step\nalong $u_{int(owner[unit])}$", fontsize=7.5)
report.figure("sample", figure)

# %%
report.write().name
