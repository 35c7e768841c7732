"""The tokenizer of a base, set up as training needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lorica.base.ending import set_end_token
from lorica.base.folder import unfit_files
from lorica.base.hub import hub_options
from lorica.base.locate import located
from lorica.base.reading import reading
from lorica.base.request import refuse


def load_tokenizer(
    name: str | Path,
    *,
    task: str = "causal-lm",
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
) -> Any:
    """The tokenizer of a base as `load_model` would set it up, without its weights.

    Raises:
        BaseModelError: there is none, or it does not know `eos_token`.
    """
    path = located(name)
    refuse(unfit_files(Path(path)))
    options = {"trust_remote_code": trust_remote_code, **hub_options(path, revision)}
    with reading(name, task):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision, **options)
    tokenizer.padding_side = "right"
    if eos_token is not None:
        set_end_token(None, tokenizer, eos_token)
    return tokenizer
