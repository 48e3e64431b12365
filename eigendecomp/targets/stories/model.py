"""The story models: the shipped one, those on the model hub, and the stories and tokens to run them on.

The shipped model has TinyStories-1M's shape (width 64, 8 blocks of 16 heads) with a vocabulary of 2,048
pieces, so that most words are one token, and a context of 256. GPT-Neo's blocks alternate global attention
and attention to the last 256 positions; within a context of 256 the two are the same, so ours are all plain
causal ones. ``train_stories.py`` makes the files in ``data/stories``.

All that depends on transformer-lens is in this module. It, transformers and datasets are imported when first used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from eigendecomp.support.extras import need

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[3] / "data" / "stories"
FILES = ("model.safetensors", "tokenizer.json", "train.txt.gz", "validation.txt.gz", "test.txt.gz")
COMMAND = "python data/stories/train.py STORIES.txt.gz"
END, END_ID = "<|endoftext|>", 0  # begins and ends every story
HUB_STORIES = "roneneldan/TinyStories"
UNPROCESSED: dict[str, Any] = dict(  # the weights as they were trained, not folded into one another
    fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
)
Split = Literal["train", "validation", "test"]


# ----------------------------------------------------------------------------------------- the shipped files


def load_model(folder: Path | None = None, device: str = "cpu") -> HookedTransformer:
    """The shipped story model: in evaluation mode, parameters that require gradients, tokenizer attached.

    It maps tokens (batch, positions ≤ 256) to logits (batch, positions, 2048). ``folder`` is where to look
    instead of the repository's ``data/stories``. Raises ``FileNotFoundError`` if a file is missing and
    ``ValueError`` if the weights are not the ones recorded in ``training.json``.
    """
    path = _checked("model.safetensors", folder)
    with safe_open(path, "pt") as file:
        config: dict[str, Any] = json.loads((file.metadata() or {})["config"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = build_model(config | {"device": device})
    missing = {name for name, _ in model.named_parameters()} ^ set(weights)
    if missing:
        raise ValueError(f"{path} does not hold the parameters of its configuration: {sorted(missing)}")
    model.load_state_dict(weights, strict=False)  # the attention masks are not in the file
    model.set_tokenizer(load_tokenizer(folder, add_bos_token=True))
    return model.eval()


def load_tokenizer(folder: Path | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """The shipped model's tokenizer: it adds no end token by itself, and any text comes back unchanged."""
    path = _checked("tokenizer.json", folder)
    return need("language", "transformers").PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token=END, eos_token=END, pad_token=END, name_or_path="", **options
    )


_shipped_tokenizer = functools.cache(load_tokenizer)


