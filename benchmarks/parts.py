"""A page whose figures are measured part by part; those of parts that are not asked for stay."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jobs import RESULTS, machine, versions, write_result


def measure_and_write(
    name: str,
    words: str,
    parts: Mapping[str, Callable[[], Any]],
    page: Callable[[], str],
    file: Path,
) -> None:
    """Run a command line: `--only PART ...` measures these, `--page` none.

    Args:
        name: of the file of the figures in `results`.
        words: what the command says of itself.
        parts: name -> what measures it, on one thread.
        page: the text of the page, from the figures in `results`.
        file: where it goes.
    """
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--page", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    known = RESULTS / f"{name}.json"
    figures = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    if not asked.page:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        for part in asked.only:
            figures[part] = parts[part]()
            print(part, json.dumps(figures[part]), flush=True)
        figures |= {"machine": machine(1), "versions": versions()}
        write_result(name, figures)
    file.write_text(page(), encoding="utf-8")
    print(f"written {file}")
