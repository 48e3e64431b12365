"""The loader of torchvision's MobileNet, with random weights in the place of ImageNet's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from eigendecomp.targets import mobilenet
from eigendecomp.targets.fashion import network as cnn


def test_with_random_weights() -> None:
    model = mobilenet.load(pretrained=False, seed=3)
    assert not model.training and not any(getattr(m, "inplace", False) for m in model.modules())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = cnn.predict(model, images)
    assert logits.shape == (3, 1000) and logits.std(0).mean() > 1e-5  # the images matter
    torch.testing.assert_close(cnn.predict(model, images[1:2]), logits[1:2])
    assert torch.equal(cnn.predict(mobilenet.load(pretrained=False, seed=3), images), logits)

    chosen = {n: p.detach() for n, p in model.named_parameters() if n.startswith(f"{mobilenet.BLOCK}.")}
    assert chosen

    def output(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).logsumexp(1).squeeze()

    gradients = vmap(grad(output), in_dims=(None, 0))(chosen, images)
    alone = grad(output)(chosen, images[2])
    for name in chosen:
        torch.testing.assert_close(gradients[name][2], alone[name], rtol=1e-3, atol=1e-7)


def test_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", closed)
    with pytest.raises(OSError, match=r"no network.*mobilenet_v3_small-\w+\.pth.*pretrained=False"):
        mobilenet.load()
