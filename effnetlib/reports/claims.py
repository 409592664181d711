"""The paper's claims as questions to runs. What counts as support was written before the first result was known.

Every figure is a final top-1 (of the moving average, over all evaluation examples) or a time, with at least three seeds per
point. Every comparison is a difference of means with its 95 % interval (Welch's: the variances may differ).

There are four verdicts. *Supported*: the interval lies on the claim's side. *Contradicted*: it lies on the other side.
*Undecided*: it holds both. *Not testable here*: the runs are missing, or cannot answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape

import numpy as np
from scipy import stats

from effnetlib.reports.paper import table2
from effnetlib.runs.record import Record

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
UNDECIDED = "undecided"
NOT_TESTABLE = "not testable here"
SYMBOLS = {SUPPORTED: "✓", CONTRADICTED: "✗", UNDECIDED: "?", NOT_TESTABLE: "–"}
MIN_SEEDS = 3
FEW_SEEDS = f"a point has fewer than {MIN_SEEDS} seeds"
MARGIN = 0.01  # of top-1: what "costs no accuracy" allows
MIME = "application/vnd.effnetlib.verdict+json"


@dataclass(frozen=True)
class Verdict:
    """What runs say of a claim. In a notebook it shows itself. It also leaves its fields in the executed notebook, where
    `publish.py` collects them.

    Attributes:
      claim: in one sentence. paper: what the paper states of it. ours: our figures, with n and spread.
      verdict: SUPPORTED, CONTRADICTED, UNDECIDED or NOT_TESTABLE.
      why: what counts as support, or why it cannot be tested.
      measured: what `effect` is, in a few words; empty where the claim cannot be tested.
      effect, low, high: the estimate and its 95 % interval, in `unit` ("points" of top-1, or "% of the time").
      least: the effect above which the claim holds, in the same unit: 0, or minus the margin of an equivalence.
      n: the least number of seeds per point.
    """

    claim: str
    paper: str
    ours: str
    verdict: str
    why: str
    measured: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "points"
    least: float = 0.0
    n: int = 0

    @property
    def finding(self) -> str:
        """The effect with its interval and n; where the claim cannot be tested, why not."""
        if self.effect is None:
            return self.why
        interval = f"95 % interval {self.low:+.2f} to {self.high:+.2f}"
        return f"{self.measured} is {self.effect:+.2f} {self.unit} ({interval}, n = {self.n} seeds each)"

    def _repr_mimebundle_(self, **_):
        shown = {name: getattr(self, name) for name in ("claim", "paper", "ours", "verdict", "why")}
        cell = '<td style="text-align: left; white-space: normal">'
        rows = "".join(f"<tr><th>{name}</th>{cell}{escape(value)}</td></tr>" for name, value in shown.items())
        name = f"{SYMBOLS[self.verdict]} {self.verdict.capitalize()}"
        said = f'<p class="verdict"><strong class="{self.verdict}">{name}</strong>: {escape(self.finding)}.</p>'
        details = f"<details><summary>how this was judged</summary><table>{rows}</table></details>"
        text = "\n".join(f"{name:8}{value}" for name, value in shown.items())
        return {"text/plain": f"{name}: {self.finding}.\n{text}", "text/html": said + details, MIME: asdict(self)}


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float

    def points(self) -> str:
        """As percentage points."""
        return f"{100 * self.estimate:+.2f} points (95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f})"

    def judged(self, least: float = 0.0) -> str:
        """The verdict on "above `least`"."""
        return SUPPORTED if self.low > least else CONTRADICTED if self.high < least else UNDECIDED

    def figures(self, measured: str, points: Sequence[Sequence]) -> dict:
        """The fields of a `Verdict` that say how large the effect is, and on how many seeds per point it rests."""
        values = {"effect": 100 * self.estimate, "low": 100 * self.low, "high": 100 * self.high}
        return values | {"measured": measured, "n": min(map(len, points))}


def contrast(*terms: tuple[float, Sequence[float]]) -> Interval:
    """``sum_i weight_i * mean_i`` of independent samples, with Welch and Satterthwaite's interval.

    The variance is ``v = sum_i v_i``, ``v_i = weight_i^2 * s_i^2 / n_i``, the degrees of freedom ``v^2 / sum_i v_i^2 / (n_i - 1)``.

    Args:
      terms: (weight, values) pairs, of at least two values each.
    """
    variances = np.array([weight**2 * np.var(values, ddof=1) / len(values) for weight, values in terms])
    freedom = np.array([len(values) - 1 for _, values in terms])
    estimate = float(sum(weight * np.mean(values) for weight, values in terms))
    if not variances.any():
        return Interval(estimate, estimate, estimate)
    degrees = variances.sum() ** 2 / (variances**2 / freedom).sum()
    low, high = stats.t.interval(0.95, degrees, estimate, np.sqrt(variances.sum()))
    return Interval(estimate, float(low), float(high))


def mean_and_spread(values: Sequence[float]) -> str:
    """As a percentage: mean, standard deviation over seeds where there are several, and n."""
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread} % (n = {len(values)})"


def large_batch(points: Mapping[tuple[str, int], Sequence[float]]) -> Verdict:
    """RMSProp loses accuracy as the batch grows and LARS keeps it.

    Args:
      points: final top-1 by (optimizer, global batch size).
    """
    claim = "RMSProp loses accuracy as the batch grows, and LARS keeps it"
    top1 = (100 * table2().set_index("preset")["top1"]).map("{:.1f} %".format)
    paper = (
        f"B2 with RMSProp: {top1['b2-4096-rmsprop']} at 4,096 and {top1['b2-16384-rmsprop']} at 16,384; "
        f"with LARS: {top1['b2-16384-lars']} there and {top1['b2-32768-lars']} at 32,768 (Table 2)"
    )
    small, large = min(batch for _, batch in points), max(batch for _, batch in points)
    rule = (
        f"from a batch of {small:,} to one of {large:,} RMSProp loses, it loses more than LARS, and LARS is ahead at {large:,}: "
        "all three intervals above 0 (contradicted: one of them below)"
    )
    if missing := {(name, batch) for name in ("rmsprop", "lars") for batch in (small, large)} - set(points):
        return Verdict(claim, paper, "-", NOT_TESTABLE, f"there are no runs of {sorted(missing)}")
    means = _means({f"{optimizer} at {batch:,}": values for (optimizer, batch), values in sorted(points.items())})
    if _few(points.values()):
        return Verdict(claim, paper, means, NOT_TESTABLE, FEW_SEEDS)
    rmsprop, lars = (((1, points[name, small]), (-1, points[name, large])) for name in ("rmsprop", "lars"))
    loses = contrast(*rmsprop)
    more = contrast(*rmsprop, *((-weight, values) for weight, values in lars))
    ahead = contrast((1, points["lars", large]), (-1, points["rmsprop", large]))
    ours = (
        f"{means}. RMSProp loses {loses.points()}, that much more than LARS: {more.points()}; "
        f"LARS is ahead at {large:,} by {ahead.points()}"
    )
    verdicts = {interval.judged() for interval in (loses, more, ahead)}
    verdict = next(each for each in (CONTRADICTED, UNDECIDED, SUPPORTED) if each in verdicts)
    figures = ahead.figures(f"LARS minus RMSProp at {large:,}", points.values())
    return Verdict(claim, paper, ours, verdict, rule, **figures)


def better(
    claim: str, paper: str, ours: tuple[str, Sequence[float]], other: tuple[str, Sequence[float]], margin: float = 0.0
) -> Verdict:
    """Whether one way is better than another, or worse by less than a margin: the interval of the difference of final top-1 lies
    above 0, or above minus the margin.

    Args:
      claim, paper: as in `Verdict`.
      ours, other: (name, final top-1 of the seeds) of the way that the claim favours, and of the other.
    """
    rule = f"the interval of {ours[0]} minus {other[0]} lies above {f'{-100 * margin:.0f} point' if margin else 0}"
    means = _means(dict((ours, other)))
    if _few((ours[1], other[1])):
        return Verdict(claim, paper, means, NOT_TESTABLE, FEW_SEEDS)
    difference = contrast((1, ours[1]), (-1, other[1]))
    figures = difference.figures(f"{ours[0]} minus {other[0]}", (ours[1], other[1])) | {"least": -100 * margin}
    said = f"{means}; difference {difference.points()}"
    return Verdict(claim, paper, said, difference.judged(-margin), rule, **figures)


def polynomial_decay(polynomial: Sequence[float], exponential: Sequence[float]) -> Verdict:
    """Polynomial decay beats exponential for LARS. Takes the final top-1 of each."""
    claim = "polynomial decay beats exponential decay for LARS"
    paper = "polynomial decay was found best for LARS (no figures known to us)"
    return better(claim, paper, ("polynomial", polynomial), ("exponential", exponential))


def warmup(with_warmup: Sequence[float], without: Sequence[float]) -> Verdict:
    """Warm-up is needed by LARS at a large batch. Takes the final top-1 of each."""
    claim = "warm-up is needed at a large batch"
    paper = "43 to 50 epochs of 350 in its LARS recipes (Table 2; no figures without)"
    return better(claim, paper, ("with warm-up", with_warmup), ("without", without))


def bfloat16_convolutions(bfloat16: Sequence[float], float32: Sequence[float]) -> Verdict:
    """bfloat16 convolutions cost no accuracy: less than MARGIN. Takes the final top-1 of each."""
    claim = "bfloat16 convolutions cost no accuracy"
    paper = "no loss of accuracy (section 3; no figures known to us)"
    return better(claim, paper, ("bfloat16", bfloat16), ("float32", float32), MARGIN)


def batch_norm_batch(points: Mapping[int, Sequence[float]]) -> Verdict:
    """Accuracy depends on the batch-norm batch size, with an optimum.

    Args:
      points: final top-1 by batch-norm batch size.
    """
    claim = "accuracy depends on the batch-norm batch size, with an optimum"
    paper = "the group size was tuned (section 3; no figures known to us)"
    rule = (
        "one-way analysis of variance gives p < 0.05, and the best mean lies at neither end of the sizes "
        "(contradicted: p < 0.05, and it lies at an end)"
    )
    sizes = sorted(points)
    means = _means({f"{size:,}": points[size] for size in sizes})
    if _few(points.values()):
        return Verdict(claim, paper, means, NOT_TESTABLE, FEW_SEEDS)
    p = float(stats.f_oneway(*points.values()).pvalue)
    best = max(sizes, key=lambda size: np.mean(points[size]))
    ends = [size for size in (sizes[0], sizes[-1]) if size != best]
    end = max(ends, key=lambda size: np.mean(points[size]))
    verdict = UNDECIDED if p >= 0.05 else SUPPORTED if len(ends) == 2 else CONTRADICTED
    gain = contrast((1, points[best]), (-1, points[end]))
    figures = gain.figures(f"groups of {best:,} minus groups of {end:,}", points.values())
    return Verdict(claim, paper, f"{means}; p = {p:.2g}, best at {best:,}", verdict, rule, **figures)


def distributed_evaluation(all_devices: Sequence[Record], one: Sequence[Record]) -> Verdict:
    """Evaluation on all devices shortens end-to-end time, from the end of compilation to the end of the run.

    Args:
      all_devices, one: runs of one recipe on several devices, evaluated on all of them and on one.
    """
    claim = "evaluation on all devices shortens end-to-end time"
    paper = "evaluating on a part of the machine was the bottleneck, so it evaluates on all cores (section 3; no figures known to us)"
    rule = "the interval of the seconds saved lies above 0"
    if any(record.devices_share_cores for record in (*all_devices, *one)):
        why = "the devices are simulated, and each of them computes on all cores already"
        return Verdict(claim, paper, "-", NOT_TESTABLE, why)
    if _few((all_devices, one)):
        return Verdict(claim, paper, "-", NOT_TESTABLE, FEW_SEEDS)
    on_all, on_one = ([record.timing["total_seconds"] for record in records] for records in (all_devices, one))
    saved = contrast((1, on_one), (-1, on_all))
    means = "; ".join(
        f"on {name}: {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} s (n = {len(values)})"
        for name, values in (("all devices", on_all), ("one", on_one))
    )
    ours = f"{means}; saved {saved.estimate:.1f} s (95 % interval {saved.low:.1f} to {saved.high:.1f})"
    share = contrast((1 / np.mean(on_one), on_one), (-1 / np.mean(on_one), on_all))
    figures = share.figures("time saved", (on_all, on_one)) | {"unit": "% of the time"}
    return Verdict(claim, paper, ours, saved.judged(), rule, **figures)


def _few(points) -> bool:
    """Whether a point has too few seeds to judge."""
    return min(map(len, points)) < MIN_SEEDS


def _means(points: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name}: {mean_and_spread(values)}" for name, values in points.items())
