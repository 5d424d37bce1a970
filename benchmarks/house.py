"""How much of the code a picture crosses, and how the code is laid out.

    python -m benchmarks.house

Files and functions of the project that are entered from the call to the picture (sys.setprofile; the shipped model, a
plain prompt, 4 steps), what stands on the first level of ldm_pipe/, circles of imports with those inside functions and
for types, and the base classes of the pipeline. It takes 20 s of CPU.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from tests.source import PACKAGES, ROOT, files, imports, module_name, modules


def traced() -> tuple[set[str], set[tuple[str, str]]]:
    """Draw one picture, and return the files and functions that were entered."""
    from ldm_pipe import LatentDiffusionPipeline

    pipe: Any = LatentDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "seed": 0}
    pipe("red apple", **call)  # what is imported or filled once
    roots = tuple(str(ROOT / package) for package in PACKAGES)
    entered: set[tuple[str, str]] = set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(roots) and not code.co_name.startswith("<"):
            entered.add((code.co_filename, f"{code.co_name}:{code.co_firstlineno}"))

    sys.setprofile(enter)
    try:
        pipe("red apple", **call)
    finally:
        sys.setprofile(None)
    return {file for file, _ in entered}, entered


def circles() -> list[int]:
    """Return the sizes of all circles of modules that import each other, whenever and whatever for."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for path in files(*PACKAGES):
        name = module_name(path)
        for one in imports(path):
            graph[name] |= set(one.targets()) & modules() - {name}
        if path.name == "__init__.py":  # a package that gathers its own files is no circle
            graph[name] = {target for target in graph[name] if not target.startswith(f"{name}.")}

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            for target in graph[left.pop()] - found:
                found.add(target)
                left.append(target)
        return found

    reach = {name: reached(name) for name in graph}
    rings = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted((len(ring) for ring in rings), reverse=True)


def main() -> int:
    """Measure and print."""
    from ldm_pipe import LatentDiffusionPipeline

    entered, functions = traced()
    first = [path.name for path in (ROOT / "ldm_pipe").iterdir() if not path.name.startswith(("__pycache__", "."))]
    bases = [base.__name__ for base in LatentDiffusionPipeline.__bases__]
    print(f"from prompt to picture: {len(entered)} files, {len(functions)} functions")
    print(f"first level of ldm_pipe/: {len(first)} ({', '.join(sorted(first))})")
    print(f"circles of imports, all counted: {circles() or 'none'}")
    print(f"base classes of the pipeline: {', '.join(bases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
