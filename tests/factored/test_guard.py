"""Models whose later batches differ from the first examples: right by ordinary autograd, or refused in words.

The right value is autograd on the model itself, one example at a time.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.factored import guard
from eigendecomp.factored.source import CapturedSource
from eigendecomp.reference import Draws
from eigendecomp.support.examples import feed
from eigendecomp.support.random import generator
from eigendecomp.target import Target

QUICK: dict[str, Any] = {"n_directions": 3, "steps": 5, "batch_size": 16, "progress": False}
REMEDIES = ("independent examples", "attribute, self.weight", "depends on", "in place", "call model.eval()")


class Of(nn.Module):
    """A module of a function and its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def one_by_one(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str]) -> Tensor:
    """Gradients of ‖f‖², flattened over the named parameters, one example at a time."""
    rows = []
    own = dict(model.named_parameters())
    for i in range(len(inputs[0])):
        f = model(*(tensor[i : i + 1] for tensor in inputs))
        chosen = [own[name] for name in names]
        found = torch.autograd.grad(f.square().sum(), chosen, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def is_exact(model: nn.Module, *inputs: Tensor, **options: Any) -> bool:
    """Whether coefficients are inner products with autograd's gradients."""
    first, *others = inputs
    given = (first, *others) if others else first
    d = ed.decompose(model.eval(), given, reference=ed.Constant(0.0), tied=True, **(QUICK | options))
    u = torch.cat([value.flatten(1) for value in d.directions().values()], 1)
    truth = one_by_one(model, inputs, list(d.directions())) @ u.T
    return bool((d.encode(given) - truth).norm() <= 1e-3 * truth.norm())


def sorted_batch() -> bool:
    lengths = torch.randint(1, 9, (64,))
    lengths[:3] = 8

    def f(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        return (x[order] @ m.w.T)[order.argsort()]

    return is_exact(Of(f, w=parameter(3, 5)), torch.randn(64, 5), lengths)


def ragged_batch() -> bool:
    tokens = torch.randint(1, 20, (6, 7))
    for row, length in zip(tokens, [7, 7, 7, 5, 4, 6], strict=True):
        row[length:] = 0

    def f(m: Any, tokens: Tensor) -> Tensor:
        h, keep = m.e(tokens), tokens > 0
        out = h.new_zeros(*tokens.shape, 3)
        out[keep] = m.a(h[keep])
        return out.sum(1)

    return is_exact(Of(f, e=nn.Embedding(20, 8), a=nn.Linear(8, 3, bias=False)), tokens, parameters=["a.weight"])


def packed_sequences() -> bool:
    lengths = torch.randint(1, 8, (40,))
    lengths[:3] = 7

    def f(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.o(m.g(packed)[1][-1])

    model = Of(f, g=nn.GRU(4, 6, batch_first=True), o=nn.Linear(6, 2))
    return is_exact(model, torch.randn(40, 7, 4), lengths, parameters=["g.weight_ih_l0"])


def negative_rows() -> bool:
    return is_exact(Of(lambda m, i: m.w[i - 5], w=parameter(7, 3)), torch.randint(0, 5, (40,)))


def zeros_first_in_place_scale() -> bool:
    x = torch.randn(50, 5)
    x[0] = 0
    model = Of(lambda m, x: m.l(x).mul_(m.gamma), l=nn.Linear(5, 6, bias=False), gamma=parameter(6))
    return is_exact(model, x)


def rare_expert() -> bool:
    kind = torch.randint(0, 3, (60,))
    kind[:3] = torch.tensor([0, 1, 0])

    def f(m: Any, x: Tensor, kind: Tensor) -> Tensor:
        h, out = x * (1 + m.all), torch.zeros_like(x)
        for j, w in enumerate(m.own):
            if (kind == j).any():
                out[kind == j] = h[kind == j] * (1 + w)
        return out

    model = Of(f, all=parameter(5), own=nn.ParameterList(torch.randn(5) for _ in range(3)))
    return is_exact(model, torch.randn(60, 5), kind)


def merged_lora() -> bool:
    def f(m: Any, x: Tensor, kind: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for j in range(3):
            if (kind == j).any():
                out[kind == j] = x[kind == j] @ (m.w + m.a[j] @ m.b[j])
        return out

    kind = torch.randint(0, 3, (60,))
    kind[:3] = torch.tensor([0, 1, 0])
    a, b = (nn.ParameterList(torch.randn(*shape) for _ in range(3)) for shape in ((5, 2), (2, 4)))
    return is_exact(Of(f, w=parameter(5, 4), a=a, b=b), torch.randn(60, 5), kind)


def two_parameters_over_one_memory() -> bool:
    a = parameter(5, 4)
    model = Of(lambda m, x: torch.tanh(x @ m.a) @ m.b.T, a=a, b=nn.Parameter(a.data))
    x = torch.randn(40, 5)
    x[0] = 0
    return is_exact(model, x, parameters=["a"])


def hidden_reference() -> bool:
    e = nn.Linear(8, 4, bias=False)
    model = Of(lambda m, x: torch.tanh(m.e(x)) @ m.reference[0], e=e, reference=[e.weight])
    x = torch.randn(40, 8)
    x[0] = 0
    return is_exact(model, x)


def routed_by_nonzero() -> bool:
    def f(m: Any, x: Tensor, kind: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for j, expert in enumerate(m.experts):
            i = (kind == j).nonzero()[:, 0]
            out.index_add_(0, i, expert(x[i]))
        return out

    model = Of(f, experts=nn.ModuleList(nn.Linear(5, 4) for _ in range(3)))
    return is_exact(model, torch.randn(60, 5), torch.randint(0, 3, (60,)))


def prelu() -> bool:
    return is_exact(nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 2)), torch.randn(40, 5))


def cdist() -> bool:
    return is_exact(Of(lambda m, x: torch.cdist(x, m.w), w=parameter(4, 5)), torch.randn(40, 5))


def table_before_tokens() -> bool:
    parts = {"g": nn.Embedding(4, 8), "e": nn.Embedding(20, 8), "o": nn.Linear(8, 3)}
    model = Of(lambda m, i: m.o(torch.tanh(m.g(torch.arange(4)).exp() * m.e(i)).mean(1)), **parts)
    return is_exact(model, torch.randint(20, (40, 4)))


def capacity() -> bool:
    """An expert that takes four examples of a batch and no more."""

    def f(m: Any, x: Tensor) -> Tensor:
        chosen = (x[:, :1] > 0) & ((x[:, :1] > 0).cumsum(0) <= 4)
        return m.l(x) * chosen + x[:, :3]

    return is_exact(Of(f, l=nn.Linear(5, 3)), torch.randn(60, 5))


def quantiser() -> bool:
    x = torch.randn(40, 8).clamp(-2, 2)
    x[30] *= 4
    return is_exact(Of(lambda m, x: m.l(x / x.abs().max().clamp_min(3.0)), l=nn.Linear(8, 2)), x)


RIGHT = (
    sorted_batch, ragged_batch, packed_sequences, negative_rows, zeros_first_in_place_scale, rare_expert, merged_lora,
    two_parameters_over_one_memory, routed_by_nonzero, prelu, cdist, table_before_tokens,
)  # fmt: skip


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_autograds(case: Callable[[], bool], seed: int) -> None:
    torch.manual_seed(seed)
    assert case()


@pytest.mark.parametrize(
    "case, words",
    [(hidden_reference, "plain Python reference"), (capacity, "examples beside it"), (quantiser, "examples beside it")],
)
def test_what_has_no_per_sample_gradient_is_refused(case: Callable[[], bool], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=words):
        case()


def test_a_fit_starts_again_when_earlier_gradients_were_wrong(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameter is used in another way from some example on, which only a later batch holds."""
    torch.manual_seed(0)
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    x = torch.randn(400, 5)
    x[:, 0] = 1.0
    fourth = feed((x,), generator(0, "data")).take(64)[0][-1]  # the last example of the fourth batch
    x[(x == fourth).all(1), 0] = -1.0  # turns its batch around

    def f(m: Any, x: Tensor) -> Tensor:
        turned = bool((x[:, 0] < 0).any())
        y = (x.flip(0) if turned else x) @ m.w.T
        return y.flip(0) if turned else y

    model, path = Of(f, w=parameter(3, 5)), tmp_path / "fit.safetensors"
    chosen: dict[str, Any] = {"n_directions": 4, "steps": 80, "batch_size": 16, "progress": False}
    with caplog.at_level(logging.WARNING):
        d = ed.decompose(model, x, checkpoint=path, checkpoint_seconds=0, **chosen)
    assert "starts again" in caplog.text and "w (its factored gradient" in caplog.text
    assert (tmp_path / "fit.safetensors.before").exists()
    plain = ed.decompose(Of(lambda m, x: x @ m.w.T, w=model.w), x, **chosen)
    torch.testing.assert_close(d.encode(x), plain.encode(x), rtol=1e-3, atol=1e-4)


# ---- networks drawn at random


ACTIVATIONS = (torch.tanh, torch.relu, nn.functional.gelu, torch.sin)


def layer(kind: str, width: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """One layer from (examples, positions, width) to the same, with its parameters."""

    def square() -> nn.Parameter:
        return nn.Parameter(torch.randn(width, width) / width**0.5)

    def routed(m: Any, x: Tensor, z: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for j, w in enumerate(m["ws"]):
            own = z % 3 == j
            if own.any():
                out[own] = x[own] @ w
        return out

    def ragged(m: Any, x: Tensor, z: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < (z % x.shape[1] + 1)[:, None]
        out = torch.zeros_like(x)
        out[keep] = x[keep] @ m["w"]
        return out

    def by_length(m: Any, x: Tensor, z: Tensor) -> Tensor:
        order = z.argsort(stable=True)
        return (x[order] @ m["w"])[order.argsort()]

    def in_steps(m: Any, x: Tensor, z: Tensor) -> Tensor:
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] + h @ m["w"])
            states.append(h)
        return torch.stack(states, 1)

    def in_place(m: Any, x: Tensor, z: Tensor) -> Tensor:
        return (x @ m["w"]).mul_(m["g"])

    kinds: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "linear": (lambda m, x, z: x @ m["w"], {"w": square()}),
        "transposed": (lambda m, x, z: (m["w"] @ x.mT).mT, {"w": square()}),
        "sliced": (lambda m, x, z: torch.cat([x @ m["w"][:, :2], x @ m["w"][:, 2:]], -1), {"w": square()}),
        "tied twice": (lambda m, x, z: torch.tanh(x @ m["w"]) @ m["w"].T, {"w": square()}),
        "scale": (lambda m, x, z: x * (1 + m["g"]), {"g": parameter(width)}),
        "in place": (in_place, {"w": square(), "g": parameter(width)}),
        "positions": (lambda m, x, z: x + m["w"][: x.shape[1]], {"w": parameter(8, width)}),
        "mixing": (lambda m, x, z: x.softmax(1) * (x @ m["w"]).cumsum(1), {"w": square()}),
        "attention": (lambda m, x, z: ((x @ m["w"]) @ x.mT).softmax(-1) @ x, {"w": square()}),
        "routed": (routed, {"ws": [square() for _ in range(3)]}),
        "ragged": (ragged, {"w": square()}),
        "sorted": (by_length, {"w": square()}),
        "recurrent": (in_steps, {"w": square()}),
        "looked up": (lambda m, x, z: x + m["w"][z % 5 - 5].unsqueeze(1), {"w": parameter(5, width)}),
        "normed": (lambda m, x, z: nn.functional.layer_norm(x, (width,), m["g"], m["b"]),
                   {"g": parameter(width), "b": parameter(width)}),
        "by hand": (lambda m, x, z: torch.einsum("epi,io->epo", x, m["w"].exp()), {"w": square()}),
        "convolved": (lambda m, x, z: nn.functional.conv1d(x.mT, m["w"], m["b"], padding=1).mT,
                      {"w": parameter(width, width, 3), "b": parameter(width)}),
        "padded": (lambda m, x, z: x * nn.functional.embedding(z % 5, m["w"], padding_idx=2)[:, None],
                   {"w": parameter(5, width)}),
        "by head": (lambda m, x, z: torch.einsum("epi,hio->epo", x, m["w"]), {"w": parameter(2, width, width)}),
    }  # fmt: skip
    return kinds[kind]


KINDS = (
    "linear", "transposed", "sliced", "tied twice", "scale", "in place", "positions", "mixing", "attention", "routed",
    "ragged", "sorted", "recurrent", "looked up", "normed", "by hand", "convolved", "padded", "by head",
)  # fmt: skip
CONTENTS = ("plain", "zeros first", "equal", "sorted", "rare last", "one")


class Drawn(nn.Module):
    """Layers one after the other, with or without residual wiring, read out at every position or at the mean."""

    def __init__(self, kinds: list[str], residual: bool, pooled: bool, activation: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.residual, self.pooled, self.activation = residual, pooled, ACTIVATIONS[activation]
        self.functions, self.parts = [], []
        for i, kind in enumerate(kinds):
            function, parts = layer(kind, 4)
            self.functions.append(function)
            names = {}
            for name, value in parts.items():
                values = value if isinstance(value, list) else [value]
                for j, one in enumerate(values):
                    self.register_parameter(f"l{i}_{name}{j}", one)
                names[name] = [f"l{i}_{name}{j}" for j in range(len(values))]
            self.parts.append((names, {name: isinstance(value, list) for name, value in parts.items()}))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for function, (names, several) in zip(self.functions, self.parts, strict=True):
            own = {name: [getattr(self, each) for each in these] for name, these in names.items()}
            y = function({name: these if several[name] else these[0] for name, these in own.items()}, x, z)
            x = x + y if self.residual else self.activation(y)
        return x.mean(1) if self.pooled else x


def contents(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 if kind == "one" else 12, 3, 4, generator=generator, dtype=torch.float64)
    z = torch.randint(0, 15, (len(x),), generator=generator)
    if kind == "zeros first":
        x[:3] = 0
    if kind == "equal":
        x, z = x[:1].expand(12, 3, 4).clone(), z[:1].expand(12).clone()
    if kind == "sorted":
        z = z.sort().values
    if kind == "rare last":
        z = torch.cat([z[:-1] // 3 * 3, torch.tensor([14])])
    return x, z


def outcome(model: nn.Module, content: str, seed: int) -> str:
    """ "factored", "by autograd", "refused", or what was wrong with the gradients of several batches."""
    target = Target(model)
    x, z = contents(content, seed)
    draws = Draws.of(
        ed.Constant(0.0), ed.SquaredError(), torch.zeros(1, 4, dtype=x.dtype), (1, 1), 1, torch.Generator()
    )
    try:
        source = CapturedSource(target, (x[:3], z[:3]))
        for some in (slice(None), slice(0, 1), slice(5, 12), slice(None)):
            if not len(x[some]):
                continue
            positions = target.outputs((x[some], z[some])).shape[1]
            asked = draws.again((len(x[some]), positions), 1, torch.Generator())
            try:
                found = source((x[some], z[some]), asked).flat()
            except guard.Mistaken:
                found = source((x[some], z[some]), asked).flat()
            truth = by_autograd(model, target.names, x[some], z[some])
            if not (found - truth).norm() <= 1e-6 * truth.norm() + 1e-12:
                return f"off by {(found - truth).norm() / truth.norm():.1e}"
    except ValueError as error:
        return "refused" if any(word in str(error) for word in REMEDIES) else f"raw: {error}"
    return "by autograd" if source.fallback else "factored"


def by_autograd(model: nn.Module, names: list[str], x: Tensor, z: Tensor) -> Tensor:
    rows, own = [], dict(model.named_parameters())
    for i in range(len(x)):
        f = model(x[i : i + 1], z[i : i + 1])
        f = f if f.ndim == 3 else f[:, None]
        for position in range(f.shape[1]):
            loss = f[0, position].square().sum()  # whose cotangent is 2f, as the divergence's is
            found = torch.autograd.grad(loss, [own[name] for name in names], retain_graph=True, allow_unused=True,
                                        materialize_grads=True)  # fmt: skip
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


NETWORKS = st.tuples(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans(), st.booleans(),
    st.integers(0, len(ACTIVATIONS) - 1), st.sampled_from(CONTENTS), st.integers(0, 1000),
)  # fmt: skip


def test_no_drawn_network_is_wrong_in_silence() -> None:
    """300 networks, or as many as ``EIGENDECOMP_FUZZ`` says; ``pytest -s`` prints how many ended in which way."""
    counts: Counter[str] = Counter()

    @settings(
        max_examples=int(os.environ.get("EIGENDECOMP_FUZZ", "300")), deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(network=NETWORKS)
    @example(network=(["routed"], False, True, 0, "rare last", 0))
    @example(network=(["ragged", "linear"], True, False, 1, "zeros first", 1))
    def drawn(network: tuple[Any, ...]) -> None:
        *made, content, seed = network
        found = outcome(Drawn(*made, seed=seed).double().eval(), content, seed)
        counts[found] += 1
        assert found in ("factored", "by autograd", "refused")

    logging.disable(logging.WARNING)
    try:
        drawn()
    finally:
        logging.disable(logging.NOTSET)
        print(f"\n{counts.total()} networks: {dict(counts)}")
