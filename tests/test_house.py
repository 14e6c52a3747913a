"""The house's rules, read off the imports: arrows run one way, and importing the package costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import placement
import traces

ROOT = Path(placement.__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "ortools",
    "pulp",
    "highspy",
    "fastapi",
    "plotly",
    "typer",
    "rich",
    "pyarrow",
}
OUTER = ("placement/runtime/", "placement/cli/", "placement/report/")
BINDING = ("placement/cli/", "placement/tasks/")
SERVICE_ALONE = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "pydantic", "httpx"}
MILP_BACKENDS = "placement/solvers/milp/"


def sources(*folders: str) -> list[str]:
    """Return the source files of some folders, relative to the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def imported(file: str) -> set[str]:
    """Return the full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module)
    return names


def packages(file: str) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imported(file)}


@pytest.mark.parametrize("file", [f for f in sources("placement") if not f.startswith(OUTER)])
def test_the_core_imports_nothing_heavy(file: str) -> None:
    """No torch, solver back end, web framework, table or terminal library in the core."""
    allowed = {"ortools", "pulp", "highspy"} if file.startswith(MILP_BACKENDS) else set()
    assert packages(file) & HEAVY <= allowed


@pytest.mark.parametrize("file", sources("placement"))
def test_placement_knows_neither_traces_nor_service(file: str) -> None:
    """The command line, and the tasks that it shares with the service, alone bind the packages together."""
    if not file.startswith("placement/cli/"):
        assert "service" not in packages(file)
    if not file.startswith(BINDING):
        assert "traces" not in packages(file)


@pytest.mark.parametrize("file", sources("placement", "traces", "service"))
def test_heavy_imports_stay_in_their_rooms(file: str) -> None:
    """PyTorch in the runtime and the recorder, numba in kernel modules, web and database in the service."""
    names = packages(file)
    if not (
        file.startswith(("placement/runtime/", "traces/record")) or file == "traces/importers/torch_file.py"
    ):
        assert names & {"torch", "transformers"} == set()
    if not file.startswith("traces/distributed/"):
        assert "ray" not in names
    if not file.endswith("kernels.py"):
        assert "numba" not in names
    if not file.startswith("service/"):
        assert (
            names & {"fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "pydantic", "httpx"} == set()
        )


@pytest.mark.parametrize("file", sources("traces"))
def test_traces_do_not_know_the_service(file: str) -> None:
    """Traces know placement, and nothing further out."""
    assert "service" not in packages(file)


@pytest.mark.parametrize("file", [f for f in sources("placement") if not f.startswith(OUTER)])
def test_only_cost_computes_objectives_below_solvers(file: str) -> None:
    """The cost model does not know the solvers, and bounds know neither solvers nor the optimizer."""
    if file.startswith(("placement/cost/", "placement/bounds/")):
        assert not any(
            name.startswith(("placement.solvers", "placement.optimizer")) for name in imported(file)
        )


def test_importing_the_package_loads_nothing_heavy() -> None:
    """``import placement`` loads neither numpy's heavy friends nor numba."""
    code = "import sys, placement, traces; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) & (HEAVY | {"numba", "scipy", "pandas", "numpy"}) == set()


@pytest.mark.parametrize("package", [placement, traces])
def test_public_names_are_there(package: object) -> None:
    """Every name in ``__all__`` resolves, and an unknown one is an AttributeError."""
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", [f for f in sources("placement", "traces") if "__main__" not in f])
def test_modules_list_their_public_names(file: str) -> None:
    """``__all__`` names only what the module defines or imports."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and any(
            getattr(t, "id", "") == "__all__"
            for t in getattr(node, "targets", [getattr(node, "target", None)])
        )
        and node.value is not None
    ]
    if not listed or "__getattr__" in {getattr(node, "name", "") for node in tree.body}:
        return
    defined = {getattr(node, "name", "") for node in tree.body}
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            defined |= {getattr(t, "id", "") for t in getattr(target, "elts", [target])}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert set(listed[0]) <= defined
