"""Errors, strict files, and a network as one folder of config and weights.

It may import nothing of ours: all three packages stand on it. It does not know any network, schedule or picture.
"""

from ldm_pipe.pretrained.files import (
    LdmPipeError,
    atomic_write,
    check_links,
    load_tensors,
    read_json,
    read_metadata,
    safe_child,
    save_tensors,
    sync_folder,
)
from ldm_pipe.pretrained.module import FrozenConfig, PretrainedModule, check_sizes, check_tensors, resolve_folder
from ldm_pipe.pretrained.weights import load_folder_tensors

__all__ = [
    "FrozenConfig",
    "LdmPipeError",
    "PretrainedModule",
    "atomic_write",
    "check_links",
    "check_sizes",
    "check_tensors",
    "load_folder_tensors",
    "load_tensors",
    "read_json",
    "read_metadata",
    "resolve_folder",
    "safe_child",
    "save_tensors",
    "sync_folder",
]
