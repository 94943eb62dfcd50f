"""The commands that look at what runs leave behind, and turn it into files for others."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_shell import (
    EXIT_BAD_DATA,
    Overrides,
    RecipeArgument,
    SourceArgument,
    StorageOption,
    app,
    print_table,
    reported,
)


@app.command("eval")
@reported
def evaluate(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="Recipe file; or a pipeline's folder or hub name, any model.")
    ],
    overrides: Overrides = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter folder, checkpoint or run; the recipe's own run by default, of a model none. "
            "none: the base model."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of cards and page; <run>/evaluation/<suite> by default.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Evaluate base model and adapter at equal prompts and seeds: metric cards, their comparison, and a page."""
    from cluster.evalrecipe import load_evaluation

    loaded = load_evaluation(recipe, overrides or [])
    from cluster.evalrun import evaluate_and_record, single
    from evaluation.comparison import compare as compared
    from evaluation.comparison import foot, table

    result, made = evaluate_and_record(loaded, adapter, out, json_path, notify=typer.echo)
    cards = list(result.cards.values())
    comparison = compared(cards) if len(cards) > 1 else None
    typer.echo()
    print_table(*(single(cards[0]) if comparison is None else table(comparison)))
    for line in [] if comparison is None else foot(comparison):
        typer.echo(f"\n{line}")
    typer.echo()
    for what, place in made.items():
        typer.echo(f"{what:<13} {place}")


@app.command()
@reported
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]... | [CARD]...",
            help="Run names, run folders or MLflow ids, all by default; or metric cards: card.json files, their "
            "folders, or a suite's folder with all its cards.",
        ),
    ] = None,
    storage: Annotated[str, typer.Option(help="Run storage, whose mlflow.db is read.")] = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow URI, if it is not the one of the storage.")] = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "raysteer",
    only: Annotated[str | None, typer.Option(help="Show only metrics whose name contains this.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for plots and page of cards; comparison-A-B beside the first card's by default."),
    ] = None,
) -> None:
    """Show runs or metric cards side by side: of runs what differs between them and their last figures; of cards all
    figures, their differences to the first card, and which of them chance does not explain. Cards of different
    protocols are refused."""
    from cluster.compare_cards import card_files
    from raysteer.errors import ConfigError, TrackingError

    files = card_files(runs or [])
    if files is not None:
        _compare_cards(files, only, json_path, out)
        return
    if out is not None:
        raise ConfigError("--out", str(out), "plots and a page are made of metric cards; leave it out to compare runs")
    from cluster.compare import as_json, fetch_runs, table
    from cluster.tracking import TrackingConfig, resolve_uri

    address = resolve_uri(TrackingConfig(uri=uri), storage)
    database = Path(address.removeprefix("sqlite:///"))
    if address.startswith("sqlite:///") and not database.is_file():
        raise TrackingError(str(database), "there is no such MLflow database", "give --storage or --uri of your runs")
    rows = fetch_runs(address, experiment, runs or [])
    if not rows:
        raise TrackingError(f"experiment {experiment}", "it has no runs", "train one, or name another --experiment")
    if json_path is not None:
        json_path.write_text(as_json(rows) + "\n", encoding="utf-8")
    print_table(["", *(row.name for row in rows)], table(rows, only))


def _compare_cards(files: list[Path], only: str | None, json_path: Path | None, out: Path | None) -> None:
    from cluster.compare_cards import compare_files, default_folder, write, write_json
    from evaluation.comparison import foot, table

    compared = compare_files(files)
    print_table(*table(compared, only))
    typer.echo("\n" + "\n".join(foot(compared)) + "\n")
    if json_path is not None:
        write_json(compared, json_path)
        typer.echo(f"figures  {json_path}")
    write(compared, files, out or default_folder(files, compared), notify=typer.echo)


@app.command()
@reported
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
    print_table(header, lines)
    files = write(report, out or Path(loaded.run.storage) / f"{loaded.run.name}-anchors")
    typer.echo(f"\n{report.legend()}")
    for kind, file in zip(("figures", "picture"), files, strict=True):
        typer.echo(f"{kind:<9} {file}")


@app.command()
@reported
def data(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Folder of a dataset, or of the run that made it.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a PNG.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Say whether it can be used with this recipe.")] = None,
) -> None:
    """Show what a dataset of scored groups holds, and whether all of it can be read; exit code 1 if not."""
    from cluster.config import load_recipe

    loaded = None if recipe is None else load_recipe(recipe)
    from cluster.data import examine

    report = examine(dataset, loaded)
    typer.echo(report.render() + "\n")
    print_table(*report.table())
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from cluster.data_plot import draw

        draw(report, plot)
    if not report.good:
        raise typer.Exit(EXIT_BAD_DATA)


@app.command()
@reported
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


@app.command()
@reported
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
