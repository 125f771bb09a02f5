"""Tests of imports between rooms: one direction, no cycles, no forbidden libraries.

The rules are checked on the source, so imports inside functions count too. Each check takes a
mapping from module names to source text, and is shown to fail on planted source.
"""

import ast
from collections.abc import Container, Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support import ROOT

ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")  # each may import those before it

MAX_FILES = 14  # per folder

# A package or module, and the libraries that it must not import, directly or through others.
FORBIDDEN = {
    "kernels": {"transformers"},
    "kernels.errors": {"torch"},
    "kernels.plan_node": {"torch"},
    "model.config": {"torch"},
    "model.errors": {"torch"},
    "model.terminal": {"torch", "kernels"},
    "pacore_sched.sched": {"torch"},
    "pacore_sched.sim": {"torch"},
    "pacore_sched.engine.speculation": {"torch"},
    "pacore_sched.engine.step_rows": {"torch"},
    "pacore_sched.engine.stopping": {"torch"},
    "pacore_sched.answers.journal": {"torch"},
    "pacore_sched.answers.questions": {"torch"},
    "pacore_sched.answers.rounds": {"torch"},
    "pacore_sched.cli.simulate": {"torch"},
    "pacore_sched.serve.images": {"torch"},
    "pacore_sched.serve.text.rollout_text": {"torch"},
    "pacore_sched.serve.text.sections": {"torch"},
    "bench.formats": {"torch", "triton", "kernels"},
    "bench.report": {"torch", "triton", "kernels"},
    "bench.rows": {"torch", "triton", "kernels"},
    "profiles.first_light": {"torch"},
    "profiles.runs.record": {"torch"},
}


def sources() -> dict[str, str]:
    """Module name -> source text for every module of every room; `__init__` has the package's
    name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): (
            path.read_text()
        )
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


@cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module: str, source: str, modules: Container[str] = ()) -> set[str]:
    """Every name that `module` imports anywhere: `from a import b` counts as "a" and "a.b", or only
    as "a.b" if that is one of `modules`."""
    names: set[str] = set()
    for node in import_statements(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= full if all(name in modules for name in full) else {base} | full
    return names


def wrong_directions(modules: dict[str, str]) -> list[str]:
    """The imports of a room from a later room, from tests or from examples."""
    wrong = []
    for module, source in modules.items():
        allowed = ROOMS[: ROOMS.index(module.split(".")[0]) + 1]
        for name in imports(module, source):
            top = name.split(".")[0]
            if top in (*ROOMS, "tests", "examples") and top not in allowed:
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(modules: dict[str, str]) -> list[list[str]]:
    """The import cycles among the modules and packages of each folder.

    A package's `__init__` counts as one of its modules: every import of a module runs it first.
    """
    graphs: dict[str, dict[str, set[str]]] = {}
    for module, source in modules.items():
        for name in imports(module, source, modules) & modules.keys():
            folder, importer, imported = _in_common_folder(module, name)
            if importer != imported:
                graphs.setdefault(folder, {}).setdefault(importer, set()).add(imported)
    cycles = []
    for graph in graphs.values():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycles.append(error.args[1])
    return cycles


def _in_common_folder(module: str, name: str) -> tuple[str, str, str]:
    """The deepest folder that contains both, and the entries of that folder that contain each."""
    ours, theirs = module.split("."), name.split(".")
    depth = 0
    while depth < min(len(ours), len(theirs)) and ours[depth] == theirs[depth]:
        depth += 1
    return ".".join(ours[:depth]), ".".join(ours[: depth + 1]), ".".join(theirs[: depth + 1])


def forbidden_imports(modules: dict[str, str]) -> list[str]:
    """The chains of imports by which modules reach what FORBIDDEN denies them."""
    return [
        " imports ".join(chain)
        for scope, forbidden in FORBIDDEN.items()
        for module in modules
        if module == scope or module.startswith(f"{scope}.")
        if (chain := _chain(module, forbidden, modules))
    ]


def _chain(start: str, targets: Iterable[str], modules: dict[str, str]) -> list[str]:
    """The shortest chain of imports from a module to one of `targets`; [] if there is none."""
    importer: dict[str, str] = {}
    queue = [start]
    for module in queue:
        for name in sorted(imports(module, modules[module])):
            parts = name.split(".")
            for prefix in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if prefix in targets:
                    chain = [prefix, module]
                    while chain[-1] != start:
                        chain.append(importer[chain[-1]])
                    return chain[::-1]
                if prefix in modules and prefix != start and prefix not in importer:
                    importer[prefix] = module
                    queue.append(prefix)
    return []


def test_imports_go_one_way():
    """Guards the order of the rooms: a kernel that imports the model cannot be tested alone."""
    assert wrong_directions(sources()) == []


def test_no_import_cycles():
    """Guards against two modules or packages that can only be understood together."""
    assert cycles(sources()) == []


def test_forbidden_imports():
    """Guards `kernels` against transformers; the scheduler and the simulator against torch; rows
    and reports, which are read where there is no GPU, against torch and kernels."""
    known = sources()
    assert forbidden_imports(known) == []
    assert known.keys() >= FORBIDDEN.keys()


def test_every_folder_is_a_package():
    """Guards the wheel against a folder that setup.py's find_packages does not find."""
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*ROOMS, "tests"}


