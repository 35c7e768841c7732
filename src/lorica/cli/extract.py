"""Make a LoRA adapter of what a full fine-tune changed in its base.

In every layer it is the nearest product of its rank, by a singular value decomposition of the
change. What the rank does not hold is told, layer by layer, and drawn in spectra.html. Weights are
read from the files one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    tuned: Annotated[str, typer.Argument(help="the fine-tuned model: a folder or a hub id")],
    base: Annotated[str, typer.Argument(help="the model that it was tuned from")],
    output_dir: Annotated[Path, typer.Option(help="a new folder for the adapter", metavar="PATH")],
    r: Annotated[
        int | None,
        typer.Option(
            help="rank of every layer, 16 where neither this nor --energy is given; with --energy "
            "the largest rank",
            show_default=False,
            min=1,
            metavar="N",
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="share of the squared change that the rank of every layer must hold, such as 0.9",
            show_default=False,
            metavar="N",
        ),
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="layers, as for training; commas between several", metavar="NAMES")
    ] = "all-linear",
    svd: Annotated[
        str, typer.Option(help="exact, randomised (quicker), or auto: by the size of the layer")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="of the randomised one", min=0, metavar="N")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an adapter that is in output_dir")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys

    from lorica.base.digest import digest_of_files
    from lorica.base.empty import empty_model
    from lorica.base.locate import weight_files
    from lorica.cli.kinds import checked_kind
    from lorica.cli.voice import Voice
    from lorica.errors import BaseModelError
    from lorica.files.adapter import save_adapter
    from lorica.mix.extract import extract
    from lorica.records.spectra import write_spectra_page

    voice = Voice(quiet=json, stream=sys.stderr)
    kind = checked_kind("auto", base)
    model = empty_model(base, task=kind)
    files = {name: weight_files(name) for name in (tuned, base)}
    if missing := [name for name, found in files.items() if not found]:
        raise BaseModelError(
            f"there are no weight files of {missing[0]} on this machine",
            mend="name a folder with *.safetensors, or load the model once",
        )
    names = tuple(name.strip() for name in target_modules.split(","))
    how: dict[str, Any] = {"target_modules": names if names[1:] else names[0], "svd": svd}
    with voice.work(f"decomposing {tuned} - {base}"):
        report = extract(model, files[tuned], files[base], r=r, energy=energy, seed=seed, **how)
    place = str(Path(base).absolute()) if Path(base).is_dir() else base
    digest = digest_of_files(files[base][0].parent)
    report.adapter.base = {"name": place, "task": kind, "digest": digest}
    facts = {"tuned": tuned, "base": base, "energy": energy, **report.facts()}
    noted = {"extracted_from": tuned, "error": report.error}
    save_adapter(report.adapter, output_dir, provenance=noted, overwrite=overwrite)
    text = jsonlib.dumps(facts, indent=2) + "\n"
    (output_dir / "extract_report.json").write_text(text, encoding="utf-8")
    write_spectra_page(output_dir.name, [str(report)], facts["places"], output_dir / "spectra.html")
    if json:
        print(jsonlib.dumps({**facts, "path": str(output_dir)}))
    else:
        print("\n".join(_lines(report, output_dir)))


def _lines(report: Any, folder: Path) -> list[str]:
    """What the adapter holds, and the layers of which it holds least."""
    from lorica.records.lines import worst_table

    table = worst_table(
        report.places,
        lambda place: place.error,
        {
            "layer": lambda place: place.path,
            "rank": lambda place: str(place.rank),
            "not held": lambda place: f"{place.error:.2%}",
            "change / weight": lambda place: f"{place.relative:.2%}",
        },
        "layers of which more is held",
    )
    return [
        str(report),
        "",
        *table,
        "",
        f"spectra  {folder / 'spectra.html'}",
        f"adapter  {folder}",
    ]
