"""Calls into transformers that read a base: without its bars, and with one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from lorica.errors import BaseModelError, LoricaError


@contextmanager
def reading(name: str | Path, task: str) -> Iterator[None]:
    """Call transformers without its bars and log lines; whatever it raises is a BaseModelError."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except LoricaError:
        raise
    except Exception as error:  # its readers raise what they like: OSError, Exception, RuntimeError
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseModelError(
            f"{name} could not be loaded for {task}: {reason}",
            expected="a folder with config.json, *.safetensors and a tokenizer, or a hub id",
            mend="check the path; for a hub id also the network, HF_HUB_OFFLINE and the access "
            "token",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
