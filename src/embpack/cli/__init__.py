"""The command line: parses and prints; everything else is the library's."""

import platform
import signal
import sys
import warnings

import numpy as np
import typer

import embpack
from embpack import _native
from embpack.cli import compare, demo, dequantize, inspect, methods, quantize, show, update
from embpack.cli.commands import Command, Group
from embpack.cli.streams import mend_streams
from embpack.errors import LossLimitError
from embpack.files import FORMAT_VERSION

_EPILOG = """[bold]embpack demo[/] makes a checkpoint and packs it.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a table loses more than --max-loss allows."""

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pack trained embedding tables to 4 bits a value, about an eighth of their size.",
    epilog=_EPILOG,
)
for command in (
    *(quantize.quantize, compare.compare, methods.methods),
    *(inspect.inspect, dequantize.dequantize, update.update, demo.demo),
):
    app.command(cls=Command)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"embpack {embpack.__version__} (file format {FORMAT_VERSION}, {_native.isa()}, NumPy {np.__version__}, "
            f"Python {platform.python_version()})"
        )
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="On failure, show the whole traceback."),  # main looks for it
    version: bool = typer.Option(
        False,
        "--version",
        help="Show the version, and what it runs on, and exit.",
        callback=_print_version,
        is_eager=True,
    ),
) -> None:
    pass


def _print_failure(error: Exception) -> None:
    if not isinstance(error, LossLimitError):
        show.print_error("; ".join([show.explain(error), *getattr(error, "__notes__", ())]))
        return
    message, *tables = str(error).split("\n")
    show.print_error(message)
    for line in tables:
        show.errors.print(line, soft_wrap=True)


def main() -> None:
    """Run the command line.

    Exit code 2 for wrong usage, 1 for a failure, which is one line on stderr, 3 if a limit of loss is not kept, which
    is a line more for each table.
    """
    mend_streams()
    if not sys.warnoptions:
        # PyTorch warns of pickle protocols and storages in checkpoints; a user who packs one can do nothing about them.
        warnings.filterwarnings("ignore", module="torch")
    warnings.showwarning = show.print_warning
    on_broken_pipe = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError) as error:
        if "--debug" in sys.argv:
            show.print_traceback(error)
        else:
            _print_failure(error)
        sys.exit(3 if isinstance(error, LossLimitError) else 1)
    finally:
        signal.signal(signal.SIGPIPE, on_broken_pipe)