def load_stories(split: Split = "test", folder: Path | None = None) -> list[str]:
    """The shipped stories of a split: 4,000 that the model was trained on, or 2,000 that it never saw."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; there are {', '.join(get_args(Split))}")
    return read_stories(_checked(f"{split}.txt.gz", folder))


def build_model(config: dict[str, Any], seed: int = 0) -> HookedTransformer:
    """A new ``HookedTransformer`` of this configuration, weights drawn from ``seed``, without tokenizer."""
    lens = need("language", "transformer_lens")
    with warnings.catch_warnings():  # that the class leaves with transformer-lens 4, which we do not use yet
        warnings.simplefilter("ignore", DeprecationWarning)
        return lens.HookedTransformer(lens.HookedTransformerConfig(**{"device": "cpu", **config}, seed=seed))


def read_stories(path: Path) -> list[str]:
    """The stories of a gzip file, separated by ``<|endoftext|>``, without blank space around their lines."""
    text = gzip.decompress(Path(path).read_bytes()).decode()
    return [re.sub(r"\s*\n\s*", "\n", story).strip() for story in text.split(END) if story.strip()]


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked(name: str, folder: Path | None) -> Path:
    """The path of a shipped file that is there and is the recorded one."""
    folder = folder or FOLDER
    path, record = folder / name, folder / "training.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. It is part of the repository: `git checkout -- data/stories`, or make it "
            f"again with `{COMMAND} --out {folder}`"
        )
    wanted = json.loads(record.read_text()).get("sha256", {}).get(name) if record.exists() else None
    if wanted is not None and (actual := sha256(path)) != wanted:
        raise ValueError(
            f"{path} has sha256 {actual}, but training.json records {wanted}: it is damaged or comes from "
            f"another training. `git checkout -- data/stories` restores it, `{COMMAND} --out {folder}` makes "
            "both again"
        )
    return path


@torch.no_grad()
def standardised(model: HookedTransformer, layers: Sequence[int], tokens: Int[Tensor, "n t"]) -> HookedTransformer:
    """The same function with some blocks' weights written so that their inputs have mean 0 and deviation 1.

    A gradient of a weight is an outer product with what arrives there, so it depends on how the layer is written: a
    mean that all tokens share is in every gradient, and large entries count for more than small ones. Means and
    deviations over ``tokens`` are moved from the weights of the query, key, value, output and first MLP maps into the
    normalisations' scales and shifts, and biases. (What arrives at the second MLP map cannot be shifted so.)
    """
    names = [f"blocks.{layer}.{point}" for layer in layers for point in ("ln1", "ln2", "attn.hook_z")]
    moments = {name: (x.mean(0), x.std(0)) for name, x in activations(model, tokens, names).items()}
    other = copy.deepcopy(model)
    for layer in layers:
        block = cast(Any, other.blocks[layer])
        attn, mlp = block.attn, block.mlp
        mean, scale = moments[f"blocks.{layer}.ln1"]
        for letter in "QKV":
            weight = getattr(attn, f"W_{letter}")
            getattr(attn, f"b_{letter}").add_(torch.einsum("d,hde->he", mean, weight))
            weight.mul_(scale[None, :, None])
        _rescale(block.ln1.w, block.ln1.b, mean, scale)
        mean, scale = moments[f"blocks.{layer}.attn.hook_z"]  # attention's rows sum to one: values shift alike
        attn.b_O.add_(torch.einsum("he,hed->d", mean, attn.W_O))
        attn.W_O.mul_(scale.unsqueeze(-1))
        attn.W_V.div_(scale.unsqueeze(1))
        attn.b_V.sub_(mean).div_(scale)
        mean, scale = moments[f"blocks.{layer}.ln2"]
        mlp.b_in.add_(mean @ mlp.W_in)
        mlp.W_in.mul_(scale.unsqueeze(1))
        _rescale(block.ln2.w, block.ln2.b, mean, scale)
    return other


@torch.no_grad()
def activations(model: HookedTransformer, tokens: Int[Tensor, "n t"], modules: Sequence[str]) -> dict[str, Tensor]:
    """What some modules give at every position: {module: (n · t, …)}, window by window; of several calls the last."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    met: dict[str, Tensor] = {}

    def remember(name: str, _module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        met[name] = output.flatten(0, 1)

    hooks = [model.get_submodule(name).register_forward_hook(partial(remember, name)) for name in modules]
    try:
        for windows in tokens.split(256):
            model(windows, return_type=None)
            for name, pieces in outputs.items():
                pieces.append(met[name])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(pieces) for name, pieces in outputs.items()}


def _rescale(w: Tensor, b: Tensor, mean: Tensor, scale: Tensor) -> None:
    w.div_(scale)
    b.sub_(mean).div_(scale)


# ------------------------------------------------------------------------------------------ tokens and words


def token_windows(
    stories: Sequence[str], n: int, length: int, seed: int = 0, *, at_start: float = 0.25
) -> Int[Tensor, "n length"]:
    """``n`` windows of ``length`` tokens, the same ones for the same stories and seed.

    Each window lies within one story. With probability ``at_start`` it is the story's beginning, the end
    token first, as the model saw it in training (and as it sees a prompt); otherwise it begins at a token
    drawn evenly from the others that leave it ``length`` tokens. Stories that are too short are left out.
    The others are used in a random order, each once before any is used again.

    Raises ``ValueError`` if ``n`` or ``length`` is not positive or no story is long enough.
    """
    if n < 1 or length < 1:
        raise ValueError(f"n is {n} and length is {length}; both must be at least 1")
    tokenizer = _shipped_tokenizer()
    begin: int = tokenizer.bos_token_id or 0  # type: ignore[assignment]
    encoded = tokenizer(list(stories), add_special_tokens=False)["input_ids"] if len(stories) else []
    sequences = [[begin, *ids] for ids in encoded if len(ids) >= length]  # type: ignore[misc]
    if not sequences:
        longest = max((len(ids) for ids in encoded), default=0)  # type: ignore[arg-type]
        raise ValueError(
            f"no story has {length} tokens (of {len(stories)} stories the longest has {longest}): "
            f"ask for a shorter length or give longer stories"
        )
    generator = torch.Generator().manual_seed(seed)
    passes = -(-n // len(sequences))
    chosen = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(passes)])[:n].tolist()
    draws = torch.rand(n, 2, generator=generator, dtype=torch.float64).tolist()
    windows = []
    for story, (kind, place) in zip(chosen, draws, strict=True):
        ids = sequences[story]
        start = 0 if kind < at_start else 1 + int(place * (len(ids) - length))
        windows.append(ids[start : start + length])
    return torch.tensor(windows)


