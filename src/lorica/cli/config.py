"""Print the settings that there are, with defaults, as YAML to start from; or their JSON Schema."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    schema: Annotated[
        bool, typer.Option("--schema", help="the JSON Schema, by which editors complete and check")
    ] = False,
) -> None:
    import json

    from lorica.config import Layer, json_schema, resolve
    from lorica.methods import METHODS

    if schema:
        print(json.dumps(json_schema(METHODS), indent=2))
        return
    example = Layer("example", {"model": "PATH_OR_ID", "data": "FILE"}, {})
    print(resolve(example, methods=METHODS).to_yaml(), end="")
