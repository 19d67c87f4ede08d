"""The architecture holds: layers import only to the left, every op is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tinynn.nn.module import Module
from tinynn.op import registry

ROOT = Path(__file__).resolve().parents[1]

#: The layers from left to right; a module belongs to the first that it or its package is named in.
LAYERS = [
    ["kernels"],
    ["tinynn.errors"],
    ["tinynn.op"],
    ["tinynn.storage", "tinynn.environment", "tinynn.generators"],
    ["tinynn.tensor"],
    ["tinynn.diagnose", "tinynn.gradcheck", "tinynn.roofline"],
    ["tinynn.ops"],
    ["tinynn.init"],
    ["tinynn.nn"],
    ["tinynn.optim", "tinynn.schedule", "tinynn.data", "tinynn.graph"],
    ["tinynn.observe", "tinynn.count", "tinynn.checkpoint", "tinynn.statistics"],
    ["tinynn.train", "tinynn.models"],
    ["tinynn.metrics"],
    ["tinynn.compress", "tinynn.deploy"],
    ["tinynn.onnx"],
    ["tinynn.warmup", "tinynn.profile", "tinynn.explain"],
    ["tinynn"],
    ["tinynn.__main__"],
    ["experiments", "bench"],
]


def layer(module: str) -> int:
    """The position of the longest name in LAYERS that the module is or lies in."""
    places = {name: i for i, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        # "tinynn" itself is the public package: a new file in it must be given a place
        if name in places and (name != "tinynn" or module == "tinynn"):
            return places[name]
    raise AssertionError(f"{module} has no place in the design: give it one in LAYERS")


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("kernels", "tinynn", "experiments", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {name for name in found if name in known}


def test_layers_import_only_to_the_left() -> None:
    known = {name for name, _ in modules()}
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(path, known)
        if layer(other) > layer(name)
    ]
    assert not wrong


def test_the_engine_never_imports_what_uses_it() -> None:
    known = {name for name, _ in modules()}
    for name, path in modules():
        if name.startswith(("kernels", "tinynn")):
            users = {o for o in imports(path, known) if o.startswith(("experiments", "bench"))}
            assert not users, f"{name} imports {users}"


def test_a_tensor_knows_no_layer_and_no_kernel() -> None:
    found = imports(ROOT / "tinynn" / "tensor.py", {name for name, _ in modules()})
    assert found == {"tinynn.errors", "tinynn.op"}


def test_kernels_import_numpy_and_numba_only() -> None:
    import sys

    allowed = {"numpy", "numba", "llvmlite", "kernels", "__future__"} | sys.stdlib_module_names
    for name, path in modules():
        if name.startswith("kernels"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    roots = {(node.module or "").split(".")[0]}
                else:
                    continue
                assert roots <= allowed, f"{name} imports {roots - allowed}"


@pytest.mark.parametrize("name", sorted(registry))
def test_every_op_says_what_it_does_and_has_a_default_kernel(name: str) -> None:
    op = registry[name]
    assert op.__doc__ and "(" + op.__name__ not in op.__doc__.split("\n")[0]
    assert op.variants and next(iter(op.variants)) != "reference"
    for sample in op.samples():
        assert isinstance(hash(sample.op), int)
        assert sample.op.macs(*sample.shapes) >= 0


def test_public_modules_and_functions_have_docstrings() -> None:
    missing = []
    for name, path in modules():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.stat().st_size:
            missing.append(name)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):  # type: ignore[arg-type]
                missing.append(f"{name}.{node.name}")  # type: ignore[attr-defined]
    assert not missing


def test_no_file_outgrows_one_reading() -> None:
    long = {
        name: count
        for name, path in modules()
        if (count := len(path.read_text().splitlines())) > 650
    }
    assert not long


def test_the_heart_of_the_engine_reads_in_one_sitting() -> None:
    lines = sum(len((ROOT / "tinynn" / f).read_text().splitlines()) for f in ("op.py", "tensor.py"))
    assert lines <= 455


def test_module_classes_have_unique_names() -> None:
    assert len({c.kind() for c in Module.registry.values()}) == len(Module.registry)
