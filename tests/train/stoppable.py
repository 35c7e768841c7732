"""A run in a process of its own, for tests of signals: stoppable.py FOLDER WHERE.

WHERE is "whole" (nothing special), "step" (waits in the middle of step 3) or "evaluation" (waits in
the first evaluation, and goes on only after the second signal).
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from lorica.cli import _guarded  # noqa: E402
from lorica.train import evaluations  # noqa: E402
from lorica.train.engine import Engine  # noqa: E402
from train.runs import run  # noqa: E402


def main(folder: str, where: str) -> None:
    step = Engine.step

    def slow_step(self, trainees, work):
        if trainees[0].step == 2:
            ready(folder)
            time.sleep(0.5)
        return step(self, trainees, work)

    def slow_loss(*arguments, **how):
        ready(folder)
        time.sleep(60)

    if where == "step":
        Engine.step = slow_step
    elif where == "evaluation":
        evaluations.mean_loss = evaluations.losses_of = slow_loss
    run(folder, max_steps=5)


def ready(folder: str) -> None:
    Path(f"{folder}.ready").touch()


if __name__ == "__main__":
    sys.exit(_guarded(lambda: main(*sys.argv[1:]), debug=False, several=False))
