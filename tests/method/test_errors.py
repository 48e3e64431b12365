"""What cannot be decomposed: refused before the first step, with a message that names the value and the remedy."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp import decomposition
from tests.cases import Model

ANY: Any = ed  # whose arguments' types nobody checks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(12, 3)


def network(*more: nn.Module) -> nn.Sequential:
    """Three numbers to two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *more, nn.Linear(4, 2)).eval()


def returning(function: Callable[[Tensor], Any]) -> Model:
    return Model(lambda m, x: function(m.net(x)), net=network())


def with_value(value: float) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[0].weight[1, 2] = value  # type: ignore[index, union-attr]
    return model


def spoiled(value: float, *places: int) -> Tensor:
    x = X.clone()
    x[list(places), 1] = value
    return x


class Never:
    """Stands where the fit does, and must not be reached."""

    def __call__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the fit began")


def refused(words: str, model: Any = None, inputs: Any = X, **options: Any) -> None:
    with pytest.raises(ValueError, match=words):
        ed.decompose(network() if model is None else model, inputs, **{"steps": 3, "progress": False, **options})


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "fit", Never())


# ---------------------------------------------------------------------------------------------------------------------
# Parameters

PARAMETERS: list[tuple[Any, str]] = [
    (["conv*"], r"'conv\*' matches none of .*: 0.weight, 0.bias, 1.weight, 1.bias"),
    (["0.*", "typo"], "'typo' matches none"),
    ([], "no parameter is chosen"),
    ([""], "'' matches none"),
    (3, r"parameters=3 must be a list of glob patterns"),
]


@pytest.mark.parametrize("parameters, words", PARAMETERS)
def test_patterns_must_match(parameters: Any, words: str, no_fit: None) -> None:
    refused(words, parameters=parameters)


def test_a_long_list_of_names_is_shortened(no_fit: None) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(15)]).eval()
    refused(r"matches none of .*0\.weight, .*… \(30 in all\)", model, parameters=["q"])


@pytest.mark.parametrize(
    "model, words",
    [
        (with_value(math.nan), r"'0\.weight' holds NaN or infinity"),
        (with_value(-math.inf), r"'0\.weight' holds NaN or infinity"),
        (nn.Sequential(nn.LazyLinear(2)), r"'0\.weight' is not initialised"),
        (Model(lambda m, x: x * m.w, w=torch.ones(3, dtype=torch.complex64)), "complex64; only real parameters"),
        (Model(lambda m, x: x + m.w.sum(), w=torch.ones(0)), "'w' is empty"),
        (nn.Linear(3, 2).half(), r"'weight' has dtype torch\.float16, too coarse .* call model\.float\(\)"),
        (nn.Linear(3, 2).bfloat16(), r"torch\.bfloat16, too coarse"),
        (nn.ReLU(), "none of the model's parameters"),
        (lambda x: x, r"model is a function; give a torch\.nn\.Module"),
    ],
)
def test_parameters_must_be_finite_real_numbers(model: Any, words: str, no_fit: None) -> None:
    refused(words, model)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda y: y.argmax(-1), "dtype torch.int64, as class labels have; decompose the real-valued outputs"),
        (lambda y: y > 0, "dtype torch.bool"),
        (lambda y: y.to(torch.complex64), "dtype torch.complex64"),
        (lambda y: y.square().mean(), "one row an example, not a loss"),
        (lambda y: (y, y), "returns a tuple; wrap it"),
        (lambda y: None, "returns a NoneType; wrap it"),
        (lambda y: y[:1], "1 outputs for 3 examples"),
        (lambda y: y.T, "2 outputs for 3 examples; the first axis"),
        (lambda y: y.log(), "output is not finite, first for example"),
        (lambda y: y / 0, "output is not finite, first for example 0"),
        (torch.Tensor.detach, "does not depend on the chosen parameters"),
    ],
)
def test_outputs_must_be_rows_of_real_numbers(function: Callable[[Tensor], Any], words: str, no_fit: None) -> None:
    refused(words, returning(function))