def test_folders_stay_small():
    """Guards against folders too large to find a file in."""
    undivided = {ROOT / "bench" / "suite"}  # a catalogue: a file per op
    folders = {path.parent for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")}
    sizes = {str(folder): len([*folder.glob("*.py")]) for folder in folders - undivided}
    assert {folder: size for folder, size in sizes.items() if size > MAX_FILES} == {}


def test_no_private_module_is_shared():
    """Guards against imports of private modules (leading underscore) from another package."""
    known = sources()
    private = [
        f"{module} imports {name}"
        for module, source in known.items()
        for name in imports(module, source) & known.keys()
        if name.rpartition(".")[2].startswith("_") and not name.endswith(".__main__")
    ]
    assert private == []


@pytest.mark.parametrize(
    "source",
    [
        "import model.config",
        "from model import config",
        "from model.config import preset",
        "def f():\n    import model",
        "def f():\n    from model.config import preset",
        "if TYPE_CHECKING:\n    import bench.measure.timing",
        "try:\n    import tests.conftest\nexcept ImportError:\n    pass",
    ],
)
def test_wrong_direction_is_found(source):
    """Guards the check itself: it finds every form of import statement."""
    assert wrong_directions({"kernels.norm": source})
    in_last = source.replace("tests.conftest", "model")
    assert not wrong_directions({"profiles.profilers.ncu": in_last})


@pytest.mark.parametrize(
    "planted",
    [
        {"model.a": "from model.b import x", "model.b": "from model.a import y"},
        {"model.a": "from model import b", "model.b": "import model.a"},
        {"model.a": "def f():\n    from .b import x", "model.b": "from . import a"},
        {"model.a": "import model.b", "model.b": "import model.c", "model.c": "import model.a"},
        {  # a cycle of packages whose modules form none
            "model.b": "from model.p import two",
            "model.p.one": "import model.b",
            "model.p.two": "",
            "model.p": "",
        },
        {
            "model.p.one": "import model.q.one",
            "model.q.one": "",
            "model.q.two": "import model.p.two",
            "model.p.two": "",
            "model.b": "",
        },
    ],
)
def test_cycle_is_found(planted):
    """Guards the check itself, also against relative and deferred imports."""
    assert cycles(planted)
    assert not cycles({**planted, "model.b": "", "model.q.two": ""})


def test_forbidden_import_is_found():
    """Guards the check itself: the rule for a package holds for its modules, and only for them."""
    assert forbidden_imports({"kernels.norm": "def f():\n    import transformers.models"})
    assert forbidden_imports({"pacore_sched.sched.step_batch": "from torch import Tensor"})
    assert not forbidden_imports({"pacore_sched.engine.engine": "import torch"})
    assert not forbidden_imports({"model.weights.gguf": "import transformers"})


def test_forbidden_import_is_found_through_others():
    """Guards the check itself: a module reaches torch if a module that it imports does, or the
    package of that module."""
    through = {"pacore_sched.sched.step_batch": "from model.terminal import table", "model": ""}
    planted = through | {
        "model.terminal": "def f():\n    import model.x",
        "model.x": "import torch",
    }
    assert "pacore_sched.sched.step_batch imports model.terminal imports model.x imports torch" in (
        forbidden_imports(planted)
    )
    assert forbidden_imports(through | {"model.terminal": "", "model": "import torch"})
    assert not forbidden_imports(through | {"model.terminal": ""})
