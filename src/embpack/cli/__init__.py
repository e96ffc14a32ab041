"""The command line: parses and prints; everything else is the library's."""

import signal
import sys
import warnings

import typer

import embpack
from embpack.cli import compare, demo, dequantize, inspect, quantize, show
from embpack.errors import LossLimitError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pack trained embedding tables to 4 bits a value, about an eighth of their size.",
    epilog="Try it on data it makes itself: [bold]embpack demo[/bold]",
)
for command in (quantize.quantize, compare.compare, inspect.inspect, dequantize.dequantize, demo.demo):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embpack {embpack.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="On failure, show the whole traceback."),  # main looks for it
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    pass


def _print_failure(error: Exception) -> None:
    if not isinstance(error, LossLimitError):
        show.print_error(show.explain(error))
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
    show.mend_streams()
    if not sys.warnoptions:
        # PyTorch warns of pickle protocols and storages in checkpoints; a user who packs one can do nothing about them.
        warnings.filterwarnings("ignore", module="torch")
    warnings.showwarning = show.print_warning
    on_broken_pipe = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if "--debug" in sys.argv:
            show.print_traceback(error)
        else:
            _print_failure(error)
        sys.exit(3 if isinstance(error, LossLimitError) else 1)
    finally:
        signal.signal(signal.SIGPIPE, on_broken_pipe)
