"""Claims of the paper, and the rule for the verdict on each. The rules were written before the first result.

A claim states one or more differences between runs, seed by seed. All must lie above a limit: 0, or minus a margin for
a claim of no loss. There are four verdicts. *Supported*: each interval lies above the limit. *Contradicted*: one lies
below. *Undecided*: one contains the limit, or is too wide. *Not testable here*: runs are missing, or cannot answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from effnetlib.reports.paper import table2
from effnetlib.reports.tables import SEARCH
from effnetlib.runs.record import Record

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
UNDECIDED = "undecided"
NOT_TESTABLE = "not testable here"
SYMBOLS = {SUPPORTED: "✓", CONTRADICTED: "✗", UNDECIDED: "?", NOT_TESTABLE: "–"}
MIN_SEEDS = 3
FIRST_SEEDS, MOST_SEEDS = 5, 8  # in the first stage, and in both
WIDEST = 1.0  # the largest half of an interval, in points of top-1
MARGIN = 1.0  # in points of top-1, for "costs no accuracy" and "is no worse"
# What a verdict does not say, by the first words of its claim.
LIMITS = {
    "RMSProp loses": "This test does not say at which batch RMSProp fails on ImageNet, where a run has many more steps.",
    "a plain optimizer": "This test does not say that LARS is needless: of both, the peak learning rate alone was tuned.",
    "polynomial decay": "This test does not rank the two in long runs, where both can end near zero.",
    "warm-up": "This test does not say how long a warm-up should be, nor that the paper's recipes could do without.",
    "accuracy depends": "This test does not say which batch-norm batch suits another network, batch or data set.",
    "bfloat16": "This test does not say that bfloat16 is faster: no time is compared.",
    "evaluation on all": "This test does not say what a pod saves, where many more devices would wait for one.",
}
MIME = "application/vnd.effnetlib.verdict.2+json"


@dataclass(frozen=True)
class Verdict:
    """The verdict of our runs on a claim. As a notebook output it also stores its fields, for `html.verdicts`.

    Attributes:
      claim: one sentence. protocol: rates "tuned" at each batch, "scaled" from the smallest, or those of the "preset"s;
        "timed" for times.
      paper: the paper's figures. ours: our figures, with n and spread.
      verdict: SUPPORTED, CONTRADICTED, UNDECIDED or NOT_TESTABLE. rule: what counts as support, or why no test is made.
      measured: the decisive difference, in words. It is empty, and `effect` is None, if the claim cannot be tested.
      effect, low, high: the mean difference and its 95 % interval, in `unit`: "points" of top-1, or "percent" of time.
      least: the limit above which the claim holds, in the same unit. most: the limit below which it holds, if any.
      n: the number of seeds.
      more: the seeds still to run, (first, last) by point.
    """

    claim: str
    protocol: str
    paper: str
    ours: str
    verdict: str
    rule: str
    measured: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "points"
    least: float = 0.0
    most: float | None = None
    n: int = 0
    more: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def finding(self) -> str:
        """The effect with its interval and n, or why the claim cannot be tested."""
        if self.effect is None:
            return self.rule
        interval = f"95 % interval {self.low:+.2f} to {self.high:+.2f}, n = {self.n}"
        return f"{self.measured} is {self.effect:+.2f} {self.unit} ({interval})"

    @property
    def meaning(self) -> str:
        """What the verdict says, in one sentence."""
        said = {SUPPORTED: "At this size the claim holds", CONTRADICTED: "At this size the opposite holds",
                UNDECIDED: "Our runs leave it open", NOT_TESTABLE: "Our runs cannot test it"}  # fmt: skip
        why = ""
        if self.verdict == UNDECIDED:
            inside = self.low <= self.least <= self.high
            why = f", which includes {self.least:g}" if inside else ", which is too wide for the rule"
        return f"{said[self.verdict]}: {self.finding}{why}."

    @property
    def limit(self) -> str:
        """What the verdict does not say, in one sentence."""
        return next(text for start, text in LIMITS.items() if self.claim.startswith(start))

    def _repr_mimebundle_(self, **_):
        shown = {name: getattr(self, name) for name in ("claim", "protocol", "paper", "ours", "verdict", "rule")}
        shown |= {"still to run": seeds_to_run([self])} if self.more else {}
        cell = '<td style="text-align: left; white-space: normal">'
        rows = "".join(f"<tr><th>{name}</th>{cell}{escape(value)}</td></tr>" for name, value in shown.items())
        name = f"{SYMBOLS[self.verdict]} {self.verdict.capitalize()}"
        about = f"{self.claim} ({self.protocol}): {self.finding}."
        said = f'<p class="verdict"><strong class="{self.verdict}">{name}</strong>: {escape(about)}</p>'
        details = f"<details><summary>how this was judged</summary><table>{rows}</table></details>"
        text = "\n".join(f"{name}: {value}" for name, value in shown.items())
        return {"text/plain": f"{name}: {about}\n{text}", "text/html": said + details, MIME: asdict(self)}


def seeds_to_run(verdicts: Sequence[Verdict]) -> str:
    """The seeds still to run, such as "seeds 5-7 of lars-4096, rmsprop-4096"; empty if none."""
    asked = pd.DataFrame([(*item[1], item[0]) for verdict in verdicts for item in verdict.more.items()])
    if asked.empty:
        return ""
    most = asked.sort_values(1, ascending=False, kind="stable").drop_duplicates(2).sort_index()
    groups = most.groupby([0, 1])[2].agg(", ".join)
    return "; ".join(f"seeds {first}-{last} of {names}" for (first, last), names in groups.items())


class Interval(NamedTuple):
    """A mean over n seeds, half its 95 % interval, and the number of seeds that the rule needs."""

    mean: float
    half: float
    n: int
    wanted: int

    def __str__(self):
        return f"{self.mean:+.2f} ({self.mean - self.half:+.2f} to {self.mean + self.half:+.2f})"


def interval(differences: Sequence[float], first: int = FIRST_SEEDS, most: int = MOST_SEEDS) -> Interval:
    """Stein's two-stage interval (1945), for differences in points of top-1, ordered by seed::

        mean of the first n +- t * s / sqrt(n)

    s is the standard deviation of the first five, and ``t = t(0.975, 4)``. n is the least with ``t * s / sqrt(n) <= 1``
    from 5 to 8. The interval covers the truth in 95 % of all cases for any spread, because n depends on s alone. With
    fewer than five, or with `first` and `most` equal to their number, there is one stage: Student's interval.
    """
    stage = np.asarray(differences[:first])
    reach = stats.t.ppf(0.975, len(stage) - 1) * np.std(stage, ddof=1)
    wanted = first if len(stage) < first else int(np.clip(np.ceil((reach / WIDEST) ** 2), first, most))
    used = differences[:wanted]
    return Interval(float(np.mean(used)), float(reach / np.sqrt(len(used))), len(used), wanted)


def by_seed(records: Sequence[Record]) -> pd.DataFrame:
    """Final top-1 in percent: one row per seed, one column per point. `attrs` has their protocol: "preset" without a search."""
    rows = [(record.recipe.seed, record.point, 100 * record.result["final_top1"]) for record in records]
    table = pd.DataFrame(rows, columns=["seed", "point", "top1"]).pivot(index="seed", columns="point", values="top1")
    searched = any(True for record in records for _ in record.directory.parent.glob(f"{SEARCH}*"))
    table.attrs["protocol"] = "tuned" if searched else "preset"
    return table


def judge(
    claim: str, paper: str, parts: Mapping[str, Mapping[str, int]], values: pd.DataFrame, *, protocol: str = "", least: float = 0,
    unit: str = "points",
) -> Verdict:  # fmt: skip
    """The verdict on "every part lies above `least`". It is contradicted if one lies below. Shows the weakest part.

    Args:
      claim, paper, least, unit: as in `Verdict`. protocol: as there; the default is that of `values`.
      parts: for each difference, its name and the weight of each point in it.
      values: one row per seed and one column per point, in `unit`. Top-1 is judged in two stages. It is undecided while
        half the interval is above one point. Time is judged in one stage.
    """
    protocol = protocol or values.attrs.get("protocol", "tuned")
    rule = f"the 95 % interval of {', and of '.join(parts)} lies above {least:g}{f' {unit}' if least else ''}"
    points = list(dict.fromkeys(point for weights in parts.values() for point in weights))
    if missing := [point for point in points if point not in values]:
        return Verdict(claim, protocol, paper, "-", NOT_TESTABLE, f"there are no runs of {', '.join(missing)}")
    summary = values[points].agg(["mean", "std", "count"])
    ours = "; ".join("{}: {:.2f} ± {:.2f} % (n = {:.0f})".format(point, *summary[point]) for point in points)
    ours = ours.replace(" ± nan", "")
    found, more = [], {}
    for measured, weights in parts.items():
        differences = (values[list(weights)] * pd.Series(weights)).sum(axis=1, skipna=False).dropna().sort_index()
        if len(differences) < MIN_SEEDS:
            few = f"fewer than {MIN_SEEDS} seeds have runs of {', '.join(weights)}"
            return Verdict(claim, protocol, paper, ours, NOT_TESTABLE, few)
        diff = interval(differences.to_numpy(), *(() if unit == "points" else 2 * (len(differences),)))
        wide = unit == "points" and diff.half > WIDEST
        above, below = diff.mean - diff.half > least, diff.mean + diff.half < least
        verdict = UNDECIDED if wide else SUPPORTED if above else CONTRADICTED if below else UNDECIDED
        found.append((verdict, measured, diff))
        ours += f"; {measured}: {diff} {unit}"
        more |= {point: (n, diff.wanted - 1) for point in weights if (n := int(values[point].count())) < diff.wanted}
    order = (CONTRADICTED, UNDECIDED, SUPPORTED)
    verdict, measured, diff = min(found, key=lambda part: (order.index(part[0]), part[2].mean - part[2].half))
    figures = {"effect": diff.mean, "low": diff.mean - diff.half, "high": diff.mean + diff.half, "n": diff.n}
    return Verdict(claim, protocol, paper, ours, verdict, rule, measured, **figures, unit=unit, least=least, more=more)


def protocols(top1: pd.DataFrame) -> list[str]:
    """The protocols for large batches that a suite has runs of. Here and below `top1` is from `by_seed`."""
    return [top1.attrs.get("protocol", "tuned"), *(["scaled"] if top1.columns.str.endswith("-scaled").any() else [])]


def point_names(top1: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The names of the points OPTIMIZER-BATCH: one row per batch, the smallest first, one column per optimizer.

    At the smallest batch the scaled LARS and momentum are the tuned ones. Scaled RMSProp has another schedule there."""
    batches = sorted({int(name[1]) for name in map(re.compile(r"[a-z]+-(\d+)(-scaled)?$").match, top1.columns) if name})
    suffix = "-scaled" * (protocol == "scaled")
    names = {name: [f"{name}-{batch}{suffix}" for batch in batches] for name in ("lars", "rmsprop", "momentum")}
    for name in ("lars", "momentum"):
        names[name][0] = names[name][0].removesuffix(suffix)
    return pd.DataFrame(names, index=batches)


