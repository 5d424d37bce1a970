"""The house rules that a machine can check: safe loading, sizes, files in order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.source import PACKAGES, ROOT, files, tree

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib  # type: ignore[no-redef]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = files(*PACKAGES, "scripts", "benchmarks")
MAX_FILE, MAX_FUNCTION = 400, 60
# Runs code on load, or writes files that do.
BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (place, dotted name, call) of every call in what ships."""
    for path in SHIPPED:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
                yield where(path, node), ast.unparse(node.func), node


def has_keyword(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def test_no_pickle() -> None:
    found = [
        where(path, node)
        for path in SHIPPED
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if name.split(".")[0] in BANNED
    ]
    assert found == []


def test_torch_load_reads_weights_only_and_nothing_is_written_with_torch_save() -> None:
    loads = [p for p, name, call in calls() if name == "torch.load" and not has_keyword(call, "weights_only", True)]
    saves = [p for p, name, _ in calls() if name in ("torch.save", "torch.jit.save", "np.save", "numpy.save")]
    arrays = [
        p for p, name, call in calls() if name.endswith("np.load") and not has_keyword(call, "allow_pickle", False)
    ]
    assert loads + saves + arrays == []


def test_yaml_is_read_safely_and_no_code_is_built_from_text() -> None:
    unsafe = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}
    shells = [p for p, name, call in calls() if name.startswith("subprocess.") and has_keyword(call, "shell", True)]
    assert [p for p, name, _ in calls() if name in unsafe] + shells == []


def test_weights_are_loaded_strictly() -> None:
    assert [
        p for p, name, call in calls() if name.endswith("load_state_dict") and has_keyword(call, "strict", False)
    ] == []


def test_no_package_touches_the_global_random_state() -> None:
    # A script may seed it once, for the initial weights.
    names = {"torch.manual_seed", "np.random.seed", "random.seed", "torch.cuda.manual_seed_all", "set_seed"}
    assert [p for p, name, _ in calls() if name in names and not p.startswith("scripts")] == []


def test_files_and_functions_stay_readable() -> None:
    long = [str(p.relative_to(ROOT)) for p in SHIPPED if len(p.read_text(encoding="utf-8").splitlines()) > MAX_FILE]
    for path in SHIPPED:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                end = node.end_lineno or node.lineno
                documented = ast.get_docstring(node, clean=False) or ""
                if end - node.lineno + 1 - len(documented.splitlines()) > MAX_FUNCTION:
                    long.append(f"{where(path, node)} {node.name}")
    assert long == []


def test_source_is_ascii_and_finished() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b")
    wrong = []
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        wrong += [] if text.isascii() else [f"{path.relative_to(ROOT)} is not ASCII"]
        wrong += [f"{path.relative_to(ROOT)} is unfinished"] if unfinished.search(text) else []
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    assert [str(p.relative_to(ROOT)) for p in SHIPPED if not ast.get_docstring(tree(p))] == []


def test_every_config_is_yaml_with_a_header_that_names_its_command() -> None:
    wrong = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        header = "".join(line for line in text.splitlines(keepends=True)[:12] if line.startswith("#"))
        if not isinstance(yaml.safe_load(text), dict) or path.name not in header:
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def pinned() -> dict[str, list[str]]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for name, rest in rows:
        found.setdefault(name, []).append(rest.split(";")[0].strip())
    return found


def test_constraints_hold_names_and_versions_only() -> None:
    pattern = re.compile(r'[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.\d+")?')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#") and not pattern.fullmatch(line)] == []


@pytest.mark.parametrize("extra", [None, "train", "openclip", "diffusers", "plots", "test", "dev"])
def test_what_is_required_is_pinned_at_its_floor_or_above(extra: str | None) -> None:
    rows = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    pins = pinned()
    wrong = []
    for row in rows:
        match = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", row)
        if match is None:
            assert row.startswith("ldm-pipe["), row
            continue
        name, floor = match[1].lower().replace("_", "-"), tuple(map(int, match[2].split(".")))
        wrong += [row for pin in pins.get(name, ["0"]) if tuple(map(int, pin.split("."))) < floor]
    assert wrong == []


def test_links_between_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://", "mailto:")) and not (page.parent / link).exists():
                broken.append(f"{page.name} -> {link}")
    assert broken == []


def test_the_emoji_tables_are_whole() -> None:
    folder = ROOT / "data" / "emoji"
    magic = {path: path.read_bytes()[:4] + path.read_bytes()[-4:] for path in folder.rglob("*.parquet")}
    assert len(magic) == 4
    assert set(magic.values()) == {b"PAR1PAR1"}, "not parquet: was the file replaced by a pointer?"
