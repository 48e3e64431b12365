"""The page to look at directions: its numbers against the package's own, and its behaviour in a real browser."""

import base64
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eigendecomp as ed
from eigendecomp.curvature import jacobian
from eigendecomp.directions import Directions
from eigendecomp.page import collect, known, measure
from eigendecomp.page.readout import Readout
from eigendecomp.page.samples import Images, Text
from eigendecomp.target import Target

NASTY = "<script>document.title='broken'</script>"
WORDS = ["[start]", " once", " upon", " a", " time", "<b>", NASTY, "</script>", " é\u2028", "&amp;", "\n", ' "quote"']


def page_data(path: Path) -> dict[str, Any]:
    """The JSON that a page holds."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


class Speaker(nn.Module):
    """A small language model: tokens (n, p) to logits (n, p, words)."""

    def __init__(self, words: int = len(WORDS), width: int = 8) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.W_K = nn.Parameter(torch.randn(2, width, 4) / 3)
        self.out = nn.Linear(width, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = torch.tanh(self.mix(h.cumsum(1)))
        return self.out(h + torch.einsum("npd,hdk,hek->npe", h, self.W_K, self.W_K).tanh())


class Seer(nn.Module):
    """A small convolutional network: images to logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.out = nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm(self.first(x)))
        return self.out(self.second(x).relu().mean((2, 3)))


fit = partial(ed.decompose, n_directions=6, steps=20, progress=False, sparsity=ed.BatchTopK(0.3))


