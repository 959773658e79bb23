"""How the report writes names and numbers."""

from __future__ import annotations

import math
import re
from html import escape
from numbers import Real
from typing import Any

# Metrics between 0 and 1 that are read in percent; any other (a median rank) is a plain number.
_SHARE = re.compile(r"R@\d+$|accuracy|auroc|f1|precision|recall|sensitivity|specificity")
_PERCENT = "\u00a0%"
# Characters that HTML cannot hold even escaped, and halves of surrogate pairs, which UTF-8 cannot.
_NOT_HTML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def text(value: Any) -> str:
    """Return `value` safe for an element or a quoted attribute: all foreign text passes here."""
    return escape(_NOT_HTML.sub("\ufffd", str(value)))


def number(value: Any) -> float:
    """Return `value` if it is a finite number, else NaN."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else math.nan


def count(value: Any) -> str:
    """Return a count with its thousands set apart, or a dash."""
    return "\u2013" if math.isnan(number(value)) else f"{number(value):,.0f}"


def is_share(metric: str) -> bool:
    """Return whether `metric` lies between 0 and 1 and is read in percent."""
    return _SHARE.search(metric) is not None


def figure(metric: str, value: Any) -> str:
    """Return the value of `metric` in its unit, or a dash."""
    value = number(value)
    if math.isnan(value):
        return "\u2013"
    return f"{100 * value:.1f}{_PERCENT}" if is_share(metric) else f"{value:.4g}"


def interval(metric: str, low: float, high: float) -> str:
    """Return the interval of `metric` in its unit, or a dash."""
    if math.isnan(high - low):
        return "\u2013"
    return f"{figure(metric, low).removesuffix(_PERCENT)} to {figure(metric, high)}"


def readable(name: str) -> str:
    """Return `image_to_text_R@1` as `image → text R@1`."""
    return name.replace("_to_", " → ").replace("_", " ")


def joined(separator: str, *parts: Any) -> str:
    """Return the parts that are there as one string."""
    return separator.join(str(part) for part in parts if part)
