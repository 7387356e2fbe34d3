"""The energy of a run, from the counters of the GPU (NVML) and of the processor (RAPL), where these can be read.

Counters are those of whole devices: what else runs on them counts too, and so does what they take when nothing runs.
Memory counts where the processor has a counter for it, and the rest of the machine does not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")  # where Linux has RAPL's counters, of Intel's and of AMD's processors
PARTS = {"gpu": "GPU", "cpu": "processor"}
Counter = Callable[[], float]  # gives joules since it was called before


class Meter:
    """Counters of energy that one process reads.

    Args:
        counters: by the part of the machine that each is of; several processes of a machine share its processor,
            whose counters are given to one of them.
    """

    def __init__(self, counters: Iterable[tuple[str, Counter]] = ()) -> None:
        self.counters = list(counters)

    def read(self) -> dict[str, float]:
        """Joules of each part since the last call; a part without a counter that can be read is left out."""
        found: dict[str, float] = {}
        for part, counter in self.counters:
            found[part] = found.get(part, 0.0) + counter()
        return found


def open_meter(device: Any) -> Meter:
    """The counters that this process can read, for a run on a device of torch's."""
    counters = [("gpu", counter) for counter in _of_gpu(device)]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # the processor's counters are read once on each machine
        counters += [("cpu", counter) for counter in _of_processor(POWERCAP)]
    return Meter(counters)


def _of_gpu(device: Any) -> list[Counter]:
    """The counter of a GPU since its driver was loaded; none before Volta, or without nvidia-ml-py."""
    if device.type != "cuda":
        return []
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # an optional dependency
    except ImportError:
        return []
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return [_since(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]  # of millijoules
    except pynvml.NVMLError:
        return []


def _of_processor(folder: Path) -> list[Counter]:
    """A counter for each socket, and for the memory on it where that is apart; none where only root may read them."""
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):  # the others are parts of these, or hold them
                continue
            range_ = (int((zone / "max_energy_range_uj").read_text()) + 1) / 1e6
            found.append(_since(partial(_joules, zone / "energy_uj"), range_))
        except (OSError, ValueError):
            continue
    return found


def _joules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def _since(read: Counter, range_: float | None = None) -> Counter:
    """A counter that begins anew with every call, of one that only rises and, if it has a range, starts again at 0."""
    last = read()

    def since() -> float:
        nonlocal last
        before, last = last, read()
        return last - before if range_ is None else (last - before) % range_

    return since


def energy_of(metrics: Iterable[Mapping[str, Any]], trajectories: int, points: float | None) -> dict[str, Any] | None:
    """What a run took, for its summary; None if no counter could be read.

    Args:
        metrics: those of all its steps.
        trajectories: of a step.
        points: gained in held-out accuracy, in percentage points; None if that was not measured.
    """
    steps = [
        {part: step[f"energy/{part}_joules"] for part in PARTS if f"energy/{part}_joules" in step} for step in metrics
    ]
    measured = [step for step in steps if step]
    if not measured:
        return None
    joules = sum(sum(step.values()) for step in measured)
    complete = len(measured) == len(steps)
    return {
        "joules": joules,
        "steps": len(measured),
        "of": sorted({part for step in measured for part in step}),
        "joules_per_trajectory": joules / (len(measured) * trajectories),
        "joules_per_point": joules / points if complete and points is not None and points > 0 else None,
    }


def energy_line(energy: Mapping[str, Any] | None) -> str:
    """The energy of a run's summary as a sentence."""
    if energy is None:
        return "Energy: not measured."
    parts = " and ".join(PARTS[part] for part in energy["of"])
    line = f"Energy ({parts}): {_unit(energy['joules'])} in {energy['steps']:,} steps"
    line += f", {_unit(energy['joules_per_trajectory'])} a trajectory"
    if energy["joules_per_point"] is not None:
        line += f", {_unit(energy['joules_per_point'])} a point of accuracy gained"
    return f"{line}."


def _unit(joules: float) -> str:
    for size, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules:.3g} J"
