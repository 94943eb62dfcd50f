"""What all commands of the command line share: the application, exit codes, common arguments, tables.

Exit codes: 0 done, 1 a dataset is damaged or does not fit, 2 something you can fix (one line says what), 3 the run
could not go on (a deadline, a failed parity gate), 130 interrupted (a training has written its checkpoint).
"""

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from raysteer import __version__
from raysteer.errors import DeadlineExceeded, ParityError, UserError
from raysteer.text import one_line

app = typer.Typer(
    name="raysteer",
    help="Safety post-training for text-to-image diffusion models, as a distributed actor-learner system on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_BAD_DATA, EXIT_USER, EXIT_STUCK, EXIT_INTERRUPTED = 1, 2, 3, 130
Command = TypeVar("Command", bound=Callable[..., None])

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, for example recipes/glyphs.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example run.steps=20 sampling.eta=0.5."),
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder or name, checkpoint folder, adapter folder or file.")
]
StorageOption = Annotated[str, typer.Option(help="Where to look for a run given by name.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run name or folder.")]
ThereOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Dashboard of the cluster that sees the run's storage; here if unset."
    ),
]
WorkingDirOption = Annotated[
    str, typer.Option(metavar="FOLDER", help="What travels with a job: the project, with the recipe.")
]


def reported(command: Command) -> Command:
    """Turn what a user can fix into one line and an exit code; let our own bugs keep their stack trace."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            fail(str(error), EXIT_USER)
        except (DeadlineExceeded, ParityError) as error:
            fail(" ".join(str(error).split()), EXIT_STUCK)
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)

    return run  # type: ignore[return-value]


def fail(message: str, code: int) -> None:
    typer.echo(f"raysteer: {one_line(message)}", err=True)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def print_table(header: list[str], lines: list[tuple[str, list[str]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        shown.add_column(one_line(name), justify="left" if index == 0 else "right", overflow="fold")
    for label, cells in lines:
        shown.add_row(*(one_line(cell) for cell in (label, *cells)))
    # Outside a terminal rich would cut at 80 columns.
    width = None if sys.stdout.isatty() else max(80, 44 + 24 * len(header))
    Console(width=width, highlight=False, markup=False).print(shown)
