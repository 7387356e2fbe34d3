"""The commands that show runs: `view`, `report`, `runs`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from ireasoner.app.options import WHOLE, Writable
from ireasoner.app.paths import find_truth
from ireasoner.method.types import UsageError

Truth = Annotated[
    Path | None,
    Parameter(
        help="Truth about the images, as playground writes it, to mark wrong majorities (the file inside RUN, if any)."
    ),
]
Port = Annotated[int, Field(ge=0, le=65535), WHOLE]


def view(runs: list[Path], /, *, truth: Truth = None, port: Port = 0, browser: bool = True) -> int:
    """Show a run on a local page: is it working, what does it ask and answer, how do the reasoning steps agree, how did
    it change, what ran. Of several runs, or of a folder that holds some: their list, and their curves laid over each
    other. Follows runs that go on. Ctrl-C ends it.

    Args:
        runs: Run directories, finished or not, or folders that hold some.
        port: Port on 127.0.0.1 (0: any that is free).
        browser: Open the page in the browser; its address is printed in any case.
    """
    from ireasoner.app.display import open_on_desktop
    from ireasoner.page.server import serve

    def ready(address: str) -> None:
        print(f"{', '.join(map(str, runs))}: {address}   (Ctrl-C ends it)", flush=True)
        if browser:
            open_on_desktop(address)

    with suppress(KeyboardInterrupt):  # how a viewer ends
        serve(runs, port, ready, lambda run: find_truth(run, truth))
    return 0


def report(run: Path, /, *, truth: Truth = None, out: Writable = None) -> int:
    """Write the page about a run, with its pictures, as one HTML file that needs nothing else.

    Args:
        run: A run directory, finished or not.
        out: The file to write (RUN/report.html).
    """
    from ireasoner.page import write_report

    try:
        path = write_report(run, out, find_truth(run, truth))
    except OSError as error:
        raise UsageError(f"the report could not be written: {error}") from None
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def runs(folder: Path = Path("runs"), /) -> int:
    """List the runs in a folder and below it, the latest last.

    Args:
        folder: Where to look.
    """
    from ireasoner.app.display import plain, print_table
    from ireasoner.page.overview import overview

    rows = overview(folder)
    if len(rows) == 1:
        print(f"No run in {folder}. Start one with: ireasoner demo")
        return 0
    print_table(f"Runs in {plain(str(folder))}", [[plain(cell) for cell in row] for row in rows])
    return 0
