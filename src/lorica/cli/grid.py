"""Draw one prompt with several weights of one or two adapters: a picture of pictures.

With two adapters the weights of the first go from left to right and those of the second from top to
bottom. Every cell begins with the same noise, so what differs is the adapters. The same command
makes the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    pipeline: Annotated[str, typer.Argument(help="a pipeline of diffusers: a folder or a hub id")],
    adapters: Annotated[
        list[str],
        typer.Option(
            help="run folder or adapter folder, one or two: with a comma, or the option twice",
            metavar="PATH",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="what to draw", metavar="TEXT")],
    output: Annotated[Path, typer.Option(help="the PNG file to write", metavar="FILE")],
    weights: Annotated[
        str, typer.Option(help="weights of each adapter, with commas", metavar="N,...")
    ] = "0,0.5,1",
    seed: Annotated[int, typer.Option(help="seed of the noise", metavar="N", min=0)] = 0,
    num_inference_steps: Annotated[
        int, typer.Option(help="denoising steps", metavar="N", min=1, max=1000)
    ] = 30,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="how far to follow the prompt", show_default=False, metavar="N"),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="pixels of a side of a cell", show_default=False, metavar="N", min=8),
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the base", metavar="DTYPE")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a file that is there")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib

    from lorica.base.image_pipeline import ImagePipeline
    from lorica.base.load import load_model
    from lorica.base.request import IMAGES
    from lorica.cli.images import png
    from lorica.cli.opening import adapter_folder
    from lorica.cli.picture_grid import cells_of, compose, drawn, numbers_of
    from lorica.errors import ConfigError
    from lorica.files.adapter import load_adapter
    from lorica.records.atomic import write_file

    given = [part for text in adapters for part in text.split(",") if part]
    values = numbers_of(weights)
    if not 1 <= len(given) <= 2:
        raise ConfigError(
            f"{len(given)} adapters are given", expected="one, or two: a picture has two sides"
        )
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} is there already", mend="add --overwrite, or another name")
    model = load_model(pipeline, task=IMAGES, dtype=dtype)
    assert isinstance(model, ImagePipeline)
    names = []
    for number, path in enumerate(given, start=1):
        folder = adapter_folder(Path(path)) or Path(path)
        names.append(load_adapter(model, folder, name=f"adapter{number}").name)
    how = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "resolution": resolution,
    }
    pictures = [drawn(model, prompt, cell, seed=seed, **how) for cell in cells_of(names, values)]
    labels = [Path(path).resolve().name for path in given]
    whole = compose(pictures, values, labels)
    write_file(output, png(whole))
    if json:
        facts = {"path": str(output), "adapters": given, "weights": values, "seed": seed}
        print(jsonlib.dumps({**facts, "size": list(whole.size)}))
    else:
        print(f"{len(pictures)} pictures of {prompt!r}: {output}")
