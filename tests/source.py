"""The source of the project as syntax trees, for the tests that read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("autoencoder", "conditioning", "ldm_pipe")
OURS = (*PACKAGES, "scripts", "benchmarks", "tests")


@dataclass(frozen=True)
class Import:
    """One import: which module imports what, and when."""

    source: str  # dotted name of the importing module
    target: str  # dotted name as written
    names: tuple[str, ...]  # what `from target import` takes, else empty
    at_import: bool  # runs when the source is imported: not in a function, not under TYPE_CHECKING
    line: int

    def targets(self) -> Iterator[str]:
        """Yield the modules meant: `from ldm_pipe import samplers` means ldm_pipe.samplers."""
        found = [f"{self.target}.{name}" for name in self.names if f"{self.target}.{name}" in modules()]
        yield from found
        if len(found) < len(self.names) or not self.names:
            yield self.target


@cache
def files(*folders: str) -> tuple[Path, ...]:
    """Return the Python files under the folders, sorted."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> frozenset[str]:
    """Return the dotted names of all modules of the three packages."""
    return frozenset(map(module_name, files(*PACKAGES)))


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file with the grammar of the oldest Python we support."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return every import statement of a file, however deep."""
    return tuple(_walk(tree(path), module_name(path), path.name == "__init__.py", at_import=True))


def _walk(node: ast.AST, source: str, is_package: bool, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(source, alias.name, (), at_import, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            target = child.module or ""
            if child.level:
                base = source.split(".")[: None if is_package and child.level == 1 else -child.level + is_package]
                target = ".".join([*base, target]).rstrip(".")
            yield Import(source, target, tuple(alias.name for alias in child.names), at_import, child.lineno)
        else:
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from _walk(child, source, is_package, at_import=at_import and not lazy)
