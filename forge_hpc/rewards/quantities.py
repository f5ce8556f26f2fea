r"""Numbers with a unit: ``5\text{ cm}``, ``50\%``, ``$1,234.50``, ``90^\circ``, ``3 million``, ``72 apples``.

A unit may be left out; one that is known is no other one that is known: 5 cm are not 5 m. Nothing is converted.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from forge_hpc.rewards.numbers import Number, leading_number, same_number, tidy, with_plain_fractions

_UNITS = """
%: percent, percentage, pct, \\%
degree: degrees, deg, °, ^\\circ, ^{\\circ}, \\circ, \\degree
$: dollar, dollars, usd, bucks
cent: cents, ¢
€: euro, euros, eur
£: pound sterling, gbp
mm: millimeter, millimeters, millimetre, millimetres
cm: centimeter, centimeters, centimetre, centimetres
m: meter, meters, metre, metres
km: kilometer, kilometers, kilometre, kilometres
in: inch, inches
ft: foot, feet
yd: yard, yards
mi: mile, miles
mg: milligram, milligrams
g: gram, grams
kg: kilogram, kilograms
lb: lbs, pound, pounds
oz: ounce, ounces
s: sec, secs, second, seconds
min: mins, minute, minutes
h: hr, hrs, hour, hours
day: days
week: weeks
month: months
year: years, yr, yrs
l: liter, liters, litre, litres
ml: milliliter, milliliters, millilitre, millilitres
mph: miles per hour, mi/h, miles/hour
km/h: kph, kmh, kilometers per hour, km per hour, kilometers/hour, km/hr
m/s: meters per second, meters/second
am: a.m.
pm: p.m.
"""
_NAMES = {
    alias.strip(): line.partition(":")[0]
    for line in _UNITS.strip().splitlines()
    for alias in [line.partition(":")[0], *line.partition(":")[2].split(", ")]
}
_FACTORS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SIGNS = {"$": "$", "€": "€", "£": "£"}
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox)\s?\{([^{}]*)\}")
_WITH_UNIT = re.compile(
    r"(.*[\d})]) ?((?:\\(?:text|textrm|mathrm|mbox)\s?\{[^{}]*\}|\\%|%|\^\{?\\circ\}?)(?:\^\{?[23]\}?)?)", re.DOTALL
)
_POWER = re.compile(r"\^?\{?([23²³])\}?\Z")
_WORDS = re.compile(r"(?:\\?[A-Za-z%°¢$€£/.'-]+|\^\\?\{?\\?circ\}?|\^?\{?[23²³]\}?|\s){1,12}")
_NO_UNIT = re.compile(r"(?:or|and|to|times|choose|mod|is|=|plus|minus|divided|per cent of)\b", re.IGNORECASE)


class Unit(NamedTuple):
    """What a number counts."""

    name: str = ""
    """Of a known unit, else ""."""

    def fits(self, other: Unit) -> bool:
        return not self.name or not other.name or self.name == other.name


class Quantity(NamedTuple):
    """A number and its unit."""

    number: Number
    unit: Unit


def quantity(text: str) -> Quantity | None:
    """The number with a unit or without that is all of a text, else None."""
    text = with_plain_fractions(tidy(text)).strip()
    found = leading_number(text)
    if found is None:
        return None
    number, rest = found
    sign = re.match(r"[-+]?\s?\\?([$€£])", text)
    if rest.strip() in ("", "."):
        return Quantity(number, Unit(_SIGNS[sign[1]] if sign else ""))
    words = _TEXT.sub(r" \1 ", rest)
    is_glued = rest[0].isalpha()
    for factor, value in _FACTORS.items():
        if match := re.match(rf"\s*{factor}s?\b", words, re.IGNORECASE):
            number, words, is_glued = number._replace(value=number.value * value), words[match.end() :], False
    if not words.strip():
        return Quantity(number, Unit(_SIGNS[sign[1]] if sign else ""))
    unit = read_unit(words, known_only=is_glued)
    return None if unit is None else Quantity(number, unit)


def read_unit(words: str, known_only: bool) -> Unit | None:
    """The unit that all of some words say, None where they say none; of unknown ones nothing but that is known."""
    if not _WORDS.fullmatch(words) or _NO_UNIT.match(words.strip()):
        return None
    name = (
        " ".join(words.split()).lower().strip(" ").removesuffix(".") if words.strip() not in _NAMES else words.strip()
    )
    if re.match(r"(?:square|sq\.?|cubic|cu\.?)\s", name):
        power, _, name = name.partition(" ")
        exponent = "2" if power.startswith("sq") else "3"
    else:
        match = _POWER.search(name)
        exponent = {"²": "2", "³": "3"}.get(match[1], match[1]) if match else ""
        name = name[: match.start()].strip() if match else name
    if name.replace(" ", "") in ("^\\circ", "^{\\circ}"):
        name = "degree"
    known = _NAMES.get(name) or _NAMES.get(name.partition(" ")[0])
    if known is not None:
        return Unit(known + exponent)
    if known_only or len(name.replace(" ", "")) < 2 or "\\" in name:
        return None
    return Unit()


def without_unit(text: str) -> tuple[str, Unit] | None:
    r"""An expression and its unit, ``5\sqrt{2}\text{ cm}``; None where it ends in none."""
    match = re.fullmatch(
        r"(.*[\d})]) ?((?:\\(?:text|textrm|mathrm|mbox)\s?\{[^{}]*\}|\\%|%|\^\{?\\circ\}?)(?:\^\{?[23]\}?)?)",
        text,
        re.DOTALL,
    )
    if match is None or not re.search(r"\d|\\pi", match[1]):
        return None
    unit = read_unit(_TEXT.sub(r" \1", match[2]), known_only=False)
    return None if unit is None or unit.name == "%" else (match[1], unit)


def same_quantity(wanted: Quantity, given: Quantity, tolerance: Fraction) -> bool:
    """Whether two quantities are the same. A sign of percent may be left out where the number is 1 or more."""
    if not wanted.unit.fits(given.unit):
        return False
    a, b = wanted.number, given.number
    percents = wanted.unit.name == "%", given.unit.name == "%"
    if percents[0] == percents[1]:
        return same_number(a, b, tolerance)
    shares = [n._replace(value=n.value / 100) if percent else n for n, percent in zip((a, b), percents, strict=True)]
    bare = abs(a.value) >= 1 and same_number(a, b, tolerance)
    return bare or same_number(shares[0], shares[1], tolerance)
