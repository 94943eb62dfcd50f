"""The command line: what each command takes, and how it ends.

Exit codes: 0 done, 2 something you can fix (one line says what), 3 the run could not go on (a deadline, a failed
parity gate), 130 interrupted (a training has written its checkpoint). Heavy imports happen inside the commands, so that
``--help`` is instant.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

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

EXIT_USER, EXIT_STUCK, EXIT_INTERRUPTED = 2, 3, 130
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


def _reported(command: Command) -> Command:
    """Turn what a user can fix into one line and an exit code; let our own bugs keep their stack trace."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            _fail(str(error), EXIT_USER)
        except (DeadlineExceeded, ParityError) as error:
            _fail(" ".join(str(error).split()), EXIT_STUCK)
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)

    return run  # type: ignore[return-value]


def _fail(message: str, code: int) -> None:
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


@app.command()
@_reported
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print what a recipe means: batch arithmetic, placement, memory, lag. Checks everything, starts nothing."""
    from cluster.config import load_recipe
    from cluster.plan import preflight, resolve

    loaded = load_recipe(recipe, overrides or [])
    preflight(loaded, hold=False)
    typer.echo(resolve(loaded).render())


@app.command()
@_reported
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train a recipe. The same command again continues a run that was stopped or killed."""
    from cluster.config import load_recipe
    from cluster.plan import preflight, resolve
    from cluster.progress import readable_seconds

    loaded = load_recipe(recipe, overrides or [])
    preflight(loaded, hold=False)
    typer.echo(resolve(loaded).render() + "\n")
    from cluster.jobs import surrounding_job
    from cluster.train import train as run_training

    result = run_training(loaded)
    how = f"in {readable_seconds(result.seconds)}" if result.seconds else "(it was before: there was nothing to do)"
    typer.echo(f"\n{result.status} after {result.steps} steps {how}")
    if result.status != "finished":
        again = "the same submission" if surrounding_job() else f"raysteer train {recipe} {' '.join(overrides or [])}"
        typer.echo(f"continue with: {again}".rstrip())
        raise typer.Exit(EXIT_INTERRUPTED)
    from cluster.tracking import resolve_uri

    typer.echo(f'adapter   {result.adapter_dir}  (pipe.load_lora_weights("{result.adapter_dir}"))')
    typer.echo(f"evaluate  raysteer eval {recipe} {' '.join(overrides or [])}".rstrip())
    typer.echo(f"look      mlflow ui --backend-store-uri {resolve_uri(loaded.tracking, loaded.run.storage)}")


@app.command()
@_reported
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster.")
    ] = "http://127.0.0.1:8265",
    working_dir: WorkingDirOption = ".",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job's log.")] = False,
) -> None:
    """Train a recipe as a job of a running Ray cluster: check it, pack it, follow its log, return its exit code."""
    from cluster.submit import submit as run_submit

    notify = functools.partial(typer.echo, err=True)
    code = run_submit(recipe, overrides or [], address, working_dir, not no_wait, notify, _write)
    raise typer.Exit(code)


@app.command()
@_reported
def status(
    run: RunArgument,
    storage: StorageOption = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Everything known, as JSON.")] = False,
    address: ThereOption = None,
    working_dir: WorkingDirOption = ".",
) -> None:
    """Show what a run is doing: version, throughput, lag, ledger, who is slow. Reads its folder, needs no Ray."""
    if address is not None:
        _there(address, working_dir, storage, ["status", run, *(["--json"] if as_json else [])], timeout_s=300.0)
    from cluster.runlock import read_holder
    from cluster.status import read_status
    from cluster.status_view import render
    from cluster.stopping import find_run

    folder = find_run(run, storage)
    found = read_status(folder)
    typer.echo(json.dumps(found, indent=1) if as_json else render(found, read_holder(folder.path), time.time()))


@app.command()
@_reported
def stop(
    run: RunArgument,
    storage: StorageOption = "runs",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave the request and return.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Longest to wait for the end, in seconds.")] = 900.0,
    address: ThereOption = None,
    working_dir: WorkingDirOption = ".",
) -> None:
    """End a run after the step it is in, with a checkpoint. The same command or submission continues it."""
    if address is not None:
        options = ["--timeout-s", str(timeout_s), *(["--no-wait"] if no_wait else [])]
        _there(address, working_dir, storage, ["stop", run, *options], timeout_s + 300.0)
    from cluster.runlock import read_holder
    from cluster.status import read_status
    from cluster.status_view import render
    from cluster.stopping import find_run, request_stop, wait_for_end

    folder = find_run(run, storage)
    request_stop(folder)
    if no_wait:
        typer.echo(f"{run} will end after its step; raysteer status {run} shows when it has")
        return
    wait_for_end(folder, timeout_s, typer.echo)
    typer.echo(render(read_status(folder), read_holder(folder.path), time.time()))


