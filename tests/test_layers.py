"""Imports go downwards only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_transfer"
GROUND = set("errors functional schedules depth heads activations cuts data tasks checkpoints models schema".split())
GROUND |= {"report", "environment", "losses", "linear_head", "linear_loss", "linear_blocks", "targets", "vocabularies"}
GROUND |= {"students", "batches", "teacher_rows", "teacher_pass", "teacher_store"}
GROUND |= {"adapters", "adversarial", "batch_norm", "discrepancy", "linear_kernels", "pooling", "ranks", "scores"}
LAYERS = [
    GROUND,
    {"features", "objectives"},
    {"training"},
    {"recipe"},
    {"adapt", "compare", "distill"},
    {"cli"},
    {"__main__"},
]


def layer(part: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if part in names)


def imported_parts(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "hf_transfer"}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    parts = {module.split(".")[1] for module in modules if module.startswith("hf_transfer.")}
    return parts - {"__version__"}


def test_imports_go_downwards():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 10
    for path in files:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        above = {part for part in imported_parts(path) - {own} if layer(part) > layer(own)}
        assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(above)} from a layer above its own"
