"""The induction circuit taken apart and removed: what its heads do, the fit, and what a move leaves of it."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.decomposition import Decomposition, decompose
from eigendecomp.divergence import KLDivergence
from eigendecomp.reference import Mean
from eigendecomp.sparsity import BatchTopK
from eigendecomp.study.moves import Move
from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys import induction
from eigendecomp.targets.toys.induction import FEATURES, Induction, Sequences, data, successor
from rooms.switches import Effect, search

LARGEST = 12.0  # the longest step along a unit direction that is tried


def path_scores(model: Induction, sequences: Sequences) -> dict[str, tuple[float, float]]:
    """How much each head, first and second, does of each step of the circuit, in [0, 1].

    ``previous``: mean attention to the token before, inside the first block from its second position on, which is where
    copies of it are looked for later. ``induction``: mean attention, at the samples of induction, to all places whose
    token came after an earlier copy of the present one.
    """
    x, t = sequences.inputs, torch.arange(sequences.inputs.shape[1])
    copies = (x.unsqueeze(2) == x.unsqueeze(1)) & (t.unsqueeze(1) > t)  # (n, position, earlier position)
    after = F.pad(copies[:, :, :-1], (1, 0))
    here = sequences.samples()["induction"]
    first = t[1:] < sequences.period.unsqueeze(1)
    attention: dict[str, list[float]] = {"previous": [], "induction": []}
    for pattern in model.patterns(x):
        attention["previous"].append(pattern.diagonal(-1, 1, 2)[first].mean().item())
        attention["induction"].append((pattern * after).sum(2)[here].mean().item())
    return {name: (values[0], values[1]) for name, values in attention.items()}


class Removal:
    """What a move does to induction and to bigrams, on these sequences.

    ``left``: what the probability of the repeated token has over chance at the samples of induction, as a share of what
    it had. ``elsewhere``: mean total variation of the predictions at the samples of bigrams. ``beside``: the same where
    the repeated token is the successor, so that both say it.
    """

    def __init__(self, model: Induction, sequences: Sequences, bigram: float = 0.5) -> None:
        self.vocabulary = model.W_U.out_features
        self.sequences, self.samples = sequences, sequences.samples()
        x, t = sequences.inputs, torch.arange(sequences.inputs.shape[1])
        agreeing = (t >= sequences.period.unsqueeze(1)) & (sequences.targets == successor(x))
        self.samples["beside"] = agreeing
        self.chance = (1 - bigram) / self.vocabulary  # what the data give a token that is no successor
        self.base = self._predictions(model)

    @torch.no_grad()
    def _predictions(self, model: nn.Module) -> Float[Tensor, "n t vocabulary"]:
        return model(self.sequences.inputs).softmax(-1)

    def _over(self, p: Float[Tensor, "n t vocabulary"]) -> float:
        own = p.gather(2, self.sequences.targets.unsqueeze(2))[..., 0]
        return own[self.samples["induction"]].mean().item() - self.chance

    def effect(self, move: Move, step: float) -> Effect:
        """What the model does with the move at this step."""
        with move(step) as moved:
            p = self._predictions(moved)
        change = (p - self.base).abs().sum(-1) / 2
        beside, elsewhere = (change[self.samples[name]].mean().item() for name in ("beside", "bigrams"))
        return Effect(step, abs(self._over(p) / self._over(self.base)), beside, elsewhere)


def truth(model: Induction, sequences: Sequences) -> Truth:
    """What computes induction and bigrams, and the scores of induction's path without the direction that it owns."""
    return replace(induction.truth(model, sequences), acted=Path(model, sequences).without)


class Path:
    """The path of induction before and after a move, whose step is chosen on one half of the sequences.

    ``previous`` and ``copies`` are the path scores of the first and of the second head, on the other half; ``moved``
    those after. ``left`` and ``elsewhere`` are those of :class:`Removal` there.
    """

    def __init__(self, model: Induction, sequences: Sequences) -> None:
        half = len(sequences.tokens) // 2
        self.model, self.half = model, Sequences(sequences.tokens[half:], sequences.period[half:])
        self.choose = Removal(model, Sequences(sequences.tokens[:half], sequences.period[:half]))
        self.judge = Removal(model, self.half)

    def without(self, move: Move, feature: int) -> dict[str, float]:
        """The scores for induction; bigrams are to stay, and have none."""
        if FEATURES[feature] != "induction":
            return {}
        step = search(lambda step: self.choose.effect(move, step), LARGEST, both=True, tries=5).step
        effect, before = self.judge.effect(move, step), path_scores(self.model, self.half)
        with move(step):
            after = path_scores(self.model, self.half)
        return {
            "previous": before["previous"][0], "previous moved": after["previous"][0],
            "copies": before["induction"][1], "copies moved": after["induction"][1],
            "left": effect.left, "elsewhere": effect.elsewhere,
        }  # fmt: skip


# The fit's settings, chosen on network 100 with fitting seed 0, which are not among those reported.
DIRECTIONS, RANK, KEPT, STEPS = 4, 16, 1.0, 300


def fit(
    model: Induction, *, seed: int, steps: int = STEPS, heads: tuple[int, ...] = (0, 1), sequences: int = 400
) -> Decomposition:
    """Four directions of rank 16 over both heads' weights, or over those of some; one coefficient a sample is kept.

    The mean output is the reference.
    """
    x = data(sequences, torch.Generator().manual_seed(1000 + seed)).inputs
    return decompose(
        model, x, divergence=KLDivergence(), reference=Mean(), parameters=[f"heads.{n}.*" for n in heads],
        n_directions=DIRECTIONS, rank=RANK, sparsity=BatchTopK(KEPT / DIRECTIONS), batch_size=240, steps=steps,
        learning_rate=1e-2, seed=seed, progress=False,
    )  # fmt: skip
