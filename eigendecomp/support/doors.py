"""What other floors do with a decomposition: each is imported when it is called, and needs an extra of its own."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.support.examples import Inputs


class Doors:
    """One-line doors to the page, the file and what else is handed on."""

    def save(self: Any, path: str | Path) -> None:
        """Write the directions as safetensors with the settings as metadata.

        A pool of references above 4 MiB is written as the inputs it came from, if these are smaller: mind who reads it.
        """
        from eigendecomp.share.file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """Read what :meth:`save` wrote; nothing in the file is ever run.

        Raises:
            ValueError: if the file is not a decomposition, is damaged, or is one of another model.
        """
        from eigendecomp.share.file import load

        return cast(Self, load(cast(Any, cls), path, model))

    def browse(self: Any, inputs: Inputs, path: str | Path, **options: Any) -> Path:
        """Write one HTML file to look at the directions on these inputs; see :mod:`eigendecomp.page`."""
        from eigendecomp.page.collect import browse  # which knows this module

        return browse(self, inputs, path, **options)

    def edit(self: Any, steps: Mapping[int, float]) -> nn.Module:
        """A deep copy of the model with w + Σ δ u, to keep; the model itself stays as it is, and tied weights tied.

        In the copy the row of a padded token moves as well, which :meth:`Decomposition.perturbed` keeps still.

        Raises:
            ValueError: if a direction does not exist, or a step is not finite.
        """
        with self.perturbed(steps) as model:
            return copy.deepcopy(model)

    def to_lora(self: Any, steps: Mapping[int, float], path: str | Path) -> Path:
        """Write the edit as an adapter that peft reads; see :mod:`eigendecomp.share.lora`."""
        from eigendecomp.share.lora import to_lora

        return to_lora(self, steps, path)

    def save_pretrained(self: Any, folder: str | Path) -> Path:
        """Write a folder with the file and a card, laid out for the hub; see :mod:`eigendecomp.share.hub`."""
        from eigendecomp.share.hub import save_pretrained

        return save_pretrained(self, folder)

    def push_to_hub(self: Any, repo: str, **options: Any) -> str:
        """Upload such a folder to the Hugging Face hub and return its address."""
        from eigendecomp.share.hub import push_to_hub

        return push_to_hub(self, repo, **options)

    @classmethod
    def from_pretrained(cls: Any, repo_or_folder: str | Path, model: nn.Module, **options: Any) -> Any:
        """:meth:`load` from such a folder, here or on the hub."""
        from eigendecomp.share.hub import find

        return cls.load(find(repo_or_folder, **options), model)

    def readout(
        self: Any, unembedding: Float[Tensor, "vocabulary width"], k: int = 10, names: Any = None, **options: Any
    ):
        """The vocabulary items that factors read and write; see :mod:`eigendecomp.share.readout`."""
        from eigendecomp.share.readout import readout

        return readout(self, unembedding, k, names, **options)

    def explain(self: Any, path: str | Path, inputs: Inputs, names: Any = None, **options: Any) -> Path:
        """Write JSON lines from which to label the directions; see :mod:`eigendecomp.share.explain`."""
        from eigendecomp.share.explain import explain

        return explain(self, path, inputs, names, **options)
