"""What the notebooks on the classifier start from, on the few images in the repository."""

import pytest
import torch

from eigendecomp.targets.fashion import images, network
from rooms.fashion import prepared


def test_the_block_begins_where_the_network_was_cut() -> None:
    found = prepared.prepare(20, 15, 10, subset=True)
    assert {part: len(x) for part, x in found.images.items()} == {"fit": 20, "choose": 15, "test": 10}
    for part, x in found.images.items():
        torch.testing.assert_close(found.logits[part], network.predict(found.network, x), rtol=1e-4, atol=1e-4)
        assert found.labels[part].shape == (len(x),)
    fit, choose = found.images["fit"].flatten(1), found.images["choose"].flatten(1)
    assert torch.cdist(fit, choose).min() > 0  # no image is in both
    with pytest.raises(ValueError, match="test=100000"):
        prepared.prepare(20, 15, 100000, subset=True)


def test_a_confusion_is_of_the_most_probable_other_class() -> None:
    logits = torch.tensor([[5.0, 1, 0], [0, 1, 5], [2, 0, 1], [0, 5, 4]])
    found = prepared.confusions(logits, torch.tensor([0, 0, 0, 1]), 1)
    assert {pair: index.tolist() for pair, index in found.items()} == {(0, 1): [0], (0, 2): [1, 2], (1, 2): [3]}
    assert set(prepared.confusions(logits, torch.tensor([0, 0, 0, 1]), 2)) == {(0, 2)}


def test_a_direction_turned_by_its_sign_raises_what_it_is_named_for() -> None:
    model = prepared.prepare(4, 4, 8, subset=True)
    x, bias = model.entering["test"], model.tail.after.head.bias
    lowers = -3 * torch.eye(10)[images.ANKLE_BOOT]
    moves = torch.stack([lowers, -lowers, torch.ones(10)])
    wanted = torch.eye(10)[[images.ANKLE_BOOT] * 3]
    signs = prepared.raising(moves, wanted)
    assert signs.tolist() == [1.0 if move @ wanted[0] >= 0 else -1.0 for move in moves - moves.mean(1, keepdim=True)]
    with torch.no_grad():
        before = model.tail(x).softmax(1)[:, images.ANKLE_BOOT]
        bias.add_(signs[0] * lowers)
        assert (model.tail(x).softmax(1)[:, images.ANKLE_BOOT] >= before).all()
