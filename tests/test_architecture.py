"""The house rules a machine can check: imports point down, files stay short, nothing prints or sets variables."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gptoss_jax", "convert", "pallas_kernels")
MAX_LINES = 400

# The floor each module or package is on; imports go to the same module's floor or below (docs/architecture.md).
FLOORS = {
    "pallas_kernels": 0,
    "gptoss_jax.errors": 1,
    "gptoss_jax.config": 1,
    "gptoss_jax.parameters": 1,
    "gptoss_jax.manifest": 1,
    "gptoss_jax.sharding": 1,
    "gptoss_jax.distributed": 1,
    "gptoss_jax.compilation": 1,
    "gptoss_jax.harmony": 1,
    "gptoss_jax.model": 2,
    "gptoss_jax.checkpoint": 3,
    "gptoss_jax.generation": 3,
    "gptoss_jax.chat": 4,
    "gptoss_jax.chat_events": 4,
    "gptoss_jax.chat_terminal": 4,
    "gptoss_jax.finetune": 4,
    "gptoss_jax.finetune.command": 5,
    "convert": 5,
    "gptoss_jax.demo": 5,
    "gptoss_jax.bench": 5,
    "gptoss_jax.cli_arguments": 5,
    "gptoss_jax.cli_processes": 5,
    "gptoss_jax.plan": 5,
    "gptoss_jax.cli": 6,
}
MAY_PRINT = {"gptoss_jax.cli", "gptoss_jax.demo", "pallas_kernels.tune"}
MAY_SET_VARIABLES = {
    "gptoss_jax.harmony.encoding",  # openai-harmony finds its vocabulary through one
    "gptoss_jax.distributed",  # gRPC learns through one that this machine needs no proxy
    "gptoss_jax.plan.topologies",  # libtpu learns through some that no TPU need be looked for
}
NO_JAX = ("gptoss_jax.harmony", "gptoss_jax.config", "gptoss_jax.errors", "gptoss_jax.parameters")

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(tree: ast.AST) -> set[str]:
    """Every module the source names in an import statement, wherever it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def floor(module: str) -> int | None:
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOORS[name] for name in names if name in FLOORS), None)


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is or lies in."""
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name or None


TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
# The package's own __init__ only lists where its public names live.
GRAPH = {
    module: {target for name in imports(tree) if (target := module_of(name)) not in (None, module, "gptoss_jax")}
    for module, tree in TREES.items()
    if module != "gptoss_jax"
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    own = floor(module)
    assert own is not None, f"{module} is on no floor: add it to FLOORS"
    upward = sorted(target for target in GRAPH[module] if floor(target) is None or floor(target) > own)
    assert not upward


def test_imports_have_no_cycle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            # A package's __init__ and its own modules are one unit to Python.
            for target in GRAPH[module]:
                if not module.startswith(target + "."):
                    visit(target)
            path.pop()
            done.add(module)

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("module", SOURCES)
def test_file_is_short(module):
    assert len(SOURCES[module].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_prints_or_sets_variables(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or module in MAY_PRINT
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            assert ast.unparse(node.value) != "os.environ" or module in MAY_SET_VARIABLES


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith(NO_JAX)])
def test_knows_no_jax(module):
    assert not any(name.split(".")[0] in ("jax", "jaxlib", "flax") for name in imports(TREES[module]))


def test_torch_is_nowhere():
    assert not [module for module, tree in TREES.items() if any(name.startswith("torch") for name in imports(tree))]
