"""What all tests share: hypothesis draws the same examples on every machine and never looks at the clock."""

import os

import torch
from hypothesis import HealthCheck, Phase, settings

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
