"""The torchvision guard: invisible until needed, effective when needed, inert on a healthy install."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import raysteer
from raysteer import torchvision_guard


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_raysteer_imports_no_torch() -> None:
    assert run_python("import sys, raysteer; print('torch' in sys.modules or 'torchvision' in sys.modules)") == "False"


def test_asking_whether_torchvision_is_installed_imports_no_torch() -> None:
    code = (
        "import importlib.util, sys, raysteer; importlib.util.find_spec('torchvision'); print('torch' in sys.modules)"
    )
    assert run_python(code) == "False"


def test_libraries_that_import_torchvision_can_be_imported() -> None:
    import open_clip
    import torchvision
    from torchvision.transforms import functional
    from transformers import CLIPTextModel

    assert torchvision.__version__
    assert callable(functional.resize)
    assert open_clip.create_model_and_transforms
    assert CLIPTextModel


def test_installing_twice_installs_one_finder() -> None:
    torchvision_guard.install()
    torchvision_guard.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, torchvision_guard.TorchvisionGuard)]
    assert len(finders) <= 1


def test_nothing_is_declared_when_the_operator_library_loads(tmp_path: Path) -> None:
    loadable = next(Path(sysconfig.get_path("platlib"), "numpy").rglob("*.so"))
    (tmp_path / "_C.so").symlink_to(loadable)
    code = (
        "from pathlib import Path\nfrom raysteer import torchvision_guard as guard\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "print(guard.declare_missing_operators(folder), bool(guard._libraries))"
    )
    assert run_python(code) == "False False"


def test_every_room_turns_the_guard_on() -> None:
    root = Path(raysteer.__file__).parent.parent
    rooms = ("diffusion", "rewards", "glyphs", "evaluation", "actors", "learner", "cluster", "benchmarks", "tests")
    for room in rooms:
        assert "import raysteer" in (root / room / "__init__.py").read_text(encoding="utf-8"), room
