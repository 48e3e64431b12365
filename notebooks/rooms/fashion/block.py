"""The middle block of the Fashion-MNIST network: the network from there on, what is read in it, and how it is moved.

Where a direction acts and what a unit of a code adds to the logits; and moves of the block that ``interventions``
does not have: of its output, and of its weights by another amount for every image.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.study.moves import Move
from eigendecomp.targets.fashion.network import FashionCNN, ResidualBlock


class AfterMiddle(nn.Module):
    """A network after its middle block, sharing its modules: what the block writes (n, c, 14, 14) to logits.

    All that changes the block's output and not the block is seen here, ``written`` being where hooks change it.
    """

    def __init__(self, model: FashionCNN) -> None:
        super().__init__()
        self.written, self.down2, self.block3, self.head = nn.Identity(), model.down2, model.block3, model.head
        self.train(model.training)

    def forward(self, output: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n 10"]:
        return self.head(self.block3(self.down2(self.written(output))).mean(dim=(2, 3)))


class FromMiddle(nn.Module):
    """A network from its middle block on, sharing its modules: what enters the block (n, c, 14, 14) to logits.

    All that changes in the middle block or after it is seen here at half the cost.
    """

    def __init__(self, model: FashionCNN) -> None:
        super().__init__()
        self.block2, self.after = model.block2, AfterMiddle(model)
        self.train(model.training)

    def forward(self, entering: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n 10"]:
        return self.after(self.block2(entering))


def contribution_maps(
    tail: FromMiddle,
    change: Mapping[str, Tensor],
    entering: Float[Tensor, "n c 14 14"],
    cotangents: Float[Tensor, "n k"],
) -> Float[Tensor, "n 14 14"]:
    """How much each position of the middle block adds to ⟨Jᵀc, u⟩: maps that sum up to it.

    ``change`` is the direction u by parameter, as ``interventions.low_rank`` gives it. A layer adds, at every position,
    the change of its output along u, its input staying as it is, times what the output is asked to change.
    """
    block, u = tail.block2, {name.removeprefix("block2."): value for name, value in change.items()}
    with torch.enable_grad():
        x = entering.detach().requires_grad_()  # so that there is a graph whatever the parameters ask for
        first = block.conv1(x)
        first_normed = block.bn1(first)
        hidden = block.relu1(first_normed)
        second = block.conv2(hidden)
        second_normed = block.bn2(second)
        later = tail.after(block.relu2(x + second_normed))
        gradients = torch.autograd.grad(later, [first, first_normed, second, second_normed], cotangents)

    with torch.no_grad():
        inputs = (x, first, hidden, second)
        changes = [run(given) for run, given in zip(changes_along(block, u).values(), inputs, strict=True)]
        return torch.stack([(g * moved).sum(1) for g, moved in zip(gradients, changes, strict=True)]).sum(0)


def changes_along(block: ResidualBlock, u: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each layer of the block, from its input to how its output changes along u: exact, since layers are linear."""

    def normed(name: str) -> Callable[[Tensor], Tensor]:
        norm, scale, shift = block.get_submodule(name), u[f"{name}.weight"], u[f"{name}.bias"]
        assert isinstance(norm, nn.BatchNorm2d)
        return lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, scale, shift, eps=norm.eps)

    def convolved(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: F.conv2d(x, u[f"{name}.weight"], padding=1)

    return {"conv1": convolved("conv1"), "bn1": normed("bn1"), "conv2": convolved("conv2"), "bn2": normed("bn2")}


class Gated(nn.Module):
    """A network whose middle block's parameters are moved for every image by its own amount, ``step`` times its gate.

    Called with what enters the block and a gate (n,) for each image. It is to a direction what scaling a unit of an
    autoencoder is to the unit: an image whose gate is zero is left alone.
    """

    def __init__(self, tail: FromMiddle) -> None:
        super().__init__()
        self.tail, self.step = tail, 0.0
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {}

    def forward(self, entering: Float[Tensor, "n c 14 14"], gate: Float[Tensor, " n"]) -> Float[Tensor, "n 10"]:
        steps = (self.step * gate)[:, None, None, None]
        handles = [
            self.tail.block2.get_submodule(name).register_forward_hook(
                lambda _module, given, output, run=run: output + steps * run(given[0])
            )
            for name, run in self.changes.items()
        ]
        try:
            return self.tail(entering)
        finally:
            for handle in handles:
                handle.remove()

    def along(self, change: Mapping[str, Tensor]) -> Move:
        """δ ↦ this network, moved along a direction given by parameter."""

        @contextmanager
        def move(delta: float) -> Iterator[nn.Module]:
            named = {name.removeprefix("block2."): value for name, value in change.items()}
            self.changes, self.step = changes_along(self.tail.block2, named), delta
            try:
                yield self
            finally:
                self.changes = {}

        return move


def shifted(after: AfterMiddle, row: Float[Tensor, " c"]) -> Move:
    """δ ↦ the network with δ · row added to the middle block's output at every position."""

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        handle = after.written.register_forward_hook(lambda *called: called[-1] + delta * row[:, None, None])
        try:
            yield after
        finally:
            handle.remove()

    return move


def logit_gradients(after: AfterMiddle, output: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n k c positions"]:
    """The gradient of every logit in what the middle block writes."""
    with torch.enable_grad():
        x = output.detach().requires_grad_()
        rows = [torch.autograd.grad(f.sum(), x, retain_graph=True)[0] for f in after(x).unbind(1)]
    return torch.stack(rows, 1).flatten(3)


def attribution(
    gradients: Float[Tensor, "n k c positions"],
    z: Float[Tensor, "n positions units"],
    decoder: Float[Tensor, "units c"],
) -> Float[Tensor, "n k units"]:
    """What each unit of a code of the middle block's output adds to each logit, to first order, over all positions.

    This is what J u is to a direction: by it, units are read with the same knowledge of the outputs.
    """
    return torch.einsum("npu,nkcp,uc->nku", z, gradients, decoder)
