"""What all tests share: hypothesis draws the same examples on every machine and never looks at the clock."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from eigendecomp.targets.fashion import images, network

# Importing a machine learning library must not reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "stable",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("stable")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fashion_subset() -> tuple[Tensor, Tensor]:
    """The shipped images of the test split, and their labels."""
    return images.load("test", subset=True)


@pytest.fixture(scope="module")
def fashion_network() -> network.FashionCNN:
    return network.load_model()


@pytest.fixture
def whole_fashion() -> None:
    """Skips a test that needs the whole of Fashion-MNIST, where it is not there."""
    if not images.available():
        pytest.skip("needs the whole Fashion-MNIST: python -m eigendecomp.targets.fashion.images fetch")


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Seed 0, and float64 for whatever the test makes."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
