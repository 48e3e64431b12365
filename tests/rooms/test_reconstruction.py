"""Components in the weights' place: those that add up to them compute what they do, under every mask that may be."""

from dataclasses import asdict

import torch

from eigendecomp.study.chains import Stage
from rooms.peers import reconstruction


def split(weight: torch.Tensor) -> torch.Tensor:
    """One component a row."""
    return torch.stack([torch.diag(row) @ weight for row in torch.eye(len(weight)).to(weight)])


def chain() -> tuple[list[Stage], torch.Tensor]:
    torch.manual_seed(0)
    stages = [
        Stage("a", torch.randn(4, 3, dtype=torch.double), None, None),
        Stage("b", torch.randn(3, 2, dtype=torch.double), torch.randn(2, dtype=torch.double), torch.tanh),
    ]
    return stages, torch.randn(30, 4, dtype=torch.double)


def test_masked_components_compute_what_the_masked_weights_do_sample_by_sample() -> None:
    stages, x = chain()
    components = {"a": torch.randn(5, 4, 3, dtype=torch.double), "b": torch.randn(5, 3, 2, dtype=torch.double)}
    mask = torch.rand(30, 5, dtype=torch.double)
    found = reconstruction.masked(stages, components, x, mask)
    bias = stages[1].bias
    assert bias is not None
    for row in range(30):
        a, b = ((mask[row, :, None, None] * part).sum(0) for part in components.values())
        torch.testing.assert_close(found[row], torch.tanh(x[row] @ a @ b + bias))


def test_components_that_add_up_and_are_all_important_leave_nothing_under_any_mask() -> None:
    stages, x = chain()
    parts = {"a": split(stages[0].weight), "b": split(stages[1].weight)}
    components = reconstruction.stacked(parts)
    assert [len(part) for part in components.values()] == [7, 7]
    sure = reconstruction.reconstruction(stages, components, x, torch.ones(30, 7).double(), seed=0)
    assert max(asdict(sure).values()) < 1e-12
    unsure = reconstruction.reconstruction(stages, components, x, torch.zeros(30, 7).double(), seed=0)
    assert unsure.unmasked < 1e-12 < 0.1 < unsure.stochastic < unsure.adversarial and unsure.important > 0.1
    still = reconstruction.reconstruction(stages, components, x, torch.zeros(30, 7).double(), seed=0, steps=0)
    assert still.adversarial < unsure.adversarial
    assert unsure == reconstruction.reconstruction(stages, components, x, torch.zeros(30, 7).double(), seed=0)


def test_a_component_that_nothing_meets_may_be_left_out_of_any_mask() -> None:
    stages, x = chain()
    x[:, 0] = 0
    components = reconstruction.stacked({"a": split(stages[0].weight), "b": stages[1].weight.unsqueeze(0)})
    ci = torch.ones(30, 5).double()
    ci[:, 0] = 0
    assert max(asdict(reconstruction.reconstruction(stages, components, x, ci, seed=0)).values()) < 1e-12


def test_directions_get_the_lengths_at_which_they_add_up_to_every_weight() -> None:
    stages, _ = chain()
    weights = {stage.name: stage.weight for stage in stages}
    rows = torch.cat([5 * split(stages[0].weight).flatten(1), torch.randn(4, 6, dtype=torch.double)], 1)
    found = reconstruction.filled(rows, weights)
    torch.testing.assert_close(found["a"], split(stages[0].weight))
    left = (found["b"].sum(0) - stages[1].weight).flatten()
    torch.testing.assert_close(rows[:, 12:] @ left, torch.zeros(4).double())  # least squares: nothing along the rows
