"""Write the weighted mean of several adapters of one kind as an adapter folder.

It is meant for adapters that began alike, such as runs from one init_adapter; seeds of LoRA begin
apart. Any adapters of one base can be mixed exactly instead: lorica mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapters: Annotated[
        list[str],
        typer.Argument(help="run folders or adapter folders, at least two", metavar="ADAPTER..."),
    ],
    output_dir: Annotated[Path, typer.Option(help="a new folder for the adapter", metavar="PATH")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="shares with the sum 1, with commas: 0.7,0.3; all alike where it is not given",
            show_default=False,
            metavar="N,...",
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

    from lorica.cli.opening import adapter_folder
    from lorica.files.average import average

    folders = [adapter_folder(Path(path)) or Path(path) for path in adapters]
    shares = shares_of(weights) or [1 / len(folders)] * len(folders)
    average(folders, output_dir, weights=shares, overwrite=overwrite)
    if json:
        facts = {"path": str(output_dir), "adapters": list(map(str, folders)), "weights": shares}
        print(jsonlib.dumps(facts))
        return
    for folder, share in zip(folders, shares, strict=True):
        print(f"{share:.4f}  {folder}")
    print(f"adapter  {output_dir}")


def shares_of(text: str | None) -> list[float]:
    """The numbers of --weights. Raises ConfigError."""
    from lorica.errors import ConfigError

    if text is None:
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text} holds something that is no number", expected="such as 0.7,0.3"
        ) from None
