"""The fits behind the notebook `sequences`: an induction circuit and a recurrent network, seed by seed.

    python notebooks/tools/long/sequences.py [--out data/runs/sequences.json] [--minutes M]

Rows are written as they come and those that are there already are not made again, so that the command may be stopped
and given again. A file made with other settings is refused. ``make long`` runs it to the end.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.report.results import plain
from eigendecomp.study import floors, recovery
from eigendecomp.study.moves import Move, displaced
from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys import induction, recurrent
from rooms import kept_rows, strengths, switches
from rooms.sequences import forgetting, removal
from rooms.switches import Effect

ROOT = Path(__file__).resolve().parents[3]
Parts = Mapping[str, Tensor]  # by parameter, (directions, *shape)
Row = dict[str, Any]
SETTINGS: dict[str, Any] = {
    name: {
        "directions": module.DIRECTIONS, "rank": module.RANK, "kept": module.KEPT, "steps": module.STEPS,
    }
    for name, module in {"induction": removal, "recurrent": forgetting}.items()
}  # fmt: skip
SETTINGS |= {"networks": 4, "sequences": 100, "tries": 5}
SEEDS = {"induction": 5, "recurrent": 20}


def searched(choose: Any, judge: Any, moves: Sequence[Move], largest: float, both: bool = True) -> tuple[int, Effect]:
    """The move, and its step, that do best on the sequences to choose by; their effect on those to judge by."""
    found = [
        switches.search(lambda step, m=m: choose.effect(m, step), largest, both=both, tries=SETTINGS["tries"])
        for m in moves
    ]
    best = min(range(len(found)), key=lambda n: switches.loss(found[n]))
    return best, judge.effect(moves[best], found[best].step)


def part(rows: Parts, number: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """One of the directions, or its part in some parameters."""
    return {name: row[number] for name, row in rows.items() if names is None or name in names}


def dictionaries(d: ed.Decomposition, x: Tensor, seed: int) -> dict[str, Parts]:
    """The learned directions, as many principal components of gradients, as many random ones of the same rank."""
    g = torch.cat([part.flat() for part in d.gradients(x, 1, seed)])
    g = g[g.norm(dim=1) > 0]
    random = floors.random_directions(d.target.shapes, d.decoder.n, d.settings.rank, seed=seed)
    return {
        "direction": d.directions(),
        "principal component": strengths.principal_parts(g, d.decoder.n, d.target.shapes),
        "random": {name: random.dense(name) for name in d.target.shapes},
    }


# ---- induction


def in_heads(change: Parts, truth: Truth) -> Row:
    """By head, the share of a change's squared size, and its cosine with what computes induction there."""
    row: Row = {}
    total = sum(value.square().sum().item() for value in change.values())
    for head, names in truth.layers.items():
        mine = torch.cat([change[n].flatten() if n in change else truth.objects[n][0].flatten() * 0 for n in names])
        object_ = torch.cat([truth.objects[n][0].flatten() for n in names])
        row[f"{head} share"] = mine.square().sum().item() / total
        row[f"{head} cosine"] = torch.cosine_similarity(mine, object_, dim=0).abs().item()
    return row


def silenced(model: induction.Induction, head: int) -> dict[str, Tensor]:
    """The change that takes a head's output away."""
    name = f"heads.{head}.W_O.weight"
    return {name: -dict(model.named_parameters())[name].detach().clone()}


def induction_moves(
    model: induction.Induction, seed: int, steps: int, choose: removal.Removal, truth: Truth
) -> dict[str, list[dict[str, Tensor]]]:
    """By method, the changes of the weights that it has to offer."""
    d = removal.fit(model, seed=seed, steps=steps)
    found = {
        name: [part(rows, v) for v in range(removal.DIRECTIONS)]
        for name, rows in dictionaries(d, choose.sequences.inputs[:40], seed).items()
    }
    for head, names in enumerate(truth.layers.values()):
        alone = removal.fit(model, seed=seed, steps=steps, heads=(head,)).directions()
        found[f"fitted to head {head + 1}"] = [part(alone, v) for v in range(removal.DIRECTIONS)]
        found[f"head {head + 1} of it"] = [part(d.directions(), v, names) for v in range(removal.DIRECTIONS)]
        found[f"head {head + 1} ablated"] = [silenced(model, head)]
    whole = part(truth.objects, 0)
    norm = torch.cat([value.flatten() for value in whole.values()]).norm()
    found["gradient by labels"] = [{name: value / norm for name, value in whole.items()}]
    return found


def induction_rows(model: induction.Induction, seed: int, steps: int = removal.STEPS) -> Iterator[Row]:
    """What every method does to induction and to bigrams.

    The parts of a direction in one head are those of the direction that does best whole.
    """
    n = SETTINGS["sequences"]
    choose, judge = (
        removal.Removal(model, induction.data(n, torch.Generator().manual_seed(start + seed))) for start in (2000, 3000)
    )
    truth = induction.truth(model, choose.sequences)
    offered, best = induction_moves(model, seed, steps, choose, truth), 0
    for method, changes in offered.items():
        few = [changes[best]] if method.endswith("of it") else changes
        ablated = method.endswith("ablated")
        moves = [displaced(model, change) for change in few]
        number, effect = searched(choose, judge, moves, 1.2 if ablated else 12.0, not ablated)
        best = number if method == "direction" else best
        with moves[number](effect.step):
            said, paths = induction.said(model, judge.sequences), removal.path_scores(model, judge.sequences)
        yield {
            "method": method, "left": effect.left, "elsewhere": effect.elsewhere, "beside": effect.beside,
            "induction": said["induction"], "bigrams": said["bigrams"],
            "previous": paths["previous"][0], "induction score": paths["induction"][1], **in_heads(few[number], truth),
        }  # fmt: skip
    said, paths = induction.said(model, judge.sequences), removal.path_scores(model, judge.sequences)
    yield {"method": "network", **said, "previous": paths["previous"][0], "induction score": paths["induction"][1]}


