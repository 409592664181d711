"""How figures look: one colour for each optimizer and for the paper, shared settings, names beside lines."""

import itertools
from collections.abc import Iterable

import numpy as np
import seaborn as sns

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"lars": "#0072b2", "rmsprop": "#d55e00", "momentum": "#009e73", "lamb": "#9b4f96", "paper": "#6b6b6b"}
OTHERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f")
NAMES = {"lars": "LARS", "rmsprop": "RMSProp", "momentum": "momentum", "lamb": "LAMB", "paper": "the paper"}
SETTINGS = {
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # the first is drawn with, the others are as wide
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "svg.hashsalt": "effnetlib",  # the same figure gives the same file
}


def use_style() -> None:
    """Sets the style of all figures that follow."""
    sns.set_theme(style="whitegrid", palette=OTHERS, rc=SETTINGS)


def palette(names: Iterable) -> dict:
    """A colour for each name: an optimizer's and the paper's own, and one that is free for any other."""
    known = COLOURS | {NAMES[name]: colour for name, colour in COLOURS.items()}
    found = {name: known.get(name) for name in names}
    free = itertools.cycle(colour for colour in OTHERS if colour not in found.values())
    return {name: colour or next(free) for name, colour in found.items()}


def percent(axes) -> None:
    """Writes the shares of the vertical axis as percentages."""
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")


def log_ticks(axes, values: Iterable[float]) -> None:
    """Makes the horizontal axis logarithmic, with ticks at these values only."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value:,.6g}" for value in sorted(set(values))])
    axes.minorticks_off()


def label_lines(axes) -> None:
    """Replaces the legend: each line's name stands at the height of its last point, in its colour, apart from its neighbours. Call it
    when all panels that share an axis are drawn."""
    if axes.get_legend():
        axes.get_legend().remove()
    axes.get_ylim()  # settles the limits
    to_fraction, lowest, ends = axes.transData + axes.transAxes.inverted(), -1.0, []
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        same = [line.get_xydata() for line in axes.lines if line.get_color() == handle.get_color()]
        longest = max((points[np.isfinite(points).all(axis=1)] for points in same), key=len)
        if len(longest):
            ends.append((to_fraction.transform(longest[-1])[1], NAMES.get(name, name), handle.get_color()))
    for height, name, colour in sorted(ends):
        lowest = max(height, lowest + 0.075)
        place = {"xycoords": "axes fraction", "va": "center", "fontsize": 10}
        axes.annotate(name, (1.02, lowest), color=colour, **place)
