"""Ten thousand bad calls and files at the public door: each ends in a ValueError or a right result, writing nothing."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.fit import State
from eigendecomp.support.checkpoint import Checkpoint

CALLS, FILES, CHECKPOINTS = 4000, 5000, 2000
ANY: Any = ed  # whose arguments' types nobody checks
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()


class Returns(nn.Module):
    """A model that returns what a function makes of its good output."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.function = small(), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.inner(x))


def unfinished() -> nn.Module:
    model = small()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    return model


# For every argument some values, of which a few are right.
VALUES: dict[str, list[Callable[[], Any]]] = {
    "model": [
        small, small, small, unfinished, lambda: None, lambda: (lambda x: x), nn.ReLU,
        lambda: nn.Sequential(small(), nn.Dropout(0.5)).train(),
        lambda: nn.Sequential(small(), nn.BatchNorm1d(2)).train(),
        lambda: Returns(lambda y: y.argmax(-1)), lambda: Returns(lambda y: y.sum()), lambda: Returns(lambda y: (y, y)),
        lambda: Returns(lambda y: y[:1]), lambda: Returns(lambda y: y - y.mean(0)), lambda: Returns(lambda y: y / 0),
        lambda: Returns(lambda y: y + torch.rand_like(y)), lambda: Returns(lambda y: None),
        lambda: Returns(lambda y: y[:0]),
        lambda: Returns(lambda y: y.to(torch.complex64)), lambda: Returns(torch.detach), lambda: nn.LazyLinear(2),
        lambda: Returns(lambda y: y * 0),
    ],
    "inputs": [
        lambda: X, lambda: X, lambda: X, lambda: (X,), lambda: (X, X), lambda: X[:0], lambda: X[:1], lambda: X[:, :2],
        lambda: X.long(), lambda: X.double(), lambda: X.bool(), lambda: X / 0, lambda: X * float("nan"),
        lambda: X.numpy(),
        lambda: None, lambda: "x", lambda: {}, lambda: (), lambda: 3, lambda: iter([X]), lambda: torch.tensor(1.0),
        lambda: torch.empty(2, 3, device="meta"), lambda: X[None], lambda: list(X), lambda: [[1.0, 2.0, 3.0]],
        lambda: X.to_sparse(), lambda: torch.utils.data.TensorDataset(X, X), lambda: X.half(),
    ],
    "divergence": [
        ed.SquaredError, ed.SquaredError, ed.KLDivergence, ed.OutputSum, lambda: "kl", lambda: ed.KLDivergence
    ],
    "reference": [
        ed.OtherSample, ed.OtherSample, ed.Mean, ed.Uniform, ed.ModelSample, ed.Constant,
        lambda: ed.Constant([0.5, 0.5]),
        lambda: ed.Constant([1.0, 2.0, 3.0]), lambda: ed.Constant([0, 1]), lambda: ed.Constant(float("nan")),
        lambda: ANY.Constant("a"), lambda: ed.OtherSample(pool=1), lambda: 0, lambda: "mean", lambda: ed.Mean,
    ],
    "parameters": [
        lambda: ["*"], lambda: ["*"], lambda: "*", lambda: ["0.*"], lambda: ["none.*"], lambda: [], lambda: [""],
        lambda: None,
        lambda: [None], lambda: [3], lambda: 3, lambda: ["*", "nothing"], lambda: ["[", "*"],
    ],
    "n_directions": [lambda: 3, lambda: 3, lambda: 0, lambda: -1, lambda: 2.5, lambda: "3", lambda: None, lambda: True],
    "rank": [lambda: 1, lambda: 2, lambda: 99, lambda: 0, lambda: -1, lambda: 1.5, lambda: None, lambda: "1"],
    "factorization": [lambda: "cp", lambda: "tucker", lambda: "svd", lambda: None, lambda: 3],
    "tied": [lambda: True, lambda: False, lambda: "yes", lambda: None],
    "sparsity": [
        lambda: ed.BatchTopK(0.5), lambda: ed.BatchTopK(1.0), lambda: ed.L1(0.1), lambda: ed.BatchTopK(0.0),
        lambda: ed.BatchTopK(2.0), lambda: ed.BatchTopK(float("nan")), lambda: ed.L1(-1.0), lambda: ed.L1(float("inf")),
        lambda: 0.1, lambda: ed.BatchTopK, lambda: ANY.BatchTopK("a"), lambda: ANY.L1(None), lambda: None,
    ],
    "steps": [lambda: 2, lambda: 1, lambda: 0, lambda: -3, lambda: 1.5, lambda: "2", lambda: None],
    "batch_size": [lambda: 8, lambda: 100, lambda: 0, lambda: -8, lambda: 2.5, lambda: None, lambda: "8"],
    "learning_rate": [lambda: 0.01, lambda: 0.0, lambda: -1.0, lambda: float("nan"), lambda: float("inf"), lambda: "a"],
    "seed": [lambda: 0, lambda: 5, lambda: -1, lambda: 1 << 40, lambda: 0.5, lambda: None, lambda: "0"],
    "checkpoint": [lambda: None, lambda: None, lambda: "no/such/folder/fit", lambda: 3, lambda: "", lambda: "."],
    "checkpoint_seconds": [
        lambda: 30.0, lambda: 30.0, lambda: 0, lambda: -1, lambda: float("nan"), lambda: "1", lambda: None
    ],
}  # fmt: skip