def large_batch(top1: pd.DataFrame, protocol: str) -> Verdict:
    claim = "RMSProp loses accuracy as the batch grows, and LARS keeps it"
    stated = table2().set_index("preset")["top1"].map("{:.1%}".format)
    paper = (
        f"B2 with RMSProp: {stated['b2-4096-rmsprop']} at 4,096 and {stated['b2-16384-rmsprop']} at 16,384; "
        f"with LARS: {stated['b2-16384-lars']} there and {stated['b2-32768-lars']} at 32,768 (Table 2)"
    )
    names = point_names(top1, protocol)
    small, large = names.iloc[0], names.iloc[-1]
    loss = {small["rmsprop"]: 1, large["rmsprop"]: -1}
    parts = {
        f"RMSProp at {small.name:,} minus RMSProp at {large.name:,}": loss,
        f"RMSProp's loss to {large.name:,} minus LARS's": loss | {small["lars"]: -1, large["lars"]: 1},
        f"LARS minus RMSProp at {large.name:,}": {large["lars"]: 1, large["rmsprop"]: -1},
    }
    return judge(claim, paper, parts, top1, protocol=protocol)


def plain_optimizer(top1: pd.DataFrame, protocol: str) -> Verdict:
    """Momentum is no worse than LARS at the largest batch. Later work raised this question."""
    claim = "a plain optimizer, momentum, is no worse than LARS at a large batch"
    paper = "no such optimizer was tried; Nado et al. (2021) found that it does as well for ResNet-50"
    large = point_names(top1, protocol).iloc[-1]
    parts = {f"momentum minus LARS at {large.name:,}": {large["momentum"]: 1, large["lars"]: -1}}
    return judge(claim, paper, parts, top1, protocol=protocol, least=-MARGIN)


