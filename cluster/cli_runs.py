"""The commands that start, watch and end runs."""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.cli_shell import (
    EXIT_INTERRUPTED,
    Overrides,
    RecipeArgument,
    RunArgument,
    StorageOption,
    ThereOption,
    WorkingDirOption,
    app,
    reported,
)


@app.command()
@reported
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print what a recipe means: batch arithmetic, placement, memory, lag. Checks everything, starts nothing."""
    from cluster.config import load_recipe
    from cluster.plan import preflight, resolve

    loaded = load_recipe(recipe, overrides or [])
    preflight(loaded, hold=False)
    typer.echo(resolve(loaded).render())


@app.command()
@reported
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
    why = f"; {result.reason}" if result.reason is not None else ""
    typer.echo(f"\n{result.status} after {result.steps} steps {how}{why}")
    if result.status != "finished":
        again = "the same submission" if surrounding_job() else f"raysteer train {recipe} {' '.join(overrides or [])}"
        typer.echo(f"continue with: {again}".rstrip())
        raise typer.Exit(EXIT_INTERRUPTED)
    from cluster.tracking import resolve_uri

    typer.echo(f'adapter   {result.adapter_dir}  (pipe.load_lora_weights("{result.adapter_dir}"))')
    typer.echo(f"evaluate  raysteer eval {recipe} {' '.join(overrides or [])}".rstrip())
    typer.echo(f"look      mlflow ui --backend-store-uri {resolve_uri(loaded.tracking, loaded.run.storage)}")


@app.command()
@reported
def generate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="Draw with this run, checkpoint or adapter; the base model by default.")
    ] = None,
) -> None:
    """Draw and score groups for offline objectives. The same command again continues a generation that was stopped."""
    from cluster.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from cluster.generate import dataset_of, prepare
    from cluster.generate import generate as run_generation
    from cluster.progress import readable_seconds

    typer.echo(prepare(loaded, adapter).describe() + "\n")
    result = run_generation(loaded, adapter)
    how = f"in {readable_seconds(result.seconds)}" if result.seconds else "(it was before: there was nothing to do)"
    typer.echo(f"\n{result.status} after {result.steps} batches {how}")
    if result.status != "finished":
        chosen = [] if adapter is None else ["--adapter", adapter]
        typer.echo(f"continue with: raysteer generate {' '.join([recipe, *(overrides or []), *chosen])}")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"dataset   {dataset_of(result)}\nlook      raysteer data {dataset_of(result)}")


@app.command()
@reported
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
@reported
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
@reported
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


@app.command("render-k8s")
@reported
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
