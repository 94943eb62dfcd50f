"""Export: from a run or one of its checkpoints to a folder that plain diffusers loads as a LoRA."""

from dataclasses import dataclass
from pathlib import Path

from diffusion.adapters import AdapterState, adapter_metadata, checksum, load_adapter_file, save_adapter
from learner.checkpoint import latest_checkpoint, read_checkpoint
from raysteer.errors import ExportError


@dataclass(frozen=True)
class Exported:
    """Where an adapter went, where it came from, and its checksum (sha256, hex)."""

    file: Path
    source: str
    checksum: str

    def load_line(self) -> str:
        """The line of Python that loads it."""
        return f'pipe.load_lora_weights("{self.file.parent}")'


def find_adapter(source: str | Path, storage: str | Path = "runs") -> tuple[AdapterState, dict[str, str], str]:
    """Adapter of a run folder, a run name, a checkpoint folder, or an adapter folder.

    A run gives its final adapter, or the one of its newest checkpoint while it is not finished.

    Returns:
        The state, its header texts, and what it is in words.

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
        checkpoint = read_checkpoint(path)
        return (
            dict(checkpoint.adapter),
            {"version": str(checkpoint.step)},
            f"checkpoint of step {checkpoint.step} ({path})",
        )
    for folder in (path / "adapter", path):
        if path.is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
            found = path if path.is_file() else folder
            return load_adapter_file(found), adapter_metadata(found), f"adapter {found}"
    newest = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ExportError(
            str(path),
            "holds no adapter and no checkpoint",
            "give a run folder, a checkpoint (step-000010) or an adapter folder",
        )
    return (
        dict(newest.adapter),
        {"version": str(newest.step)},
        f"checkpoint of step {newest.step} of the unfinished run {path}",
    )


def export(source: str | Path, target: str | Path, storage: str | Path = "runs", force: bool = False) -> Exported:
    """Write the adapter of ``source`` into the folder ``target`` and read it back.

    Raises:
        ExportError: ``target`` holds something and ``force`` is off, or what was written reads back differently.
    """
    state, metadata, words = find_adapter(source, storage)
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        raise ExportError(str(folder), "is a file", "choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ExportError(
            str(folder), "is not empty", "choose another folder, or say --force to replace the adapter in it"
        )
    digest = checksum(state)
    try:
        file = save_adapter(state, folder, metadata | {"raysteer_checksum": digest})
    except OSError as error:
        raise ExportError(
            str(folder), f"cannot be written ({error.strerror})", "choose another folder or free some space"
        ) from None
    if checksum(load_adapter_file(folder)) != digest:
        raise ExportError(str(file), "reads back differently from what was written", "check the disk and export again")
    return Exported(file, words, digest)