@pytest.fixture(scope="module")
def speech() -> tuple[ed.Decomposition, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randint(len(WORDS), (40, 9))
    return fit(Speaker(), x, divergence=ed.KLDivergence(), parameters=["mix.*", "W_K"]), x


@pytest.fixture(scope="module")
def sight() -> tuple[ed.Decomposition, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(70, 1, 10, 8)
    return fit(Seer().eval(), x, divergence=ed.KLDivergence(), parameters=["first.*", "norm.*", "second.*"]), x


@pytest.fixture(scope="module")
def rows() -> tuple[ed.Decomposition, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(90, 5)
    return fit(model, x, sparsity=ed.L1(0.05), tied=True), x


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, speech, sight, rows) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    classes = ["cat", "dog", NASTY]
    labels = [classes[i % 3] for i in range(70)]
    return {
        "text": speech[0].browse(speech[1], folder / "text.html", names=WORDS, title="Words <i>here</i>"),
        "image": sight[0].browse(sight[1], folder / "image.html", names=classes, labels=labels),
        "vector": rows[0].browse(rows[1], str(folder / "vector.html"), by="activation", top=5, middle=2),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


@pytest.mark.parametrize("reference", [ed.OtherSample(), ed.ModelSample(), ed.Uniform()])
@pytest.mark.parametrize("which", ["text", "image", "vector"])
def test_what_is_measured_in_one_pass_is_what_the_package_measures(which, reference, speech, sight, rows) -> None:
    d, x = {"text": speech, "image": sight, "vector": rows}[which]
    if which == "vector" and isinstance(reference, ed.Uniform):
        return  # compares distributions
    d = fit(d.target.model, x, divergence=d.settings.divergence, reference=reference, parameters=d.settings.parameters)
    found = measure.measure(d, (x,), references=5, seed=3)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    close(found.activation, d.activation(x))
    close(found.impact, d.impact(x, references=5, seed=3))
    close(found.z, d.encode(x, seed=3))
    close(found.interactions.float(), ed.interactions(d, x))


def test_outputs_are_features_times_the_last_layer_where_it_is_a_matrix(speech, sight) -> None:
    (d, x), (other, images) = speech, sight
    readout = Readout.of(d.target, (x[:3],))
    features = readout.before.outputs((x,))
    assert features.shape == (40, 9, 8)
    torch.testing.assert_close(readout(features), d.target.outputs((x,)))
    torch.testing.assert_close(readout.along(features), d.target.outputs((x,)) - readout(torch.zeros(8)))
    assert (
        Readout.of(ed.decompose(d.target.model, x, n_directions=2, steps=1, progress=False).target, (x,)).weight is None
    )
    assert Readout.of(other.target, (images[:3],)).weight is None  # three outputs of four features


def test_few_at_a_time_or_all_at_once_is_the_same(monkeypatch: pytest.MonkeyPatch, speech) -> None:
    d, x = speech
    together = measure.measure(d, (x,), 3, 0)
    monkeypatch.setattr(measure, "MEMORY", 1)
    alone = measure.measure(d, (x,), 3, 0)
    for name in ("activation", "impact", "z", "interactions"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-3, atol=1e-4)


def test_what_is_not_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pages, speech) -> None:
    monkeypatch.setattr(measure, "MEMORY", 1)
    data = page_data(speech[0].browse(speech[1], tmp_path / "a.html", names=WORDS))
    for direction, kept in zip(data["directions"], page_data(pages["text"])["directions"], strict=True):
        for side in ("promoted", "suppressed"):
            values, expected = ([value for _, value in one[side]] for one in (direction, kept))
            assert values == pytest.approx(expected, rel=2e-3, abs=1e-5)


class Once(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * (1 - ctx.saved_tensors[0].square())


class Bent(nn.Module):
    """Two layers with a function between them, and a third that is not run."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(2, 2)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("function", [torch.tanh, Once.apply])
def test_the_change_of_outputs_is_their_jacobian_times_directions(function: Any) -> None:
    torch.manual_seed(0)
    target, x = Target(Bent(function).double()), torch.randn(4, 2, 3, dtype=torch.float64)
    u = Directions.random(target.shapes, 5, 2, dtype=torch.float64)
    f, y = measure.first_order(target, u, (x,), 3)
    torch.testing.assert_close(f, target.outputs((x,)).flatten(0, 1))
    plain = Target(Bent(torch.tanh).double())
    plain.model.load_state_dict(target.model.state_dict())
    expected = torch.einsum("nkw,vw->nvk", jacobian(plain, (x,)), u.flat(target.names))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


class Greedy(torch.autograd.Function):
    """tanh, whose backward pass asks for more memory than there is."""

    forward = Once.forward

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * torch.empty(1 << 60)[0]


def test_a_lack_of_memory_is_no_lack_of_a_second_derivative() -> None:
    torch.manual_seed(0)
    target = Target(Bent(Greedy.apply))
    with pytest.raises(RuntimeError, match=r"allocate|memory"):
        measure.first_order(target, Directions.random(target.shapes, 2, 1), (torch.randn(4, 3),))


class Detached(torch.autograd.Function):
    """tanh, with a backward pass that autograd does not see."""

    forward = Once.forward

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.detach() * (1 - ctx.saved_tensors[0].square())


def fused(x: torch.Tensor) -> torch.Tensor:
    """Attention by an operation whose backward pass has no derivative."""
    shaped = x.view(1, 1, len(x), -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(shaped, shaped, shaped)[0].view_as(x)


@pytest.mark.parametrize("function", [Once.apply, Detached.apply, fused])
def test_what_has_no_second_derivative_is_pushed_forwards(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    torch.manual_seed(0)
    target, pushed = Target(Bent(function)), []
    monkeypatch.setattr(measure, "push_forward", lambda *given: pushed.append(given) or torch.zeros(4, 2, 5))
    measure.first_order(target, Directions.random(target.shapes, 2, 1), (torch.randn(4, 3),))
    assert pushed


def test_the_numbers_in_the_page_are_the_packages(pages: dict[str, Path], speech) -> None:
    d, x = speech
    data, p = page_data(pages["text"]), x.shape[1]
    impact, activation, z = d.impact(x), d.activation(x), d.encode(x)
    strengths, order = d.top(x, 12)
    on = (d.encode(x, sparse=True) != 0).double().mean(0)
    energy = activation.square().mean(0)
    between = ed.interactions(d, x)
    assert (data["kind"], data["samples"], len(data["directions"])) == ("text", x.numel(), 6)
    for v, direction in enumerate(data["directions"]):
        top = [one for one in direction["samples"] if one["group"] == "top"]
        assert [one["impact"] for one in top] == pytest.approx(strengths[v].tolist(), rel=2e-3)
        assert len({one["e"] * p + one["p"] for one in direction["samples"]}) == 20
        for one in direction["samples"]:
            row = one["e"] * p + one["p"]
            for name, values in (("impact", impact), ("activation", activation), ("z", z)):
                assert one[name] == pytest.approx(values[row, v].item(), rel=2e-3, abs=1e-5)
            shades = impact[:, v].view(-1, p)[one["e"], one["from"] : one["to"]]
            assert one["shades"]["impact"] == pytest.approx(shades.tolist(), rel=1e-2, abs=1e-5)
        assert direction["active"] == pytest.approx(on[v].item(), rel=1e-3)
        assert direction["curvature"] == pytest.approx((energy[v] / energy.sum()).item(), rel=2e-3)
        assert sum(direction["histograms"]["impact"]["counts"]) == x.numel()
        assert direction["histograms"]["activation"]["most"] == pytest.approx(activation[:, v].max().item(), rel=1e-3)
        for other, value in direction["interactions"]:
            assert value == pytest.approx(between[v, other].item(), rel=5e-3, abs=1e-4)
    assert order.shape == (6, 12)


def test_what_a_direction_does_is_what_the_model_does(pages: dict[str, Path], sight) -> None:
    d, x = sight
    for v, direction in enumerate(page_data(pages["image"])["directions"]):
        few = x[[one["e"] for one in direction["samples"] if one["group"] == "top"]]
        named = dict(direction["push"]["lines"])
        for i, step in enumerate(direction["push"]["steps"]):
            with d.perturbed({v: step}) as model, torch.no_grad():
                expected = model(few).softmax(-1).mean(0)
            for k, name in enumerate(["cat", "dog", NASTY]):
                assert named[name][i] == pytest.approx(expected[k].item(), abs=1e-3)
        h = 1e-3
        moved = []
        for step in (h, -h):
            with d.perturbed({v: step}) as model, torch.no_grad():
                moved.append(model(few).double())
        slope = ((moved[0] - moved[1]) / (2 * h)).mean(0)
        slope = slope - slope.mean()
        told = dict(direction["promoted"]) | dict(direction["suppressed"])
        assert len(told) == 3
        for k, name in enumerate(["cat", "dog", NASTY]):
            assert told[name] == pytest.approx(slope[k].item(), rel=0.05, abs=5e-3 * slope.abs().max().item())


def test_maps_add_up_to_the_activation(pages: dict[str, Path]) -> None:
    data = page_data(pages["image"])
    assert data["kind"] == "image"
    for direction in data["directions"]:
        for one in direction["samples"]:  # all decomposed tensors have places, so nothing is missing
            assert one["map"]["sum"] == pytest.approx(one["activation"], rel=2e-3, abs=1e-5)
            values = np.frombuffer(base64.b64decode(one["map"]["bytes"]), np.int8)
            assert len(values) == one["map"]["height"] * one["map"]["width"] == 80
            assert abs(values.astype(int)).max() == 127 or one["activation"] == 0


def test_shares_by_tensor_and_head(pages: dict[str, Path], speech) -> None:
    d, _ = speech
    rows = d.directions()
    for v, direction in enumerate(page_data(pages["text"])["directions"]):
        by_tensor = dict(direction["tensors"])
        assert sum(by_tensor.values()) == pytest.approx(1, rel=1e-2)
        for name, value in rows.items():
            assert by_tensor[name] == pytest.approx(value[v].square().sum().item(), rel=1e-2, abs=1e-4)
        [[name, heads]] = direction["heads"]
        assert name == "W_K"
        assert heads == pytest.approx(rows["W_K"][v].square().sum((1, 2)).tolist(), rel=1e-2, abs=1e-4)


def test_middling_samples_are_neither_top_nor_nothing() -> None:
    first, others = known.pick(torch.arange(100.0), 10, 5)
    assert first == list(range(99, 89, -1))
    assert others == pytest.approx([74, 62, 50, 37, 25], abs=1)
    assert known.pick(torch.tensor([1.0, 3.0, 2.0]), 2, 8) == ([1, 2], [0])
    assert known.pick(torch.zeros(3), 2, 0)[1] == []


def test_by_threshold_and_steps_are_taken(tmp_path: Path, rows) -> None:
    d, x = rows
    path = d.browse(x, tmp_path / "a.html", by="activation", threshold=1e9, steps=[-1, 2], top=3, middle=0)
    data = page_data(path)
    strengths, _ = d.top(x, 3, "activation")
    for v, direction in enumerate(data["directions"]):
        assert [one["activation"] for one in direction["samples"]] == pytest.approx(strengths[v].tolist(), rel=2e-3)
        assert direction["push"]["steps"] == [-1, 0, 2]
        assert not direction["alive"]


def test_no_text_can_end_its_element_and_nothing_is_fetched(pages: dict[str, Path]) -> None:
    for path in pages.values():
        html = path.read_text()
        assert html.count("<script") == html.count("</script>") == 2
        assert NASTY not in html
        assert "Content-Security-Policy" in html
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", html)
        assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", html)
    assert "Words &lt;i&gt;here" in pages["text"].read_text()
    assert NASTY in page_data(pages["text"])["vocabulary"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, rows) -> None:
    d, x = rows
    one, two = (d.browse(x, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


def test_a_failed_page_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows) -> None:
    d, x = rows
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="space"):
        d.browse(x, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_thumbnails_shrink_until_they_fit() -> None:
    x = torch.rand(300, 3, 100, 100)
    made = Images(x, 1, None).examples(range(300))["examples"]
    assert sum(map(len, made.values())) < 3 << 20


def test_tokens_may_be_given_as_strings_or_by_a_function() -> None:
    x = torch.tensor([[0, 1], [2, 1]])
    assert Text(x, 2, lambda i: f"t{i}", None).strings == [["t0", "t1"], ["t2", "t1"]]
    assert Text(x.float(), 1, [["a", "b"], ["c", "d"]], None).about(0, 0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sound"}, "kind='sound' must be"),
        ({"kind": "text"}, "not token numbers"),
        ({"kind": "text", "tokens": [["a"]]}, "tokens holds 1 examples; give 90 lists"),
        ({"kind": "image"}, "1 or 3 channels"),
        ({"images": torch.rand(3, 1, 4, 4)}, "90 images"),
        ({"names": ["a"]}, "names has 1 entries; give one for each of the model's 3 outputs"),
        ({"labels": ["a"]}, "labels has 1 entries; give one for each of the 90"),
        ({"features": ["a"]}, "features has 1 names"),
        ({"by": "size"}, "by='size' must be"),
        ({"top": 0}, "top=0"),
        ({"middle": -1}, "middle=-1"),
        ({"references": 0}, "references=0"),
        ({"steps": [float("nan")]}, "steps"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_work(options, message, tmp_path, monkeypatch, rows) -> None:
    d, x = rows
    monkeypatch.setattr(collect, "collect", lambda *_: pytest.fail("work had begun"))
    with pytest.raises(ValueError, match=re.escape(message)):
        d.browse(x, tmp_path / "page.html", **options)
    with pytest.raises(ValueError, match="does not exist"):
        d.browse(x, tmp_path / "nowhere" / "page.html")


def test_inputs_that_fit_no_kind_are_refused(tmp_path: Path, speech) -> None:
    d, x = speech
    with pytest.raises(ValueError, match="what token 11 is called is not known"):
        d.browse(x, tmp_path / "page.html", kind="text")
    wide = nn.Linear(300, 2)
    e = fit(wide, torch.randn(8, 300), parameters=["bias"])
    with pytest.raises(ValueError, match="300 numbers cannot be seen as bars"):
        e.browse(torch.randn(8, 300), tmp_path / "page.html")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    screenshots = pytest.importorskip("screenshots", reason="Playwright is not installed: pages not tried in a browser")
    if screenshots.chromium() is None:
        pytest.skip("Chromium is not installed (apt-get install chromium): pages not tried in a real browser")
    with screenshots.browser() as opened:
        yield opened


class Visit:
    """A page opened from disk, with what it said to the console and asked of the network."""

    def __init__(self, chrome: Any, path: Path, fragment: str = "", **options: Any) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = chrome.new_page(viewport=options.pop("viewport", {"width": 1300, "height": 850}), **options)
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        begun = time.perf_counter()
        self.page.goto(path.as_uri() + fragment)
        self.page.wait_for_selector("#heading")
        self.seconds = time.perf_counter() - begun

    def comes_to(self, number: int) -> None:
        """Wait for a direction's page: it is drawn when the address has changed, a moment after the click."""
        from playwright.sync_api import expect

        expect(self.page.locator("#heading")).to_have_text(f"Direction {number}")

    def heading(self) -> str:
        return self.page.inner_text("#heading")

    def numbers(self) -> list[int]:
        return [int(text) for text in self.page.locator("#list tbody tr td:first-child").all_inner_texts()]

    def quiet(self) -> None:
        """Nothing fetched but the page itself and what is inside it; nothing wrong said."""
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith(("data:", "file:"))] == []
        assert sum(url.startswith("file:") for url in self.requests) == 1


@pytest.fixture(params=["text", "image", "vector"])
def visit(request: pytest.FixtureRequest, chrome, pages: dict[str, Path]) -> Iterator[Visit]:
    opened = Visit(chrome, pages[request.param])
    yield opened
    opened.quiet()
    opened.page.close()


def test_opens_clicks_and_turns(visit: Visit) -> None:
    page = visit.page
    numbers = visit.numbers()
    assert sorted(numbers) == list(range(6))
    visit.comes_to(numbers[0])
    page.click("#list tbody tr:nth-child(4) td.what")
    visit.comes_to(numbers[3])
    assert page.url.endswith(f"#{numbers[3]}")
    assert page.locator("#list tr[aria-current]").count() == 1
    page.keyboard.press("ArrowRight")
    visit.comes_to(numbers[4])
    for number in (numbers[3], numbers[2]):
        page.keyboard.press("ArrowLeft")
        visit.comes_to(number)
    page.go_back()
    visit.comes_to(numbers[3])
    page.locator(".turn a").last.click()
    visit.comes_to(numbers[4])
    meets = page.locator("#interactions a").first
    other = int(str(meets.get_attribute("href")).removeprefix("#"))
    assert other != numbers[4]
    meets.click()
    visit.comes_to(other)


def test_sorts(visit: Visit, pages: dict[str, Path]) -> None:
    page = visit.page
    data = page_data(next(path for path in pages.values() if path.as_uri() == page.url.split("#")[0]))
    for key in ("active", "curvature", "strength"):
        page.click(f"#list th[data-key={key}] button")
        if page.get_attribute(f"#list th[data-key={key}]", "aria-sort") == "ascending":
            page.click(f"#list th[data-key={key}] button")
        values = [data["directions"][v][data["by"] if key == "strength" else key] for v in visit.numbers()]
        assert values == sorted(values, reverse=True)
        page.click(f"#list th[data-key={key}] button")
        assert page.get_attribute(f"#list th[data-key={key}]", "aria-sort") == "ascending"
        values = [data["directions"][v][data["by"] if key == "strength" else key] for v in visit.numbers()]
        assert values == sorted(values)
    page.click("#list th[data-key=number] button")
    assert visit.numbers() == list(range(6))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_searches_texts_labels_and_tokens(kind: str, chrome, pages: dict[str, Path]) -> None:
    visit = Visit(chrome, pages[kind])
    visit.page.fill("#search", "no such words")
    assert visit.numbers() == []
    assert visit.page.inner_text("#matches") == "0 of 6 directions"
    visit.page.keyboard.press("Escape")
    visit.page.fill("#search", "once upon" if kind == "text" else "dog")
    data = page_data(pages[kind])
    if kind == "text":
        told = [
            "".join(data["vocabulary"][i] for i in data["examples"][str(one["e"])][one["from"] : one["to"]])
            for direction in data["directions"]
            for one in direction["samples"]
        ]
        holding = {i // 20 for i, text in enumerate(told) if "once upon" in text}
        assert set(visit.numbers()) == holding
        if holding:
            visit.page.click("#list tbody tr >> nth=0")
            assert visit.page.locator(".token.hit").count() >= 2
    else:
        assert len(visit.numbers()) > 0
    visit.page.fill("#search", "#3")
    assert 3 in visit.numbers()
    visit.page.fill("#search", "")
    visit.page.select_option("#which", "dead")
    assert visit.numbers() == [v for v, direction in enumerate(data["directions"]) if not direction["alive"]]
    visit.quiet()
    visit.page.close()


def test_keys_typed_in_the_search_do_not_turn_the_page(chrome, pages: dict[str, Path]) -> None:
    visit = Visit(chrome, pages["text"])
    before = visit.heading()
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("a")
    visit.page.keyboard.press("ArrowLeft")
    assert visit.page.input_value("#search") == "a"
    assert visit.heading() == before
    visit.page.close()


@pytest.mark.parametrize(("fragment", "expected"), [("#5", 5), ("#0", 0), ("#99", None), ("#x", None)])
def test_deep_links(fragment: str, expected: int | None, chrome, pages: dict[str, Path]) -> None:
    visit = Visit(chrome, pages["vector"], fragment)
    assert visit.heading() == f"Direction {visit.numbers()[0] if expected is None else expected}"
    visit.page.evaluate("location.hash = '#2'")
    visit.comes_to(2)
    visit.quiet()
    visit.page.close()


def test_text_that_looks_like_a_script_is_text(chrome, pages: dict[str, Path]) -> None:
    for kind in ("text", "image"):
        visit = Visit(chrome, pages[kind])
        holding = [NASTY in visit.page.inner_text("main")]
        for v in range(6):
            visit.page.evaluate(f"location.hash = '#{v}'")
            visit.page.wait_for_timeout(30)
            holding.append(NASTY in visit.page.inner_text("main"))
            assert visit.page.locator("main script, main b, nav script").count() == 0
        assert any(holding)
        assert "broken" not in visit.page.title()
        visit.quiet()
        visit.page.close()


def test_tokens_are_shaded_and_say_their_values(chrome, pages: dict[str, Path]) -> None:
    visit = Visit(chrome, pages["text"], "#1")
    own = visit.page.locator(".token.here").first
    assert float(own.evaluate("e => e.style.getPropertyValue('--s')")) == pytest.approx(1, abs=0.01)
    own.hover()
    best = page_data(pages["text"])["directions"][1]["samples"][0]
    told = re.search(r"impact (\S+)\nactivation (\S+)", visit.page.inner_text("#tip"))
    assert told
    assert [float(value) for value in told.groups()] == pytest.approx([best["impact"], best["activation"]], rel=1e-2)
    visit.page.check("input[value=activation]")
    value = visit.page.inner_text("#samples .value >> nth=0").strip()
    assert float(value) == pytest.approx(best["activation"], rel=1e-2)
    visit.quiet()
    visit.page.close()


def test_maps_can_be_hidden(chrome, pages: dict[str, Path]) -> None:
    visit = Visit(chrome, pages["image"])
    assert visit.page.locator(".picture canvas >> visible=true").count() == 20
    visit.page.uncheck("#places")
    assert visit.page.locator(".picture canvas >> visible=true").count() == 0
    assert visit.page.locator(".picture img").first.evaluate("e => e.naturalWidth") == 8
    visit.quiet()
    visit.page.close()


@pytest.mark.parametrize("kind", ["text", "image", "vector"])
def test_fits_a_phone_and_knows_the_dark(kind: str, chrome, pages: dict[str, Path]) -> None:
    light, dark = (
        Visit(chrome, pages[kind], viewport={"width": 360, "height": 740}, color_scheme=scheme)
        for scheme in ("light", "dark")
    )
    assert light.page.evaluate("document.documentElement.scrollWidth") <= 360
    back = [
        page.evaluate("getComputedStyle(document.documentElement).backgroundColor") for page in (light.page, dark.page)
    ]
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in back]
    assert brightness[0] > 700 > 100 > brightness[1]
    for visit in (light, dark):
        visit.quiet()
        visit.page.close()


def test_a_screen_reader_has_words_for_everything(visit: Visit) -> None:
    names = visit.page.evaluate(
        """() => [...document.querySelectorAll('a, button, input, select, img, svg[role=img], canvas')]
        .filter((e) => !e.closest('[aria-hidden]'))
        .filter((e) => !(e.getAttribute('aria-label') || e.alt || e.title || e.textContent.trim()))
        .filter((e) => !e.closest('label'))
        .map((e) => e.outerHTML)"""
    )
    assert names == []
    assert visit.page.locator("main, nav[aria-label], [role=search], html[lang]").count() == 4
    assert visit.page.locator("#said").text_content().startswith(visit.heading())


def test_a_hundred_directions_are_small_and_quick(chrome, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(len(WORDS), (150, 64))
    d = fit(Speaker(), x, divergence=ed.KLDivergence(), n_directions=100, steps=2, batch_size=64)
    path = d.browse(x, tmp_path / "large.html", names=WORDS, references=1)
    assert len(page_data(path)["directions"][0]["samples"]) == 20
    assert path.stat().st_size < 5e6
    visit = Visit(chrome, path)
    assert visit.page.locator("#list tbody tr").count() == 100
    painted = visit.page.evaluate("performance.getEntriesByType('paint').at(-1)?.startTime ?? 0")
    assert painted < 5000  # well under 1000 on a machine with nothing else to do
    visit.quiet()
    visit.page.close()


def test_the_tool_takes_pictures(chrome, tmp_path: Path, pages: dict[str, Path]) -> None:
    import screenshots  # pyright: ignore[reportMissingImports]

    for scheme in ("light", "dark"):
        screenshots.screenshot(chrome, pages["image"], tmp_path / f"{scheme}.png", width=800, height=500, scheme=scheme)
    light, dark = (np.asarray(Image.open(tmp_path / f"{scheme}.png").convert("L")) for scheme in ("light", "dark"))
    assert light.shape == dark.shape == (750, 1200)
    assert light.mean() > 180 > 90 > dark.mean()
