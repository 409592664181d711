"""A measurement: a value a round, the median and the range over the rounds, and what was aimed at; and the table of them."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass
class Measurement:
    """One line of the table.

    Attributes:
      name: what is measured.
      unit: of the values.
      values: one a round; none where it has not run, which `note` then explains.
      at_least, at_most: what is aimed at, for the median; None is nothing.
      note: what a reader must know.
    """

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without an aim, or without a value."""
        if not self.values or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.median >= self.at_least) and (
            self.at_most is None or self.median <= self.at_most
        )

    def to_dict(self) -> dict:
        """All of it, and what follows from it."""
        spread = {"min": min(self.values), "max": max(self.values)} if self.values else {"min": None, "max": None}
        return asdict(self) | {"rounds": len(self.values), "median": self.median, **spread, "met": self.met}


def in_turn(unit: str, rounds: int, competitors: dict[str, Callable[[], float]], note: str = "") -> list[Measurement]:
    """A measurement of each competitor, by name. They take turns, A B C A B C …, so that noise meets all of them.

    >>> [each.values for each in in_turn("s", 2, {"one": iter([1, 3]).__next__, "other": iter([2, 4]).__next__})]
    [[1, 3], [2, 4]]
    """
    measurements = {name: Measurement(name, unit, note=note) for name in competitors}
    for _ in range(rounds):
        for name, competitor in competitors.items():
            measurements[name].values.append(competitor())
    return list(measurements.values())


def ratio(name: str, above: Measurement, below: Measurement, **options) -> Measurement:
    """``above / below``, round by round: both were measured within seconds, whatever else the machine was doing.

    >>> ratio("a over b", Measurement("a", "s", [2.0, 6.0, 9.0]), Measurement("b", "s", [1.0, 2.0, 3.0])).values
    [2.0, 3.0, 3.0]
    """
    values = [a / b for a, b in zip(above.values, below.values, strict=True)]
    return Measurement(name, "times", values, **options)


def table(measurements: list[dict]) -> str:
    """The record's measurements for a terminal: a line each, and the notes below."""
    rows = [("what", "unit", "median", "least to greatest", "rounds", "aim", "")]
    notes = []
    for each in measurements:
        mark = ""
        if each["note"]:
            if each["note"] not in notes:
                notes.append(each["note"])
            mark = f" ({notes.index(each['note']) + 1})"
        measured = ("not run", "", "")
        if each["values"]:
            measured = (
                _number(each["median"]),
                f"{_number(each['min'])} to {_number(each['max'])}",
                str(each["rounds"]),
            )
        aims = (("at least", each["at_least"]), ("at most", each["at_most"]))
        aim = ", ".join(f"{word} {value:g}" for word, value in aims if value is not None)
        rows.append(
            (each["name"] + mark, each["unit"], *measured, aim, {True: "met", False: "missed", None: ""}[each["met"]])
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *(f"({number}) {note}" for number, note in enumerate(notes, 1))])


def _number(value: float) -> str:
    """Four digits.

    >>> _number(1234.6), _number(12.3456), _number(0.0123456)
    ('1,235', '12.35', '0.01235')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
