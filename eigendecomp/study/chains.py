"""Networks as chains of weights, of which some may lie on a branch beside a residual stream."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Stage(NamedTuple):
    """One weight of a chain: x ↦ act(x W + b). A branch opens before a stage, and what closes it adds the stream."""

    name: str
    weight: Float[Tensor, "i o"]
    bias: Float[Tensor, " o"] | None = None
    act: Callable[[Tensor], Tensor] | None = None
    opens: bool = False
    closes: bool = False


def run(
    stages: Sequence[Stage], x: Float[Tensor, "n i"], product: Callable[[Stage, Tensor], Tensor] | None = None
) -> Float[Tensor, "n o"]:
    """The chain's output, with ``product`` in the place of x W where it is given."""
    stream = x
    for stage in stages:
        stream = x if stage.opens else stream
        x = x @ stage.weight if product is None else product(stage, x)
        x = x if stage.bias is None else x + stage.bias
        x = x if stage.act is None else stage.act(x)
        x = x + stream if stage.closes else x
    return x
