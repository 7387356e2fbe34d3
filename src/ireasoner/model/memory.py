"""How much memory is free: on a GPU, or on this machine, where a container may be given less than all of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of version 2 and version 1: the limit, what is in use, and the line of memory.stat that says how much of that the
# kernel can take back.
NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: str) -> tuple[int, int]:
    """Bytes that are free on a device, and bytes in all: of 'cuda', 'cuda:N', or else of this machine."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    machine = psutil.virtual_memory()
    left = [machine.available, *(found for folder in _own_cgroups() if (found := _left_in(folder)) is not None)]
    return min(left), machine.total


def _own_cgroups() -> list[Path]:
    """The control groups that this process is in, with those around them, whose limits hold as well."""
    try:
        lines = OWN_CGROUPS.read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers in ("", "memory"):  # of version 2, and of version 1
            root = CGROUPS / controllers
            own = root / path.lstrip("/")
            found += [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    return found


def _left_in(folder: Path) -> int | None:
    """Bytes that a control group may still take; None: without limit."""
    for limit, used, reclaimable in NAMES:
        try:
            most, now = ((folder / name).read_text("ascii").strip() for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        except OSError:  # another version, or the root, which has no limit
            continue
        if most != "max":
            return max(0, int(most) - int(now) + int(stat.get(reclaimable, 0)))
    return None