def _there(address: str, working_dir: str, storage: str, command: list[str], timeout_s: float) -> NoReturn:
    """Run one of these commands as a small job of the cluster, print what it prints and leave with its exit code."""
    from cluster.jobs import JobServer, shared_folder

    server = JobServer(address)
    place = shared_folder(server, storage, "--storage", Path.cwd())
    line = ["python", "-m", "cluster", *command, "--storage", place]
    code, output = server.ask(line, Path(working_dir), f"raysteer-{command[0]}", timeout_s)
    typer.echo(output, nl=False)
    raise typer.Exit(code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command("eval")
@_reported
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder, checkpoint or run; the recipe's own run by default.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Evaluate base model and adapter at equal prompts and seeds, and print the metric card."""
    from cluster.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from cluster.evalrun import evaluate_and_record

    typer.echo(evaluate_and_record(loaded, adapter, json_path, notify=typer.echo))


@app.command()
@_reported
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Run names, run folders or MLflow ids; all by default."),
    ] = None,
    storage: Annotated[str, typer.Option(help="Run storage, whose mlflow.db is read.")] = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow URI, if it is not the one of the storage.")] = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "raysteer",
    only: Annotated[str | None, typer.Option(help="Show only metrics whose name contains this.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Show runs side by side: what differs between them, their last figures, their evaluations."""
    from cluster.compare import as_json, fetch_runs, table
    from cluster.tracking import TrackingConfig, resolve_uri
    from raysteer.errors import TrackingError

    address = resolve_uri(TrackingConfig(uri=uri), storage)
    database = Path(address.removeprefix("sqlite:///"))
    if address.startswith("sqlite:///") and not database.is_file():
        raise TrackingError(str(database), "there is no such MLflow database", "give --storage or --uri of your runs")
    rows = fetch_runs(address, experiment, runs or [])
    if not rows:
        raise TrackingError(f"experiment {experiment}", "it has no runs", "train one, or name another --experiment")
    if json_path is not None:
        json_path.write_text(as_json(rows) + "\n", encoding="utf-8")
    _print_table(["", *(row.name for row in rows)], table(rows, only))


@app.command()
@_reported
def anchors(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    safe: Annotated[str | None, typer.Option(help="Safe prompts; the recipe's by default.")] = None,
    unsafe: Annotated[str | None, typer.Option(help="Unsafe prompts; the recipe's by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts of each side, a random sample of more.")] = 500,
    out: Annotated[
        Path | None, typer.Option(help="Folder of anchors.json and anchors.png; <storage>/<run>-anchors by default.")
    ] = None,
) -> None:
    """Show how anchor sets separate safe from unsafe prompts in the recipe's CLIP, and how far alpha moves them."""
    from cluster.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from cluster.anchors import study, write

    report = study(loaded, safe, unsafe, limit, notify=typer.echo)
    header, lines = report.table()
    _print_table(header, lines)
    files = write(report, out or Path(loaded.run.storage) / f"{loaded.run.name}-anchors")
    typer.echo(f"\n{report.legend()}")
    for kind, file in zip(("figures", "picture"), files, strict=True):
        typer.echo(f"{kind:<9} {file}")


@app.command()
@_reported
def export(
    source: SourceArgument,
    target: Annotated[str, typer.Argument(metavar="FOLDER", help="Where to write; for kohya also FILE.safetensors.")],
    form: Annotated[
        str, typer.Option("--to", metavar="FORM", help="diffusers (a LoRA), kohya (a LoRA), merged (a whole pipeline).")
    ] = "diffusers",
    model: Annotated[
        str | None, typer.Option(help="Base model of the merged form; the one of the run's recipe by default.")
    ] = None,
    storage: StorageOption = "runs",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
) -> None:
    """Write the adapter as plain diffusers, kohya-style programs or from_pretrained load it."""
    from cluster.export import export as run_export

    done = run_export(source, target, form, storage=storage, model=model, force=force)
    typer.echo(f"wrote {done.path} from {done.source}\nload it with: {done.load_line}")


@app.command("render-k8s")
@_reported
def render_k8s(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        str, typer.Option(metavar="FILE|FOLDER|-", help="FILE.yaml, a folder of two files, or - for standard output.")
    ] = "-",
) -> None:
    """Write what kubectl apply needs to train the recipe on Kubernetes with KubeRay. Starts nothing."""
    from cluster.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from cluster.kubernetes.render import dump, manifests, write

    rendered = manifests(loaded)
    if out == "-":
        typer.echo(dump((*rendered.shared, *rendered.run)), nl=False)
    else:
        for file in write(rendered, out):
            typer.echo(f"wrote {file}")
    for path, place in rendered.copies.items():  # beside the manifests, which may be piped into kubectl
        typer.echo(f"copy  {path} to {place} on the shared volume", err=True)


@app.command()
@_reported
def sample(
    source: SourceArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; several times for several rows.")] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="How much of the adapter, 0 (base model) to 1 (all of it) or 2; several times, or 0,0.5,1."),
    ] = None,
    seed: Annotated[str, typer.Option(help="Decides the initial noise, the same in every image.")] = "0",
    steps: Annotated[str | None, typer.Option(help="Denoising steps; those of the run by default.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance scale; that of the run by default.")] = None,
    out: Annotated[str, typer.Option(help="PNG to write.")] = "sample.png",
    model: Annotated[str | None, typer.Option(help="Base model; the one of the run's recipe by default.")] = None,
    storage: StorageOption = "runs",
) -> None:
    """Draw the same images with more and more of the adapter, side by side in one PNG. Needs no Ray."""
    from cluster.sample import sample as run_sample

    done = run_sample(source, prompt or [], scale or [], seed, steps, guidance, out, model, storage, notify=typer.echo)
    typer.echo(f"picture {done}")


def _print_table(header: list[str], lines: list[tuple[str, list[str]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for label, cells in lines:
        shown.add_row(*(one_line(cell) for cell in (label, *cells)))
    # Outside a terminal rich would cut at 80 columns.
    width = None if sys.stdout.isatty() else max(80, 44 + 24 * len(header))
    Console(width=width, highlight=False, markup=False).print(shown)


def main() -> None:
    """Entry point of the ``raysteer`` script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
