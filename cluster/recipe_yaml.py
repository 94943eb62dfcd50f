"""Text side of a recipe: YAML in and out, overrides, paths, file identity, and pydantic's errors in our words."""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Discriminator, Tag, ValidationError
from pydantic.fields import FieldInfo

from raysteer.errors import ConfigError
from rewards.config import map_files

# Keys that hold paths; those of prompt sources and rewards are found by their own modules.
_PATH_KEYS = ("model.path", "prompts.safe", "prompts.unsafe")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_LOCAL_CLIP = "local-dir:"
_HASH_WHOLE_BYTES = 64 * 2**20
_SAMPLE_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Core schema of YAML 1.2; a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would take for something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice (first in line {seen[key]})", key_node.start_mark
            )
        seen[key] = line
    data: dict[Any, Any] = {}
    yield data
    data.update(loader.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten, not eight


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML 1.2 core schema.

    Raises:
        ConfigError: with the line and column of a mistake.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        found = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else text[:40]
        raise ConfigError(where, found, f"correct the YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(name, text[:40], f"correct the YAML: {error}") from None


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML of plain data that ``parse_yaml`` reads back as equal."""
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if parse_yaml(text, "recipe") != data:
        raise AssertionError("a recipe did not survive being written as YAML")
    return text


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one ``a.b=c`` in nested dicts, in place.

    Raises:
        ConfigError: for a missing "=", bad YAML on the right, or a path through something that is no section.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(override, "override", "write an override as section.key=value, for example run.steps=20")
    *sections, leaf = key.split(".")
    here: dict[str, Any] = data
    for depth, section in enumerate(sections):
        if here.get(section) is None:
            here[section] = {}
        if not isinstance(here[section], dict):
            raise ConfigError(key, text, f"{'.'.join(sections[: depth + 1])} is a value, not a section")
        here = here[section]
    here[leaf] = parse_yaml(text, f"override {key}")


def to_config_error(error: ValidationError, data: Mapping[str, Any], model: type[BaseModel]) -> ConfigError:
    """The most helpful of pydantic's complaints, as one ConfigError with the full dotted key."""
    found = sorted(error.errors(), key=_rank)
    first = found[0]
    key = _dotted(first["loc"], data, first["type"] == "missing")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(key, first["input"], f"there is no such key; {_suggest(key, model, data)}{more}")
    if first["type"] == "missing":
        return ConfigError(key, None, f"add it to the recipe{more}")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        key, value = _blame(key, first["input"], message)
        return ConfigError(key, value, f"{message}{more}")
    message = first["msg"].removeprefix("Input should be ")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return ConfigError(key, first["input"], f"it should be {message}{more}")


# Pydantic's words for types, in those of somebody who writes YAML.
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "an object": "a section of keys",
}


def _rank(item: Any) -> int:
    """A misspelt key usually also shows as a missing one, and the misspelling is the cause; an unknown name makes
    strangers of the keys that go with it; where text or a section would do, pydantic complains about both, and for a
    section the complaint about text is beside the point."""
    if item["type"] == "extra_forbidden" or (item["type"] == "value_error" and item["loc"][-1] == "name"):
        return 0
    return 2 if item["type"] == "string_type" and isinstance(item["input"], Mapping) else 1


def _blame(key: str, value: Any, message: str) -> tuple[str, Any]:
    """A validator of a whole section starts its message with the key at fault ("trained.count is 9 but ..."): name
    that key.
    """
    if not isinstance(value, Mapping):
        return key, value
    inner, here = re.split(r"[^a-z0-9_.]", message, maxsplit=1)[0], value
    for part in inner.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return key, value
        here = here[part]
    return f"{key}.{inner}", here


def known_keys(model: type[BaseModel], data: Mapping[str, Any] | None = None, prefix: str = "") -> list[str]:
    """Dotted paths of all sections and keys of a model, or of those that ``data`` may have."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        name = field.alias or name
        keys.append(prefix + name)
        inner = None if data is None else data.get(name)
        inside = inner if isinstance(inner, Mapping) else None
        for section in _sections(_chosen(field, inside)):
            keys += known_keys(section, inside, f"{prefix}{name}.")
    return keys


def _chosen(field: FieldInfo, data: Mapping[str, Any] | None) -> Any:
    """What a field is: where its name chooses between several sections, the one that ``data`` has chosen."""
    for item in field.metadata if data is not None else ():
        if isinstance(item, Discriminator):
            chosen: Any = item.discriminator(data) if callable(item.discriminator) else item.discriminator
            return next(one for one in get_args(field.annotation) if Tag(chosen) in get_args(one))
    return field.annotation


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models named in an annotation, also those of list items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _suggest(key: str, model: type[BaseModel], data: Mapping[str, Any]) -> str:
    """Right key nearest to a wrong one: same name elsewhere first, then similar siblings, then anything similar."""
    keys = known_keys(model, data)
    section, _, name = ".".join(part for part in key.split(".") if not part.isdigit()).rpartition(".")
    elsewhere = [known for known in keys if known.rpartition(".")[2] == name]
    siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == section}
    close = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    names = {known.rpartition(".")[2]: known for known in keys}
    if key in known_keys(model):
        return f"it goes with another {section}.name; with this one there is: {', '.join(siblings)}"
    far = [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.75)]
    for candidates in (close, elsewhere, far):
        if candidates:
            return f"did you mean {candidates[0]}?"
    return (
        f"{section or 'a recipe'} has: {', '.join(siblings)}"
        if siblings
        else f"sections: {', '.join(model.model_fields)}"
    )


def _dotted(location: tuple[int | str, ...], data: Any, missing: bool) -> str:
    """Dotted key of a pydantic location, without the names of union branches that pydantic adds to it."""
    parts: list[str] = []
    here = data
    for index, part in enumerate(location):
        try:
            here = here[part]
        except (LookupError, TypeError):
            if not (missing and index == len(location) - 1):
                continue
        parts.append(str(part))
    return ".".join(parts) or "recipe"


def resolve_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths in the sections of a dumped recipe absolute: in the working directory if the file is there, else
    beside the recipe if it is there, else in the working directory (where the message about the missing file points).
    """

    def locate(path: str) -> str:
        here = Path(path).expanduser()
        beside = folder / here
        return str((beside if not here.exists() and beside.exists() else here).absolute())

    for source in data.get("prompts", {}).get("sources") or ():
        source["path"] = locate(source["path"])
    for key in _PATH_KEYS:
        section, name = key.split(".")
        if data.get(section, {}).get(name) is None:
            continue
        located = locate(data[section][name])
        if key != "model.path" or Path(located).exists() or not HUB_NAME.match(data[section][name]):
            data[section][name] = located

    def locate_unless_hub(path: str) -> str:
        located = locate(path)
        return located if Path(located).exists() or not HUB_NAME.match(path) else path

    if "reward" in data:
        data["reward"] = map_files(data["reward"], locate_unless_hub)
    if (data.get("offline") or {}).get("data") is not None:
        data["offline"]["data"] = locate(data["offline"]["data"])
    _resolve_evaluation(data["evaluation"], locate, locate_unless_hub)
    data["run"]["storage"] = str(Path(data["run"]["storage"]).expanduser().absolute())
    return data


def _resolve_evaluation(
    section: dict[str, Any], locate: Callable[[str], str], locate_unless_hub: Callable[[str], str]
) -> None:
    """Make the paths of an evaluation absolute: prompt files, references, detectors and the judge."""
    if section["judge"] is not None:
        section["judge"]["reward"] = map_files(section["judge"]["reward"], locate_unless_hub)
    for suite in section.values():
        for key in ("file", "reference"):
            if isinstance(suite, dict) and suite.get(key) is not None:
                suite[key] = locate(suite[key])
    detectors = section["detectors"]
    for name, own in detectors.items():
        if own is None:
            continue
        is_clip = name in ("clip", "perceptual")
        found = map_files({"clip": own} if is_clip else own, locate_unless_hub)
        found = found["clip"] if is_clip else found
        files = {key: locate(found[key]) for key in ("prompts", "weights") if found.get(key) is not None}
        models = {"model": locate_unless_hub(found["model"])} if name == "objects" else {}
        detectors[name] = found | files | models


def portable_paths(data: dict[str, Any]) -> dict[str, Any]:
    """Inverse of ``resolve_paths`` for what lies below the working directory."""
    base = Path.cwd()

    def relative(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: relative(item) for key, item in value.items()}
        if isinstance(value, list):
            return [relative(item) for item in value]
        if not isinstance(value, str):
            return value
        prefix = _LOCAL_CLIP if value.startswith(_LOCAL_CLIP) else ""
        path = Path(value.removeprefix(prefix))
        return f"{prefix}{path.relative_to(base)}" if path.is_absolute() and path.is_relative_to(base) else value

    return {key: relative(value) for key, value in data.items()}


def identity(path: str) -> str:
    """What a file or folder contains, as sha256 (hex); a name that is no path stands for itself.

    Files above 64 MiB count with their size and their first and last MiB: reading gigabytes of weights at every start
    would cost minutes, and weights that differ differ there.
    """
    root = Path(path)
    if not root.exists():
        return path
    digest = hashlib.sha256()
    for file in [root] if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root) if file != root else ''}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _HASH_WHOLE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(_SAMPLE_BYTES))
                stream.seek(size - _SAMPLE_BYTES)
                digest.update(stream.read())
    return digest.hexdigest()


def check_finite(data: Any, key: str = "") -> None:
    """Refuse .inf and .nan anywhere in a recipe.

    Raises:
        ConfigError: with the dotted key.
    """
    if isinstance(data, Mapping):
        for name, value in data.items():
            check_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            check_finite(value, f"{key}.{index}")
    elif isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(key, data, "use a finite number")
