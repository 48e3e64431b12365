"""The Fashion-MNIST data and the shipped network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import train_network
from torch import Tensor
from torch.func import functional_call, grad, vmap

from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


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


def test_the_subset_is_small_and_holds_as_many_of_every_class(fashion_subset: tuple[Tensor, Tensor]) -> None:
    assert fashion.SUBSET.stat().st_size < 4_000_000
    for images, labels in (fashion_subset, fashion.load("train", subset=True)):
        assert images.shape == (2500, 1, 28, 28) and 0 == images.min() < images.max() == 1
        assert labels.bincount().tolist() == [250] * 10


@pytest.mark.usefixtures("whole_fashion")
def test_the_subset_is_part_of_the_data(fashion_subset: tuple[Tensor, Tensor]) -> None:
    images, labels = fashion.load("test")
    index = fashion.load_file(fashion.SUBSET)["test_index"].long()
    assert torch.equal(images[index], fashion_subset[0]) and torch.equal(labels[index], fashion_subset[1])


# ---------------------------------------------------------------------------------------------------- network


def test_the_shipped_network_is_accurate_and_its_record_is_its_own(
    fashion_network: cnn.FashionCNN, fashion_subset: tuple[Tensor, Tensor]
) -> None:
    assert not fashion_network.training and cnn.CHECKPOINT.stat().st_size < 1_000_000
    assert cnn.predict(fashion_network, fashion_subset[0][:7], batch_size=3).shape == (7, 10)
    assert cnn.accuracy(fashion_network, *fashion_subset) >= 0.92
    record = json.loads(cnn.CHECKPOINT.with_name("training.json").read_text())
    assert record["test_accuracy"] >= 0.925 and len(record["test_accuracy_by_class"]) == 10
    assert record["checkpoint_sha256"] == fashion.hashlib.sha256(cnn.CHECKPOINT.read_bytes()).hexdigest()
    assert record["parameters"] == sum(p.numel() for p in fashion_network.parameters()) <= 150_000


@pytest.mark.usefixtures("whole_fashion")
def test_the_recorded_accuracy_is_that_of_the_checkpoint(fashion_network: cnn.FashionCNN) -> None:
    recorded = json.loads(cnn.CHECKPOINT.with_name("training.json").read_text())["test_accuracy"]
    assert cnn.accuracy(fashion_network, *fashion.load("test")) == pytest.approx(recorded, abs=3e-4)


def test_the_middle_block_has_the_parts_that_its_pattern_selects(fashion_network: cnn.FashionCNN) -> None:
    names = {name for name, _ in fashion_network.named_parameters() if name.startswith("block2.")}
    parts = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias")
    assert names == {f"block2.{part}" for part in parts}
    assert not any(getattr(module, "inplace", False) for module in fashion_network.modules())


def test_per_sample_gradients_of_the_network(
    fashion_network: cnn.FashionCNN, fashion_subset: tuple[Tensor, Tensor]
) -> None:
    images, labels = fashion_subset[0][:4], fashion_subset[1][:4]
    chosen = {n: p.detach() for n, p in fashion_network.named_parameters() if n.startswith("block2.")}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(fashion_network, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(chosen, images, labels)
    for i in range(4):
        alone = grad(loss)(chosen, images[i], labels[i])
        for name in chosen:
            assert together[name].shape == (4, *chosen[name].shape)
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-3, atol=1e-6)


def test_training_is_repeatable_saved_and_learns(tmp_path: Path) -> None:
    images, labels = (tensor[::2] for tensor in fashion.load("train", subset=True))
    settings = train_network.Settings(epochs=4, batch_size=25, widths=(4, 6, 8), held_out=250)
    before = torch.get_rng_state()
    model, history = train_network.train(images, labels, 1, settings)
    assert torch.equal(before, torch.get_rng_state()) and not model.training
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[-1]["held_out_accuracy"] > 0.5
    again, _ = train_network.train(images, labels, 1, settings)
    train_network.save_model(again, tmp_path / "deep" / "again.safetensors")
    loaded = cnn.load_model(tmp_path / "deep" / "again.safetensors")
    assert torch.equal(cnn.predict(model, images[:9]), cnn.predict(loaded, images[:9]))
    with pytest.raises(ValueError, match="held_out=1250"):
        train_network.train(images, labels, settings=train_network.Settings(held_out=1250))


def test_augmentation_only_flips_and_shifts() -> None:
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    changed = train_network.augment(image.expand(64, -1, -1, -1), 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    possible = [p[..., i : i + 28, j : j + 28] for p in (padded, padded.flip(3)) for i in range(5) for j in range(5)]
    used = [[torch.equal(one[None], other) for other in possible].index(True) for one in changed]
    assert len(set(used)) > 20


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors.*data/cnn/train_network\.py"):
        cnn.load_model(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="another network"):
        cnn.load_model(fashion.SUBSET)
