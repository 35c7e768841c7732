"""Talk to a base or an adapter. Text on standard input is answered line by line; on a terminal it is a dialogue.

/base and /tuned switch the adapter off and on, /clear forgets the dialogue, /quit ends it.
"""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    subject: Annotated[str, typer.Argument(help="run folder, adapter folder, or base model")],
    model: Annotated[
        str | None,
        typer.Option(help="the adapter's base, where it is not where it was", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="answer this and end", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token", min=0.0)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="sample among the likeliest tokens of this share", min=0.01, max=1.0),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    system: Annotated[str | None, typer.Option(help="system message", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="of the base: auto, float32, bfloat16")] = "auto",
) -> None:
    import sys

    import torch

    from lorica.cli.dialogue import Dialogue
    from lorica.cli.opening import open_subject

    opened = open_subject(subject, base=model, dtype=dtype, max_new_tokens=max_new_tokens)
    torch.manual_seed(seed)
    dialogue = Dialogue(opened, max_new_tokens, temperature, top_p, system)
    if prompt is not None:
        dialogue.answer(prompt, sys.stdout)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{subject}: {dialogue.describe()}   /base /tuned /clear /quit", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            break
        text = line.rstrip("\n")
        if text.startswith("/"):
            print(dialogue.command(text.strip()), file=sys.stderr)
        elif text.strip():
            dialogue.answer(text, sys.stdout)
