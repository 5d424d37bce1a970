"""Who may import whom (CONTRIBUTING.md, "The rooms"), what is never imported, and what an import costs."""

from __future__ import annotations

import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source import OURS, PACKAGES, ROOT, Import, files, imports, module_name, modules

LEAF = "ldm_pipe.pretrained"
# The core of ldm_pipe: what each room may know besides itself and the leaf. None of them knows another package.
CORE: dict[str, set[str]] = {
    "files": set(),
    "pretrained": {"files"},
    "sampler_table": set(),
    "png_info": {"sampler_table"},
    "figures": set(),
    "unet": set(),
    "betas": set(),
    "spacing": set(),
    "steps": set(),
    "schedule": {"betas", "spacing", "steps", "schedule_config", "schedule_export"},
    "continuous": {"schedule", "spacing", "steps", "schedule_export"},
    "laws": {"continuous", "schedule", "spacing"},
    "schedule_keys": set(),
    "law_file": {"laws", "schedule"},
    "schedule_config": {"betas", "law_file", "laws", "sampler_table", "schedule", "schedule_keys", "spacing"},
    "schedule_export": {"betas", "laws", "sampler_table", "schedule", "schedule_config", "schedule_keys", "spacing"},
    "noise": set(),
    "process": {"schedule"},
    "objectives": {"process", "schedule", "denoiser", "variational"},
    "variational": {"process", "schedule", "denoiser", "noise"},
    "times": {"schedule"},
    "denoiser": {"unet", "process", "schedule"},
    "mixture": {"denoiser", "process"},
    "guidance": {"denoiser", "process", "schedule"},
    "thresholding": {"denoiser"},
    "samplers": {
        "sampler_table",
        "schedule",
        "denoiser",
        "noise",
        "process",
    },  # Steps, Denoise, Noise and the algebra between them
    "data": {"captions"},
}
# Where the three packages meet: the pipeline and what it is made of, the formats, training, the command line.
MEETING = {
    "ldm_pipe", "pipeline", "prompting", "drawing", "request", "request_prompts", "stepping", "golden", "outputs",
    "pixels", "interop", "training", "metrics", "commands", "cli", "editing", "placement", "request_steps",
    "scheduler_config", "adapters", "pipelines", "call", "request_beside", "request_pictures", "request_shared",
}  # fmt: skip
# Costly to import, or not installed with the runtime: never when a module of ours is imported.
HEAVY = {
    "transformers", "diffusers", "open_clip", "torchvision", "timm", "datasets", "pyarrow", "pandas", "accelerate",
    "peft", "gradio", "matplotlib", "tensorboard", "torchmetrics", "xformers", "scipy", "deepspeed",
}  # fmt: skip
MAY_IMPORT_DIFFUSERS = {"ldm_pipe.interop.export"}


def room(name: str) -> str:
    """Return the room of a module of ldm_pipe: `ldm_pipe.unet.layers` lives in `unet`."""
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
    assert rooms - set(CORE) - MEETING == set(), "decide in this file what the new room may import"


def test_the_core_of_ldm_pipe_imports_only_what_lies_before_it() -> None:
    wrong = []
    for path in files("ldm_pipe"):
        own = room(module_name(path))
        if own in CORE:
            allowed = {own, "pretrained", *CORE[own]}
            wrong += [i for i, t in ours(path) if not t.startswith("ldm_pipe") or room(t) not in allowed | {"ldm_pipe"}]
            wrong += [i for i, t in ours(path) if t == "ldm_pipe" and i.names != ("__version__",)]
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