def outcome(call: Callable[[], ed.Decomposition]) -> str:
    """``result`` for a finite decomposition, else the error's kind; anything but a ValueError fails the test."""
    try:
        d = call()
    except ValueError as error:
        assert str(error), "an error without a message"
        return "ValueError"
    assert all(factor.isfinite().all() for factor in d.decoder.tensors())
    return "result"


def test_bad_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three arguments at a time take values of every kind."""
    monkeypatch.chdir(tmp_path)
    chance, counts, wrong = random.Random(0), Counter(), Counter()
    for number in range(CALLS):
        arguments: dict[str, Any] = {"n_directions": 3, "steps": 2, "progress": False}
        chosen = {name: chance.choice(VALUES[name]) for name in chance.sample(list(VALUES), chance.randint(1, 3))}

        def call(
            arguments: dict[str, Any] = arguments, chosen: dict[str, Callable[[], Any]] = chosen
        ) -> ed.Decomposition:
            made = {"model": small(), "inputs": X, **arguments, **{name: value() for name, value in chosen.items()}}
            return ed.decompose(**made)

        try:
            counts[outcome(call)] += 1
        except Exception as error:
            wrong[f"{type(error).__name__}: {error} for {sorted(chosen)} (call {number})"] += 1
    assert not wrong, "\n".join(list(wrong)[:20]) + f"\n({len(wrong)} in all)"
    assert counts["ValueError"] > CALLS / 3 and counts["result"] > CALLS / 20, counts
    assert not list(tmp_path.iterdir()), "a call wrote something"
    print(dict(counts))


def mutations(whole: bytes, chance: random.Random) -> bytes:
    """The file cut short, with bits flipped, bytes put in or taken out, or hostile metadata."""
    kind = chance.randrange(5)
    place = chance.randrange(len(whole))
    if kind == 0:
        return whole[:place]
    if kind == 1:
        return whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
    if kind == 2:
        return whole[:place] + chance.randbytes(chance.randint(1, 40)) + whole[place:]
    if kind == 3:
        return whole[:place] + whole[place + chance.randint(1, 40) :]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    hostile = [None, -1, 1e308, [], {}, "x" * 1000, "__import__('os')", 1 << 70, ["a"], {"name": "__class__"}, True]
    settings = json.loads(header["__metadata__"]["eigendecomp"])
    inner = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    part = chance.choice([header, header["__metadata__"], *inner])
    part[chance.choice(list(part))] = chance.choice(hostile)
    if any(part is one for one in inner):
        header["__metadata__"]["eigendecomp"] = json.dumps(settings)
        if chance.random() < 0.5:  # with the right checksum, as somebody who means harm would
            return resigned(header, settings, whole[8 + length :])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def resigned(header: dict[str, Any], metadata: dict[str, Any], rest: bytes) -> bytes:
    from safetensors.torch import load

    from eigendecomp.support.files import checksum

    plain = {name: value for name, value in header.items() if name != "__metadata__"}
    text = json.dumps(plain).encode()
    tensors = load(len(text).to_bytes(8, "little") + text + rest)
    written = json.dumps(metadata)
    header["__metadata__"] = {"eigendecomp": written, "sha256": checksum(tensors, written)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_bad_files(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "d.safetensors"
    d = ed.decompose(model, X, n_directions=3, steps=2, progress=False)
    d.save(path)
    whole, chance, counts, wrong = path.read_bytes(), random.Random(1), Counter(), Counter()
    for number in range(FILES):
        damaged = mutations(whole, chance)
        path.write_bytes(damaged)
        try:
            counts["unchanged" if damaged == whole else outcome(lambda: ed.Decomposition.load(path, model))] += 1
        except Exception as error:
            wrong[f"{type(error).__name__}: {error} (file {number})"] += 1
        assert path.read_bytes() == damaged
    assert not wrong, "\n".join(list(wrong)[:20]) + f"\n({len(wrong)} in all)"
    assert counts["ValueError"] > FILES * 0.9, counts
    assert list(tmp_path.iterdir()) == [path]
    print(dict(counts))


def test_bad_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that is to go on from a damaged or hostile checkpoint says so, or ends where it should have ended."""
    model, path, settings = small(), tmp_path / "fit", dict[str, Any](n_directions=3, steps=4, progress=False)
    end = State.update
    with monkeypatch.context() as patch:  # it dies with two of its four steps done
        patch.setattr(Checkpoint, "due", lambda self: True)
        patch.setattr(State, "update", lambda self, *given: end(self, *given) if self.step < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ed.decompose(model, X, checkpoint=path, checkpoint_seconds=0, **settings)
    whole, chance, counts, wrong = path.read_bytes(), random.Random(2), Counter(), Counter()
    right = ed.decompose(model, X, **settings).decoder.flat()
    for number in range(CHECKPOINTS):
        damaged = mutations(whole, chance)
        path.write_bytes(damaged)

        def call() -> ed.Decomposition:
            d = ed.decompose(model, X, checkpoint=path, **settings)
            assert torch.equal(d.decoder.flat(), right), "another result"
            return d

        try:
            counts[found := outcome(call)] += 1
            assert found == "result" or path.read_bytes() == damaged, "written over"
        except Exception as error:
            wrong[f"{type(error).__name__}: {error} (file {number})"] += 1
    assert not wrong, "\n".join(list(wrong)[:20]) + f"\n({len(wrong)} in all)"
    assert counts["ValueError"] > CHECKPOINTS * 0.9, counts
    assert list(tmp_path.iterdir()) == [path]
    print(dict(counts))
