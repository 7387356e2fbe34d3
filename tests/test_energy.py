"""The energy of a run: counters of the processor and of the GPU, here made by hand, and the line about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ireasoner.app.cli import main
from ireasoner.training import energy
from ireasoner.training.energy import energy_line, energy_of, open_meter
from ireasoner.training.metrics import energy_metrics

pytestmark = pytest.mark.usefixtures("copied_models", "no_reports")
CPU = torch.device("cpu")


def zone(folder: Path, name: str, joules: float, full: float = 1000.0) -> Path:
    """A counter as Linux shows it."""
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{round(full * 1e6) - 1}\n")
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    return folder / "energy_uj"


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Counters of two sockets, of the memory of one, and of what is no part of its own or the whole machine."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    named = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    return [zone(tmp_path / "powercap" / f"intel-rapl:{n}", name, 990.0) for n, name in named.items()]


def test_sockets_and_memory_are_added_up_and_counters_start_again_at_zero(sockets: list[Path]):
    meter = open_meter(CPU)
    for path in sockets:
        path.write_text(str(995_000_000))
    assert meter.read() == {"cpu": pytest.approx(15.0)}
    sockets[0].write_text(str(2_000_000))  # behind the end of its range
    assert meter.read() == {"cpu": pytest.approx(7.0)}
    assert meter.read() == {"cpu": 0.0}


def test_one_process_of_a_machine_reads_the_processors_counters(sockets: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert open_meter(CPU).read() == {}


def test_counters_that_cannot_be_read_are_left_out(sockets: list[Path], tmp_path: Path):
    for path in sockets:
        path.unlink()
        path.mkdir()  # as good as unreadable, also to root
    assert open_meter(CPU).read() == {}


def test_the_gpus_counter_is_found_by_the_gpus_own_number(monkeypatch: pytest.MonkeyPatch):
    asked, library = [], ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    library.nvmlInit = lambda: None  # type: ignore[attr-defined]
    library.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or 7  # type: ignore[attr-defined]
    read = iter([1_000_000, 1_002_500])
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(read)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-12"))
    assert open_meter(torch.device("cuda:1")).read() == {"gpu": pytest.approx(2.5)}
    assert asked == ["GPU-ab-12"]

    def fail() -> None:
        raise library.NVMLError

    library.nvmlInit = fail  # type: ignore[attr-defined]
    assert open_meter(torch.device("cuda:1")).read() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(torch.device("cuda:1")).read() == {}


def test_energy_is_told_for_each_trajectory_and_each_point():
    steps: list[dict[str, Any]] = [energy_metrics([{"gpu": 100.0, "cpu": 20.0}, {"gpu": 80.0}]) for _ in range(5)]
    assert steps[0] == {"energy/cpu_joules": 20.0, "energy/gpu_joules": 180.0}
    found = energy_of(steps, trajectories=10, points=4.0)
    assert found is not None
    assert found == {
        "joules": 1000.0, "steps": 5, "of": ["cpu", "gpu"], "joules_per_trajectory": 20.0, "joules_per_point": 250.0,
    }  # fmt: skip
    told = "Energy (processor and GPU): 1 kJ in 5 steps, 20 J a trajectory, 250 J a point of accuracy gained."
    assert energy_line(found) == told
    for points in (None, -1.0, 0.0):
        lost = energy_of(steps, 10, points)
        assert lost is not None
        assert lost["joules_per_point"] is None
    # Where a part of the steps was not measured, trajectories are those of the others, and a point has no price.
    partly = energy_of([{}, *steps], 10, 4.0)
    assert partly is not None
    assert (partly["joules_per_trajectory"], partly["joules_per_point"]) == (20.0, None)
    assert energy_of([{}], 10, 4.0) is None
    assert energy_line(None) == "Energy: not measured."


def test_a_run_says_what_it_took(
    sockets: list[Path], tmp_path: Path, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "pool").mkdir()
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "pool" / f"{index}.png")
    words = ["train", "--images", str(tmp_path / "pool"), "--out", str(tmp_path / "run"), "--model", "tiny"]
    words += ["--device", "cpu", "--steps", "1", "--images-per-step", "1", "--group-size", "2"]
    main([*words, "--max-solution-tokens", "16", "--probe-every", "0", "--blank-every", "0"])
    out = capsys.readouterr().out
    assert "Energy (processor): 0 J in 1 steps, 0 J a trajectory." in out  # these counters stand still
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["energy"]["of"] == ["cpu"]
