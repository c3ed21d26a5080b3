"""The check that numbers among the settings share."""

from __future__ import annotations

from dpo.outcomes import UserError


def check_range(
    key: str,
    value: float | int | None,
    *,
    low: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
    high: float | int | None = None,
    also: str | None = None,
) -> None:
    """Raise unless low <= value <= high and above < value < below, as far as these are given; None passes."""
    if value is None:
        return
    inside = (low is None or value >= low) and (above is None or value > above)
    inside = inside and (high is None or value <= high) and (below is None or value < below)
    if inside and value not in (float("inf"), float("-inf")):
        return
    bounds = {"at least": low, "more than": above, "at most": high, "less than": below}
    allowed = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    if low is not None and high is not None:
        allowed = f"from {low} to {high}"
    raise UserError(f"{key} is {value}; allowed is {allowed}{f' or {also}' if also else ''}")