def test_a_later_output_that_is_not_finite_is_counted(no_fit: None) -> None:
    x = X.abs() + 1
    x[7, 0] = -1.0
    refused("not finite, first for example 7", Model(lambda m, x: x.sqrt() @ m.w, w=normal(3, 2)), x)


@pytest.mark.parametrize("gradient", ["infinite", "nan"])
@pytest.mark.parametrize("example", [0, 9])
def test_gradients_must_be_finite(gradient: str, example: int, no_fit: None) -> None:
    """Outputs are fine; the slope of a root at zero is not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = (x @ m.w).square()
        return y.sqrt() if gradient == "nan" else (x.abs() @ m.v).abs().sqrt()

    x = X.abs() + 0.1
    x[example] = 0
    refused("gradient.*(NaN|infinite|finite)", Model(forward, w=normal(3, 2).abs(), v=normal(3, 2).abs() + 0.1), x)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 200])
def test_gradients_must_not_all_be_zero(steps: int, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if live:
        monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    model = Model(lambda m, x: torch.relu(x @ m.w - 100), w=normal(3, 2))
    refused("all gradients are zero.*depend on the chosen parameters", model, steps=steps)
    refused("all gradients are zero.*differ from the reference", inputs=X[:1], reference=ed.Mean(), steps=steps)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@pytest.mark.parametrize(
    "inputs, words",
    [
        (spoiled(math.nan, 4, 7), r"inputs\[0\] holds NaN or infinity, first in example 4 \(2 of 12\)"),
        (spoiled(math.inf, 11), r"first in example 11 \(1 of 12\); remove or mend"),
        ((X, spoiled(-math.inf, 0)[:, 1]), r"inputs\[1\] holds NaN or infinity, first in example 0"),
        (X[:0], "zero examples; give at least one"),
        ((), "empty tuple"),
        ((X, X[:5]), r"\[5, 12\] examples; the first axes must agree"),
        (torch.tensor(1.0), "is a single number"),
        ([[1.0, 2.0, 3.0]], r"inputs\[0\] is a list; give a tensor"),
        (None, "inputs is a NoneType"),
        (X[:1], "draws another sample.* two or more"),
        (X[:, :2], "does not run on these inputs"),
        (X.long(), "does not run on these inputs"),
        ((X, X), "does not run on these inputs"),
    ],
)
def test_inputs_must_be_finite_examples_that_the_model_takes(inputs: Any, words: str, no_fit: None) -> None:
    refused(words, None, inputs)


READERS: dict[str, Callable[[ed.Decomposition, Any], Any]] = {
    "encode": ed.Decomposition.encode,
    "activation": ed.Decomposition.activation,
    "impact": ed.Decomposition.impact,
    "reconstruction_error": ed.Decomposition.reconstruction_error,
    "interactions": ed.interactions,
}


@pytest.fixture(scope="module")
def fitted() -> ed.Decomposition:
    return ed.decompose(returning(torch.exp), X, steps=3, progress=False)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(
    "inputs, words",
    [
        (spoiled(math.nan, 4), "NaN or infinity, first in example 4"),
        (X[:0], "zero examples"),
        (None, "inputs is a NoneType"),
        (X[:, :2], "does not run on these inputs"),
        (X * 1e4, "output is not finite"),
    ],
)
def test_readers_refuse_what_the_fit_refuses(
    read: Callable[[ed.Decomposition, Any], Any], inputs: Any, words: str, fitted: ed.Decomposition
) -> None:
    with pytest.raises(ValueError, match=words):
        read(fitted, inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Models whose outputs depend on chance, on the batch, or on what happened before


def training(module: nn.Module) -> nn.Sequential:
    model = network(module)
    module.train()
    return model


def own_buffer(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.5).add_(x.detach().mean(0))
    return m.net(x - m.mean)


class Averaging(Model):
    """Keeps a running mean of its inputs, in evaluation too."""

    def __init__(self) -> None:
        super().__init__(own_buffer, net=network())
        self.register_buffer("mean", torch.zeros(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: training(nn.Dropout(0.1)), r"'1' \(Dropout\) is in training mode.*chance; call model.eval"),
    "alpha dropout": (lambda: training(nn.AlphaDropout(0.1)), r"\(AlphaDropout\) is in training mode"),
    "batch statistics": (lambda: training(nn.BatchNorm1d(4)), r"\(BatchNorm1d\).*the batch; call model.eval"),
    "batch statistics kept by nobody": (
        lambda: network(nn.BatchNorm1d(4, track_running_stats=False)), r"(BatchNorm1d|batch's statistics)"
    ),
    "randomised slopes": (lambda: training(nn.RReLU()), "remove randomness"),
    "dropout between layers": (
        lambda: Model(lambda m, x: m.net(x[:, None])[0], net=nn.LSTM(3, 2, 2, dropout=0.5, batch_first=True)).train(),
        "remove randomness",
    ),
    "dropout in attention": (
        lambda: Model(
            lambda m, x: m.net(*[x[:, None].expand(-1, 4, -1)] * 3)[0],
            net=nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)
        ).train(),
        "remove randomness",
    ),
    "noise": (lambda: Model(lambda m, x: m.net(x + torch.randn_like(x)), net=network()), "remove randomness"),
    "state": (Averaging, "changes its buffer 'mean' in place"),
    "examples compared": (
        lambda: Model(lambda m, x: m.net(x - x.mean(0)), net=network()), "the examples beside it"
    ),
    "inputs changed in place": (
        lambda: Model(lambda m, x: m.net(x.mul_(2)), net=network()), r"changes its input 0 in place.*clone\(\)"
    ),
    "inputs changed by a layer": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), network()), "changes its input 0 in place.*inplace=False"
    ),
    "a table that renormalises itself": (
        lambda: Model(lambda m, x: m.table((x > 0).long()).flatten(1), table=nn.Embedding(2, 3, max_norm=0.1)),
        "changes its parameter 'table.weight' in place.*renormalises",
    ),
    "precisions mixed": (
        lambda: Model(lambda m, x: m.v(m.w(x).double()), w=nn.Linear(3, 2), v=nn.Linear(2, 2).double()),
        "'w.weight' and 'v.weight' are torch.float32 on cpu and torch.float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, words", MODELS.values(), ids=MODELS.keys())
def test_models_that_differentiation_would_get_wrong_are_refused(
    make: Callable[[], nn.Module], words: str, no_fit: None
) -> None:
    model, x = make(), X.clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    refused(words, model, x)
    assert torch.equal(x, X)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_training_mode_that_changes_nothing_is_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LayerNorm(4), nn.GELU()).train()
    d = ed.decompose(model, X, steps=3, progress=False)
    assert d.encode(X).isfinite().all() and model.training


# ---------------------------------------------------------------------------------------------------------------------
# Settings

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank=0"),
    ({"rank": 4}, r"rank=4 is outside 1 to 3.*"),  # of a 4 × 3 matrix, when no other tensor can use more
    ({"rank": 1.5}, r"rank=1\.5"),
    ({"n_directions": 0}, "n_directions=0"),
    ({"n_directions": -2}, "n_directions=-2"),
    ({"steps": 0}, "steps=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 2.5}, r"batch_size=2\.5"),
    ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
    ({"learning_rate": math.nan}, "learning_rate=nan"),
    ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 0.5}, r"seed=0\.5"),
    ({"factorization": "svd"}, "factorization='svd' must be 'cp' or 'tucker'"),
    ({"tied": "yes"}, "tied='yes'"),
    ({"divergence": "kl"}, "divergence='kl' must be a Divergence"),
    ({"divergence": ed.KLDivergence}, "must be a Divergence"),
    ({"reference": "mean"}, "reference='mean' must be a Reference"),
    ({"reference": ed.Mean}, "must be a Reference"),
    ({"sparsity": 0.1}, r"sparsity=0\.1 must be a Sparsity"),
    ({"reference": ed.Uniform()}, "use KLDivergence"),
    ({"reference": ed.Constant([0.1, 0.2, 0.7])}, r"3.* and the model 2 outputs"),
    ({"reference": ed.Constant([0.5, 0.6]), "divergence": ed.KLDivergence()}, "a distribution over the 2 classes"),
    ({"reference": ed.Constant(0.0), "divergence": ed.KLDivergence()}, "a distribution over the 2 classes"),
]


@pytest.mark.parametrize("options, words", SETTINGS, ids=[str(options) for options, _ in SETTINGS])
def test_settings_must_make_sense(options: dict[str, Any], words: str, no_fit: None) -> None:
    refused(words, network(), X, **{"parameters": ["0.*"], **options})


def test_one_output_has_no_distribution(no_fit: None) -> None:
    refused("one output; use SquaredError", nn.Linear(3, 1), divergence=ed.KLDivergence())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ed.BatchTopK(0.0), r"\(0, 1\]|0\.0"),
        (lambda: ed.BatchTopK(1.5), r"1\.5"),
        (lambda: ed.BatchTopK(math.nan), "nan"),
        (lambda: ed.BatchTopK(0.1, warmup=1.5), r"warmup.*1\.5"),
        (lambda: ed.BatchTopK(0.1, auxiliary=-1.0), r"auxiliary.*-1"),
        (lambda: ed.L1(-0.1), r"-0\.1"),
        (lambda: ed.L1(math.inf), "inf"),
        (lambda: ANY.L1("a"), "'a'"),
    ],
)
def test_sparsity_must_make_sense(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_acting_and_reading_need_what_is_there(fitted: ed.Decomposition) -> None:
    steps: list[tuple[Any, str]] = [
        ({5: 0.1}, "direction=5 must be a whole number from 0 to 4"),
        ({-1: 0.1}, "direction=-1"),
        ({"a": 0.1}, "direction='a'"),
        ({0: math.nan}, "step along direction 0=nan must be a finite number"),
        ({0: math.inf}, "must be a finite number"),
    ]
    before = [p.detach().clone() for p in fitted.target.model.parameters()]
    for step, words in steps:
        with pytest.raises(ValueError, match=words), fitted.perturbed(step):
            raise AssertionError("the body ran")
    assert all(torch.equal(p, q) for p, q in zip(fitted.target.model.parameters(), before, strict=True))
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"references={count}"):
            fitted.impact(X, references=count)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the sizes and types are


@settings(max_examples=60)
@given(
    data=st.data(),
    examples=st.integers(1, 5),
    axes=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(1, 4),
    outputs=st.integers(1, 3),
    model_type=st.sampled_from([torch.float32, torch.float64, torch.float32, torch.bfloat16]),
    input_type=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)
def test_any_sizes_and_types_end_in_a_refusal_or_a_finite_result(
    data: st.DataObject, examples: int, axes: list[int], width: int, outputs: int, model_type: torch.dtype,
    input_type: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 99)))
    cast = data.draw(st.sampled_from([True, True, True, False]))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.net(x.to(model_type) if cast else x)

    net = nn.Sequential(nn.Linear(width, 3), nn.GELU(), nn.Linear(3, outputs))
    model = Model(forward, net=net.to(model_type))
    x = (torch.randn(examples, *axes, width) * 2).to(input_type)
    options: dict[str, Any] = {
        "divergence": data.draw(st.sampled_from([ed.SquaredError(), ed.KLDivergence(), ed.OutputSum()])),
        "reference": data.draw(st.sampled_from([ed.OtherSample(), ed.Mean(), ed.ModelSample(), ed.Constant(0.5)])),
        "factorization": data.draw(st.sampled_from(["cp", "tucker"])),
        "rank": data.draw(st.sampled_from([1, 1, 2, 3])),
        "n_directions": data.draw(st.integers(1, 4)),
        "tied": data.draw(st.booleans()),
        "sparsity": data.draw(st.sampled_from([ed.BatchTopK(0.5), ed.L1(0.1)])),
        "batch_size": data.draw(st.integers(1, 9)),
    }
    try:
        d = ed.decompose(model, x, steps=2, progress=False, **options)
    except ValueError as error:
        assert str(error)
        return
    samples = examples * math.prod(axes)
    for values in (d.encode(x), d.activation(x), d.impact(x, references=2)):
        assert values.shape == (samples, options["n_directions"])
        assert values.isfinite().all()
    assert all(u.isfinite().all() for u in d.directions().values())
    assert all(math.isfinite(value) for value in d.history.loss)
