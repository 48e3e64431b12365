"""The story targets: the shipped model and stories, the hub, the sampling and the training script."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformer_lens")

import sample as sample_stories
import train as train_stories

from eigendecomp.targets.stories import model as stories

TINY: dict[str, Any] = dict(
    d_model=16, n_layers=2, n_heads=4, d_head=4, d_mlp=32, n_ctx=48, d_vocab=2048,
    act_fn="gelu_new", normalization_type="LN", use_attn_scale=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return stories.load_model()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((stories.FOLDER / "training.json").read_text())


# ------------------------------------------------------------------------------ the shipped model and corpus


def test_shipped_files_are_small_and_the_recorded_ones(record: dict[str, Any]) -> None:
    paths = [stories.FOLDER / name for name in stories.FILES]
    assert {path.name: stories.sha256(path) for path in paths} == record["sha256"]
    sizes = [path.stat().st_size for path in stories.FOLDER.iterdir()]
    assert max(sizes) < 4_000_000 and sum(sizes) < 8_000_000


def test_splits_are_apart() -> None:
    splits = [stories.load_stories(split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [4_000, 2_000, 2_000]
    assert len(set().union(*splits)) == 8_000
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        stories.load_stories("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", " ", 'Lily said, "I don\'t know!"\nThe end.', "  two  spaces ,and\ttab\n\n", "naïve 龍 🙂 \x00"],
)
def test_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = stories.load_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert stories.END_ID not in ids


def test_common_words_are_one_token() -> None:
    tokenizer = stories.load_tokenizer()
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = Counter(word for story in stories.load_stories("train")[:2_000] for word, _ in split(story))
    common = [word for word, _ in words.most_common(500)]
    assert " little" in [word.replace("Ġ", " ") for word in common]
    assert not set(common) - set(tokenizer.get_vocab())


def test_model_beats_the_trigram_model(model: Any, record: dict[str, Any]) -> None:
    tokenizer = stories.load_tokenizer()
    total, count = 0.0, 0
    for story in stories.load_stories("test")[:60]:
        ids = torch.tensor([[0, *tokenizer.encode(story), 0]])[:, : model.cfg.n_ctx + 1]
        with torch.no_grad():
            total += float(F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    ours, trigram = (record["evaluation"]["test"][name]["nats_per_token"] for name in ("model", "trigram"))
    assert total / count < trigram - 0.2
    assert total / count == pytest.approx(ours, abs=0.1)  # sixty stories of two thousand


def test_model_is_ready_for_decomposition(model: Any) -> None:
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.blocks[4].attn.W_K.shape == (16, 64, 4)
    tokens = model.to_tokens("Once upon a time")
    assert tokens[0, 0] == stories.END_ID and model.to_string(tokens[0, 1:]) == "Once upon a time"
    assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == ","


def test_per_sample_gradients_agree_with_a_loop(model: Any) -> None:
    windows = stories.token_windows(stories.load_stories("test")[:20], 3, 8)
    name = "blocks.4.attn.W_K"
    weights = {name: dict(model.named_parameters())[name].detach()}

    def loss(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (tokens[None],))[0, -1].logsumexp(-1)

    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, windows)[name]
    looped = torch.stack([torch.func.grad(loss)(weights, row)[name] for row in windows])
    assert batched.abs().max() > 1e-3
    torch.testing.assert_close(batched, looped, rtol=1e-3, atol=1e-6)


def test_local_attention_would_change_nothing(model: Any) -> None:
    config = dict(train_stories.SHAPE, use_local_attn=True, window_size=256, attn_types=["global", "local"] * 4)
    neo = stories.build_model(config)
    neo.load_state_dict(dict(model.named_parameters()), strict=False)
    tokens = torch.randint(2048, (1, 256), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(neo(tokens), model(tokens))


def test_a_missing_or_changed_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing.*train.py"):
        stories.load_model(tmp_path)
    for name in ("training.json", "tokenizer.json"):
        shutil.copy(stories.FOLDER / name, tmp_path)
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json has sha256.*git checkout"):
        stories.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------- windows of tokens


def test_windows_lie_within_stories_and_are_determined() -> None:
    texts, tokenizer = stories.load_stories("validation")[:50], stories.load_tokenizer()
    windows = stories.token_windows(texts, 120, 24, seed=3)
    assert windows.shape == (120, 24) and windows.dtype == torch.int64
    assert torch.equal(windows, stories.token_windows(texts, 120, 24, seed=3))
    assert not torch.equal(windows, stories.token_windows(texts, 120, 24, seed=4))
    begins = windows[:, 0] == stories.END_ID
    assert 12 <= begins.sum() <= 50 and not (windows[:, 1:] == stories.END_ID).any()
    for row, begin in zip(windows.tolist(), begins.tolist(), strict=True):
        piece = str(tokenizer.decode(row[1:] if begin else row))
        assert any(text.startswith(piece) if begin else piece in text for text in texts)
    assert (stories.token_windows(texts, 9, 24, at_start=1)[:, 0] == stories.END_ID).all()


def test_windows_use_every_story_before_any_again() -> None:
    texts = [f"Tom saw {animal}s and ran home." for animal in ("cat", "dog", "bird", "frog")]
    first = stories.token_windows(texts, 4, 6, at_start=1)
    assert len({tuple(row) for row in first.tolist()}) == 4
    whole = stories.load_tokenizer().encode(texts[0])
    short = stories.token_windows(texts[:1], 5, len(whole), at_start=0)
    assert short.tolist() == [whole] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 1, 4), "no story"), ((["Hi."], 1, 40), "no story has 40"), ((["Hi."], 0, 1), "n is 0")],
)
def test_windows_refuse_what_they_cannot_give(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stories.token_windows(*arguments)


# --------------------------------------------------------------------------------------------------- the hub

STAND_IN = """
import sys, time
from eigendecomp.targets.stories import model as stories
heavy = {"transformer_lens", "transformers", "datasets", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
model = stories.load_hub_model("tiny-stories-1M")
print(model.cfg.n_ctx, tuple(model.blocks[1].attn.W_K.shape), model.to_tokens("Once").tolist(), model.training)
import torch, transformers
folder = sys.argv[1]
plain = transformers.GPTNeoForCausalLM.from_pretrained(folder).eval()
tokens = torch.arange(40)[None]
with torch.no_grad():
    print(float((model(tokens).log_softmax(-1) - plain(tokens).logits.log_softmax(-1)).abs().max()))
"""


def snapshot(home: Path, repository: str) -> Path:
    """A folder laid out as the hub's cache, for one repository."""
    revision = "0123456789" * 4
    folder = home / "hub" / repository
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    return folder / "snapshots" / revision


def test_models_come_from_the_hub_cache(tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = snapshot(tmp_path, "models--roneneldan--TinyStories-1M")
    config = GPTNeoConfig(
        vocab_size=2048, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=2048, window_size=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(folder)
    stories.load_tokenizer().save_pretrained(folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", STAND_IN, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shape, difference = done.stdout.splitlines()[-2:]
    assert shape == "512 (4, 16, 4) [[0, 385]] False"
    assert float(difference) < 1e-4


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and a hub that accepts connections and never answers: the slowest way to be out of
    reach."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.mark.parametrize(
    "load",
    [
        lambda: stories.load_hub_model("tiny-stories-8M"),
        lambda: sample_stories.fetch(None, None),
    ],
)
def test_a_missing_network_is_told_at_once(no_network: None, load: Callable[[], Any]) -> None:
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=r"(?s)not in this machine's hub cache.*load_model.*HF_HOME"):
        load()
    assert time.monotonic() - begun < 2


def test_offline_mode_is_told_without_a_probe(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        stories.load_hub_model()
    assert time.monotonic() - begun < 0.5


def test_unknown_hub_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'tiny-stories-2M'.*tiny-stories-1m"):
        stories.load_hub_model("tiny-stories-2M")


# ------------------------------------------------------------------------------------------ sampling stories


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A small random checkpoint and tokenizer in llama2.c's formats, and the arrays that were written."""
    width, hidden, layers, heads, kv_heads, vocabulary, context = 16, 24, 2, 4, 2, 600, 64
    rng, head = np.random.default_rng(0), width // heads
    shapes = dict(
        embed=(vocabulary, width), norm1=(layers, width), wq=(layers, width, width),
        wk=(layers, kv_heads * head, width), wv=(layers, kv_heads * head, width), wo=(layers, width, width),
        norm2=(layers, width), w1=(layers, hidden, width), w2=(layers, width, hidden),
        w3=(layers, hidden, width), norm=(width,), rotary=(2, context, head // 2),
    )  # fmt: skip
    arrays = {name: rng.normal(size=shape).astype("<f4") / 4 for name, shape in shapes.items()}
    arrays["embed"][1] += 0.8  # the end of a story is likely, but not at once
    header = struct.pack("<7i", width, hidden, layers, heads, kv_heads, vocabulary, context)
    (tmp_path / "model.bin").write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b" ", b"a", b"b", b"c", b" a", b"bc", b" abc"]
    pieces += [b" a rather long piece no %d" % i for i in range(vocabulary - len(pieces))]
    rows = [struct.pack("<fi", float(len(piece)), len(piece)) + piece for piece in pieces]
    (tmp_path / "tok.bin").write_bytes(struct.pack("<i", 30) + b"".join(rows))
    return tmp_path / "model.bin", tmp_path / "tok.bin", arrays


def test_llama_is_the_usual_one(llama: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path, _, arrays = llama
    config = LlamaConfig(
        vocab_size=600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    usual = LlamaForCausalLM(config).eval()
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}

    def halves(
        weight: torch.Tensor,
    ) -> torch.Tensor:  # transformers turns the two halves of a head, not pairs
        return weight.view(-1, 2, 2, 16).transpose(1, 2).reshape(weight.shape)

    weights = {"model.embed_tokens.weight": tensors["embed"], "model.norm.weight": tensors["norm"]}
    names = dict(
        norm1="input_layernorm", norm2="post_attention_layernorm", wv="self_attn.v_proj", wo="self_attn.o_proj",
        w1="mlp.gate_proj", w2="mlp.down_proj", w3="mlp.up_proj", wq="self_attn.q_proj", wk="self_attn.k_proj",
    )  # fmt: skip
    for i in range(2):
        for short, long in names.items():
            weight = tensors[short][i]
            weights[f"model.layers.{i}.{long}.weight"] = halves(weight) if short in ("wq", "wk") else weight
    assert not usual.load_state_dict(weights, strict=False).unexpected_keys
    ours = sample_stories.Llama.read(path)
    tokens = torch.randint(600, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), usual(tokens).logits, rtol=1e-4, atol=1e-5)
    cache = ours.cache(3)
    steps = [ours.logits(tokens[:, a:b], cache, a) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(steps, 1), ours.logits(tokens), rtol=1e-4, atol=1e-5)


def test_llama_pieces(llama: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    pieces = sample_stories.Pieces(llama[1])
    assert [pieces.pieces[i] for i in pieces.encode("abc abb")] == [b"<s>", b" abc", b" a", b"b", b"b"]
    assert pieces.decode(pieces.encode("abc é\ncab")) == "abc é\ncab"


def test_sampling_script(llama: tuple[Path, Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, _ = llama
    out = model.with_name("out.txt.gz")
    files = ["--model", str(model), "--tokenizer", str(tokenizer), "--any-model"]
    written = []
    for seed in ("0", "0", "1"):
        sample_stories.main([str(out), "--n", "20", "--batch", "32", "--seed", seed, *files])
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]
    texts = stories.read_stories(out)
    assert len(set(texts)) == 20 and all(250 <= len(text) <= 1_500 for text in texts)
    sample_stories.main([str(out), "--score", *files])
    assert "20 stories" in capsys.readouterr().out.splitlines()[-1]


def test_sampling_refuses_other_files(llama: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not stories260K/stories260K\.bin: its sha256 is"):
        sample_stories.fetch(llama[0], llama[1])
    cut = tmp_path / "cut.bin"
    cut.write_bytes(llama[0].read_bytes()[:-4])
    with pytest.raises(ValueError, match="by its header it must have"):
        sample_stories.Llama.read(cut)


# -------------------------------------------------------------------------------------------------- training


def test_fast_logits_are_the_models(model: Any) -> None:
    tokens = torch.randint(2048, (2, 100), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(train_stories.fast_logits(model, tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_trigram_probabilities_sum_to_one_and_prefer_what_was_seen() -> None:
    corpus = [np.array([0, 1, 2, 3, 0]), np.array([0, 1, 2, 4, 1, 2, 3, 0])]
    trigram = train_stories.Trigram(corpus, 7)
    for context in ([0, 1], [0, 1, 2], [0, 5], [0, 2, 6]):
        last = [trigram.log_probabilities(np.array([*context, word]))[-1] for word in range(7)]
        assert np.exp(last).sum() == pytest.approx(1)
    after = [trigram.log_probabilities(np.array([0, 1, 2, word]))[-1] for word in range(7)]
    assert np.argmax(after) == 3 and after[4] > after[5]


def test_training_learns_and_is_determined_by_its_seed(tmp_path: Path) -> None:
    encoded = train_stories.encode_stories(stories.load_stories("train")[:200], stories.FOLDER)
    held = [ids[:48] for ids in train_stories.encode_stories(stories.load_stories("test")[:20], stories.FOLDER)]
    files = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        run = train_stories.train(
            encoded, held, path, steps=60, lr=2e-2, tokens=256, short=16, long_every=4, seed=1, config=TINY
        )
        files.append(path.read_bytes())
        assert run["steps"] == 60 and run["history"][0]["validation"] > 7.5 > 6.8 > run["history"][-1]["validation"]
    assert files[0] == files[1]
