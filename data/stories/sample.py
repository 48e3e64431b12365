"""Sample stories from stories260K: ``python data/stories/sample.py OUT.txt.gz --n 32000``.

The corpus that the shipped story model is trained on comes from this public checkpoint, a Llama-style model
of 260,000 parameters that A. Karpathy trained on TinyStories (``karpathy/tinyllamas`` on the Hugging Face
hub, MIT licence). Its two files are fetched by name, or given with ``--model`` and ``--tokenizer``, and held
against their SHA-256. The stories are grammatical and often make no sense, which is the small model's doing.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.targets.stories import model as st

REPOSITORY = "karpathy/tinyllamas"
SHA256 = {
    "stories260K/stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "stories260K/tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
}
BEGIN, STOP = 1, 2  # the pieces <s> and </s>; the model was trained on stories that each begin with <s>


def write_stories(stories: Sequence[str], path: Path) -> None:
    """Write the file that ``read_stories`` of the package reads; the same stories give the same bytes."""
    text = f"\n{st.END}\n".join(stories) + "\n"
    Path(path).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


@dataclass
class Llama:
    """A small Llama: per-layer weights stacked on the first axis, matrices as (out, in)."""

    heads: int
    kv_heads: int
    context: int
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Llama:
        """Read llama2.c's first export format. ``ValueError`` if the file's length is not its header's."""
        data = path.read_bytes()
        if len(data) < 28:
            raise ValueError(f"{path} has {len(data)} bytes; a checkpoint begins with a header of 28")
        width, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", data[:28])
        vocabulary, shared = abs(vocabulary), vocabulary > 0
        head = width // max(heads, 1)
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (vocabulary, width),
            "norm1": (layers, width),
            "wq": (layers, width, width),
            "wk": (layers, kv_heads * head, width),
            "wv": (layers, kv_heads * head, width),
            "wo": (layers, width, width),
            "norm2": (layers, width),
            "w1": (layers, hidden, width),
            "w2": (layers, width, hidden),
            "w3": (layers, hidden, width),
            "norm": (width,),
            "rotary": (2, context, head // 2),  # two tables that are no longer used
        }
        if not shared:
            shapes["unembed"] = (vocabulary, width)
        wanted = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
        if len(data) != wanted:
            raise ValueError(f"{path} has {len(data)} bytes; by its header it must have {wanted}")
        flat, weights = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), {}
        for name, shape in shapes.items():
            weights[name], flat = flat[: math.prod(shape)].view(shape), flat[math.prod(shape) :]
        weights.setdefault("unembed", weights["embed"])
        return cls(heads, kv_heads, context, weights)

    def cache(self, batch: int) -> Float[Tensor, "2 layers batch context kv_heads head"]:
        """An empty cache of keys and values."""
        layers, inner, _ = self.weights["wk"].shape
        return torch.zeros(2, layers, batch, self.context, self.kv_heads, inner // self.kv_heads)

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "batch positions"],
        cache: Float[Tensor, "2 layers batch context kv_heads head"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch positions vocab"]:
        """Logits of tokens at positions from ``start``; ``cache`` holds what came before and takes what
        is new."""
        w, (batch, length) = self.weights, tokens.shape
        cache = self.cache(batch) if cache is None else cache
        end, head = start + length, cache.shape[-1]
        angle = torch.outer(torch.arange(start, end), 10_000.0 ** (-torch.arange(0, head, 2) / head))
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # adjacent pairs as complex numbers
        future = torch.full((length, end), -torch.inf).triu(start + 1)
        x = w["embed"][tokens]
        for i in range(len(w["wq"])):
            h = _rms_norm(x, w["norm1"][i])
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.view(batch, length, -1, head // 2, 2)) * turn).flatten(3)
                for y in (h @ w["wq"][i].T, h @ w["wk"][i].T)
            )
            cache[0, i, :, start:end], cache[1, i, :, start:end] = k, (h @ w["wv"][i].T).view_as(k)
            keys, values = (c[i, :, :end].repeat_interleave(self.heads // self.kv_heads, 2) for c in cache)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(head) + future
            z = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
            x = x + z.flatten(2) @ w["wo"][i].T
            h = _rms_norm(x, w["norm2"][i])
            x = x + (F.silu(h @ w["w1"][i].T) * (h @ w["w3"][i].T)) @ w["w2"][i].T
        return _rms_norm(x, w["norm"]) @ w["unembed"].T


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale


class Pieces:
    """The tokenizer: byte strings with scores, the best-scoring pair of neighbours merged first."""

    def __init__(self, path: Path) -> None:
        """Read llama2.c's tokenizer format."""
        data, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """The tokens of a story, ``<s>`` first."""
        ids: list[int] = []
        for character in " " + text:
            raw = character.encode()
            ids += [self.ids[raw]] if raw in self.ids else [3 + byte for byte in raw]
        while True:
            merged = [self.ids.get(self.pieces[a] + self.pieces[b]) for a, b in itertools.pairwise(ids)]
            best = max(((self.scores[m], -i) for i, m in enumerate(merged) if m is not None), default=None)
            if best is None:
                return [BEGIN, *ids]
            i = -best[1]
            ids[i : i + 2] = [merged[i]]  # type: ignore[list-item]

    def decode(self, ids: list[int]) -> str:
        """The text of a story's tokens, without ``<s>`` and ``</s>``."""
        raw = b"".join(
            bytes([int(self.pieces[i][3:5], 16)]) if self.pieces[i].startswith(b"<0x") else self.pieces[i]
            for i in ids
            if i not in (BEGIN, STOP)
        )
        return raw.decode(errors="replace").strip()


def sample(
    model: Llama, batch: int, generator: torch.Generator, temperature: float = 0.85, top_p: float = 0.92
) -> list[list[int]]:
    """The tokens of those stories, of ``batch`` that are begun, that end by themselves within the context.

    At each position the choice is among the fewest tokens that hold ``top_p`` of the probability; a
    temperature of 0 takes the likeliest. Rows that have ended are dropped, so that the cost falls as the
    stories end.
    """
    tokens = torch.full((batch, 1), BEGIN)
    cache, ended = model.cache(batch), []
    for position in range(model.context - 1):
        logits = model.logits(tokens[:, -1:], cache, position)[:, 0]
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            p, order = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
            p = p * (p.cumsum(-1) - p < top_p)
            chosen = order.gather(1, torch.multinomial(p, 1, generator=generator))
        tokens = torch.cat([tokens, chosen], 1)
        stop = (chosen == BEGIN) | (chosen == STOP)
        ended += tokens[stop[:, 0]].tolist()
        going = ~stop[:, 0]
        if not going.any():
            break
        if stop.any():
            tokens, cache = tokens[going], cache[:, :, going]
    return ended


def sample_stories(
    model: Llama,
    pieces: Pieces,
    n: int,
    seed: int,
    *,
    batch: int = 256,
    shortest: int = 250,
    longest: int = 1_500,
) -> Iterator[str]:
    """``n`` different stories of ``shortest`` to ``longest`` characters, determined by seed and ``batch``.

    Raises ``RuntimeError`` if twenty batches one after another give none, as a model that never ends a story
    does.
    """
    generator, seen, idle = torch.Generator().manual_seed(seed), set(), 0
    while len(seen) < n:
        idle += 1
        for ids in sample(model, batch, generator):
            text = pieces.decode(ids)
            if shortest <= len(text) <= longest and text not in seen and len(seen) < n:
                seen.add(text)
                idle = 0
                yield text
        if idle == 20:
            raise RuntimeError(
                f"{20 * batch} stories begun, and no new one ended by itself with {shortest} to {longest} characters"
            )


def likelihood(model: Llama, pieces: Pieces, text: str) -> tuple[float, int]:
    """A story's summed loss in nats, its end included, and the number of its tokens (cut to the context)."""
    ids = torch.tensor([*pieces.encode(text), BEGIN])[: model.context + 1]
    return float(F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="sum")), len(ids) - 1


def fetch(model: Path | None, tokenizer: Path | None) -> tuple[Path, Path]:
    """The paths of the two files, from the hub where none is given, held against their SHA-256.

    Raises ``ConnectionError`` as ``load_hub_model`` does and ``ValueError`` for a file that is another one.
    """
    given = dict(zip(SHA256, (model, tokenizer), strict=True))
    missing = [name for name, path in given.items() if path is None]
    if missing:
        from huggingface_hub import hf_hub_download

        with st.hub(REPOSITORY, missing):
            given |= {name: Path(hf_hub_download(REPOSITORY, name)) for name in missing}
    for name, path in given.items():
        if (found := st.sha256(path)) != SHA256[name]:  # type: ignore[arg-type]
            raise ValueError(f"{path} is not {name}: its sha256 is {found}, not {SHA256[name]}")
    return tuple(given.values())  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample stories from the public stories260K checkpoint.")
    parser.add_argument("out", type=Path, help="the file to write, .txt.gz")
    parser.add_argument("--n", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="stories260K.bin, instead of the hub's")
    parser.add_argument("--tokenizer", type=Path, help="tok512.bin, instead of the hub's")
    parser.add_argument("--batch", type=int, default=256, help="stories begun together")
    parser.add_argument("--any-model", action="store_true", help="take files with another SHA-256")
    parser.add_argument("--score", action="store_true", help="write nothing: report the loss of OUT's stories")
    args = parser.parse_args(arguments)
    if args.any_model and args.model and args.tokenizer:
        paths = args.model, args.tokenizer
    else:
        paths = fetch(args.model, args.tokenizer)
    model, pieces = Llama.read(paths[0]), Pieces(paths[1])
    if args.score:
        texts = st.read_stories(args.out)[: args.n]
        losses, tokens = map(sum, zip(*(likelihood(model, pieces, text) for text in texts), strict=True))
        size = sum(len(text.encode()) for text in texts)
        print(
            f"{len(texts)} stories, {tokens} tokens: {losses / tokens:.3f} nats a token, "
            f"{losses / size / math.log(2):.3f} bits a byte"
        )
        return
    stories: list[str] = []
    for story in sample_stories(model, pieces, args.n, args.seed, batch=args.batch):
        stories.append(story)
        if len(stories) % 1_000 == 0 or len(stories) == args.n:
            print(f"{len(stories)} stories", flush=True)
            write_stories(stories, args.out)


if __name__ == "__main__":
    main()
