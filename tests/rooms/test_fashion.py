"""Concepts of Fashion-MNIST, and what is read and moved in the network's middle block."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.study import moves
from eigendecomp.target import Target
from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.fashion import block as cnn_block
from rooms.fashion import concepts as fashion_concepts
from rooms.fashion import jacobians


def picture(*lit: tuple[slice, slice], value: float = 0.5) -> Tensor:
    image = torch.zeros(1, 1, 28, 28)
    for rows, columns in lit:
        image[..., rows, columns] = value
    return image


# --------------------------------------------------------------------------------------------------- concepts


def test_concepts_are_neither_rare_nor_everywhere(fashion_subset: tuple[Tensor, Tensor]) -> None:
    found = fashion_concepts.concepts(*fashion_subset)
    assert len(found) >= 12 and not set(found) & set(fashion.CLASSES)
    for name, holds in found.items():
        assert holds.dtype == torch.bool and holds.shape == (2500,)
        assert 0.05 <= holds.float().mean() <= 0.6, name


@pytest.mark.usefixtures("whole_fashion")
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


# -------------------------------------------------------------------------------------------- from the middle block


@pytest.fixture(scope="module")
def middle(
    fashion_network: cnn.FashionCNN, fashion_subset: tuple[Tensor, Tensor]
) -> tuple[cnn_block.FromMiddle, Tensor]:
    with torch.no_grad():
        return cnn_block.FromMiddle(fashion_network), fashion_network.enter(fashion_subset[0][:8])


def test_the_network_goes_on_from_its_middle_block(fashion_network, middle, fashion_subset) -> None:
    tail, entering = middle
    assert torch.equal(cnn.predict(tail, entering), cnn.predict(fashion_network, fashion_subset[0][:8]))
    with torch.no_grad():
        assert torch.equal(tail.after(tail.block2(entering)), cnn.predict(tail, entering))
    names = {name.removeprefix("after.") for name, _ in tail.named_parameters()}
    assert names < {name for name, _ in fashion_network.named_parameters()}


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
