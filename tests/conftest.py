"""Shared material: the tiny LMM that ships with the package, and pictures of its world."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from ireasoner.app.display import quiet_libraries
from ireasoner.playground import world

if TYPE_CHECKING:
    from ireasoner.model.options import BackboneOptions
    from ireasoner.model.policy import Policy
    from ireasoner.model.source import Source

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
quiet_libraries()  # as the command line does, before any test imports transformers


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imported modules and collected tests are no garbage: the collector would look through them in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take half a minute come first: begun as the last ones, they would leave a core idle at the end."""
    long = ("test_parallel", "test_loop", "test_ablate", "test_view", "test_memory", "test_doctor")
    items.sort(key=lambda item: item.path.stem not in long)


@pytest.fixture(scope="module", autouse=True)
def earlier_modules_are_no_garbage() -> None:
    """The collector leaves alone what was there before a module of tests; to look through it would take a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk() -> Iterator[None]:
    """What is written need not reach the disk before a test goes on: none of them cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Six pictures of the world in the demo's style, all different."""
    rng = np.random.default_rng(123)
    return [world.draw(world.sample_picture(rng), world.sample_style("chalk", rng), rng) for _ in range(6)]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are finished in this test write no report, whose curves take as long as some steps of training."""
    monkeypatch.setattr("ireasoner.page.write_report", lambda *_, **__: None)


@pytest.fixture(scope="module")
def no_reports() -> Iterator[None]:
    """The same for all tests and fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ireasoner.page.write_report", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def energy_is_not_measured() -> Iterator[None]:
    """What a machine's counters say is different in every run, and runs are compared."""
    from ireasoner.training import energy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "POWERCAP", Path("nowhere"))
        yield


@pytest.fixture(scope="module")
def copied_models() -> Iterator[None]:
    """Runs and evaluations in the processes of the tests work on copies of the shipped model, and do not load it."""
    from ireasoner.model import loading
    from ireasoner.model.backbone import resolve_device
    from ireasoner.training import opening
    from models import load

    load_policy = loading.load_policy

    def copy(
        model: str | Source, options: BackboneOptions, *, device: str = "auto", seed: int = 0, **others: Any
    ) -> Policy:
        if str(model) != "tiny" or others.get("revision") or resolve_device(device) != "cpu":
            return load_policy(model, options, device=device, seed=seed, **others)
        return load(seed=seed, **dict(options))

    with pytest.MonkeyPatch.context() as patch:
        for module in (opening, loading):
            patch.setattr(module, "load_policy", copy)
        yield


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Policy]:
    """`make_policy(filled, **options)`: the shipped model with adapters whose B matrices are N(0, filled²).

    Fresh adapters have B = 0, so that A gets no gradient and the KL is 0: no test of an update should start there.
    At 0.05 the model still writes what it was trained to; at 0.2 it babbles, from a broad distribution.
    """

    from ireasoner.studies.doctor import fill_adapters
    from models import load

    def make(filled: float = 0.05, **options: Any) -> Policy:
        policy = load(**options)
        fill_adapters(policy, filled, seed=1)
        return policy

    return make
