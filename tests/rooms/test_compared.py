"""Every decomposition of one network: gradients that are autograd's, and components that take the weights' place."""

import pytest
import torch

from rooms.peers import compared, networks
from rooms.peers.compared import Entry, Problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem("tms", 20, 2)


def test_gradients_are_autograds_against_the_outputs_of_other_samples(problem: Problem) -> None:
    model, x = problem.model, problem.held_out[:3]
    found = problem.gradients(x, 2)
    others = problem.x[-6:].unflatten(0, (3, 2))
    for n in range(3):
        for r in range(2):
            model.zero_grad()
            (model(x[n : n + 1]) - model(others[n, r : r + 1]).detach()).square().sum().backward()
            grads = [p.grad for name, p in model.named_parameters() if name in problem.weights]
            torch.testing.assert_close(found[n, r], torch.cat([g.flatten() for g in grads if g is not None]))


def test_the_split_of_the_weights_takes_their_place_and_random_rows_do_not(problem: Problem) -> None:
    w_in, w_out = problem.weights.values()
    split = [torch.cat([torch.diag(e) @ w_in, (w_out @ torch.diag(e)).T], 1) for e in torch.eye(5)]
    rows = torch.stack([torch.cat([part[:, :2].flatten(), part[:, 2:].T.flatten()]) for part in split])
    random = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    found = [compared.in_place(problem, Entry("L3D", 0, r, r, kept=1.0)) for r in (7 * rows, random)]
    assert found[0] is not None and found[1] is not None
    assert found[0]["weights missed"] < 1e-10 and found[0]["unmasked"] < 1e-10 and found[0]["CI-L0"] == 5
    assert found[0]["adversarial"] < 1e-10  # all are kept, so that no mask may change anything
    assert found[1]["weights missed"] > 0.1 and found[1]["unmasked"] > 0.1
    assert compared.in_place(problem, Entry("principal components", 0, rows, rows)) is None


def test_scores_of_vectors_do_not_hang_on_the_length_of_rows(problem: Problem) -> None:
    w_in, w_out = problem.weights.values()
    rows = torch.stack([torch.cat([(torch.diag(e) @ w_in).flatten(), 0 * w_out.flatten()]) for e in torch.eye(5)])
    for scale in (1.0, -3.0):
        found = compared.both_ways(problem, Entry("ours", 0, scale * rows, rows))
        assert found["least own cosine"] == pytest.approx(1) and found["ML2R"] == pytest.approx(1)
        assert found["MMCS"] == pytest.approx(1) and found["owned"] == 5


def test_the_files_of_the_peers_are_read_and_floors_come_last(problem: Problem) -> None:
    fits = {3: networks.directions("tms", problem.x, 3, steps=5)}
    found = list(compared.entries(problem, fits))
    assert [e.method for e in found[:2]] == ["ours", "ours, refitted"] and found[0].ours is found[1].ours
    assert [e.method for e in found[-2:]] == ["principal components", "random"]
    assert sum(e.method == "NPEFF" for e in found) == len(compared.runs("tms", "npeff")) >= 3
    for e in found:
        assert e.rows.shape[1] == e.reader.shape[1] == problem.target.size


def test_the_soonest_is_the_first_to_reach_the_level() -> None:
    curve = [{"seconds": s, "own_cosine": c} for s, c in ((1.0, 0.5), (2.0, 0.95), (3.0, 0.9), (4.0, 0.99))]
    assert compared.soonest(curve, 0.9) == 2 and compared.soonest(curve, 0.999) is None


def test_speeds_compare_what_was_timed_in_one_process() -> None:
    of = {"network": "tms", "seed": 1, "steps": 1}
    points = [{**of, "method": "ours", "seconds": 0.5, "own_cosine": 0.95}]
    points += [{**of, "method": "SPD", "seconds": s, "own_cosine": c} for s, c in ((1.0, 0.2), (4.0, 0.91))]
    (row,) = compared.speeds(points, {"tms": 0.9})
    assert row["times"] == 8 and row["ours"] == 0.5 and row["SPD"] == 4
    (row,) = compared.speeds(points, {"tms": 0.93})
    assert row["times"] is None and row["SPD"] is None
    kept = compared.curves(["tms"])
    assert {point["method"] for point in kept} == {"ours", "SPD"} and all(point["steps"] for point in kept)
