"""Factored gradients against the oracle, which forms every one of them, in float64 and for any model we could think of.

Each case below is a family of models; hypothesis picks a member, its inputs, cotangents and directions.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import eigendecomp as ed
from eigendecomp.batches import LiveBatches
from eigendecomp.directions import Directions, Factorization
from eigendecomp.factored import terms
from eigendecomp.factored.kept import everything
from eigendecomp.factored.source import CapturedSource
from eigendecomp.fit import fit
from eigendecomp.gradients import FunctionalSource, Gradients, Source
from eigendecomp.objective import loss_and_error
from eigendecomp.reference import Draws
from eigendecomp.settings import Settings
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.axes import largest_rank
from eigendecomp.support.examples import feed
from eigendecomp.support.models import Largest
from eigendecomp.support.random import generator
from eigendecomp.target import Target
from tests.cases import Model

EXACT = 1e-10
Examples = tuple[Tensor, ...]
Case = tuple[nn.Module, Examples]


@dataclass
class Given:
    """Cotangents that were chosen beforehand: (examples, positions, draws, outputs)."""

    c: Tensor

    def __call__(self, f: Tensor) -> Tensor:
        return self.c

    def __getitem__(self, rows: slice) -> "Given":
        return Given(self.c[rows])


class Draw:
    """What a case asks of hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), label="seed"))

    def size(self, low: int = 1, high: int = 4) -> int:
        return self.data.draw(st.integers(low, high))

    def one(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=self.generator)


def evaluated(model: nn.Module, draw: Draw) -> nn.Module:
    """In float64 and evaluation mode, every parameter and statistic random (no scale is one, no bias zero)."""
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(draw.normal(*p.shape) * (0.7 if p.ndim > 1 or "norm" in name else 0.4) + (p.ndim == 1) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(draw.normal(*buffer.shape))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + draw.normal(*buffer.shape).square())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Families of models whose gradients are factored. Each returns a model and its inputs.

SUPPORTED: dict[str, Callable[[Draw], Case]] = {}
FALLBACK: dict[str, tuple[Callable[[Draw], Case], set[str]]] = {}


