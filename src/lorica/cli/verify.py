"""Check that a merged or exported model answers as its base with the adapter does.

Both are asked the same prompts, in float32. It is told how much of what the adapter does to the
logits is missing, and whether the greedy answers are the same. Exit code 3 says that they are not
the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[
        str,
        typer.Argument(help="a run folder or an adapter folder", metavar="ADAPTER"),
    ],
    merged: Annotated[
        str,
        typer.Argument(help="the model, or another adapter, that is to be the same"),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="records or lines to ask, the first 32 of them; plain texts and random tokens "
            "where it is not given",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option(help="the adapter's share that was merged", metavar="N")
    ] = 1.0,
    dtype: Annotated[
        str,
        typer.Option(help="precision of the comparison: float32, or bfloat16 to save memory"),
    ] = "float32",
    max_new_tokens: Annotated[
        int, typer.Option(help="length of the greedy answers", min=1, metavar="N")
    ] = 12,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys

    from lorica.cli.asking import precision_of, prompts_of
    from lorica.cli.opening import adapter_folder, open_subject
    from lorica.cli.voice import Voice
    from lorica.errors import AdapterFileError
    from lorica.evaluate.verify import expect, judge

    if adapter_folder(Path(adapter)) is None:
        raise AdapterFileError(
            f"{adapter} is neither a run nor an adapter folder",
            expected="a folder with run.json or adapter_config.json",
        )
    voice = Voice(quiet=json, stream=sys.stderr)
    with voice.work(f"asking {adapter}"):
        opened = open_subject(adapter, base=model, dtype=dtype)
        assert opened.adapter is not None
        asked = prompts_of(opened, prompts)
        mixture = {opened.adapter.name: weight}
        expected = expect(opened.model, mixture, asked, max_new_tokens=max_new_tokens)
    kind = opened.task.kind
    is_adapter = adapter_folder(Path(merged)) is not None
    del opened  # one model in memory at a time
    with voice.work(f"asking {merged}"):
        task = "auto" if is_adapter else kind
        other = open_subject(merged, base=model if is_adapter else None, task=task, dtype=dtype)
        stored = "float32" if is_adapter else precision_of(Path(merged))
        precision = "bfloat16" if dtype == "bfloat16" else stored
        found = judge(expected, other.model, precision=precision)
    if json:
        print(jsonlib.dumps({"adapter": adapter, "merged": merged, "ok": found.ok, **vars(found)}))
    else:
        print(found)
    found.check(merged)
