"""Alarms over the rows of a run: each a sentence that says what is wrong and what to do, at most
once per adapter.

An alarm is fed one adapter's rows in order and answers None or the sentence. It knows nothing of
files or screens.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from lorica.records.phrases import loss_text, number, rate
from lorica.records.write import Recorder

MAD_TO_SIGMA = (
    1.4826  # the median absolute deviation of a normal distribution times this is its sigma
)


class Alarm(Protocol):
    def __call__(self, row: dict) -> str | None: ...


class LossNotFinite:
    """A loss or gradient norm is NaN or infinite. None means that the row has no such value."""

    def __call__(self, row: dict) -> str | None:
        for key, name in (
            ("loss", "loss"),
            ("eval_loss", "eval loss"),
            ("grad_norm", "gradient norm"),
        ):
            if row.get(key) is not None and number(row[key]) is None:
                return (
                    f"the {name} is not a finite number at step {row.get('step')}; go on from the "
                    f"last checkpoint with a lower learning_rate (now "
                    f"{rate(row.get('learning_rate'))}) or in fp32"
                )
        return None


class LossSpike:
    """A loss far above the last ones: a robust z-score (median and MAD of a window) and a factor
    over the median.

    Args:
        window: rows looked back on; at least `least` of them are needed.
        threshold: robust standard deviations. factor: over the median, so that a very calm loss
            raises no alarm.
    """

    def __init__(
        self, *, window: int = 50, least: int = 20, threshold: float = 8.0, factor: float = 1.5
    ) -> None:
        self.least, self.threshold, self.factor = least, threshold, factor
        self._losses: deque[float] = deque(maxlen=window)

    def __call__(self, row: dict) -> str | None:
        loss = number(row.get("loss"))
        if loss is None:
            return None
        message = self._judge(loss, row) if len(self._losses) >= self.least else None
        self._losses.append(loss)
        return message

    def _judge(self, loss: float, row: dict) -> str | None:
        centre = median(self._losses)
        spread = MAD_TO_SIGMA * median(abs(value - centre) for value in self._losses)
        score = (loss - centre) / max(spread, 1e-3 * abs(centre), 1e-12)
        if score < self.threshold or loss < self.factor * centre:
            return None
        return (
            f"the loss jumped from about {loss_text(centre)} to {loss_text(loss)} at step "
            f"{row.get('step')}; if it does not come back soon, lower learning_rate (now "
            f"{rate(row.get('learning_rate'))}) or max_grad_norm, and look at the records of that "
            f"step"
        )


class EvalRising:
    """The eval loss has risen `patience` evaluations in a row since its best."""

    def __init__(self, *, patience: int = 3) -> None:
        self.patience = patience
        self._best = math.inf
        self._best_step: object = None
        self._previous = math.inf
        self._rises = 0

    def __call__(self, row: dict) -> str | None:
        loss = number(row.get("eval_loss"))
        if loss is None:
            return None
        if loss < self._best:
            self._best, self._best_step = loss, row.get("step")
        self._rises = self._rises + 1 if loss > self._previous else 0
        self._previous = loss
        if self._rises < self.patience:
            return None
        return (
            f"the eval loss has risen for {self._rises} evaluations; the best was "
            f"{loss_text(self._best)} at step {self._best_step}, now it is {loss_text(loss)}: the "
            f"adapter learns the training records by heart. Keep the checkpoint of the best step, "
            f"and train fewer steps, on more data, or with a smaller r or learning_rate"
        )


class GradientZero:
    """The gradient norm is exactly 0, several rows running: nothing that trains has an effect on
    the loss.
    """

    def __init__(self, *, rows: int = 3) -> None:
        self.rows = rows
        self._zeros = 0

    def __call__(self, row: dict) -> str | None:
        norm = number(row.get("grad_norm"))
        if norm is None:
            return None
        self._zeros = self._zeros + 1 if norm == 0 else 0
        if self._zeros < self.rows:
            return None
        return (
            f"the gradient norm has been 0 for {self._zeros} rows (step {row.get('step')}): the "
            f"adapter has no effect on the loss. See with lorica inspect whether target_modules "
            f"are layers that the forward pass calls, and with lorica check whether the records "
            f"have trained tokens"
        )


class LearningRateZero:
    """The learning rate is 0 although the end is far: nothing is learned."""

    def __init__(self, *, max_steps: int | None = None, rows: int = 2) -> None:
        self.max_steps, self.rows = max_steps, rows
        self._zeros = 0

    def __call__(self, row: dict) -> str | None:
        value = number(row.get("learning_rate"))
        step = number(row.get("step")) or 0
        if value is None or (self.max_steps is not None and step >= 0.95 * self.max_steps):
            return None
        self._zeros = self._zeros + 1 if value == 0 else 0
        if self._zeros < self.rows:
            return None
        return (
            f"the learning rate is 0 at step {row.get('step')}: nothing is learned. Set "
            f"learning_rate above 0, and see that max_steps and warmup_ratio fit lr_scheduler_type"
        )


class LossNotFalling:
    """After a fair part of the run the loss is where it began.

    Args:
        max_steps: of the plan; None where unknown.
        rows: number of rows in the median at the start and in the one now; 3 times as many are
            needed to judge.
        part: of max_steps that must be over. fall: relative decrease that counts as falling, after
            which the alarm rests.
    """

    def __init__(
        self, *, max_steps: int | None = None, rows: int = 20, part: float = 0.3, fall: float = 0.02
    ) -> None:
        self.max_steps, self.rows, self.part, self.fall = max_steps, rows, part, fall
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=rows)
        self._seen = 0
        self._fell = False

    def __call__(self, row: dict) -> str | None:
        loss = number(row.get("loss"))
        if loss is None or self._fell:
            return None
        self._seen += 1
        if len(self._first) < self.rows:
            self._first.append(loss)
        self._last.append(loss)
        early = (number(row.get("step")) or 0) < self.part * (self.max_steps or 0)
        if self._seen < 3 * self.rows or early:
            return None
        start, current = median(self._first), median(self._last)
        if start - current > self.fall * abs(start):
            self._fell = True
            return None
        return (
            f"the loss has not fallen in {self._seen} rows ({loss_text(start)} at the start, "
            f"{loss_text(current)} at step {row.get('step')}); try a learning_rate 3 to 10 times "
            f"higher (now {rate(row.get('learning_rate'))}) or a larger r, and see with lorica "
            f"check that what should be learned is among the trained tokens"
        )


def default_alarms(max_steps: int | None = None) -> list[Alarm]:
    """A fresh set of all alarms, for one adapter."""
    return [
        LossNotFinite(),
        LossSpike(),
        EvalRising(),
        GradientZero(),
        LearningRateZero(max_steps=max_steps),
        LossNotFalling(max_steps=max_steps),
    ]


class Watch:
    """A set of alarms for every adapter that appears in the rows.

    Args:
        max_steps: of the plan; None where unknown.
        make: builds the alarms of one adapter from max_steps.
    """

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        make: Callable[[int | None], Sequence[Alarm]] = default_alarms,
    ) -> None:
        self.max_steps = max_steps
        self._make = make
        self._alarms: dict[str | None, list[Alarm]] = {}

    def __call__(self, row: dict) -> list[str]:
        """The sentences that this row gives rise to; an alarm that has spoken is dropped."""
        adapter = row.get("adapter")
        if adapter not in self._alarms:
            self._alarms[adapter] = list(self._make(self.max_steps))
        alarms = self._alarms[adapter]
        answers = [(alarm, alarm(row)) for alarm in alarms]
        self._alarms[adapter] = [alarm for alarm, answer in answers if answer is None]
        prefix = f"{adapter}: " if len(self._alarms) > 1 else ""
        return [prefix + answer for _, answer in answers if answer is not None]


class Watched:
    """A recorder around another one that adds the alarms as events of kind "warning"."""

    def __init__(self, recorder: Recorder, watch: Watch | None = None) -> None:
        self.recorder = recorder
        self._watch = watch or Watch()

    def start(self, manifest: dict) -> None:
        if self._watch.max_steps is None:
            self._watch.max_steps = manifest.get("plan", {}).get("max_steps")
        self.recorder.start(manifest)

    def step(self, row: dict) -> None:
        self.recorder.step(row)
        for sentence in self._watch(row):
            self.recorder.event("warning", sentence)

    def event(self, kind: str, text: str) -> None:
        self.recorder.event(kind, text)

    def finish(self, summary: dict) -> None:
        self.recorder.finish(summary)