def supported(case: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
    SUPPORTED[case.__name__] = case
    return case


def falls_back(*names: str) -> Callable[[Callable[[Draw], Case]], Callable[[Draw], Case]]:
    """A family in which the named parameters, and only those, are left to the oracle."""

    def register(case: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
        FALLBACK[case.__name__] = case, set(names)
        return case

    return register


@supported
def linear(d: Draw) -> Case:
    """Inputs with zero to two axes of positions."""
    e, i, o = d.size(), d.size(), d.size()
    positions = [d.size(1, 3) for _ in range(d.size(0, 2))]
    return nn.Linear(i, o, bias=d.flag()), (d.normal(e, *positions, i),)


@supported
def mlp(d: Draw) -> Case:
    e, i, h, o = d.size(), d.size(), d.size(), d.size()
    layers = [nn.Linear(i, h), d.one(nn.GELU(), nn.ReLU(), nn.Tanh()), nn.Linear(h, h, bias=False), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(h, o)), (d.normal(e, i),)


@supported
def inplace_activations(d: Draw) -> Case:
    e, i, h, o = d.size(), d.size(), d.size(), d.size()
    layers = [nn.Linear(i, h), nn.ReLU(inplace=True), nn.Linear(h, h), nn.Hardtanh(inplace=True), nn.Linear(h, o)]
    return nn.Sequential(*layers), (d.normal(e, i),)


@supported
def inplace_residual(d: Draw) -> Case:
    """The input of a layer is changed after the layer has used it."""
    e, t, h = d.size(), d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        stream = m.first(x)
        stream += m.second(torch.tanh(stream))
        return stream * 2

    return Model(forward, first=nn.Linear(h, h), second=nn.Linear(h, h)), (d.normal(e, t, h),)


@supported
def hf_conv1d(d: Draw) -> Case:
    from transformers.pytorch_utils import Conv1D

    e, t, i, h, o = d.size(), d.size(), d.size(), d.size(), d.size()
    return nn.Sequential(Conv1D(h, i), nn.GELU(), Conv1D(o, h)), (d.normal(e, t, i),)


@supported
def conv1d(d: Draw) -> Case:
    e, groups = d.size(), d.one(1, 1, 2)
    i, o, kernel, dilation = groups * d.size(1, 2), groups * d.size(1, 2), d.size(1, 3), d.size(1, 2)
    padding = d.one("same", "valid", 0, 1, 2)
    stride = 1 if padding == "same" else d.size(1, 2)
    conv = nn.Conv1d(i, o, kernel, stride, padding, dilation, groups, bias=d.flag())
    head = nn.Sequential(nn.Tanh(), nn.Flatten())
    return nn.Sequential(conv, *head), (d.normal(e, i, dilation * (kernel - 1) + d.size()),)


@supported
def conv2d(d: Draw) -> Case:
    e, groups = d.size(1, 3), d.one(1, 1, 2)
    i, o = groups * d.size(1, 2), groups * d.size(1, 2)
    kernel, dilation = (d.size(1, 3), d.size(1, 3)), (d.size(1, 2), d.size(1, 2))
    stride, padding = (d.size(1, 2), d.size(1, 2)), (d.size(0, 2), d.size(0, 2))
    conv = nn.Conv2d(i, o, kernel, stride, padding, dilation, groups, bias=d.flag())
    second = nn.Conv2d(o, 2, 1)
    size = [k * (n - 1) + d.size(1, 3) for k, n in zip(dilation, kernel, strict=True)]
    return nn.Sequential(conv, nn.ReLU(), second, nn.Flatten()), (d.normal(e, i, *size),)


@supported
def conv2d_depthwise_circular(d: Draw) -> Case:
    e, c = d.size(1, 3), d.size(2, 3)
    depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode="circular")
    layers = [depthwise, nn.SiLU(), nn.Conv2d(c, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), (d.normal(e, c, 3, 4),)


@supported
def embedding(d: Draw) -> Case:
    e, t, vocabulary, h, o = d.size(), d.size(), d.size(2, 6), d.size(), d.size()
    table = nn.Embedding(vocabulary, h, padding_idx=d.one(None, 0, 1, -1))
    pool = d.flag()

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.head(torch.tanh(m.table(x)))
        return rows.sum(1) if pool else rows

    return Model(forward, table=table, head=nn.Linear(h, o)), (d.tokens(vocabulary, e, t),)


@supported
def embedding_by_index(d: Draw) -> Case:
    e, t, vocabulary, h = d.size(), d.size(), d.size(2, 6), d.size()
    return Model(lambda m, x: m.table[x].sin(), table=d.normal(vocabulary, h)), (d.tokens(vocabulary, e, t),)


@supported
def tied_embedding(d: Draw) -> Case:
    """One table read by tokens and multiplied at the end, with a projection of its own use of it in between."""
    e, t, vocabulary, h = d.size(), d.size(), d.size(2, 6), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.table(x) @ m.mix) @ m.table.weight.T

    parts = {"table": nn.Embedding(vocabulary, h), "mix": d.normal(h, h), "norm": nn.RMSNorm(h, eps=1e-2)}
    return Model(forward, **parts), (d.tokens(vocabulary, e, t),)


@supported
def tied_modules(d: Draw) -> Case:
    e, t, vocabulary, h = d.size(), d.size(), d.size(2, 6), d.size()
    table, head = nn.Embedding(vocabulary, h), nn.Linear(h, vocabulary)
    head.weight = table.weight
    return nn.Sequential(table, nn.Tanh(), head), (d.tokens(vocabulary, e, t),)


@supported
def tied_transpose(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    parts = {"W": d.normal(i, h), "b": d.normal(i)}
    return Model(lambda m, x: torch.relu(x @ m.W @ m.W.T + m.b), **parts), (d.normal(e, i),)


@supported
def layer_norm(d: Draw) -> Case:
    e, t, h = d.size(), d.size(), d.size(2, 4)
    over = d.one((h,), (t, h))
    norm = nn.LayerNorm(over, eps=1e-2, bias=d.flag())
    return nn.Sequential(nn.Linear(h, h), norm, nn.Tanh()), (d.normal(e, t, h),)


@supported
def rms_norm(d: Draw) -> Case:
    e, t, h = d.size(), d.size(), d.size()
    return nn.Sequential(nn.Linear(h, h), nn.RMSNorm(h, eps=1e-2), nn.Tanh()), (d.normal(e, t, h),)


@supported
def written_out_norm(d: Draw) -> Case:
    """As Hugging Face's models write it: the scale may stand on either side."""
    e, t, h, left = d.size(), d.size(), d.size(), d.flag()

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt()
        return m.scale * x if left else x * m.scale

    return Model(forward, first=nn.Linear(h, h), scale=d.normal(h)), (d.normal(e, t, h),)


@supported
def group_norm(d: Draw) -> Case:
    e, groups, per = d.size(), d.size(1, 2), d.size(1, 2)
    channels, length = groups * per, d.size(2, 3)
    layers = [nn.Conv1d(2, channels, 1), nn.GroupNorm(groups, channels, eps=1e-2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers), (d.normal(e, 2, length),)


@supported
def batch_norm_1d(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    return nn.Sequential(nn.Linear(i, h), nn.BatchNorm1d(h), nn.ReLU(), nn.Linear(h, 2)), (d.normal(e, i),)


@supported
def batch_norm_2d(d: Draw) -> Case:
    e, c = d.size(1, 3), d.size(1, 3)
    layers = [nn.Conv2d(1, c, 2), nn.BatchNorm2d(c), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*layers), (d.normal(e, 1, 3, 3),)


@supported
def shifts_and_scales(d: Draw) -> Case:
    """Parameters added, subtracted and multiplied, spread over examples, positions, channels or everything."""
    e, t, h = d.size(), d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.place + torch.tanh(x * m.scale - m.centre)
        x = m.per_position[:, None] - x
        return torch.sin(x * m.temperature + m.offset) * m.late

    parts = {
        "place": d.normal(t, h), "scale": d.normal(h), "centre": d.normal(h), "per_position": d.normal(t),
        "temperature": d.normal(), "offset": d.normal(1), "late": d.normal(1, h),
    }  # fmt: skip
    return Model(forward, **parts), (d.normal(e, t, h),)


@supported
def repeated_shift(d: Draw) -> Case:
    e, h = d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x + m.b) * m.g - m.b) * m.g + m.b

    return Model(forward, b=d.normal(h), g=d.normal(h)), (d.normal(e, h),)


@supported
def attention_per_head(d: Draw) -> Case:
    """TransformerLens's layout: one matrix a head, contracted by einsum."""
    e, t, h, heads, k = d.size(), d.size(), d.size(), d.size(1, 3), d.size(1, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        q, key, v = (torch.einsum("bpd,hdk->bphk", x, w) for w in (m.q, m.k, m.v))
        pattern = (torch.einsum("bphk,bqhk->bhpq", q + m.bq, key) / 2).softmax(-1)
        z = torch.einsum("bhpq,bqhk->bphk", pattern, v)
        return torch.einsum("bphk,hkd->bpd", z, m.o)

    heads_first = {name: d.normal(heads, h, k) for name in "qkv"}
    return Model(forward, **heads_first, o=d.normal(heads, k, h), bq=d.normal(heads, k)), (d.normal(e, t, h),)


@supported
def heads_by_matmul(d: Draw) -> Case:
    """Per-head matrices broadcast over the batch, (e, 1, t, d) @ (h, d, k), and a readout summed over heads."""
    e, t, i, heads, k = d.size(), d.size(), d.size(), d.size(1, 3), d.size()
    parts = {"w": d.normal(heads, i, k), "o": d.normal(heads, k, 2)}
    return Model(lambda m, x: ((x[:, None] @ m.w).tanh() @ m.o).sum(1), **parts), (d.normal(e, t, i),)


@supported
def heads_with_bmm(d: Draw) -> Case:
    e, i, heads, k = d.size(), d.size(), d.size(1, 3), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.baddbmm(m.b, x.expand(heads, *x.shape), m.w).tanh().movedim(0, 1)

    return Model(forward, w=d.normal(heads, i, k), b=d.normal(heads, 1, k)), (d.normal(e, i),)


@supported
def weight_first(d: Draw) -> Case:
    e, i, o = d.size(), d.size(), d.size()
    return Model(lambda m, x: (m.v @ (m.w @ x.T).tanh()).T, w=d.normal(o, i), v=d.normal(2, o)), (d.normal(e, i),)


@supported
def weight_first_batched(d: Draw) -> Case:
    """W @ x for a batch of columns or of matrices."""
    e, i, o, n = d.size(), d.size(), d.size(), d.size(1, 3)
    return Model(lambda m, x: (m.w @ x).tanh().flatten(1), w=d.normal(o, i)), (d.normal(e, i, n),)


@supported
def vector_weight(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    parts = {"w": d.normal(i, h), "v": d.normal(h)}
    return Model(lambda m, x: (x @ m.w).tanh() @ m.v, **parts), (d.normal(e, i),)


@supported
def vector_weight_over_positions(d: Draw) -> Case:
    e, t, i, h = d.size(), d.size(), d.size(), d.size()
    parts = {"w": d.normal(i, h), "v": d.normal(h)}
    return Model(lambda m, x: (x @ m.w).tanh() @ m.v, **parts), (d.normal(e, t, i),)


@supported
def slices_and_chunks(d: Draw) -> Case:
    """One fused weight, used in three parts and in one of its columns; a bias in halves."""
    e, t, h = d.size(), d.size(), d.size(1, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in m.qkv.chunk(3))
        y = torch.tanh(q * k + v + m.b[:h])
        return y @ m.qkv[h : 2 * h] + m.b[h:] * (x @ m.qkv[:1].T)

    return Model(forward, qkv=d.normal(3 * h, h), b=d.normal(2 * h)), (d.normal(e, t, h),)


@supported
def strided_slices(d: Draw) -> Case:
    e, h = d.size(), d.size(1, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ m.w[::2]) @ m.w[1::2].T

    return Model(forward, w=d.normal(2 * h, d.size())), (d.normal(e, h),)


@supported
def reshaped_weight(d: Draw) -> Case:
    """A weight stored as one tensor of order three or four, or transposed, and multiplied as a matrix."""
    e, a, b, c = d.size(), d.size(1, 3), d.size(1, 3), d.size(1, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w.flatten(1)  # (a, b·c)
        y = torch.tanh(y) @ m.v.permute(2, 1, 0).flatten(1).T  # (2, b·2c)
        return y.tanh() @ m.w.permute(0, 2, 1).flatten(0, 1)[:2]

    return Model(forward, w=d.normal(a, b, 2 * c), v=d.normal(2 * c, b, 2)), (d.normal(e, a),)


@supported
def copied_weight(d: Draw) -> Case:
    e, i, o = d.size(), d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return x @ m.w.T.contiguous().to(torch.float64) + (x @ m.w.clone().T).tanh()

    return Model(forward, w=d.normal(o, i)), (d.normal(e, i),)


@supported
def multihead_attention(d: Draw) -> Case:
    e, t, heads, k = d.size(1, 3), d.size(1, 3), d.size(1, 2), d.size(1, 2)
    h, batch_first = heads * k, d.flag()
    attention = nn.MultiheadAttention(h, heads, batch_first=batch_first, bias=d.flag())

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x if batch_first else x.transpose(0, 1)
        y = m.attention(y, y.tanh(), y, need_weights=False)[0]
        return y if batch_first else y.transpose(0, 1)

    return Model(forward, attention=attention), (d.normal(e, t, h),)


@supported
def transformer_layer(d: Draw) -> Case:
    e, t = d.size(1, 3), d.size(1, 3)
    layer = nn.TransformerEncoderLayer(4, 2, 3, batch_first=d.flag(), norm_first=d.flag(), layer_norm_eps=1e-2)
    if not layer.self_attn.batch_first:
        return Model(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer), (d.normal(e, t, 4),)
    return layer, (d.normal(e, t, 4),)


def recurrent(d: Draw, kind: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN], **options: Any) -> Case:
    e, t, i, h = d.size(), d.size(1, 3), d.size(1, 3), d.size(1, 3)
    batch_first = d.flag()
    net = kind(i, h, num_layers=d.size(1, 2), bidirectional=d.flag(), batch_first=batch_first, **options)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.net(x if batch_first else x.transpose(0, 1))[0]
        return m.head(y if batch_first else y.transpose(0, 1))

    return Model(forward, net=net, head=nn.Linear(h * (1 + net.bidirectional), 2)), (d.normal(e, t, i),)


@supported
def lstm(d: Draw) -> Case:
    return recurrent(d, nn.LSTM, bias=d.flag())


@supported
def gru(d: Draw) -> Case:
    return recurrent(d, nn.GRU, bias=d.flag())


@supported
def rnn(d: Draw) -> Case:
    return recurrent(d, nn.RNN, nonlinearity=d.one("tanh", "relu"))


@supported
def unrolled_cells(d: Draw) -> Case:
    e, t, i, h = d.size(), d.size(1, 3), d.size(1, 3), d.size(1, 3)
    cell = d.one(nn.LSTMCell, nn.GRUCell, nn.RNNCell)(i, h)

    def forward(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in x.unbind(1):
            state = m.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)

    return Model(forward, cell=cell), (d.normal(e, t, i),)


@supported
def shared_layer(d: Draw) -> Case:
    """One layer applied again and again, as a weight-tied network does."""
    e, t, h, times = d.size(), d.size(1, 3), d.size(), d.size(2, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(times):
            x = x + m.layer(m.norm(x)).tanh()
        return x

    return Model(forward, layer=nn.Linear(h, h), norm=nn.LayerNorm(h, eps=1e-2)), (d.normal(e, t, h),)


@supported
def two_inputs(d: Draw) -> Case:
    e, t, i, vocabulary = d.size(), d.size(1, 3), d.size(), d.size(2, 5)
    parts = {"table": nn.Embedding(vocabulary, i), "net": nn.Linear(i, 2)}
    inputs = (d.normal(e, t, i), d.tokens(vocabulary, e))
    return Model(lambda m, x, y: m.net(x * m.table(y)[:, None]), **parts), inputs


@supported
def unused_parameters(d: Draw) -> Case:
    e, i, o = d.size(), d.size(), d.size()
    parts = {"first": d.normal(2, 3), "net": nn.Linear(i, o), "never": d.normal(2), "scalar": d.normal()}
    return Model(lambda m, x: m.net(x), **parts), (d.normal(e, i),)


@supported
def constant_output(d: Draw) -> Case:
    """Some outputs depend on a bias alone, some on nothing."""
    e, i = d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([(x @ m.w)[:, 0], 0 * x[:, 0] + m.b[0], torch.ones_like(x[:, 0])], 1)

    return Model(forward, w=d.normal(i, 1), b=d.normal(1)), (d.normal(e, i),)


@supported
def time_first(d: Draw) -> Case:
    """Everything inside runs position by position, examples second, and many units are dead."""
    e, t, i, h = d.size(), d.size(1, 4), d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x.transpose(0, 1).contiguous()) - 1.5)
        return (torch.relu(m.second(y) * m.scale - 0.5) + m.place[:, None]).transpose(0, 1)

    parts = {"first": nn.Linear(i, h), "second": nn.Linear(h, 2), "scale": d.normal(2), "place": d.normal(t, 2)}
    return Model(forward, **parts), (d.normal(e, t, i),)


@supported
def channels_last(d: Draw) -> Case:
    """A ConvNeXt block: convolution, then layers over the channels at the end."""
    e, c = d.size(1, 3), d.size(1, 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x).permute(0, 2, 3, 1))
        y = m.down(F.gelu(m.up(y))) * m.gamma
        return (x + y.permute(0, 3, 1, 2)).mean((2, 3))

    parts = {
        "conv": nn.Conv2d(c, c, 3, padding=1, groups=c), "norm": nn.LayerNorm(c, eps=1e-2), "up": nn.Linear(c, 3),
        "down": nn.Linear(3, c), "gamma": d.normal(c),
    }  # fmt: skip
    return Model(forward, **parts), (d.normal(e, c, 2, 3),)


@supported
def transformer_lens(d: Draw) -> Case:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    e, t, heads = d.size(1, 3), d.size(1, 3), d.size(1, 2)
    config = HookedTransformerConfig(
        n_layers=1, d_model=3, n_ctx=3, d_head=2, n_heads=heads, d_mlp=3, d_vocab=5, act_fn="gelu", seed=0, eps=1e-2,
        normalization_type=d.one("LN", "RMS", None),
        positional_embedding_type=d.one("standard", "rotary", "shortformer"),
        use_attn_result=d.flag(), use_split_qkv_input=d.flag(), use_hook_mlp_in=d.flag(), gated_mlp=d.flag(),
        parallel_attn_mlp=d.flag(), dtype=torch.float64, device="cpu", rotary_dim=2,
    )  # fmt: skip
    return HookedTransformer(config), (d.tokens(5, e, t),)


@supported
def llama(d: Draw) -> Case:
    """Rotary positions, grouped queries, a gated MLP, an embedding that is also the readout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4, tie_word_embeddings=d.flag(), attention_bias=d.flag(),
        rms_norm_eps=1e-2, use_cache=False, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), (d.tokens(5, d.size(1, 3), d.size(1, 3)),)


@supported
def learned_positions(d: Draw) -> Case:
    """Positions looked up once for all examples."""
    e, t, h = d.size(), d.size(1, 4), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.net(torch.tanh(x + m.place(torch.arange(t))))

    return Model(forward, place=nn.Embedding(t, h), net=nn.Linear(h, 2)), (d.normal(e, t, h),)


# ---- families in which some parameters are formed by the oracle


@supported
def nonlinear_in_the_weight(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    parts = {"w": d.normal(i, h), "net": nn.Linear(h, 2)}
    return Model(lambda m, x: m.net(torch.tanh(x @ m.w.exp())), **parts), (d.normal(e, i),)


@supported
def bilinear(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    parts = {"first": nn.Linear(i, h), "pair": nn.Bilinear(h, i, 2)}
    return Model(lambda m, x: m.pair(m.first(x), x), **parts), (d.normal(e, i),)


@supported
def weight_normalised(d: Draw) -> Case:
    e, t, i, h = d.size(), d.size(1, 3), d.size(), d.size()
    return nn.Sequential(weight_norm(nn.Linear(i, h)), nn.Tanh(), nn.Linear(h, 2)), (d.normal(e, t, i),)


@supported
def weight_times_a_number(d: Draw) -> Case:
    """A weight is scaled before it is used, and an other one is used both as it is and through its square."""
    e, i, h = d.size(), d.size(), 3 * d.size(1, 2)
    parts = {"scaled": d.normal(h, i), "net": nn.Linear(h, 2)}
    return Model(lambda m, x: m.net(torch.relu(x @ (m.scaled * 0.5).T)), **parts), (d.normal(e, i),)


@supported
def one_use_of_two_unknown(d: Draw) -> Case:
    e, i = d.size(), d.size()
    parts = {"table": d.normal(i, i), "net": nn.Linear(i, 2)}
    return Model(lambda m, x: m.net(x @ m.table) * m.table.square().sum(), **parts), (d.normal(e, i),)


@falls_back("stopped")
def stopped_gradient(d: Draw) -> Case:
    """A use that the loss does not see, beside one that it does."""
    e, i, h = d.size(), d.size(), d.size()
    parts = {"net": nn.Linear(i, h), "stopped": d.normal(h, h)}

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.net(x)
        return torch.tanh(y @ m.stopped.detach()) + y.detach() @ m.stopped

    return Model(forward, **parts), (d.normal(e, i),)


@supported
def class_token(d: Draw) -> Case:
    """A parameter that becomes data: a token set before the sequence."""
    e, t, h = d.size(), d.size(1, 3), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.token.expand(len(x), -1, -1), x], 1)
        return m.net(y.softmax(1) * y).sum(1)

    return Model(forward, token=d.normal(1, 1, h), net=nn.Linear(h, 2)), (d.normal(e, t, h),)


@supported
def merged_weights(d: Draw) -> Case:
    """Weights that are made of others, which are also used as they are."""
    e, t, i, o, r = d.size(), d.size(1, 3), d.size(), d.size(), d.size(1, 2)
    parts = {"w": d.normal(i, o), "a": d.normal(i, r), "b": d.normal(r, o), "net": nn.Linear(o, 2)}

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.net(torch.tanh(x @ (m.w * (m.w > 0) + m.a @ m.b)) + (x @ m.a).sum(-1, keepdim=True))

    return Model(forward, **parts), (d.normal(e, t, i),)


@supported
def one_plus_a_scale(d: Draw) -> Case:
    e, t, h = d.size(), d.size(1, 3), d.size()
    parts = {"w": d.normal(h), "p": d.normal(4, h), "net": nn.Linear(h, h), "gate": d.normal(h)}

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.layer_norm(m.net(x) + F.normalize(m.p, dim=-1)[: x.shape[1]], (x.shape[-1],), 1 + m.w)
        return y * m.gate.sigmoid() + x * (1 - m.gate.sigmoid())

    return Model(forward, **parts), (d.normal(e, t, h),)


@supported
def unknown_operations(d: Draw) -> Case:
    """Operations that belong to no known kind, with outputs at every position or with one."""
    e, t, h = d.size(), d.size(1, 3), d.size()
    parts = {
        "slope": d.normal(h), "low": d.normal(h), "over": d.normal(h), "mask": d.normal(1, 1, h),
        "base": d.normal(t, 1), "net": nn.Linear(h, h), "power": d.normal(h).abs() + 1,
    }  # fmt: skip
    pooled, keep = d.flag(), d.normal(t) > 0

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.prelu(m.net(x).transpose(1, 2), m.slope).transpose(1, 2)
        y = torch.where(keep[:, None], y, m.mask) + torch.add(m.base.repeat(len(x), 1, 1), y, alpha=2)
        y = torch.maximum(y, m.low) / (m.over.abs() + 1) + (y.square() + 1).pow(m.power)
        return m.net(y).cumsum(1).mean(1) if pooled else m.net(y)

    return Model(forward, **parts), (d.normal(e, t, h),)


@supported
def looked_up_otherwise(d: Draw) -> Case:
    e, t, n, h = d.size(), d.size(1, 3), d.size(2, 4), d.size()
    parts = {"pairs": d.normal(n, n, h), "rows": d.normal(n, h), "queries": d.normal(1, 2, h), "v": d.normal(h, 2)}

    def forward(m: Any, i: Tensor, j: Tensor) -> Tensor:
        x = m.pairs[i, j] + m.rows.index_select(0, i.flatten()).view(*i.shape, -1)
        x = x + m.rows.gather(0, j.unsqueeze(-1).expand(-1, -1, h).flatten(0, 1)).view(*x.shape)
        return F.scaled_dot_product_attention(m.queries.expand(len(x), -1, -1), x, torch.tanh(x)) @ m.v

    return Model(forward, **parts), (d.tokens(n, e, t), d.tokens(n, e, t))


@supported
def made_without_gradient(d: Draw) -> Case:
    """A copy of a weight that the loss does not see, beside the weight."""
    e, i, h = d.size(), d.size(), d.size()

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            still = 2 * m.w
        y = m.net(x)
        return torch.tanh(y @ still) + y @ (m.w * 0.5)

    return Model(forward, w=d.normal(h, h), net=nn.Linear(i, h)), (d.normal(e, i),)


@falls_back("0.weight")
def bag_of_rows(d: Draw) -> Case:
    e, t, n, h = d.size(), d.size(1, 3), d.size(2, 4), d.size()
    table = nn.EmbeddingBag(n, h, padding_idx=d.one(None, 0))
    return nn.Sequential(table, nn.Tanh(), nn.Linear(h, 2)), (d.tokens(n, e, t),)


@falls_back("scale")
def written_in_place(d: Draw) -> Case:
    e, i, h = d.size(), d.size(), d.size()
    return Model(lambda m, x: m.net(x).mul_(m.scale.exp()), net=nn.Linear(i, h), scale=d.normal(h)), (d.normal(e, i),)


@supported
def other_convolutions(d: Draw) -> Case:
    e = d.size(1, 3)
    parts = {
        "up": nn.ConvTranspose2d(1, 2, 2), "volume": nn.Conv3d(1, 1, 2), "flat": nn.Conv1d(2, 1, 2),
    }  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.up(x)).unsqueeze(1)
        return m.flat(torch.tanh(m.volume(y)).flatten(2).expand(-1, 2, -1)).flatten(1)

    return Model(forward, **parts), (d.normal(e, 1, 2, 2),)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(found: Gradients, truth: Gradients, directions: Sequence[Directions]) -> None:
    """All that a fit asks of gradients, and the dense form; errors count relative to the size of the gradient."""
    g = truth.flat()
    size = g.norm(dim=1)
    floor = size.max() * 1e-6  # a gradient that is nothing beside the others may be off by rounding of theirs
    scale = size.clamp_min(floor)
    assert found.shapes == truth.shapes
    for d in directions:  # their rows have unit norm
        leaves = d.map(lambda factor: factor.detach().requires_grad_())
        z, expected = found.inner(leaves), g @ leaves.flat().T
        assert ((z - expected).abs() <= EXACT * scale[:, None]).all()
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
        factors = list(leaves.tensors())
        fast, slow = (torch.autograd.grad((weights * rows).sum(), factors) for rows in (z, expected))
        for a, b in zip(fast, slow, strict=True):
            assert (a - b).abs().max() <= EXACT * (b.abs().max() + scale.max())
    assert ((found.square_norms() - size.square()).abs() <= EXACT * scale.square()).all()
    assert ((found.flat() - g).norm(dim=1) <= EXACT * scale).all()


def some_directions(target: Target, rank: int, seed: int) -> list[Directions]:
    kinds: tuple[Factorization, ...] = ("cp", "tucker")
    made = []
    for kind in kinds:
        k = min(rank, max(largest_rank(shape, kind) for shape in target.shapes.values()))
        g = torch.Generator().manual_seed(seed)
        made.append(Directions.random(target.shapes, 3, k, kind, generator=g, dtype=torch.float64))
    return made


# Ways to compute with factors, each of which the count of operations may choose: (formed?, fold first?).
WAYS = {"counted": None, "side by side": (False, False), "folded": (False, True), "formed": (True, False)}


def going(way: str) -> ExitStack:
    """Inside, gradients are computed with in this way, whatever the sizes say."""
    stack = ExitStack()
    if (forced := WAYS[way]) is not None:
        formed, fold = forced
        stack.enter_context(patch.object(terms.Factored, "better_formed", lambda *_: formed))
        stack.enter_context(patch.object(terms, "rows_cost" if fold else "folding_cost", lambda *_: float("inf")))
    return stack


def agree(model: nn.Module, inputs: Examples, draw: Draw, *, loop: bool = False) -> CapturedSource:
    """The capture agrees with the oracle whatever its cost model picks, and whatever the batch and the memory."""
    target, before = Target(model), [p.detach().clone() for p in model.parameters()]
    f = target.outputs(inputs)
    e, p, k = f.shape
    c = Given(draw.normal(e, p, draw.size(1, 2), k))
    directions = some_directions(target, draw.size(1, 3), 0)
    truth = FunctionalSource(target, loop=loop)(inputs, c)
    source, small = CapturedSource(target, inputs), CapturedSource(target, inputs, budget=1)
    for way in WAYS:
        with going(way):
            compare(source(inputs, c), truth, directions)
    compare(small(inputs, c), truth, directions[:1])
    rows = truth.flat().unflatten(0, (e, -1))
    # One example at a time, and all of them in another order and twice.
    alone = torch.cat([source([x[i : i + 1] for x in inputs], c[slice(i, i + 1)]).flat() for i in range(e)])
    torch.testing.assert_close(alone, rows.flatten(0, 1), rtol=EXACT, atol=EXACT)
    order = torch.cat([torch.randperm(e, generator=draw.generator) for _ in range(2)])
    mixed = source([x[order] for x in inputs], Given(c.c[order])).flat()
    torch.testing.assert_close(mixed, rows[order].flatten(0, 1), rtol=EXACT, atol=EXACT)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    return source


def needs_loop(model: nn.Module) -> bool:
    return any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules())


@pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED.keys())
@settings(max_examples=5)
@given(data=st.data())
def test_factored_gradients_are_exact(case: Callable[[Draw], Case], data: st.DataObject) -> None:
    draw = Draw(data)
    model, inputs = case(draw)
    source = agree(evaluated(model, draw), inputs, draw, loop=needs_loop(model))
    assert source.fallback == {}


@pytest.mark.parametrize("case, names", FALLBACK.values(), ids=FALLBACK.keys())
@settings(max_examples=5)
@given(data=st.data())
def test_what_is_not_factored_is_formed(case: Callable[[Draw], Case], names: set[str], data: st.DataObject) -> None:
    draw = Draw(data)
    model, inputs = case(draw)
    source = agree(evaluated(model, draw), inputs, draw)
    assert set(source.fallback) == names


# ---------------------------------------------------------------------------------------------------------------------
# Further promises


class Recorder:
    """Cotangents of ones, one draw."""

    def __call__(self, f: Tensor) -> Tensor:
        return torch.ones_like(f).unsqueeze(2)

    def __getitem__(self, rows: slice) -> "Recorder":
        return self


def net(forward: Callable[..., Any], seed: int = 0, **shapes: Sequence[int]) -> Model:
    """A model in float64 with Gaussian parameters of these shapes."""
    g = torch.Generator().manual_seed(seed)
    return Model(
        forward, **{name: torch.randn(*s, generator=g, dtype=torch.float64) for name, s in shapes.items()}
    ).eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(source: CapturedSource, inputs: Examples) -> None:
    compare(source(inputs, Recorder()), FunctionalSource(source.target)(inputs, Recorder()), [])


def test_units_dead_for_the_first_examples_are_read_right() -> None:
    """Layouts are found on the first examples; here no gradient comes back from them, and examples lie second."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x.transpose(0, 1) @ m.w + m.b)
        return (torch.relu(y @ m.v) * m.s).transpose(0, 1)

    model = net(forward, w=(2, 4), b=(4,), v=(4, 3), s=(3,))
    dead = torch.zeros(3, 5, 2, dtype=torch.float64) + normal(3, 5, 2) * 1e-3
    with torch.no_grad():
        model.b.copy_(torch.full((4,), -1.0))  # type: ignore[operator]
    inputs = (torch.cat([dead, 3 * normal(4, 5, 2)]),)
    target = Target(model)
    assert not target.outputs(inputs)[:3].any()
    exact(CapturedSource(target, inputs), inputs)


def test_a_scaled_weight_of_dead_units_is_read_right() -> None:
    """A product of two weights alone has no samples in it, though for dead units no gradient says so."""
    model = net(lambda m, x: torch.relu(x @ (m.w * m.mask) - 5), w=(3, 3), mask=(3, 3))
    inputs = (torch.cat([torch.zeros(3, 3, dtype=torch.float64), 9 * normal(4, 3)]),)
    exact(CapturedSource(Target(model), inputs), inputs)


def test_inputs_of_another_length_are_read_right() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.table[x] + m.place[: x.shape[1]]
        scores = (y @ m.w @ y.mT).softmax(-1)
        return scores @ y @ m.out

    source = CapturedSource(
        Target(net(forward, table=(5, 3), place=(6, 3), w=(3, 3), out=(3, 2))), (torch.tensor([[0, 1, 2, 3]] * 3),)
    )
    for length in (2, 6, 1, 3, 4):
        exact(source, (torch.randint(5, (4, length), generator=torch.Generator().manual_seed(length)),))


def test_chosen_parameters_alone_are_read() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ m.first) @ m.second + m.bias

    model, inputs = net(forward, first=(3, 4), second=(4, 2), bias=(2,)), (normal(5, 3),)
    for names in (["first"], ["second", "bias"], ["b*"]):
        target = Target(model, names)
        exact(CapturedSource(target, inputs), inputs)


def test_frozen_parameters_and_no_grad_callers_are_fine() -> None:
    model, inputs = net(lambda m, x: torch.tanh(x @ m.w), w=(3, 2)), (normal(4, 3),)
    model.requires_grad_(False)
    with torch.no_grad():
        exact(CapturedSource(Target(model), inputs), inputs)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_recurrent_network_with_a_fallback() -> None:
    """The oracle itself must cope with what cannot be batched."""
    draw_seed = torch.Generator().manual_seed(0)
    lstm = nn.LSTM(2, 2, batch_first=True).double()
    scale = torch.randn(2, generator=draw_seed, dtype=torch.float64)
    model = Model(lambda m, x: (m.lstm(x)[0] + 1).mul_(m.scale.exp()), lstm=lstm, scale=scale).eval()
    inputs = (normal(4, 3, 2),)
    source = CapturedSource(Target(model), inputs)
    assert set(source.fallback) == {"scale"}
    compare(source(inputs, Recorder()), FunctionalSource(source.target, loop=True)(inputs, Recorder()), [])


def test_a_fallback_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = net(lambda m, x: (x @ m.v).mul_(m.w.exp()), w=(2,), v=(3, 2)), (normal(4, 3),)
    with caplog.at_level(logging.WARNING, logger="eigendecomp"):
        source = CapturedSource(Target(model), inputs)
        for size in (1, 2, 4):
            source([x[:size] for x in inputs], Recorder())
    assert len(caplog.records) == 1
    assert "w (aten.mul_" in caplog.text and "v (" not in caplog.text


def test_nothing_of_the_size_of_the_gradients_is_ever_made() -> None:
    """Fewer numbers in the largest array than samples × parameters, by far, for all that the objective needs."""
    model, inputs = net(lambda m, x: torch.tanh(x @ m.w) @ m.v, w=(64, 64), v=(64, 64)), (normal(32, 64),)
    target = Target(model)
    source = CapturedSource(target, inputs, terms=8)
    directions = Directions.random(target.shapes, 8, 1, dtype=torch.float64).map(lambda f: f.requires_grad_())
    with Largest() as largest:
        gradients = source(inputs, Recorder())
        loss = gradients.inner(directions).square().sum() + gradients.square_norms().sum() + directions.gram().sum()
        loss.backward()
    assert largest.elements <= target.size < 32 * target.size / 16


def test_the_fitted_loss_is_that_of_the_oracle_in_float32() -> None:
    """Step by step, for the penalty that does not jump; and for both at the directions that were found."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.table[x]
        y = y + (y @ m.w @ y.mT).softmax(-1) @ y @ m.v
        return y @ m.table.T + m.b

    model = net(forward, table=(6, 4), w=(4, 4), v=(4, 4), b=(6,)).float()
    inputs = (torch.randint(6, (24, 3), generator=torch.Generator().manual_seed(0)),)
    target = Target(model)
    sources: list[Source] = [CapturedSource(target, inputs), FunctionalSource(target)]
    pool = target.outputs(inputs).flatten(0, 1).softmax(-1)
    draws = Draws.of(ed.OtherSample(), ed.KLDivergence(), pool, (24, 3), 1, generator(0, "probe"))
    both: tuple[tuple[Sparsity, Factorization], ...] = ((ed.L1(0.05), "cp"), (ed.BatchTopK(0.2), "tucker"))
    for sparsity, factorization in both:
        choices = Settings(
            divergence=ed.KLDivergence(), reference=ed.OtherSample(), parameters=("*",), n_directions=6, rank=2,
            factorization=factorization, tied=False, sparsity=sparsity, steps=15, batch_size=30, learning_rate=1e-2,
            seed=0,
        )  # fmt: skip
        fits = []
        for source in sources:
            batches = LiveBatches(source, feed(inputs, generator(0, "data")), draws, 3)
            fits.append(fit(source.target, batches, choices, progress=False, log_every=1))
        fast, slow = (torch.tensor(found.history.loss) for found in fits)
        assert len(slow) == 15 and slow[-1] < slow[0]
        if isinstance(sparsity, ed.L1):
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)
        batches = [everything(sparsity, s(inputs, draws), fits[0].encoder, fits[0].decoder, 1.0) for s in sources]
        alive = torch.zeros(6, dtype=torch.bool)
        fast, slow = (loss_and_error(sparsity, batch, alive)[0] for batch in batches)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Models that have no per-sample gradients


def branching(m: Any, x: Tensor) -> Tensor:
    return x @ m.w if x.sum() > 0 else torch.tanh(x @ m.w) @ m.v


def stateful(m: Any, x: Tensor) -> Tensor:
    m.count = getattr(m, "count", 0) + 1
    return x @ m.w * m.count


REFUSED = {
    "batch mean": (lambda m, x: (x - x.mean(0)) @ m.w, "changes with the examples beside it"),
    "batch sum in the output": (lambda m, x: (x @ m.w) / (x @ m.w).norm(), "changes with the examples beside it"),
    "attention over the batch": (lambda m, x: (x @ x.T).softmax(-1) @ x @ m.w, "changes with the examples beside it"),
    "noise": (lambda m, x: (x + torch.randn_like(x)) @ m.w, "remove randomness"),
    "dropout by hand": (lambda m, x: F.dropout(x @ m.w, 0.5, training=True), "remove randomness"),
    "state": (stateful, "two runs of the model on the same inputs differ"),
    "branch on data": (branching, "changes with the examples beside it"),
    "no chosen parameter in the output": (lambda m, x: x, "does not depend on the chosen parameters"),
}


@pytest.mark.parametrize("forward, words", REFUSED.values(), ids=REFUSED.keys())
def test_models_without_per_sample_gradients_are_refused(forward: Callable[..., Any], words: str) -> None:
    model = net(forward, w=(4, 3), v=(3, 3))
    inputs = normal(8, 4).abs()
    inputs[3:] *= -1  # another branch than the first three examples
    with pytest.raises(ValueError, match=words):
        ed.decompose(model, inputs, steps=2, progress=False)
