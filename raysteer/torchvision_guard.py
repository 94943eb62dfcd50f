"""Let torchvision be imported beside a CPU build of torch when its compiled operators were built for CUDA.

The PyPI wheel of torchvision links CUDA libraries. Beside CPU torch its operator library is silently skipped, and the
Python half then fails with ``operator torchvision::nms does not exist``; transformers, diffusers, peft and open_clip
all import torchvision when it is installed, so all of them fail with it. The cure is to declare the two missing
schemas just before torchvision runs. (``ops.nms`` and ``io.read_image`` stay unusable; we use neither.)

On a healthy install nothing is declared: declaring twice would clash.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[Any] = []  # torch drops the declarations when the Library object is collected


class TorchvisionGuard(MetaPathFinder):
    """Finds torchvision as usual and declares its missing operators right before its ``__init__`` runs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        run, folder = spec.loader.exec_module, Path(spec.origin).parent

        # Declared at execution, not at discovery: torch must not be imported because somebody asked "is it installed?".
        def exec_module(module: ModuleType) -> None:
            declare_missing_operators(folder)
            run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the guard in this process. Idempotent, imports nothing; also the set-up hook of Ray workers."""
    if "torchvision" in sys.modules or any(isinstance(finder, TorchvisionGuard) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, TorchvisionGuard())


def declare_missing_operators(folder: Path) -> bool:
    """Declare ``nms`` and ``qnms`` if torch is a CPU build and torchvision's operator library cannot be loaded.

    Args:
        folder: the installed torchvision package.

    Returns:
        True if the operators were declared, False if there was nothing to cure.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    if _libraries or _loads(folder):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(operator + _SCHEMA)
    _libraries.append(library)
    return True


def _loads(folder: Path) -> bool:
    import torch

    candidates = [path for pattern in ("_C.so", "_C.*.so", "_C.pyd", "_C.*.pyd") for path in folder.glob(pattern)]
    if not candidates:
        return False
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError:
        return False
    return True