def readable(token: int, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """One token as text for tables: the end token as ``[start]``, a line break as ``¶``."""
    tokenizer = tokenizer or _shipped_tokenizer()
    text = str(tokenizer.decode([token])).replace("\n", "¶")
    return "[start]" if token in tokenizer.all_special_ids else text


# ---------------------------------------------------------------------------------------------- from the hub


def load_hub_model(name: str = "tiny-stories-1M", **options: Any) -> HookedTransformer:
    """A model of the Hugging Face hub, by transformer-lens's name for it, its weights as they were trained.

    ``tiny-stories-1M`` has larger sisters, ``-3M``, ``-8M``, ``-28M``, ``-33M``; ``options`` go to
    ``HookedTransformer.from_pretrained``. A cached copy is used as it is. Raises ``ValueError`` for an unknown name and
    ``ConnectionError``, within two seconds, if the model is not cached and the hub is out of reach.
    """
    lens = need("language", "transformer_lens")
    loading = need("language", "transformer_lens.loading_from_pretrained")
    aliases: dict[str, str] = loading.make_model_alias_map()
    if name.lower() not in aliases:
        known = ", ".join(sorted(alias for alias in aliases if alias.startswith("tiny-stories-")))
        raise ValueError(f"transformer-lens knows no model {name!r}; of this family there are {known}")
    repository = aliases[name.lower()]
    needed = ["config.json", "tokenizer*.json", "*.[sb][ai][fn]*"]  # .safetensors or .bin
    with hub(repository, "model", needed), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return lens.HookedTransformer.from_pretrained(name, **{"device": "cpu", **UNPROCESSED, **options}).eval()


def load_hub_stories(n: int, split: Literal["train", "validation"] = "validation") -> list[str]:
    """The first ``n`` stories of a split of TinyStories on the Hugging Face hub (fewer if it holds fewer).

    A cached copy is used as it is; without one the stories are streamed, which downloads little more than is
    asked for. Raises ``ValueError`` for another split and ``ConnectionError`` as ``load_hub_model`` does.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; TinyStories has train and validation")
    datasets = need("language", "datasets")
    with hub(HUB_STORIES, "dataset", [f"data/{split}-*.parquet"]) as cached:
        if cached:  # load_dataset with the name does not look into the hub's cache
            names = [str(file) for file in cached]
            source = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        else:
            source = datasets.load_dataset(HUB_STORIES, split=split, streaming=True)
        return [str(row["text"]) for row in source.take(n)]


@contextlib.contextmanager
def hub(repository: str, kind: Literal["model", "dataset"], needed: Sequence[str]) -> Iterator[list[Path]]:
    """The files of a hub repository that ``needed`` names (patterns), if all are cached; else none.

    Within it the hub's libraries are offline in the first case and online in the second. They read HF_HUB_OFFLINE when
    they are imported, and without it try a missing network for 23 s, or 141 s for a cached model: hence the switch, and
    the probe before anything is asked of the network. Raises ``ConnectionError`` with the remedies.
    """
    constants = need("language", "huggingface_hub.constants")
    home = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    main = home / "refs" / "main"
    snapshot = home / "snapshots" / (main.read_text().strip() if main.exists() else "none")
    matches = [sorted(snapshot.glob(pattern)) for pattern in needed]
    cached = [path for paths in matches for path in paths] if all(map(_complete, matches)) else []
    if not cached and (constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)):
        raise ConnectionError(
            f"{kind} {repository} is not in this machine's hub cache, and {constants.ENDPOINT} is out of "
            "reach (or HF_HUB_OFFLINE is set). Remedies: use what is shipped (load_model, load_stories), "
            "which needs no network; or connect to the network, or set HF_ENDPOINT to a mirror within reach; "
            "or copy the hub cache of a machine that has loaded it, and set HF_HOME to the copy"
        )
    modules = [constants] + ([need("language", "datasets.config")] if kind == "dataset" else [])
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = bool(cached)
        yield cached
    except OSError as error:  # the hub's own errors are such, a cache that lacks a file among them
        where = f"the cached copy in {snapshot}" if cached else constants.ENDPOINT
        raise ConnectionError(f"{kind} {repository} could not be loaded from {where}: {error}") from error
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _complete(paths: list[Path]) -> bool:
    """Whether there are files, and all of them if they are numbered (``-00000-of-00004``)."""
    count = re.search(r"-of-(\d+)", paths[0].name) if paths else None
    return len(paths) >= (int(count[1]) if count else 1)


def _reachable(address: str) -> bool:
    """Whether anything answers at the address within a second, through the proxies that are set."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=1.0).close()
            answers.append(True)
        except urllib.error.HTTPError as error:  # a refusal is an answer, but not one of a proxy or a gateway
            answers.append(error.code != 407 and error.code < 500)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent keeps no one waiting
    thread.start()
    thread.join(1.0)
    return answers == [True]
