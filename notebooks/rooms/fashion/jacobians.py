"""Everything that directions can read in a sample, from its Jacobian once.

Impact, activation and their shares are small functions of J u, one number for each output, so many sets of directions
are read in one pass over the data, without a pass for each reference. For models with one output vector an example.

A *share* divides by what the whole gradient offers: a confident sample's gradients are tiny, and shares compare its
directions with each other rather than with another sample's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.factored.source import CapturedSource
from eigendecomp.gradients import EachOutput
from eigendecomp.support.examples import Inputs, as_examples, chunks
from eigendecomp.target import Target

CHUNK = 32  # examples whose Jacobians are formed at a time
SMALL = 1e-12


@dataclass
class Jacobians:
    """What samples' Jacobians J = ∂f/∂w are to given rows: J u, and J Jᵀ for the shares."""

    f: Float[Tensor, "n k"]
    gram: Float[Tensor, "n k k"]
    along: dict[str, Float[Tensor, "n k v"]]

    def impact(self, name: str, cotangents: Float[Tensor, "n r k"], share: bool = False) -> Float[Tensor, "n v"]:
        """Mean |⟨g, u⟩| over the gradients g = Jᵀc; the share divides each by ‖g‖ (|cosine|, if u has unit norm)."""
        z = torch.einsum("nrk,nkv->nrv", cotangents, self.along[name]).abs()
        if share:
            square = torch.einsum("nrk,nkl,nrl->nr", cotangents, self.gram, cotangents)
            z = z / square.clamp_min(SMALL).sqrt().unsqueeze(-1)
        return z.mean(1)

    def activation(self, name: str, share: bool = False) -> Float[Tensor, "n v"]:
        """√(uᵀHu) under KL divergence; the share is √(uᵀHu / tr H), at most 1."""
        return self._curved(name, self.f.softmax(-1), share)

    def logit_move(self, name: str, share: bool = False) -> Float[Tensor, "n v"]:
        """How far the logits move apart, whatever the model predicts: the activation if all outputs were as likely."""
        return self._curved(name, torch.full_like(self.f, 1 / self.f.shape[-1]), share)

    def _curved(self, name: str, p: Float[Tensor, "n k"], share: bool) -> Float[Tensor, "n v"]:
        curvature = torch.einsum("nk,nkv->nv", p, self._centred(name, p).square())
        return (curvature / self._trace(p).unsqueeze(-1) if share else curvature).sqrt()

    def _centred(self, name: str, p: Float[Tensor, "n k"]) -> Float[Tensor, "n k v"]:
        y = self.along[name]
        return y - torch.einsum("nk,nkv->nv", p, y).unsqueeze(1)

    def _trace(self, p: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        """tr H."""
        trace = torch.einsum("nk,nkk->n", p, self.gram) - torch.einsum("nk,nkl,nl->n", p, self.gram, p)
        return trace.clamp_min(SMALL)

    def held(self, name: str, rows: Float[Tensor, "v w"], counts: Sequence[int]) -> dict[int, Float[Tensor, " n"]]:
        """Share of tr H under KL divergence in the span of a sample's rows of largest activation, by their number."""
        p, y = self.f.softmax(-1), self._centred(name, self.f.softmax(-1))
        order = self.activation(name).topk(max(counts)).indices
        y = y.gather(2, order.unsqueeze(1).expand(-1, y.shape[1], -1)).double()
        h = torch.einsum("nk,nki,nkj->nij", p.double(), y, y)
        gram = (rows.double() @ rows.double().T)[order.unsqueeze(2), order.unsqueeze(1)]
        inverse = {c: torch.linalg.pinv(gram[:, :c, :c], hermitian=True, rtol=1e-6) for c in counts}
        trace = self._eigenvalues.sum(1)
        return {c: torch.einsum("nij,nji->n", g, h[:, :c, :c]) / trace for c, g in inverse.items()}

    def largest(self, counts: Sequence[int]) -> dict[int, Float[Tensor, " n"]]:
        """As :meth:`held`, of the leading eigenvectors of each sample's own H: the most that any rows can hold."""
        values = self._eigenvalues
        return {c: values[:, :c].sum(1) / values.sum(1) for c in counts}

    @cached_property
    def _eigenvalues(self) -> Float[Tensor, "n k"]:
        """Those of H under KL divergence, the largest first; in float64, since a sure sample's p is nearly a vertex."""
        p = self.f.double().softmax(-1)
        root = torch.diag_embed(p.sqrt()) - p.sqrt().unsqueeze(2) * p.unsqueeze(1)  # H = Jᵀ rootᵀ root J
        values = torch.linalg.eigvalsh(root @ self.gram.double() @ root.mT)
        return values.clamp_min(0).flip(1)


@torch.no_grad()
def read(target: Target, inputs: Inputs, rows: Mapping[str, Float[Tensor, "v w"]]) -> Jacobians:
    """J u for every row of every set, over the target's flattened parameters in order.

    Raises:
        ValueError: if the model has several output vectors an example (positions).
    """
    names, widths = list(rows), [len(row) for row in rows.values()]
    matrix = torch.cat(list(rows.values())).T
    source, outputs, grams, along = None, [], [], []
    for some in chunks(as_examples(inputs), CHUNK):
        f = target.outputs(some)
        if f.shape[1] != 1:
            raise ValueError(f"the model gives {f.shape[1]} output vectors an example; readings are for one")
        source = source or CapturedSource(target, some, terms=len(matrix))
        j = source(some, EachOutput()).flat()
        outputs.append(f[:, 0])
        along.append((j @ matrix).unflatten(0, (len(f), -1)))
        j = j.unflatten(0, (len(f), -1))
        grams.append(j @ j.mT)
    parts = torch.cat(along).split(widths, -1)
    return Jacobians(torch.cat(outputs), torch.cat(grams), dict(zip(names, parts, strict=True)))
