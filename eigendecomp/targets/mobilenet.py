"""torchvision's MobileNet-v3-small, the convolutional network of the published setting; no notebook runs it.

It decomposes one block, the parameters ``BLOCK + ".*"``, on ImageNet's weights, which a download gives.
"""

from pathlib import Path

import torch
from torch import nn

BLOCK = "features.7"


def load(pretrained: bool = True, seed: int = 0) -> nn.Module:
    """torchvision's MobileNet-v3-small in eval mode, no activation in place; its logits are ImageNet's 1000.

    ``pretrained`` takes the ImageNet weights by name, from torch's cache or the network. Without it, weights
    are random, drawn from the seed, with the normalisation statistics of noise, for tests only. The published
    setting decomposes the parameters ``BLOCK + ".*"``. Raises OSError with the remedies where the
    weights cannot be had, ImportError where torchvision is not installed.
    """
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1 if pretrained else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mobilenet_v3_small(weights=weights)
            if not pretrained:  # with untouched statistics the signal fades to 1e-10 on its way through
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = 1.0
                with torch.no_grad():
                    model.train()(torch.randn(32, 3, 64, 64))
    except OSError as error:
        assert weights is not None
        raise OSError(
            f"the weights of mobilenet_v3_small could not be fetched ({error}). Remedies: put "
            f"{Path(weights.url).name} into the folder checkpoints of torch.hub.get_dir() "
            "(TORCH_HOME/hub); or, for a test, use random weights: load(pretrained=False)"
        ) from None
    for module in model.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 (pyright takes a module's attributes for tensors)
    return model.eval()
