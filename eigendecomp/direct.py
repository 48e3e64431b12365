"""The direct method: directions found on the curvature itself, without gradients or references.

Two losses alternate on batches of samples, with c_v = u_vᵀ H(x) u_v from Jacobian–vector products (eq. 12): one makes
Σ_v c_v² large, so that each direction seeks few samples that it moves a lot; the other makes the interference
Σ_{v≠w} c_v c_w cos²(u_v, u_w) small, so that no two directions seek the same. It checks what the fit of gradients
finds, for small models: every step pushes every direction through the model.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from eigendecomp.curvature import push_forward
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence, SquaredError
from eigendecomp.fit import rate
from eigendecomp.reference import ModelSample
from eigendecomp.settings import Settings
from eigendecomp.sparsity import L1
from eigendecomp.support.checks import patterns
from eigendecomp.support.examples import Feed, Inputs, feed, first
from eigendecomp.support.history import History
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target


def losses(moved: Float[Tensor, "n v k"], gram: Float[Tensor, "v v"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Steepness, −Σ_v c_v², and interference, Σ_{v≠w} c_v c_w cos²(u_v, u_w): means over samples (eq. 12).

    Interference is the squared off-diagonal of (Λ^½U)(Λ^½U)ᵀ with Λ = diag(c), which has the unit of c² as steepness
    has, so their weight is a pure number. Both are of the *unit* directions: dividing by the norms takes the radial
    part out of the gradient, which is the larger one by far and would leave Adam no step for the rest.
    """
    square = gram.diagonal()
    c = moved.square().sum(-1) / square
    cosine = gram.square() / square.outer(square)
    cosine = cosine - cosine.diagonal().diag()
    return -c.square().sum(1).mean(), ((c @ cosine) * c).sum(1).mean()


def decompose_curvature(
    model: nn.Module,
    inputs: Inputs,
    *,
    divergence: Divergence | None = None,
    parameters: Sequence[str] = ("*",),
    n_directions: int = 5,
    rank: int = 1,
    factorization: Factorization = "cp",
    steps: int = 500,
    batch_size: int = 256,
    learning_rate: float = 3e-2,
    interference: float = 4.0,
    seed: int = 0,
    progress: bool = True,
) -> Decomposition:
    """Learn directions along which a model's outputs curve strongly, each for few samples.

    The result is what :func:`eigendecomp.decompose` gives: tied directions that keep every coefficient, and are read
    against :class:`ModelSample`, whose gradients have the Hessian as their second moment. Its history has the loss.

    Args:
        interference: weight of the second loss. The higher, the closer to orthogonal the directions are; below about 2
            two can share a peak. Peaks are local, so that a seed can miss one: compare the final losses of a few.
        steps: each is two updates, of steepness alone and of both losses.

    The others are as in :func:`eigendecomp.decompose`.

    Raises:
        ValueError: for anything that cannot be handled, or if the outputs move along no direction.
    """
    settings = Settings(
        SquaredError() if divergence is None else divergence, ModelSample(), patterns(parameters), n_directions, rank,
        factorization, True, L1(0.0), steps, batch_size, learning_rate, seed, interference=interference,
    )  # fmt: skip
    target = Target(model, settings.parameters)
    f = Outputs.of(target, first(inputs, 3))
    u, history = climb(target, feed(inputs, generator(seed, "data")), f.shape[1], settings, progress)
    return Decomposition(target, settings, u, u, None, settings.pool(f), history)


def climb(target: Target, data: Feed, positions: int, settings: Settings, progress: bool) -> tuple[Directions, History]:
    """The directions after all steps, and the loss at some of them."""
    u, steps, scale, history = settings.random(target).map(nn.Parameter), settings.steps, 0.0, History()
    # A short memory: a direction that was pushed off a peak has small gradients, and must not be given small steps.
    optimizer = torch.optim.Adam(list(u.tensors()), lr=settings.learning_rate, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / steps))
    bar = tqdm(range(steps), disable=not progress, desc="direct", mininterval=0.5)
    for step in bar:
        examples, loss = data.take(max(1, settings.batch_size // positions)), torch.zeros(())
        for weight in (0.0, settings.interference or 0.0):
            moved = push_forward(target, settings.divergence, u, examples)
            steep, overlap = losses(moved, u.gram())
            loss = steep + weight * overlap
            scale = scale or -steep.item()  # that of the start, so that the step does not depend on the outputs' unit
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(f"the mean squared curvature is {scale} at step {step}: the outputs do not move")
            optimizer.zero_grad()
            (loss / scale).backward()
            optimizer.step()
            u.normalize_()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss is {loss.item()} at step {step}; learning_rate={settings.learning_rate} is too high"
                )
            history.step.append(step)
            history.loss.append(loss.item())
            bar.set_postfix(loss=f"{loss.item():.3g}", refresh=False)
    return u.map(Tensor.detach), history