def better(claim: str, paper: str, top1: pd.DataFrame, ours: str, *others: str, least: float = 0) -> Verdict:
    """The point `ours` is better than each of `others`."""
    return judge(claim, paper, {f"{ours} minus {other}": {ours: 1, other: -1} for other in others}, top1, least=least)


def polynomial_decay(top1: pd.DataFrame, polynomial: str, exponential: str, which: str) -> Verdict:
    """Polynomial decay beats exponential decay for LARS. `which` describes the latter, in words."""
    claim = f"polynomial decay beats exponential decay {which}, for LARS"
    return better(claim, "polynomial decay was found best (no figures known to us)", top1, polynomial, exponential)


def warmup(top1: pd.DataFrame, usual: str, none: str, optimizer: str) -> Verdict:
    """Warm-up is needed at a large batch."""
    paper = "43 to 50 epochs of 350 in its LARS recipes (Table 2; no figures without)"
    return better(f"warm-up is needed at a large batch, by {optimizer}", paper, top1, usual, none)


def batch_norm_batch(top1: pd.DataFrame, small: str, middle: str, large: str) -> Verdict:
    """Accuracy depends on the batch-norm batch size, with an optimum: `middle` beats both ends."""
    claim = "accuracy depends on the batch-norm batch size, with an optimum"
    return better(claim, "the group size was tuned (section 3; no figures known to us)", top1, middle, small, large)


