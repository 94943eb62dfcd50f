"""From what a user points at (a run, a checkpoint, an adapter) to the adapter in it and the model it adapts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import is_run_name
from diffusion.adapters import AdapterState, adapter_metadata, check_fits, checksum, layout, load_adapter_file
from diffusion.loading import quiet_loading, read_index
from diffusion.policy import LoRAConfig, ModelConfig
from learner.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from raysteer.errors import ExportError, ModelError, UserError

if TYPE_CHECKING:
    from cluster.config import Recipe

_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Source:
    """An adapter and where it is from.

    Attributes:
        state: the adapter, alpha included.
        words: what it is, for people.
        metadata: header texts: checksum (sha256, hex), and run and step as far as they are known.
        run: folder of the run it is from, if that is at hand with its recipe.
    """

    state: AdapterState
    words: str
    metadata: dict[str, str]
    run: Path | None

    @property
    def name(self) -> str:
        """A file name for it: the run's. The header of a file may say anything: what is no run name is not used."""
        run = self.metadata.get("run", "")
        return run if is_run_name(run) else "adapter"

    def recipe(self) -> Recipe | None:
        """The recipe of its run, None without a run.

        Raises:
            ExportError: there is one and it cannot be read.
        """
        from cluster.config import load_recipe

        if self.run is None:
            return None
        try:
            return load_recipe(self.run / _RECIPE)
        except UserError as error:
            raise ExportError(
                str(self.run / _RECIPE), f"cannot be read ({error})", "export the adapter, then give it with --model"
            ) from None


def find_adapter(source: str | Path, storage: str | Path = "runs") -> Source:
    """Adapter of a run folder, a run name, a checkpoint folder, an adapter folder or an adapter file.

    A run gives its final adapter, or the one of its newest checkpoint while it is not finished; the moving average
    where the recipe asks for one.

    Raises:
        ExportError: nothing there that holds an adapter.
        CheckpointError, ModelError: it is there and damaged.
    """
    path = Path(source)
    if not path.exists() and (Path(storage) / path).is_dir():
        path = Path(storage) / path
    if not path.exists():
        raise ExportError(str(source), "there is no such run, checkpoint or adapter", f"look into the folder {storage}")
    if (path / "manifest.json").is_file():
        return _of_checkpoint(read_checkpoint(path), path.resolve().parent.parent, f"({path})")
    for place in (path / "adapter", path):
        if place.is_file() or any(place.glob("*.safetensors")):
            state = load_adapter_file(place)
            metadata = adapter_metadata(place) | {"checksum": checksum(state)}
            return Source(state, f"adapter {place}", metadata, _run_of(path))
    newest = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ExportError(
            str(path),
            "holds no adapter and no checkpoint",
            "give a run folder, a checkpoint (step-000010) or an adapter folder",
        )
    return _of_checkpoint(newest, path.resolve(), f"of the unfinished run {path}")


def _of_checkpoint(checkpoint: Checkpoint, run: Path, where: str) -> Source:
    state = dict(checkpoint.exported)
    metadata = {"run": run.name, "step": str(checkpoint.step), "checksum": checksum(state)}
    return Source(state, f"checkpoint of step {checkpoint.step} {where}", metadata, _run_of(run))


def _run_of(path: Path) -> Path | None:
    """The run folder that ``path`` is or lies in."""
    path = path.resolve()
    return next((place for place in (path, *path.parents[:2]) if (place / _RECIPE).is_file()), None)


def base_model(source: Source, model: str | None) -> ModelConfig:
    """The model an adapter is to be put on, with the adapter's own LoRA shape; nothing is loaded.

    Args:
        source: from ``find_adapter``.
        model: folder or hub name; None takes the one of the run's recipe.

    Raises:
        ExportError: no model is given and none is known, or it is not there.
        ModelError: it is no pipeline, or the adapter is of another model (names the first module that does not fit).
    """
    recipe = None if model is not None and source.run is None else source.recipe()
    if model is None:
        if recipe is None:
            raise ExportError(source.words, "does not say which model it adapts", "give it with --model PATH")
        config = recipe.model
        if Path(config.path).is_absolute() and not Path(config.path).is_dir():
            raise ExportError(config.path, "the model of this run is not there", "say where it is with --model PATH")
    else:
        own = ModelConfig(path=str(Path(model).expanduser()) if model.strip() else ".")
        config = own if recipe is None else recipe.model.model_copy(update={"path": own.path})
    lora = fitting_lora(config, source)
    return config.model_copy(update={"lora": lora, "gradient_checkpointing": False})


def fitting_lora(config: ModelConfig, source: Source) -> LoRAConfig:
    """The LoRA shape of an adapter that fits this model; no weights are loaded.

    Raises:
        ModelError: it does not fit (names the first module), or the model cannot be read.
    """
    import diffusers
    import torch

    index: dict[str, Any] = read_index(config)
    what = layout(source.state, source.words)
    library, name = index.get(what.component) or ("", "")
    kind = getattr(diffusers, name, None) if library == "diffusers" else None
    if kind is None:
        raise ModelError(
            config.path,
            f"is a {index['_class_name']} without the {what.component} that the adapter is for",
            "use the model it was made for",
        )
    local = config.local_files_only and not Path(config.path).is_dir()
    try:
        with quiet_loading(), torch.device("meta"):  # names and shapes without weights
            part = kind.load_config(
                config.path, subfolder=what.component, revision=config.revision, local_files_only=local
            )
            check_fits(source.state, kind.from_config(part), source.words)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            config.path, f"its {what.component} cannot be read ({reason})", "save the pipeline again"
        ) from error
    return LoRAConfig(rank=what.rank, alpha=what.alpha, targets=what.modules)