# ---- the recurrent network


def unit_off(model: recurrent.FlipFlop, unit: int) -> dict[str, Tensor]:
    """The change that keeps a unit of the state from being read, by the state or by the output."""
    changes = {}
    for name, p in model.named_parameters():
        if name.startswith(("state_", "read.weight")):
            changes[name] = torch.zeros_like(p)
            changes[name][:, unit] = -p[:, unit].detach()
    return changes


def recurrent_rows(model: recurrent.FlipFlop, seed: int, steps: int = forgetting.STEPS) -> Iterator[Row]:
    """What every method does to each bit, and the scores of the dictionaries."""
    truth, bits = recurrent.truth(model), range(recurrent.BITS)
    draw = torch.Generator().manual_seed(2000 + seed)
    x, y = (recurrent.data(SETTINGS["sequences"], draw) for _ in range(2))
    offered: dict[str, list[list[dict[str, Tensor]]]] = {}  # by method and bit
    scores: dict[str, Row] = {}
    fitted = forgetting.fit(model, seed=seed, steps=steps)
    sides = {side: forgetting.fit(model, seed=seed, steps=steps, parameters=(f"{side}_*",)) for side in truth.layers}
    alone = recurrent.data(100, draw, written=forgetting.WRITTEN)
    sets = {name: (fitted, rows) for name, rows in dictionaries(fitted, alone, seed).items()}
    sets |= {f"fitted to {side}s": (d, d.directions()) for side, d in sides.items()}
    for name, (d, rows) in sets.items():
        direct = name == "direction"
        strength = recovery.strength(d, truth, 1) if direct else strengths.dense_strength(d, rows, truth, 1)
        owner, _ = recovery.owners(strength)
        owner = torch.where(owner >= 0, owner, strength.argmax(1))
        offered[name] = [[part(rows, int(owner[bit]))] for bit in bits]
        scores[name] = recovery.recovered(strength, rows, truth).row()
    for side, names in truth.layers.items():
        offered[f"{side}s of it"] = [
            [{k: v for k, v in offered["direction"][bit][0].items() if k in names}] for bit in bits
        ]
    offered["gradient by labels"] = [[unit_norm(part(truth.objects, bit))] for bit in bits]
    offered["unit"] = [[unit_off(model, unit) for unit in range(model.units)] for _ in bits]
    for method, each in offered.items():
        for bit in bits:
            choose, judge = (forgetting.Forgetting(model, some, bit) for some in (x, y))
            moves = [displaced(model, change) for change in each[bit]]
            number, effect = searched(choose, judge, moves, 1.5 if method == "unit" else 6.0, method != "unit")
            yield {
                "method": method, "bit": bit, "left": effect.left, "elsewhere": effect.elsewhere,
                "own share": forgetting.own_share(model, moves[number], y, bit), **scores.get(method, {}),
            }  # fmt: skip


def unit_norm(change: Parts) -> dict[str, Tensor]:
    """The change at norm one."""
    norm = torch.cat([value.flatten() for value in change.values()]).norm()
    return {name: value / norm for name, value in change.items()}


# ---- the file


@cache
def network(target: str, number: int) -> tuple[nn.Module, Any]:
    """A trained network and what it reaches."""
    return induction.train(seed=number) if target == "induction" else recurrent.train(seed=number)


def rows_of(target: str, seed: int) -> list[Row]:
    """All rows of a seed; networks of the recurrent target take turns."""
    number = seed if target == "induction" else seed % SETTINGS["networks"]
    model, reached = network(target, number)
    make: Callable[..., Iterator[Row]] = induction_rows if target == "induction" else recurrent_rows
    started = time.process_time()
    rows = [plain({"target": target, "seed": seed, **row}) for row in make(model, seed)]
    seconds = plain(time.process_time() - started)
    return [{**row, "cpu_seconds": seconds, "reached": plain(reached)} for row in rows]


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "sequences.json")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no seed after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content, started = kept_rows.read(options.out, SETTINGS, "notebooks/tools/long/sequences.py"), time.monotonic()
    done = {(row["target"], row["seed"]) for row in content["rows"]}
    for target, seed in ((target, seed) for target, count in SEEDS.items() for seed in range(count)):
        if (target, seed) in done or time.monotonic() - started > 60 * options.minutes:
            continue
        rows = rows_of(target, seed)
        content["rows"] += rows
        kept_rows.write(options.out, content)
        print(f"{target} {seed}: {rows[0]['left']:.3f} left, {rows[0]['elsewhere']:.3f} elsewhere, "
              f"{rows[0]['cpu_seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