def bfloat16_convolutions(top1: pd.DataFrame, bfloat16: str, float32: str) -> Verdict:
    """bfloat16 convolutions cost no accuracy: the difference is within a point, in both directions."""
    paper = "no loss of accuracy (section 3; no figures known to us)"
    both = ((bfloat16, float32), (float32, bfloat16))
    parts = {f"{ours} minus {other}": {ours: 1, other: -1} for ours, other in both}
    return replace(judge("bfloat16 convolutions cost no accuracy", paper, parts, top1, least=-MARGIN), most=MARGIN)


def distributed_evaluation(all_devices: Sequence[Record], one: Sequence[Record]) -> Verdict:
    """Evaluation on all devices shortens end-to-end time, from the end of compilation to the end of the run.

    Args:
      all_devices, one: runs of one recipe on several devices, evaluated on all devices and on one.
    """
    first = all_devices[0]
    ratio = first.timing["images"] / (len(first.frame("eval")) * first.result["eval_examples"])
    claim = f"evaluation on all devices shortens end-to-end time ({ratio:.3g} training images per evaluated one)"
    paper = "evaluating on a part of the machine was the bottleneck (section 3; no figures known to us)"
    if any(record.devices_share_cores for record in (*all_devices, *one)):
        why = "the devices are simulated, and each one already computes on all cores"
        return Verdict(claim, "timed", paper, "-", NOT_TESTABLE, why)
    seconds = {
        name: pd.Series({record.recipe.seed: record.timing["total_seconds"] for record in records})
        for name, records in (("on one", one), ("on all", all_devices))
    }
    shares = 100 * pd.DataFrame(seconds) / seconds["on one"].mean()
    return judge(claim, paper, {"time saved": {"on one": 1, "on all": -1}}, shares, protocol="timed", unit="percent")
