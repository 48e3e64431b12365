"""Drawings that several notebooks share."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from eigendecomp.report import plots

mpl.use("Agg")


def test_a_layered_network_has_a_line_for_each_weight_and_a_dot_for_each_unit() -> None:
    figure, ax = plt.subplots()
    weights = [torch.randn(5, 2), torch.randn(2, 3)]
    plots.layered(ax, weights, [None, None, torch.tensor([0.0, 0.5, -0.5])], limit=1.0)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(ax.lines) - len(dots) == 5 * 2 + 2 * 3
    assert len(dots) == 5 + 2 + 3
    plt.close(figure)


def test_first_and_last_units_of_a_layered_network_show_input_and_output() -> None:
    figure, ax = plt.subplots()
    nodes = (torch.tensor([0.0, 1.0]), torch.tensor([0.25]))
    plots.layered(ax, [torch.randn(2, 1)], [None, None], limit=1.0, nodes=nodes)
    fills = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "o"]
    assert fills == ["1.0", "0.0", "0.75"]
    plt.close(figure)


def test_a_lines_name_stands_beside_it_in_its_colour() -> None:
    _, ax = plt.subplots()
    plots.name_line(ax, 1.0, 2.0, "ours", plots.OURS)
    (text,) = ax.texts
    assert (text.get_text(), text.get_color(), text.get_fontsize()) == ("ours", plots.OURS, 7)
    assert text.xy == (1.0, 2.0)  # pyright: ignore[reportAttributeAccessIssue]
