"""The command line: one file per command, and each loads what it needs when it is called."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "demo": "the whole way on an embedded base and data, offline, in minutes",
    "train": "train an adapter on your records, and judge it against the base",
    "search": "find the rank and other settings: candidates trained together",
    "check": "look for faults in records before they cost a run",
    "clean": "write a repaired copy of records: no repeats, leaks or secrets",
    "plan": "what a run will need: memory by part, steps, time, disk",
    "methods": "the ways to adapt a model, with their settings and defaults",
    "inspect": "what a model consists of, and what could train in it",
    "eval": "score a run, an adapter or a base on records",
    "chat": "talk to a base or an adapter",
    "merge": "write an adapter into its base: a plain model for any tool",
    "export": "write an adapter or its merged model for another tool: GGUF ...",
    "convert": "read an adapter in any format and write it in another one",
    "verify": "check that a merged model answers as base and adapter do",
    "mix": "one adapter made of several: their weighted sum, TIES, DARE ...",
    "extract": "a LoRA adapter of what a full fine-tune changed in its base",
    "grid": "pictures of one prompt with several weights of image adapters",
    "average": "one adapter from several of one kind: the mean of their tensors",
    "report": "make the page of a run anew",
    "config": "a settings file to start from, or the JSON Schema",
}
"""Command -> its line in `lorica --help`. A command lives in the file of its name."""

OPTIONS = {
    "--version": "print the version",
    "--debug": "show where an error came from",
    "--help, -h": "show this; lorica COMMAND --help tells of one of them",
}
_HELP = {"help_option_names": ["--help", "-h"]}

UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it cannot read."""


class _Command(TyperCommand):
    """A command whose help page looks like all others."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from lorica.cli.pages import page

        formatter.write(page(ctx))


class _LateGroup(TyperGroup):
    """Knows its commands by name and imports one only when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"lorica.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        settings = {**_HELP, **getattr(module, "CONTEXT", {})}
        how = {"help": module.__doc__, "context_settings": settings, "cls": _Command}
        single.command(cmd_name, **how)(module.command)
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        from lorica.errors import ConfigError, nearest

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = nearest(args[0], COMMANDS)
            raise ConfigError(
                f"there is no command {args[0]!r}",
                expected=f"one of: {', '.join(COMMANDS)}",
                mend=f"did you mean {near}?" if near else None,
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing any of them."""
        width = max(map(len, [*COMMANDS, *OPTIONS])) + 2
        lines = ["Usage: lorica COMMAND ...", ""]
        lines += ["Adapt large pretrained models with few parameters."]
        for title, entries in (("Commands", COMMANDS), ("Options", OPTIONS)):
            lines += ["", f"{title}:", *(f"  {k.ljust(width)}{v}" for k, v in entries.items())]
        formatter.write("\n".join(lines) + "\n")


app = typer.Typer(
    cls=_LateGroup, add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="print the version", is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="show where an error came from"),
) -> None:
    if version:
        from lorica import __version__

        print(f"lorica {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and end the process with its exit code.

    0 fine, 1 failed, 2 usage or settings, 3 a check refused, 128 + n stopped by signal n and
    resumable.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given  # wherever it stands
    rest = [word for word in given if word != "--debug"]
    with warnings.catch_warnings():
        warnings.showwarning = _shown(warnings.showwarning)
        call = lambda: app(rest, standalone_mode=False, prog_name="lorica")  # noqa: E731
        code = _guarded(call, debug, several=rest[:1] in (["train"], ["search"]))
    sys.exit(code)


def _guarded(call: Callable[[], Any], debug: bool, *, several: bool) -> int:
    """The exit code of a command; `several`: processes of torchrun can do it together."""
    from lorica.errors import LoricaError, is_out_of_memory

    try:
        result = call()
        sys.stdout.flush()
        if result == 130:  # typer has made an exit code of Ctrl-C
            _complain("lorica: stopped")
        return result if isinstance(result, int) else 0
    except LoricaError as error:
        if debug:
            raise
        if not several or _speaks(error):
            _complain(f"lorica: {error}")
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except UsageError as error:
        if not several or _speaks(error):
            _print_usage(error)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        _complain("lorica: stopped")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `lorica eval ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, OSError) or is_out_of_memory(error)):
            raise
        _complain(f"lorica: {_of_the_machine(error)}")
        return 1


def _speaks(error: Exception) -> bool:
    """Whether it is for this process to say it, of several that were started together."""
    from lorica.cli.one_voice import speaks

    return speaks(error)


def _complain(text: str) -> None:
    """Say it on standard error, where that still takes words; the exit code says it too."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr)


def _of_the_machine(error: Exception) -> str:
    """A fault of the machine in one sentence, with what to do."""
    from lorica.errors import LoricaError, is_out_of_memory

    if is_out_of_memory(error):
        told = next(iter(str(error).strip().splitlines()), "")
        return str(
            LoricaError(
                f"memory ran out: {told}" if told else "memory ran out",
                mend="lower batch_size, eval_batch_size or max_length, use dtype: bfloat16, or a "
                "smaller base; a run that had begun goes on with --resume",
            )
        )
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    return str(
        LoricaError(
            f"{where}{error.strerror or error}",
            mend="see that the disk has space and the path can be used; a run that had begun goes "
            "on with --resume, and --debug shows where this came from",
        )
    )


def _print_usage(error: Any) -> None:
    """What is wrong with a command line, as all other errors are told."""
    name = error.ctx.command_path if getattr(error, "ctx", None) else "lorica"
    print(f"lorica: {error.format_message()}", file=sys.stderr)
    print(f"  mend: see {name} --help", file=sys.stderr)


def _shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Shows Lorica's own warnings as sentences, and leaves those of others as they are."""
    from lorica.errors import LoricaWarning

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if issubclass(category, LoricaWarning):
            with suppress(OSError, ValueError):  # whoever read it has gone; the run stays
                print(f"lorica: warning: {message}", file=sys.stderr)
        else:
            otherwise(message, category, *rest, **named)

    return show
