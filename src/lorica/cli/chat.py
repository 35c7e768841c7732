"""Talk to a base or an adapter, asked exactly as it was trained.

On a terminal this is a dialogue. Otherwise every line of standard input is a prompt, and the
answers go to standard output. /base and /tuned switch the adapter off and on, /clear forgets the
dialogue, /quit ends it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lorica.cli.together import AverageWith, StackOn, Weights


def command(
    subject: Annotated[str, typer.Argument(help="a run folder, an adapter folder or a base model")],
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    stack_on: StackOn = None,
    average_with: AverageWith = None,
    weights: Weights = None,
    prompt: Annotated[
        str | None, typer.Option(help="answer this one prompt and end", show_default=False)
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="system message; that of the training otherwise", show_default=False),
    ] = None,
    turns: Annotated[
        bool | None,
        typer.Option(
            "--turns/--no-turns",
            help="ask with the chat template and remember the dialogue, or prompt by prompt; as in "
            "the training otherwise",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="tokens of an answer at most", min=1, metavar="N")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(help="of the sampling; 0 takes the likeliest token", min=0.0, metavar="N"),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="share of the probability that is sampled from", min=0.01, max=1.0, metavar="N"
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling", min=0, metavar="N")] = 0,
    dtype: Annotated[
        str, typer.Option(help="precision of the base: auto, float32 or bfloat16")
    ] = "auto",
) -> None:
    import sys

    import torch

    from lorica.cli.dialogue import Dialogue, Sampling, converse
    from lorica.cli.opening import open_subject
    from lorica.cli.together import join, others_of
    from lorica.cli.voice import Voice
    from lorica.errors import ConfigError

    if top_p < 1 and temperature == 0:
        raise ConfigError("--top-p has no effect at --temperature 0", mend="set a temperature")
    others = others_of(subject, stack_on, average_with, weights)
    voice = Voice(quiet=prompt is not None, stream=sys.stderr)
    with voice.work(f"loading {subject}"):
        opened = open_subject(subject, base=model, dtype=dtype, max_new_tokens=max_new_tokens)
        join(opened, others)
    for note in opened.notes:
        voice.say(note)
    torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    dialogue = Dialogue(opened, sampling, system=system, turns=turns)
    if prompt is not None:
        dialogue.answer(prompt, sys.stdout)
    else:
        converse(dialogue)
