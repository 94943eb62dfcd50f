"""What of a working directory travels with a job: the rules are Ray's, the warnings come before anything is sent."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from cluster.memory import readable_bytes
from raysteer.errors import ConfigError, UserError

LARGE_FILE_BYTES = 10 * 2**20  # Ray warns from here on
LARGEST_PACKAGE_BYTES = 512 * 2**20  # Ray refuses more, compressed

Files = dict[Path, int]


def travelling(working_dir: Path) -> Files:
    """The files that Ray would pack, absolute, with their sizes in bytes: all but what .gitignore and .rayignore files
    name, .git and virtual environments.
    """
    # Ray's own walk, so that the answer is right by construction; there is no public one.
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: Files = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[path] = path.stat().st_size

    quiet = logging.getLogger(f"{__name__}.ray")
    quiet.setLevel(logging.ERROR)
    _dir_travel(
        working_dir,
        [_get_excludes(working_dir, get_runtime_env_default_excludes())],
        note,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=quiet,
    )
    return files


def check_size(working_dir: Path, files: Files) -> list[str]:
    """Warnings about large files.

    Raises:
        UserError: more than Ray takes.
    """
    largest = sorted(files, key=lambda path: -files[path])
    if sum(files.values()) > LARGEST_PACKAGE_BYTES:
        named = _named(working_dir, largest[:3], files)
        raise UserError(
            f"working directory {working_dir}",
            f"it holds {readable_bytes(sum(files.values()))} and Ray packs at most "
            f"{readable_bytes(LARGEST_PACKAGE_BYTES)}; the largest are {named}",
            "name what the job does not need in .rayignore, or put it on storage the cluster shares",
        )
    large = [path for path in largest if files[path] >= LARGE_FILE_BYTES]
    if not large:
        return []
    return [f"large files travel with the job: {_named(working_dir, large[:5], files)} (.rayignore leaves files out)"]


def check_needed(
    working_dir: Path, files: Files, needed: Mapping[str, Path], absolute: Collection[Path], here: bool
) -> list[str]:
    """Warnings about what a recipe needs and a job may not find.

    Args:
        working_dir: what is packed.
        files: what of it travels.
        needed: absolute path by recipe key.
        absolute: those that were written as absolute paths, which the job will look for at just that place.
        here: whether the job sees this machine's files.

    Raises:
        ConfigError: a relative path that cannot be there in the job.
    """
    warnings = []
    for key, path in needed.items():
        if path in absolute:
            if path.exists() and not here:
                warnings.append(f"{key}: {path} does not travel; the cluster must have it at the same place")
            continue
        left = _left_behind(working_dir, files, key, path)
        if left:
            named = ", ".join(str(file.relative_to(working_dir)) for file in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            warnings.append(f"{key}: ignored files do not travel: {named}{more}")
    return warnings


def _left_behind(working_dir: Path, files: Files, key: str, path: Path) -> list[Path]:
    """What of a file or folder does not travel.

    Raises:
        ConfigError: nothing of it does.
    """
    remedy = "put it there, or on storage the cluster shares and write its absolute path"
    inside = Path(os.path.normpath(path))
    if not inside.is_relative_to(working_dir):
        raise ConfigError(key, str(path), f"it lies outside the working directory {working_dir}; {remedy}")
    wanted = [file for file in (inside, *sorted(inside.rglob("*"))) if file.is_file()]
    if not wanted:
        raise ConfigError(key, str(path), f"there is no such file in the working directory; {remedy}")
    left = [file for file in wanted if file not in files]
    if len(left) == len(wanted):
        raise ConfigError(
            key,
            str(path),
            "it would not travel, because .gitignore or .rayignore names it: take it out of there, or put it on "
            "storage the cluster shares and write its absolute path",
        )
    return left


def _named(working_dir: Path, paths: list[Path], files: Files) -> str:
    return ", ".join(f"{path.relative_to(working_dir)} ({readable_bytes(files[path])})" for path in paths)
