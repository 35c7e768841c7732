"""Every method that PEFT has, beside PEFT: outputs, gradients, files; and how much code it is.

    python benchmarks/peft_parity.py            # results/parity.json and docs/parity.md (minutes)
    python benchmarks/peft_parity.py --page     # the page alone, from the figures

The code that measures is that of tests/parity, which holds the same errors to 1e-5.
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
import tempfile
import tokenize
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import peft  # noqa: E402
import torch  # noqa: E402
from parity_page import PAGE, page  # noqa: E402
from parts import measure_and_write  # noqa: E402

from architectures import ARCHITECTURES  # noqa: E402
from lorica.attach.attach import attach  # noqa: E402
from lorica.errors import AdapterFileError, LoricaError  # noqa: E402
from lorica.methods import METHODS, WORDS, LoRA  # noqa: E402
from parity import prompts  # noqa: E402
from parity.kinds import PAIRS, PLACES, Pair  # noqa: E402
from parity.measured import logits, ours_first, stir, theirs_first  # noqa: E402

Figures = dict[str, Any]


def of_layers() -> list[Figures]:
    """Each method on each kind of layer."""
    rows = []
    for word, pair in PAIRS.items():
        for kind in PLACES:
            rows.append({"method": word, "on": kind, **_on_kind(pair, kind)})
            print(rows[-1], flush=True)
    return rows


def _on_kind(pair: Pair, kind: str) -> Figures:
    """The errors; or which of the two has the method there."""
    name, targets = PLACES[kind]
    peft_has, lorica_has = _peft_has(name, pair, targets), _lorica_has(name, pair, targets)
    if not (peft_has and lorica_has):
        return {"peft": peft_has, "lorica": lorica_has}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = theirs_first(name, pair.theirs(targets), Path(folder))
        except AdapterFileError:
            return {"peft": True, "lorica": True, "exchanged": False}
        first = ours_first(name, pair.ours(targets), Path(folder))
    return _errors(found, first)


def _errors(found: Any, first: float) -> Figures:
    return {
        "peft": True,
        "lorica": True,
        "exchanged": True,
        "outputs": found.outputs,
        "gradients": found.gradients,
        "returned": found.returned,
        "first": first,
    }


def _peft_has(name: str, pair: Pair, targets: list[str]) -> bool:
    """Whether a model with PEFT's adapter answers. It refuses with errors of many classes."""
    base = ARCHITECTURES[name].build()
    try:
        theirs = peft.get_peft_model(base, pair.theirs(targets)).eval()
        stir(p for p in theirs.parameters() if p.requires_grad)
        with torch.no_grad():
            logits(name, theirs, base)
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def _lorica_has(name: str, pair: Pair, targets: list[str]) -> bool:
    try:
        attach(ARCHITECTURES[name].build(), pair.ours(targets), name="a")
    except LoricaError:
        return False
    return True


def of_prompts() -> list[Figures]:
    """Each method of virtual tokens on each architecture."""
    words = {"prompt": "prompt-tuning", "mlp": "p-tuning, MLP", "lstm": "p-tuning, LSTM"}
    words |= {"prefix": "prefix-tuning", "projected": "prefix-tuning, projection"}
    rows = []
    for case, (name, _) in prompts.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = prompts.theirs_first(case, Path(folder))
            first = prompts.ours_first(case, Path(folder))
        rows.append({"method": words[case.split("-")[0]], "on": name, **_errors(found, first)})
        print(rows[-1], flush=True)
    return rows


def of_tokens() -> list[Figures]:
    """New tokens beside LoRA, on a plain and on a tied embedding."""
    rows = []
    for name in ("llama", "llama-tied"):
        sample = ARCHITECTURES[name].sample(ARCHITECTURES[name].build(), 2, 7)
        chosen = sample["input_ids"].unique()[:3].tolist()
        settings: Any = {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": chosen}
        with tempfile.TemporaryDirectory() as folder:
            found = theirs_first(name, peft.LoraConfig(**settings), Path(folder))
            first = ours_first(name, LoRA(**settings), Path(folder))
        rows.append({"method": "lora, trained tokens", "on": name, **_errors(found, first)})
        print(rows[-1], flush=True)
    return rows


def of_code() -> list[Figures]:
    """Lines of every method's file: all, and without blank lines, comments and docstrings."""
    rows = []
    files = {Path(inspect.getfile(method)) for method in METHODS.values()}
    for path in sorted(files):
        text = path.read_text(encoding="utf-8")
        words = [word for word, known in WORDS.items() if _file(known) == path]
        rows.append(
            {
                "file": path.name,
                "words": words,
                "lines": len(text.splitlines()),
                "code": len(code_lines(text)),
            }
        )
    return rows


def _file(known: Any) -> Path:
    return Path(inspect.getfile(getattr(known, "method", known)))


def code_lines(text: str) -> set[int]:
    """Numbers of the lines on which there is code: no blank line, comment or docstring."""
    found, begins = set[int](), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _BETWEEN:
            begins = begins or token.type not in (tokenize.COMMENT, tokenize.NL)
            continue
        if not (begins and token.type == tokenize.STRING):
            found |= set(range(token.start[0], token.end[0] + 1))
        begins = False
    return found


_BETWEEN = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


PARTS = {
    "layers": of_layers,
    "prompts": of_prompts,
    "tokens": of_tokens,
    "code": of_code,
}


def main() -> None:
    logging.disable(logging.WARNING)
    measure_and_write("parity", (__doc__ or "").splitlines()[0], PARTS, page, PAGE)


if __name__ == "__main__":
    main()
