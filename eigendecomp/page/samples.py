"""How samples of one kind are shown in the page: text, images, or vectors.

Each says what the page needs to know about an example, once, and about a sample, each time it is shown.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from jaxtyping import Float
from PIL import Image
from torch import Tensor

Kind = Literal["text", "image", "vector"]
Names = Sequence[str] | Callable[[int], str]
Tokens = Sequence[Sequence[str]] | Callable[[int], str]

BEFORE, AFTER = 32, 12  # tokens shown around a sample
WIDEST = 256  # numbers in a vector that can still be seen as bars
EDGES, THUMBNAILS = (64, 48, 32, 24), 3 << 20  # pixels of a thumbnail: the most with which all stay under so many bytes


def plain(value: Any, digits: int = 4) -> Any:
    """Numbers and lists of numbers, to a few significant digits."""
    if isinstance(value, Tensor):
        return plain(value.tolist(), digits)
    if isinstance(value, list):
        return [plain(item, digits) for item in value]
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


class Renderer(Protocol):
    """How samples of one kind are put in the page."""

    kind: Kind

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What the page needs to show these examples, and what they share."""
        ...

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        """What it needs for one sample beside its example; ``strength`` is that of all samples."""
        ...

    def about(self, e: int, p: int) -> str | None:
        """What to call a sample if it has no label."""
        ...


class Text:
    """Tokens, shaded by how strong the direction is at each."""

    kind: Kind = "text"

    def __init__(self, inputs: Tensor, p: int, tokens: Tokens | None, names: Names | None) -> None:
        if inputs.ndim != 2:
            raise ValueError(f"kind='text' shows inputs (examples, tokens), not {tuple(inputs.shape)}")
        length = inputs.shape[1]
        if p not in (1, length):
            raise ValueError(f"the model gives {p} outputs for {length} tokens; text has one for each, or one in all")
        if isinstance(tokens, Sequence) and not isinstance(tokens, str):
            if len(tokens) != len(inputs) or any(len(row) != length for row in tokens):
                raise ValueError(
                    f"tokens holds {len(tokens)} examples; give {len(inputs)} lists of {length} strings each, or a "
                    "function from a token's number to its string"
                )
            self.strings = [[str(token) for token in row] for row in tokens]
        else:
            if inputs.is_floating_point():
                raise ValueError(f"inputs are {inputs.dtype}, not token numbers; give tokens=[[string, ...], ...]")
            say: Any = names if tokens is None else tokens
            most = int(inputs.max())
            if say is None or not (callable(say) or len(say) > most):
                raise ValueError(
                    f"what token {most} is called is not known; give tokens= (a function from a token's number to its "
                    "string) or names= with one string for each token"
                )
            call = say if callable(say) else say.__getitem__
            called = {token: str(call(token)) for token in inputs.unique().tolist()}
            self.strings = [[called[token] for token in row] for row in inputs.tolist()]
        self.whole = p == 1

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        ids: dict[str, int] = {}
        tokens = {e: [ids.setdefault(token, len(ids)) for token in self.strings[e]] for e in numbers}
        return {"examples": tokens, "vocabulary": list(ids)}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        if self.whole:
            return {"from": 0, "to": len(self.strings[e])}
        start, stop = max(0, p - BEFORE), min(len(self.strings[e]), p + AFTER + 1)
        shades = {name: plain(values[e, start:stop], 3) for name, values in strength.items()}
        return {"from": start, "to": stop, "shades": shades}

    def about(self, e: int, p: int) -> str | None:
        return None if self.whole else self.strings[e][p].strip() or self.strings[e][p]


class Images:
    """Thumbnails; where the outputs arise in them is drawn over them."""

    kind: Kind = "image"

    def __init__(self, inputs: Tensor, p: int, images: Tensor | None) -> None:
        shown = inputs if images is None else images
        if not isinstance(shown, Tensor) or len(shown) != len(inputs):
            raise ValueError(f"images must be a tensor of {len(inputs)} images, as many as there are examples")
        shown = shown.unsqueeze(1) if shown.ndim == 3 else shown
        if shown.ndim != 4 or shown.shape[1] not in (1, 3):
            raise ValueError(
                f"an image has 1 or 3 channels, as (examples, channels, height, width); {tuple(shown.shape)} is none. "
                "Give images= to show in their place"
            )
        if p != 1:
            raise ValueError(f"the model gives {p} outputs for an image; kind='image' shows models that give one")
        self.images = shown.detach().float().cpu()
        low, high = float(self.images.min()), float(self.images.max())
        self.low, self.high = (0.0, 1.0) if low >= 0 and 0.5 < high <= 1 else (low, max(high, low + 1e-12))

    def png(self, e: int, edge: int) -> str:
        """A data URI of a thumbnail, ``edge`` pixels long at most."""
        gray = (self.images[e] - self.low).div(self.high - self.low).clamp(0, 1).mul(255).round().byte()
        image = Image.fromarray(gray.permute(1, 2, 0).squeeze(2).numpy())
        if max(image.size) > edge:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        made: dict[int, str] = {}
        for edge in EDGES:
            made = {e: self.png(e, edge) for e in numbers}
            if sum(map(len, made.values())) < THUMBNAILS:
                break
        return {"examples": made, "aspect": self.images.shape[3] / self.images.shape[2]}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        return {}

    def about(self, e: int, p: int) -> str | None:
        return None


class Vectors:
    """Bars, one for each entry."""

    kind: Kind = "vector"

    def __init__(self, inputs: Tensor, p: int, features: Sequence[str] | None) -> None:
        vectors = inputs.detach().double().cpu()
        vectors = vectors.unsqueeze(1) if vectors.ndim == 1 else vectors
        self.vectors = vectors.unsqueeze(1).expand(-1, p, -1) if vectors.ndim == 2 else vectors
        if self.vectors.ndim != 3 or self.vectors.shape[1] != p:
            raise ValueError(
                f"kind='vector' shows inputs (examples, numbers) or (examples, {p}, numbers), not {tuple(inputs.shape)}"
            )
        size = self.vectors.shape[-1]
        if size > WIDEST:
            raise ValueError(f"a vector of {size} numbers cannot be seen as bars (at most {WIDEST}); use kind='image'")
        if features is not None and len(features) != size:
            raise ValueError(f"features has {len(features)} names; give one for each of the {size} entries")
        self.features = [str(i) for i in range(size)] if features is None else [str(name) for name in features]

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        vectors = {e: plain(self.vectors[e], 3) for e in numbers}
        return {"examples": vectors, "features": self.features, "largest": plain(self.vectors.abs().max())}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        return {}

    def about(self, e: int, p: int) -> str | None:
        sizes = self.vectors[e, p].abs()
        return self.features[int(sizes.argmax())] if sizes.max() > 0 else None


def renderer(
    kind: Kind | None,
    inputs: Tensor,
    p: int,
    *,
    names: Names | None,
    tokens: Tokens | None,
    images: Tensor | None,
    features: Sequence[str] | None,
) -> Renderer:
    """The renderer asked for, or else the one that the inputs look like."""
    if kind is None:
        if tokens is not None or (not inputs.is_floating_point() and inputs.ndim == 2 and names is not None):
            kind = "text"
        elif images is not None or (inputs.ndim == 4 and inputs.shape[1] in (1, 3)):
            kind = "image"
        else:
            kind = "vector"
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be 'text', 'image' or 'vector'")
    if kind == "text":
        return Text(inputs, p, tokens, names)
    return Images(inputs, p, images) if kind == "image" else Vectors(inputs, p, features)
