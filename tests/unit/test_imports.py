"""Who may import whom (CONTRIBUTING.md, "The rooms"), what is never imported, and what an import costs."""

from __future__ import annotations

import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source import OURS, PACKAGES, ROOT, Import, files, imports, module_name, modules

LEAF = "ldm_pipe.pretrained"
# The house of ldm_pipe: a room knows itself and the rooms of lower floors, whenever it imports and whatever for.
FLOORS = {
    "pretrained": 1, "sampler_table": 1, "masking": 1, "printable": 1,
    "noise": 2, "schedule": 2, "networks": 2, "data": 2,
    "denoiser": 3,
    "guidance": 4, "samplers": 4,
    "drawing": 5,
    "interop": 6,
    "pipelines": 7,
    "training": 8,
    "metrics": 9,
    "cli": 10,
}  # fmt: skip
# Up the stairs: for types, or inside a function.
UPWARDS = {("drawing", "pipelines"), ("interop", "pipelines"), ("drawing", "interop")}
STAGES = 5  # below this floor nothing of ldm_pipe knows another package: the stages meet in drawing
# Costly to import, or not installed with the runtime: never when a module of ours is imported.
HEAVY = {
    "transformers", "diffusers", "open_clip", "torchvision", "timm", "datasets", "pyarrow", "pandas", "accelerate",
    "peft", "gradio", "matplotlib", "tensorboard", "torchmetrics", "xformers", "scipy", "deepspeed",
}  # fmt: skip
MAY_IMPORT_DIFFUSERS = {"ldm_pipe.pipelines.export"}


def room(name: str) -> str:
    """Return the room of a module of ldm_pipe: `ldm_pipe.networks.layers` lives in `networks`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def ours(path: Path) -> list[tuple[Import, str]]:
    return [(i, target) for i in imports(path) for target in i.targets() if target.split(".")[0] in OURS]


def told(found: list[Import]) -> list[str]:
    return [f"{i.source}:{i.line} imports {i.target} {', '.join(i.names)}" for i in found]


@pytest.mark.parametrize("package", ["autoencoder", "conditioning"])
def test_the_outer_stages_know_themselves_and_one_leaf(package: str) -> None:
    wrong = [i for path in files(package) for i, t in ours(path) if t.split(".")[0] != package and t != LEAF]
    assert told(wrong) == []


def test_every_module_of_ldm_pipe_has_a_room() -> None:
    rooms = {room(name) for name in modules() if name.startswith("ldm_pipe")}
    assert rooms - set(FLOORS) == {"ldm_pipe"}, "decide in this file on which floor the new room is"


def test_every_room_imports_only_from_lower_floors() -> None:
    wrong = []
    for path in files("ldm_pipe"):
        own = room(module_name(path))
        for i, target in ours(path):
            if own not in FLOORS:  # the face
                continue
            if not target.startswith("ldm_pipe"):
                wrong += [i] if FLOORS[own] < STAGES else []
            elif target == "ldm_pipe":
                wrong += [] if FLOORS[own] >= FLOORS["cli"] or i.names == ("__version__",) else [i]
            elif room(target) != own and FLOORS[room(target)] >= FLOORS[own] and (own, room(target)) not in UPWARDS:
                wrong.append(i)
    assert told(wrong) == []


def test_nothing_imports_scripts_tests_or_benchmarks() -> None:
    wrong = [i for path in files(*PACKAGES) for i, t in ours(path) if t.split(".")[0] not in PACKAGES]
    assert told(wrong) == []


def test_no_module_takes_what_another_keeps_to_itself() -> None:
    found = [i for path in files(*PACKAGES, "scripts", "benchmarks") for i, _ in ours(path)]
    assert told([i for i in found if any(n.startswith("_") and not n.startswith("__") for n in i.names)]) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module_name(path): {t for i, t in ours(path) if i.at_import} - {module_name(path)} for path in files(*PACKAGES)
    }
    packages = {module_name(path) for path in files(*PACKAGES) if path.name == "__init__.py"}
    for name in packages:  # a package that gathers its own files is no circle
        graph[name] = {t for t in graph[name] if not t.startswith(f"{name}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_heavy_libraries_are_imported_only_where_they_are_used() -> None:
    wrong = [i for path in files(*PACKAGES) for i in imports(path) if i.at_import and i.target.split(".")[0] in HEAVY]
    assert told(wrong) == []


def test_diffusers_is_only_for_the_check_of_an_export() -> None:
    found = [i for path in files(*PACKAGES, "scripts") for i in imports(path) if i.target.split(".")[0] == "diffusers"]
    assert told([i for i in found if i.source not in MAY_IMPORT_DIFFUSERS]) == []


def modules_after(code: str) -> set[str]:
    """Return the top-level names in sys.modules after running code in a fresh interpreter."""
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def test_importing_ldm_pipe_and_its_pipeline_costs_about_torch() -> None:
    loaded = modules_after("import ldm_pipe\nfrom ldm_pipe import LatentDiffusionPipeline")
    assert loaded & HEAVY == set()


def test_the_bare_import_is_lazy() -> None:
    loaded = modules_after("import ldm_pipe")
    assert loaded & (HEAVY | {"autoencoder", "conditioning", "pydantic", "tyro"}) == set()


def test_help_does_not_import_torch() -> None:
    code = "from ldm_pipe.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert modules_after(code) & (HEAVY | {"torch", "numpy", "PIL"}) == set()


def test_the_command_is_installed() -> None:
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="console_scripts") if entry.name == "ldm-pipe"]
    assert found
    assert found[0].load()(["info", "no such file"]) == 2
