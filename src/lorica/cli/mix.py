"""Write one adapter that is made of several.

cat is exact: the new adapter does the weighted sum of what the given ones do, and its ranks add up.
svd cuts the same sum to a rank. The others (slerp, ties, dare_linear, dare_ties, magnitude_prune)
mean something else than the sum. How far the result is from the exact sum is told for every way.
With one adapter alone, svd makes it smaller, or makes LoRA of another method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

CONTEXT = {"ignore_unknown_options": True}  # a negative weight looks like an option
REPORT = "mix_report.json"


def command(
    adapters: Annotated[
        list[str], typer.Argument(help="run folders or adapter folders", metavar="ADAPTER...")
    ],
    output_dir: Annotated[Path, typer.Option(help="a new folder for the adapter", metavar="PATH")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="one for each adapter, with blanks or commas between, also negative; 1/n each "
            "where they are not given",
            show_default=False,
            metavar="N...",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="cat, svd, slerp, ties, dare_linear, dare_ties, magnitude_prune, task_arithmetic "
            "or linear"
        ),
    ] = "cat",
    r: Annotated[
        int | None,
        typer.Option(
            help="rank of the result; the sum of the ranks where it is not given",
            show_default=False,
            min=1,
            metavar="N",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="share of the elements that ties, dare_* and magnitude_prune keep",
            show_default=False,
            metavar="N",
        ),
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="how ties elects a sign: total or frequency")
    ] = "total",
    seed: Annotated[int, typer.Option(help="of what dare_* drops", min=0, metavar="N")] = 0,
    search: Annotated[
        str | None,
        typer.Option(
            help="records on which the best weights are searched, without gradients (LoraHub)",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    search_steps: Annotated[
        int, typer.Option(help="mixtures that the search tries", min=3, metavar="N")
    ] = 40,
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapters, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an adapter that is in output_dir")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys

    from lorica.cli.gathering import gathered, read_words, save_made
    from lorica.cli.voice import Voice
    from lorica.mix.mixing import mix

    paths, given = read_words(adapters, weights)
    voice = Voice(quiet=json, stream=sys.stderr)
    with voice.work("loading the adapters"):
        group = gathered(paths, base=model, whole=search is not None)
    mixture = dict(zip(group.names, given or [1 / len(paths)] * len(paths), strict=True))
    found = None
    if search is not None:
        with voice.work("searching the weights"):
            found = _search(group, search, mixture, search_steps)
        voice.say(str(found))
        mixture = dict(found.weights)
    with voice.work("mixing"):
        report = mix(
            group.model,
            mixture,
            method=method,
            r=r,
            density=density,
            seed=seed,
            majority_sign_method=majority_sign_method,
        )
    facts = {**report.facts(), **({"search": {**vars(found)}} if found else {})}
    save_made(group, report.adapter, output_dir, facts, title=str(report), overwrite=overwrite)
    if json:
        print(jsonlib.dumps({**facts, "path": str(output_dir)}))
    else:
        print("\n".join(_lines(report, output_dir)))


def _search(group: Any, path: str, mixture: dict[str, float], steps: int) -> Any:
    """The best weights on the records of a file."""
    from lorica.data.read import read
    from lorica.mix.search import search_weights

    rows = [dict(row) for row in read(path).rows]
    start = list(mixture.values())
    return search_weights(group.model, group.names, group.task, rows, start=start, steps=steps)


def _lines(report: Any, folder: Path) -> list[str]:
    """What was made, and the places where it is furthest from the exact sum."""
    from lorica.records.lines import worst_table

    table = worst_table(
        report.places,
        lambda place: place.error,
        {
            "place": lambda place: place.path,
            "rank": lambda place: str(place.rank),
            "from the exact sum": lambda place: f"{place.error:.2%}",
            "lost by the rank": lambda place: f"{place.lost:.2%}",
        },
        "places that are nearer",
    )
    return [str(report), "", *table, "", f"adapter  {folder}"]
