"""The command line: one file per command, and each loads what it needs when it is called."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "demo": "train the embedded base on embedded data, offline, in under three minutes",
    "train": "train an adapter on your records; judge it against the base",
    "inspect": "what a model consists of, and what each choice of targets would train",
    "eval": "score a run, an adapter or a base on records",
    "chat": "talk to a base or an adapter",
    "merge": "write an adapter into its base: a plain model for any tool",
    "report": "make the page of a run anew",
    "config": "the settings that there are, or their JSON Schema",
}
"""Command -> its line in `lorica --help`. A command lives in the file of its name."""


UsageError = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it cannot read."""


class _LateGroup(TyperGroup):
    """Knows its commands by name and imports one only when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"lorica.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(
            cmd_name, help=module.__doc__, context_settings=getattr(module, "CONTEXT", {})
        )(module.command)
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing any of them."""
        formatter.write_usage("lorica", "COMMAND ...")
        formatter.write_paragraph()
        formatter.write_text("Adapt large pretrained models with few parameters.")
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, text in COMMANDS.items()])
        with formatter.section("Options"):
            formatter.write_dl(
                [
                    ("--version", "print the version"),
                    ("--debug", "show where an error came from"),
                    ("--help", "show this"),
                ]
            )
        formatter.write_text("lorica COMMAND --help tells more about one of them.")


app = typer.Typer(
    cls=_LateGroup, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="print the version", is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="show where an error came from"),
) -> None:
    context.obj = {"debug": debug}
    if version:
        from lorica import __version__

        print(f"lorica {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and end the process with its exit code.

    0 fine, 1 failed, 2 usage or settings, 3 a check refused, 128 + n stopped by signal n and resumable.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(
        _guarded(
            lambda: app(arguments, standalone_mode=False, prog_name="lorica"),
            "--debug" in arguments,
        )
    )


def _guarded(call: Callable[[], Any], debug: bool) -> int:
    from lorica.errors import LoricaError

    try:
        result = call()
        return result if isinstance(result, int) else 0
    except LoricaError as error:
        if debug:
            raise
        print(f"lorica: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("lorica: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 1
