"""The command line: parses and prints; everything else is the library's."""

import sys
import warnings

import typer
from rich.markup import escape

import embpack
from embpack.cli import compare, demo, dequantize, inspect, quantize
from embpack.cli.show import errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pack trained embedding tables to 4 bits a value, an eighth of their size.",
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


def main() -> None:
    """Run the command line. Exit code 2 for wrong usage, 1 for a failure, which is one line on stderr."""
    if not sys.warnoptions:
        # PyTorch warns of pickle protocols and storages in checkpoints; a user who packs one can do nothing about them.
        warnings.filterwarnings("ignore", module="torch")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error) or type(error).__name__)}", markup=True, soft_wrap=True)
        sys.exit(1)
