"""Numbers and verdicts in words, the same on the screen, in the report and in the model card."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

METRIC_NAMES = {
    "accuracy": "accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "eval_loss": "eval loss",
    "exact_match": "exact match",
    "f1": "F1",
    "macro_f1": "macro F1",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "matthews": "Matthews",
    "perplexity": "perplexity",
    "precision": "precision",
    "recall": "recall",
    "rouge_l": "ROUGE-L",
    "slot_accuracy": "slot accuracy",
    "style_marks": "with style marks",
}


@dataclass(frozen=True)
class Verdict:
    """What a comparison of base and tuned says about one score.

    Attributes:
        kind: "better" or "worse" where the interval of the difference excludes 0 and the p-value
            does not speak against it; else "unclear".
        headline: the verdict alone. detail: metric, both values, difference, interval, p and n.
    """

    kind: Literal["better", "worse", "unclear"]
    headline: str
    detail: str

    @property
    def sentence(self) -> str:
        return f"{self.headline}: {self.detail}"


CHOSEN_BY_SCORED = (
    "on the evaluation records, by whose loss the adapter that was kept is chosen too: somewhat in "
    "its favour; test_data names records of their own"
)
"""Said beside scores of records that were no mere test."""


def chosen_by_scored(manifest: Mapping) -> bool:
    """Whether run.json says so of its scores."""
    data = manifest.get("data")
    test = data.get("test") if isinstance(data, Mapping) else None
    return isinstance(test, Mapping) and test.get("chose_the_adapter") is True


def verdict(metric: str, score: Mapping) -> Verdict:
    """Read one entry of run.json's scores: base, tuned, difference, low, high, p, num_records,
    higher_is_better, and the verdict of `evaluate.compare` where it has one.
    """
    low, high = number(score.get("low")), number(score.get("high"))
    sign = 1 if score.get("higher_is_better", True) else -1
    kind: Literal["better", "worse", "unclear"] = "unclear"
    apart = low is not None and high is not None and (low > 0 or high < 0)
    if apart and score.get("verdict") != "no evidence":  # its p-value may say that it is chance
        kind = "better" if ((low or 0) > 0) == (sign > 0) else "worse"
    headline = {
        "better": "better than the base",
        "worse": "worse than the base",
        "unclear": "no evidence that it is better than the base",
    }[kind]
    return Verdict(kind, headline, _evidence(metric, score))


def _evidence(metric: str, score: Mapping) -> str:
    cells = score_cells(score)
    parts = [f"difference {cells['difference']}"]
    interval = cells["interval"]
    parts.append(f"95 % interval {interval}" if interval else "no interval")
    if cells["p"]:
        parts.append(f"p {cells['p']}" if cells["p"].startswith("<") else f"p = {cells['p']}")
    if score.get("num_records") is not None:
        parts.append(f"n = {count(score['num_records'])}")
    values = f"{metric_name(metric)} {cells['base']} → {cells['tuned']}"
    if score.get("higher_is_better") is False:
        values += ", lower is better"
    return f"{values} ({', '.join(parts)})"


def score_cells(score: Mapping) -> dict[str, str]:
    """base, tuned, difference, interval and p as text, with the same number of decimals."""
    base, tuned = number(score.get("base")), number(score.get("tuned"))
    difference = number(score.get("difference"))
    if difference is None and base is not None and tuned is not None:
        difference = tuned - base
    low, high, p = number(score.get("low")), number(score.get("high")), number(score.get("p"))
    digits = _common_decimals([abs(value) for value in (base, tuned) if value])
    return {
        "base": fixed(base, digits),
        "tuned": fixed(tuned, digits),
        "difference": fixed(difference, digits, signed=True),
        "interval": ""
        if low is None or high is None
        else f"{fixed(low, digits)} to {fixed(high, digits)}",
        "p": "" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"),
    }


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, METRIC_NAMES.get(metric.removeprefix("eval_"), metric))


def number(value: object) -> float | None:
    """`value` as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def decimals(magnitude: float) -> int:
    """Decimals that show about four digits of numbers of this size."""
    return 3 if magnitude < 2 else 2 if magnitude < 10 else 1 if magnitude < 1000 else 0


def _common_decimals(magnitudes: list[float]) -> int:
    """Enough for the smaller value, but at most one more than the larger one needs."""
    if not magnitudes:
        return decimals(0.0)
    return min(decimals(min(magnitudes)), decimals(max(magnitudes)) + 1)


def fixed(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A fixed number of decimals with a true minus sign; "–" for None."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−")


def count(value: object) -> str:
    amount = number(value)
    return "–" if amount is None else f"{amount:,.0f}"


def loss_text(value: object) -> str:
    """A loss or a gradient norm; what is not finite is said, what is absent is a dash."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    amount = number(value)
    return "–" if amount is None else f"{amount:.4f}" if abs(amount) < 1 else f"{amount:.3f}"


def rate(value: object) -> str:
    """A learning rate, as people write it: 2e-4, 1.85e-5, 0."""
    amount = number(value)
    if amount is None:
        return "–"
    if amount == 0:
        return "0"
    mantissa, exponent = f"{amount:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(num_bytes: object) -> str:
    amount = number(num_bytes)
    if amount is None:
        return "–"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.1f} {unit}"


def clock(seconds: object) -> str:
    """0:42, 12:07, 1:02:03."""
    amount = number(seconds)
    if amount is None:
        return "–"
    minutes, rest = divmod(max(0, round(amount)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: object) -> str:
    """41.6 s, 2 min 31 s, 1 h 2 min."""
    amount = number(seconds)
    if amount is None:
        return "–"
    if amount < 60:
        return f"{amount:.1f} s"
    minutes, rest = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def parameters(value: object) -> str:
    """812, 42.5 K, 1.31 M, 8.03 B."""
    amount = number(value)
    if amount is None:
        return "–"
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if amount >= scale:
            return f"{amount / scale:.3g} {unit}"
    return f"{amount:.0f}"
