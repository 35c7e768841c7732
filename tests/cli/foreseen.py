"""What a run will need, without the cheaper settings that `lorica plan` looks for besides: each of
those is an estimate of its own.
"""

from lorica.cli.forecast import Forecast, foresee
from lorica.cli.material import gather
from lorica.cli.voice import Voice
from lorica.config import resolve
from lorica.methods import WORDS


def foreseen(**given: object) -> Forecast:
    """The forecast of `lorica train` with these settings."""
    values = {name: str(v) if hasattr(v, "parts") else v for name, v in given.items()}
    settings = resolve(("run.yaml", values), methods=WORDS)
    material = gather(settings.run, seed=settings.data_seed)
    kind = material.task(settings.run.task, settings.run.model)
    found = foresee(settings, material, kind, Voice(quiet=True), ignore_memory=True)
    assert found is not None
    return found
