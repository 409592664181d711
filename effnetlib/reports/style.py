"""The look of figures: one colour per optimizer and for the paper, shared settings, names beside lines."""

import itertools
from collections.abc import Iterable

import numpy as np
import seaborn as sns

# Colour-blind readers can tell these apart (Okabe and Ito).
COLOURS = {"lars": "#0072b2", "rmsprop": "#d55e00", "momentum": "#009e73", "lamb": "#9b4f96", "paper": "#6b6b6b"}
OTHERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f")
NAMES = {"lars": "LARS", "rmsprop": "RMSProp", "momentum": "momentum", "lamb": "LAMB", "paper": "the paper"}
SETTINGS = {
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # for browsers, the second is as wide as the first
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "svg.fonttype": "none",  # text stays text: smaller files, and readers can search it
    "svg.hashsalt": "effnetlib",  # makes the file reproducible
}


def use_style() -> None:
    """Sets the style of all later figures."""
    sns.set_theme(style="whitegrid", palette=OTHERS, rc=SETTINGS)


def palette(names: Iterable) -> dict:
    """A colour per name: fixed ones for the optimizers and the paper, unused ones for other names."""
    known = COLOURS | {NAMES[name]: colour for name, colour in COLOURS.items()}
    found = {name: known.get(name) for name in names}
    free = itertools.cycle(colour for colour in OTHERS if colour not in found.values())
    return {name: colour or next(free) for name, colour in found.items()}


def percent(axes) -> None:
    """Shows the shares on the vertical axis as percentages."""
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")


def log_ticks(axes, values: Iterable[float]) -> None:
    """Makes the horizontal axis logarithmic, with ticks at `values` only."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value:,.6g}" for value in sorted(set(values))])
    axes.minorticks_off()


def mean_line(axes, x, values, place: int = 0, **line) -> None:
    """Draws the mean of each column of `values` (a row per seed) against `x`, with the standard deviation. NaN is no seed.

    `place` is the number of the line: bars that would overlap are set apart.
    """
    x, mean = x * (1 + 0.03 * place), values.mean()
    (drawn,) = axes.plot(x, mean, "o-", **line)
    axes.errorbar(x, mean, values.std().fillna(0), fmt="none", color=drawn.get_color(), capsize=3)


def label_lines(axes) -> None:
    """Replaces the legend by names at the ends of the lines. First draw all panels that share an axis."""
    if axes.get_legend():
        axes.get_legend().remove()
    axes.get_ylim()  # settles the limits
    to_fraction, height, ends = axes.transData + axes.transAxes.inverted(), -1.0, []
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        same = [line.get_xydata() for line in axes.lines if line.get_color() == handle.get_color()]
        longest = max((points[np.isfinite(points).all(axis=1)] for points in same), key=len)
        if len(longest):
            ends.append((to_fraction.transform(longest[-1])[1], NAMES.get(name, name), handle.get_color()))
    for above, (end, name, colour) in enumerate(sorted(ends), 1 - len(ends)):  # minus the number of names above
        height = max(min(end, 1 + 0.075 * above), height + 0.075)
        axes.annotate(name, (1.02, height), color=colour, xycoords="axes fraction", va="center", fontsize=10)
