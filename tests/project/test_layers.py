"""The rooms import one way, nothing forms a cycle, and each room keeps out what it must not know.

The rules are read off the source, so imports inside functions count too. A check takes a mapping
from module names to source text; each is shown to fail on a planted source.
"""

import ast
from collections.abc import Container, Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support import ROOT

ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")  # each may import those before it

MOST_FILES = 14  # of a folder

# A package, or a module, and what it reaches neither itself nor through what it imports.
FORBIDDEN = {
    "kernels": {"transformers"},
    "kernels.errors": {"torch"},
    "kernels.plan_node": {"torch"},
    "model.config": {"torch"},
    "model.errors": {"torch"},
    "model.terminal": {"torch"},
    "pacore_sched.sched": {"torch"},
    "pacore_sched.sim": {"torch"},
    "pacore_sched.engine.speculation": {"torch"},
    "pacore_sched.engine.step_rows": {"torch"},
    "pacore_sched.engine.stopping": {"torch"},
    "pacore_sched.answers.journal": {"torch"},
    "pacore_sched.answers.questions": {"torch"},
    "pacore_sched.answers.rounds": {"torch"},
    "pacore_sched.cli.simulate": {"torch"},
    "profiles.first_light": {"torch"},
    "profiles.runs.record": {"torch"},
}


def sources() -> dict[str, str]:
    """Module name -> source text, for every module of every room; a package's has its name."""
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
    """Every name that `module` imports anywhere: `from a import b` counts as "a" and as "a.b", or
    as "a.b" alone if that is one of `modules`."""
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
    """The imports of a room from one that comes after it, the tests or the examples."""
    wrong = []
    for module, source in modules.items():
        allowed = ROOMS[: ROOMS.index(module.split(".")[0]) + 1]
        for name in imports(module, source):
            top = name.split(".")[0]
            if top in (*ROOMS, "tests", "examples") and top not in allowed:
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(modules: dict[str, str]) -> list[list[str]]:
    """The import cycles among what stands side by side in a folder, modules and packages alike.

    A package's own `__init__` stands beside its modules, which every import of them runs first.
    """
    graphs: dict[str, dict[str, set[str]]] = {}
    for module, source in modules.items():
        for name in imports(module, source, modules) & modules.keys():
            shared, ours, theirs = _where_they_part(module, name)
            if ours != theirs:
                graphs.setdefault(shared, {}).setdefault(ours, set()).add(theirs)
    found = []
    for graph in graphs.values():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(error.args[1])
    return found


def _where_they_part(module: str, name: str) -> tuple[str, str, str]:
    """The deepest folder that holds both, and what they are or lie in there."""
    ours, theirs = module.split("."), name.split(".")
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return ".".join(ours[:same]), ".".join(ours[: same + 1]), ".".join(theirs[: same + 1])


def forbidden_imports(modules: dict[str, str]) -> list[str]:
    """How modules reach what FORBIDDEN keeps from them, by way of which others."""
    return [
        " imports ".join(chain)
        for scope, forbidden in FORBIDDEN.items()
        for module in modules
        if module == scope or module.startswith(f"{scope}.")
        if (chain := _chain(module, forbidden, modules))
    ]


def _chain(start: str, wanted: Iterable[str], modules: dict[str, str]) -> list[str]:
    """The shortest chain of imports from a module to one of `wanted`; [] if there is none."""
    came_from: dict[str, str] = {}
    waiting = [start]
    for module in waiting:
        for name in sorted(imports(module, modules[module])):
            parts = name.split(".")
            for prefix in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if prefix in wanted:
                    chain = [prefix, module]
                    while chain[-1] != start:
                        chain.append(came_from[chain[-1]])
                    return chain[::-1]
                if prefix in modules and prefix != start and prefix not in came_from:
                    came_from[prefix] = module
                    waiting.append(prefix)
    return []


def test_imports_go_one_way():
    """Guards the order of the rooms: a kernel that knows the model cannot be judged by itself."""
    assert wrong_directions(sources()) == []


def test_no_import_cycles():
    """Guards against two modules or packages that can only be understood together."""
    assert cycles(sources()) == []


def test_forbidden_imports():
    """Guards `kernels` against transformers, and the scheduler and the simulator against torch."""
    known = sources()
    assert forbidden_imports(known) == []
    assert known.keys() >= FORBIDDEN.keys()


def test_every_folder_is_a_package():
    """Guards the wheel against a folder that setup.py's find_packages passes over."""
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*ROOMS, "tests"}


def test_folders_stay_small():
    """Guards against a folder in which nobody finds anything."""
    undivided = {ROOT / "bench", ROOT / "bench" / "peers"}  # still
    folders = {path.parent for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")}
    sizes = {str(folder): len([*folder.glob("*.py")]) for folder in folders - undivided}
    assert {folder: size for folder, size in sizes.items() if size > MOST_FILES} == {}


def test_no_private_module_is_shared():
    """Guards the meaning of a leading underscore: what another package imports has none."""
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
        "if TYPE_CHECKING:\n    import bench.timing",
        "try:\n    import tests.conftest\nexcept ImportError:\n    pass",
    ],
)
def test_wrong_direction_is_found(source):
    """Guards the check itself: each way to write an import is seen."""
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
        {  # of packages, though their modules form none
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
    """Guards the check itself: a module is not free of torch if what it imports, or the package
    that this lies in, is not."""
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
