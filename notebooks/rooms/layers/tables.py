"""Tables of the kept runs of `layers`."""

import pandas as pd

SCORES = ["owned", "selectivity", "mean_cosine", "nc"]


def over_seeds(group: pd.DataFrame) -> pd.Series:
    """A line over seeds: means, and of the least scores the least."""
    full = int((group["owned"] == group["features"]).sum())
    means = group[["owned", "selectivity", "mean_cosine", "mean_reader", "nc", "fit_cpu_seconds"]].mean()
    least = group[["least_selectivity", "least_cosine", "least_reader", "least_nc"]].min()
    return pd.Series({"seeds": len(group), "all owned": full, **means, **least, "nc sd": group["nc"].std()})


def ways(fits: pd.DataFrame) -> pd.DataFrame:
    """How often all features own a direction with 1.5 of them a feature, by layers and by how fits start."""
    lines = []
    for _, group in fits[fits["multiple"] == 1.5].groupby(["layers", "single"]):
        one = group.iloc[0]
        way = "one, from random directions" if one["single"] else "the better of two, from samples"
        lines.append({
            "layers": one["layers"], "way": way,
            "fits": len(group), "all owned": int((group["owned"] == group["features"]).sum()),
            "seconds": group["fit_cpu_seconds"].mean(),
        })  # fmt: skip
    return pd.DataFrame(lines)


def floors(usual: pd.DataFrame, single: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds that have floors, with an identity embedding, and directions fitted to one layer alone."""
    some = usual[(usual["embedding"] == "identity") & usual["random nc"].notna()]
    lines = []
    for layers, group in some.groupby("layers"):
        for name, before in (("learned", ""), ("principal components", "principal "), ("random", "random ")):
            scores = {key: group[before + key].mean() for key in SCORES}
            lines.append({"layers": layers, "directions": name, **scores})
    for _, row in single.iterrows():
        alone = f"fitted to layer {row['only'] + 1} alone"
        lines.append({"layers": row["layers"], "directions": alone, **{key: row[key] for key in SCORES}})
    return pd.DataFrame(lines)
