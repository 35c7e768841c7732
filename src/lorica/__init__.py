"""Lorica adapts large pretrained models with few parameters.

    import lorica

    model = lorica.load_model("path-or-hub-id", task="causal-lm")
    sql = lorica.attach(model, lorica.LoRA(r=8, target_modules=["q_proj", "v_proj"]), name="sql")

The public names stand in one table below and are resolved on first use, so that `import lorica`
loads neither torch nor anything else.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    # the words
    "LoricaError": "lorica.errors",
    "LoricaWarning": "lorica.errors",
    "LoRA": "lorica.methods.lora",
    "TrainSettings": "lorica.config.settings",
    # a base and its adapters
    "load_model": "lorica.base.load",
    "attach": "lorica.attach.attach",
    "detach": "lorica.attach.attach",
    "adapters": "lorica.attach.handle",
    "activate": "lorica.attach.activate",
    "Stack": "lorica.attach.activate",
    "Adapter": "lorica.attach.handle",
    "survey": "lorica.attach.survey",
    # files
    "save_adapter": "lorica.files.adapter",
    "load_adapter": "lorica.files.adapter",
    # data
    "read": "lorica.data.read",
    "read_splits": "lorica.data.read",
    "Dataset": "lorica.data.dataset",
    # doing
    "train": "lorica.train.loop",
    "attach_by_records": "lorica.train.starts",
    "merge": "lorica.mix.merging",
    "MergeReport": "lorica.mix.report",
    "mix": "lorica.mix.mixing",
    "MixReport": "lorica.mix.mixing",
    # judging
    "score": "lorica.evaluate.score",
    "compare": "lorica.evaluate.compare",
    "verify": "lorica.evaluate.verify",
    "write_report": "lorica.records.report",
}
"""Public name -> the module that defines it."""

if TYPE_CHECKING:  # the same for editors and type checkers; a test holds both equal
    from lorica.attach.activate import Stack as Stack
    from lorica.attach.activate import activate as activate
    from lorica.attach.attach import attach as attach
    from lorica.attach.attach import detach as detach
    from lorica.attach.handle import Adapter as Adapter
    from lorica.attach.handle import adapters as adapters
    from lorica.attach.survey import survey as survey
    from lorica.base.load import load_model as load_model
    from lorica.config.settings import TrainSettings as TrainSettings
    from lorica.data.dataset import Dataset as Dataset
    from lorica.data.read import read as read
    from lorica.data.read import read_splits as read_splits
    from lorica.errors import LoricaError as LoricaError
    from lorica.errors import LoricaWarning as LoricaWarning
    from lorica.evaluate.compare import compare as compare
    from lorica.evaluate.score import score as score
    from lorica.evaluate.verify import verify as verify
    from lorica.files.adapter import load_adapter as load_adapter
    from lorica.files.adapter import save_adapter as save_adapter
    from lorica.methods.lora import LoRA as LoRA
    from lorica.mix.merging import merge as merge
    from lorica.mix.mixing import MixReport as MixReport
    from lorica.mix.mixing import mix as mix
    from lorica.mix.report import MergeReport as MergeReport
    from lorica.records.report import write_report as write_report
    from lorica.train.loop import train as train
    from lorica.train.starts import attach_by_records as attach_by_records

__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """A package in which `lorica.train` stays the function when its package is imported.

    Python binds a subpackage to its name in the parent on import. Subpackages are reached by
    `from lorica.train.loop import ...`, which does not read that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
