"""Long scripts: what they would run can be run."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from long import peers

from rooms import kept_rows
from rooms.peers.networks import NETWORKS


def test_every_run_of_the_peers_has_a_target_a_method_and_settings() -> None:
    assert len(set(peers.RUNS)) == len(peers.RUNS)
    for run in peers.RUNS:
        target, method, seed = run.split("-")
        assert target in NETWORKS and method in peers.METHODS and int(seed) > 0
        assert method != "spd" or target in peers.SPD


def test_a_result_is_made_once_and_not_kept_under_other_settings(tmp_path: Path) -> None:
    path, made = tmp_path / "one.json", []
    for _ in range(2):
        kept_rows.once(path, {"steps": 3}, "notebooks/tools/long/one.py", lambda: made.append(1) or {"error": 0.5})
    assert made == [1]
    assert json.loads(path.read_text())["result"] == {"error": 0.5}
    with pytest.raises(SystemExit, match="other settings"):
        kept_rows.once(path, {"steps": 4}, "notebooks/tools/long/one.py", dict)
