"""The rooms import one way, modules form no cycle, and each room keeps out what it must not know.

The rules are read off the source, so imports inside functions count too. A check takes a mapping
from module names to source text; each is shown to fail on a planted source.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support import ROOT

ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")  # each may import those before it
FORBIDDEN = {
    "kernels": {"transformers"},
    "pacore_sched.sched.prefix_tree": {"torch"},
    "pacore_sched.answers.rounds": {"torch"},
    "pacore_sched.sched.plan": {"torch"},
    "pacore_sched.sched.policy": {"torch"},
    "pacore_sched.sched.scheduler": {"torch"},
    "pacore_sched.sched.request": {"torch"},
    "pacore_sched.engine.step_rows": {"torch"},
    "pacore_sched.engine.speculation": {"torch"},
    "pacore_sched.sim.cost_model": {"torch"},
    "pacore_sched.sim.workload": {"torch"},
    "pacore_sched.sim.simulator": {"torch"},
    "pacore_sched.sim.cluster": {"torch"},
    "pacore_sched.sim.metrics": {"torch"},
    "pacore_sched.engine.stopping": {"torch"},
    "pacore_sched.answers.questions": {"torch"},
    "pacore_sched.answers.journal": {"torch"},
}


def sources() -> dict[str, str]:
    """Module name -> source text, for every module of every room."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def imports(module: str, source: str) -> set[str]:
    """Every name that `module` imports anywhere: `from a import b` counts as "a" and as "a.b"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def wrong_directions(modules: dict[str, str]) -> list[str]:
    """The imports of a room from one that comes after it, or from the tests."""
    wrong = []
    for module, source in modules.items():
        allowed = ROOMS[: ROOMS.index(module.split(".")[0]) + 1]
        for name in imports(module, source):
            top = name.split(".")[0]
            if top in (*ROOMS, "tests") and top not in allowed:
                wrong.append(f"{module} imports {name}")
    return wrong


def cycle(modules: dict[str, str]) -> list[str]:
    """The modules of one import cycle, or [] if there is none."""
    graph = {m: (imports(m, source) & modules.keys()) - {m} for m, source in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def forbidden_imports(modules: dict[str, str]) -> list[str]:
    """The imports that FORBIDDEN rules out, made by a module itself."""
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for scope, forbidden in FORBIDDEN.items()
        if module == scope or module.startswith(f"{scope}.")
        for name in imports(module, source)
        if name.split(".")[0] in forbidden
    ]


def test_imports_go_one_way():
    """Guards the order of the rooms: a kernel that knows the model cannot be judged by itself."""
    assert wrong_directions(sources()) == []


def test_no_import_cycles():
    """Guards against two modules that can only be understood, and imported, together."""
    assert cycle(sources()) == []


def test_forbidden_imports():
    """Guards `kernels` against transformers, and the scheduler's bookkeeping against torch."""
    assert forbidden_imports(sources()) == []


def test_packages_are_the_rooms():
    """Guards setup.py against a room that an installed copy would lack."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    packages = next(
        ast.literal_eval(node.value)
        for node in ast.walk(setup)
        if isinstance(node, ast.keyword) and node.arg == "packages"
    )
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    nested = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*/__init__.py")}
    inside = {".".join(path.relative_to(ROOT).parts) for path in nested}
    assert set(ROOMS) == folders
    assert set(packages) == folders | inside


@pytest.mark.parametrize(
    "source",
    [
        "import model.config",
        "from model import config",
        "from model.config import preset",
        "def f():\n    import model",
        "def f():\n    from model.config import preset",
        "if TYPE_CHECKING:\n    import bench.timing",
        "try:\n    import tests.conftest\nexcept ImportError:\n    pass",
    ],
)
def test_wrong_direction_is_found(source):
    """Guards the check itself: each way to write an import is seen."""
    assert wrong_directions({"kernels.norm": source})
    assert not wrong_directions(
        {"profiles.profilers.ncu": source.replace("tests.conftest", "model")}
    )


@pytest.mark.parametrize(
    "planted",
    [
        {"model.a": "from model.b import x", "model.b": "from model.a import y"},
        {"model.a": "from model import b", "model.b": "import model.a"},
        {"model.a": "def f():\n    from .b import x", "model.b": "from . import a"},
        {"model.a": "import model.b", "model.b": "import model.c", "model.c": "import model.a"},
    ],
)
def test_cycle_is_found(planted):
    """Guards the check itself, also against relative and deferred imports."""
    assert cycle(planted)
    assert not cycle({**planted, "model.b": ""})


def test_forbidden_import_is_found():
    """Guards the check itself: the rule for a package holds for its modules, and only for them."""
    assert forbidden_imports({"kernels.norm": "def f():\n    import transformers.models"})
    assert forbidden_imports({"pacore_sched.answers.rounds": "from torch import Tensor"})
    assert not forbidden_imports({"pacore_sched.engine.engine": "import torch"})
    assert not forbidden_imports({"model.weights": "import transformers"})
