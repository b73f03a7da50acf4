"""Every place where bytes from outside are parsed, by name."""

from __future__ import annotations

from tests.fuzz import (
    discovery_targets,
    file_targets,
    http2_targets,
    http_targets,
    kube_targets,
    load_targets,
    object_targets,
    picker_targets,
)

MODULES = (
    load_targets,
    object_targets,
    kube_targets,
    discovery_targets,
    http_targets,
    file_targets,
    picker_targets,
    http2_targets,
)
TARGETS = {target.name: target for module in MODULES for target in module.TARGETS}
