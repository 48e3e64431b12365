"""The Fashion-MNIST data, its concepts, the shipped network, and what is read and moved in its middle block."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from eigendecomp.directions import Directions
from eigendecomp.study import moves
from eigendecomp.target import Target
from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.fashion import block as cnn_block
from rooms.fashion import concepts as fashion_concepts
from rooms.fashion import jacobians

needs_data = pytest.mark.skipif(
    not fashion.available(),
    reason="needs the whole Fashion-MNIST: python -m eigendecomp.targets.fashion.images fetch",
)


@pytest.fixture(scope="module")
def test_subset() -> tuple[Tensor, Tensor]:
    return fashion.load("test", subset=True)


@pytest.fixture(scope="module")
def model() -> cnn.FashionCNN:
    return cnn.load_model()


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


def picture(*lit: tuple[slice, slice], value: float = 0.5) -> Tensor:
    image = torch.zeros(1, 1, 28, 28)
    for rows, columns in lit:
        image[..., rows, columns] = value
    return image


# ------------------------------------------------------------------------------------------------------- data


def test_idx_files_are_parsed() -> None:
    assert fashion.parse_idx(idx((2, 3), bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"labels has 10 bytes.*\[3\].*asks for 11"):
        fashion.parse_idx(idx((3,), b"ab"), "labels")
    with pytest.raises(ValueError, match="images is still gzip-packed"):
        fashion.parse_idx(b"\x1f\x8b\x08\x00", "images")
    with pytest.raises(ValueError, match="starts with '00000d01'"):
        fashion.parse_idx(b"\x00\x00\x0d\x01\x00\x00\x00\x00")


def fake_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images a split, whose sums are taken for the right ones."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in fashion.SHA256:
        shape = (2, 28, 28) if "images" in name else (2,)
        count = 2 * 28 * 28 if "images" in name else 2
        raw = idx(shape, bytes(i % 10 for i in range(count)))
        (folder / name).write_bytes(raw)
        monkeypatch.setitem(fashion.SHA256, name, fashion.hashlib.sha256(raw).hexdigest())
    return folder


def test_data_are_found_by_argument_then_environment_then_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_data(tmp_path / "a", monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(fashion, "DOWNLOADS", tmp_path / "none")
    monkeypatch.setenv("EIGENDECOMP_DATA", str(tmp_path / "b"))
    assert fashion.raw_folder(tmp_path / "a") == folder
    assert fashion.raw_folder().is_relative_to(tmp_path / "b")
    monkeypatch.setenv("EIGENDECOMP_DATA", str(tmp_path / "empty"))
    assert not fashion.available()
    monkeypatch.setattr(fashion, "DOWNLOADS", tmp_path / "a")
    images, labels = fashion.load("test")
    assert images.shape == (2, 1, 28, 28) and images.dtype == torch.float32 and images.max() == 9 / 255
    assert labels.tolist() == [0, 1]


def test_missing_data_are_an_error_with_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DOWNLOADS", tmp_path)
    monkeypatch.delenv("EIGENDECOMP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)fashion\.images fetch.*dataset-fashion-mnist.*EIGENDECOMP_DATA"):
        fashion.load("train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fashion.load("train", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split='valid' is unknown"):
        fashion.load("valid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not both"):
        fashion.load("test", tmp_path, subset=True)


def test_a_flipped_byte_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_data(tmp_path, monkeypatch) / "t10k-images-idx3-ubyte"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)
    fashion.load("train", tmp_path)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is damaged.*sha256 is"):
        fashion.load("test", tmp_path)


def test_fetch_takes_the_next_route_and_reports_every_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_data(tmp_path / "source", monkeypatch)

    def closed(folder: Path) -> None:
        raise OSError("no network")

    def damaged(folder: Path) -> None:
        for name in fashion.SHA256:
            (folder / name).write_bytes(b"?")

    def works(folder: Path) -> None:
        for name in fashion.SHA256:
            shutil.copy(source / name, folder)

    monkeypatch.setattr(fashion, "ROUTES", {"one": closed, "two": damaged})
    with pytest.raises(OSError, match=r"(?s)one: OSError: no network.*two: ValueError.*damaged.*Remedies"):
        fashion.fetch(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    monkeypatch.setattr(fashion, "ROUTES", {"one": closed, "two": works})
    fetched = fashion.fetch(tmp_path / "target")
    assert all((fetched / name).read_bytes() == (source / name).read_bytes() for name in fashion.SHA256)
    monkeypatch.setattr(fashion, "ROUTES", {})
    assert fashion.fetch(tmp_path / "target") == fetched  # nothing to do
    assert fashion.ensure(tmp_path / "target") == fetched
    with pytest.raises(OSError, match=r"could not be fetched(?s:.*)Remedies"):
        fashion.ensure(tmp_path / "other")


def test_the_subset_is_small_and_holds_as_many_of_every_class(test_subset: tuple[Tensor, Tensor]) -> None:
    assert fashion.SUBSET.stat().st_size < 4_000_000
    for images, labels in (test_subset, fashion.load("train", subset=True)):
        assert images.shape == (2500, 1, 28, 28) and 0 == images.min() < images.max() == 1
        assert labels.bincount().tolist() == [250] * 10


@needs_data
def test_the_subset_is_part_of_the_data(test_subset: tuple[Tensor, Tensor]) -> None:
    images, labels = fashion.load("test")
    index = fashion.load_file(fashion.SUBSET)["test_index"].long()
    assert torch.equal(images[index], test_subset[0]) and torch.equal(labels[index], test_subset[1])


# --------------------------------------------------------------------------------------------------- concepts


def test_concepts_are_neither_rare_nor_everywhere(test_subset: tuple[Tensor, Tensor]) -> None:
    found = fashion_concepts.concepts(*test_subset)
    assert len(found) >= 12 and not set(found) & set(fashion.CLASSES)
    for name, holds in found.items():
        assert holds.dtype == torch.bool and holds.shape == (2500,)
        assert 0.05 <= holds.float().mean() <= 0.6, name


@needs_data
@pytest.mark.slow
def test_thresholds_are_those_of_the_training_split_and_hold_on_the_test_split() -> None:
    images, labels = fashion.load("train")
    computed = fashion_concepts.thresholds(images, labels)
    assert computed == pytest.approx({name: rule.threshold for name, rule in fashion_concepts.RULES.items()}, rel=1e-3)
    for name, holds in fashion_concepts.concepts(*fashion.load("test")).items():
        assert 0.05 <= holds.float().mean() <= 0.6, name


def test_measures_of_drawn_pictures() -> None:
    block = picture((slice(4, 24), slice(10, 18)))
    measured = {name: value.item() for name, value in fashion_concepts.measures(block).items()}
    expected = {
        "width": 8,
        "area": 160 / 784,
        "brightness": 0.5,
        "contrast": 0,
        "texture": 0,
        "holes": 0,
        "asymmetry": 0,
        "centre": 0.5,
        "shade": 0,
        "sleeve_width": 8,
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-6)

    legs = picture((slice(0, 28), slice(4, 9)), (slice(0, 28), slice(19, 24)), (slice(0, 12), slice(4, 24)))
    measured = fashion_concepts.measures(legs)
    assert measured["holes_below"].item() == pytest.approx(0.5) and measured["holes_above"].item() == 0
    assert measured["arch"].item() == pytest.approx(10)

    rows = picture(*((slice(i, i + 1), slice(0, 28)) for i in range(0, 28, 2))) + 0.2
    measured = fashion_concepts.measures(torch.cat([rows, rows.transpose(2, 3)]))
    assert measured["grain"].tolist() == pytest.approx([1, -1], abs=1e-5)
    corner = fashion_concepts.measures(picture((slice(0, 28), slice(0, 14)), (slice(0, 7), slice(0, 28))))
    assert corner["asymmetry"].item() == pytest.approx(0.6) and corner["centre"].item() < 0.5
    zipped = block.clone()
    zipped[..., 4:24, 13:15] = 1
    assert fashion_concepts.measures(zipped)["front_line"].item() == pytest.approx(0.5)


def test_concepts_follow_their_rules() -> None:
    wide = picture((slice(8, 20), slice(0, 28)), value=0.9)
    images = torch.cat([wide, wide, torch.zeros_like(wide)])  # an empty image must not fail
    found = fashion_concepts.concepts(images, torch.tensor([fashion.SNEAKER, fashion.COAT, fashion.BAG]))
    assert found["footwear"].tolist() == [True, False, False]
    assert found["upper_body"].tolist() == [False, True, False]
    assert found["long_sleeves"].tolist() == [False, True, False]  # as wide, but no garment with sleeves
    assert found["bright"].tolist() == found["wide"].tolist() == [True, True, False]
    assert fashion_concepts.classes(torch.tensor([9, 3]))["dress"].tolist() == [False, True]


def test_bad_input_to_concepts_is_named() -> None:
    images, labels = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"\(2, 28, 28\)"):
        fashion_concepts.concepts(images[:, 0], labels)
    with pytest.raises(ValueError, match=r"\[0, 1\].*in \[.*25"):
        fashion_concepts.measures(images * 255)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        fashion_concepts.measures(images.byte())
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        fashion_concepts.concepts(images, labels[:1])
    with pytest.raises(ValueError, match="integers in 0 … 9"):
        fashion_concepts.concepts(images, labels + 9)


# ---------------------------------------------------------------------------------------------------- network


def test_the_shipped_network_is_accurate_and_its_record_is_its_own(
    model: cnn.FashionCNN, test_subset: tuple[Tensor, Tensor]
) -> None:
    assert not model.training and cnn.CHECKPOINT.stat().st_size < 1_000_000
    assert cnn.predict(model, test_subset[0][:7], batch_size=3).shape == (7, 10)
    assert cnn.accuracy(model, *test_subset) >= 0.92
    record = json.loads(cnn.RECORD.read_text())
    assert record["test_accuracy"] >= 0.925 and len(record["test_accuracy_by_class"]) == 10
    assert record["checkpoint_sha256"] == fashion.hashlib.sha256(cnn.CHECKPOINT.read_bytes()).hexdigest()
    assert record["parameters"] == sum(p.numel() for p in model.parameters()) <= 150_000


@needs_data
def test_the_recorded_accuracy_is_that_of_the_checkpoint(model: cnn.FashionCNN) -> None:
    recorded = json.loads(cnn.RECORD.read_text())["test_accuracy"]
    assert cnn.accuracy(model, *fashion.load("test")) == pytest.approx(recorded, abs=3e-4)


def test_the_middle_block_has_the_parts_that_its_pattern_selects(model: cnn.FashionCNN) -> None:
    names = {name for name, _ in model.named_parameters() if name.startswith("block2.")}
    parts = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias")
    assert names == {f"block2.{part}" for part in parts}
    assert not any(getattr(module, "inplace", False) for module in model.modules())


def test_per_sample_gradients_of_the_network(model: cnn.FashionCNN, test_subset: tuple[Tensor, Tensor]) -> None:
    images, labels = test_subset[0][:4], test_subset[1][:4]
    chosen = {n: p.detach() for n, p in model.named_parameters() if n.startswith("block2.")}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(chosen, images, labels)
    for i in range(4):
        alone = grad(loss)(chosen, images[i], labels[i])
        for name in chosen:
            assert together[name].shape == (4, *chosen[name].shape)
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-3, atol=1e-6)


def test_training_is_repeatable_saved_and_learns(tmp_path: Path) -> None:
    images, labels = (tensor[::2] for tensor in fashion.load("train", subset=True))
    settings = cnn.Settings(epochs=4, batch_size=25, widths=(4, 6, 8), held_out=250)
    before = torch.get_rng_state()
    model, history = cnn.train(images, labels, 1, settings)
    assert torch.equal(before, torch.get_rng_state()) and not model.training
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[-1]["held_out_accuracy"] > 0.5
    again, _ = cnn.train(images, labels, 1, settings)
    cnn.save_model(again, tmp_path / "deep" / "again.safetensors")
    loaded = cnn.load_model(tmp_path / "deep" / "again.safetensors")
    assert torch.equal(cnn.predict(model, images[:9]), cnn.predict(loaded, images[:9]))
    with pytest.raises(ValueError, match="held_out=1250"):
        cnn.train(images, labels, settings=cnn.Settings(held_out=1250))


def test_augmentation_only_flips_and_shifts() -> None:
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    changed = cnn.augment(image.expand(64, -1, -1, -1), 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    possible = [p[..., i : i + 28, j : j + 28] for p in (padded, padded.flip(3)) for i in range(5) for j in range(5)]
    used = [[torch.equal(one[None], other) for other in possible].index(True) for one in changed]
    assert len(set(used)) > 20


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors.*eigendecomp\.targets\.fashion\.network train"):
        cnn.load_model(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="another network"):
        cnn.load_model(fashion.SUBSET)


# -------------------------------------------------------------------------------------------- from the middle block


@pytest.fixture(scope="module")
def middle(model: cnn.FashionCNN, test_subset: tuple[Tensor, Tensor]) -> tuple[cnn_block.FromMiddle, Tensor]:
    with torch.no_grad():
        return cnn_block.FromMiddle(model), model.enter(test_subset[0][:8])


def test_the_network_goes_on_from_its_middle_block(model, middle, test_subset) -> None:
    tail, entering = middle
    assert torch.equal(cnn.predict(tail, entering), cnn.predict(model, test_subset[0][:8]))
    with torch.no_grad():
        assert torch.equal(tail.after(tail.block2(entering)), cnn.predict(tail, entering))
    names = {name.removeprefix("after.") for name, _ in tail.named_parameters()}
    assert names < {name for name, _ in model.named_parameters()}


def test_contribution_maps_add_up_to_the_coefficient(middle) -> None:
    tail, entering = middle
    target = Target(tail, ["block2.*"])
    directions = Directions.random(target.shapes, 3, 2)
    c = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    j = jacobians.read(target, entering, {"u": directions.flat()}).along["u"]
    maps = cnn_block.contribution_maps(tail, moves.low_rank(directions, 1), entering, c)
    assert maps.shape == (8, 14, 14)
    torch.testing.assert_close(maps.sum((1, 2)), (c * j[:, :, 1]).sum(1), rtol=1e-4, atol=1e-4)


def test_attribution_is_the_first_order_change_of_the_logits(middle) -> None:
    tail, entering = middle
    draw = torch.Generator().manual_seed(0)
    z, decoder = torch.rand(8, 196, 3, generator=draw).double(), torch.randn(3, 32, generator=draw).double()
    tail, entering = deepcopy(tail).double(), entering.double()
    with torch.no_grad():
        output, step = tail.block2(entering), 1e-6
    found = cnn_block.attribution(cnn_block.logit_gradients(tail.after, output), z, decoder)
    with torch.no_grad():
        added = torch.einsum("np,c->ncp", z[..., 1], decoder[1]).view_as(output)
        change = (tail.after(output + step * added) - tail.after(output - step * added)) / (2 * step)
    torch.testing.assert_close(found[..., 1], change, rtol=1e-5, atol=1e-5)


def test_a_shift_adds_a_row_at_every_position_and_ends(middle) -> None:
    tail, entering = middle
    row = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = tail.block2(entering)
        before, expected = tail.after(output), tail.after(output + 0.5 * row[:, None, None])
        with cnn_block.shifted(tail.after, row)(0.5) as moved:
            assert torch.equal(moved(output), expected) and not torch.allclose(expected, before)
        assert torch.equal(tail.after(output), before)


def test_a_gated_move_is_the_direction_for_some_images_and_nothing_for_others(middle) -> None:
    tail, entering = middle
    target = Target(tail, ["block2.*"])
    change = moves.low_rank(Directions.random(target.shapes, 3, 2), 1)
    gate = torch.tensor([1.0, 0.0] * 4)
    before = cnn.predict(tail, entering)
    with torch.no_grad(), moves.displaced(tail, change)(0.7):
        everywhere = tail(entering)
    with torch.no_grad(), cnn_block.Gated(tail).along(change)(0.7) as moved:
        found = moved(entering, gate)
    torch.testing.assert_close(found[::2], everywhere[::2], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1::2], before[1::2]) and not torch.allclose(found[::2], before[::2])
    assert torch.equal(cnn.predict(tail, entering), before)
