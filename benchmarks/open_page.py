"""How long runs take to open in a real browser: `python benchmarks/open_page.py RUN [RUN ...]`, or a folder of runs.

Five times: start `ireasoner view`, go to its address in a new tab of a browser that is already up, wait for the text,
for the curves that are seen, and after unfolding the others for these. Then scroll through the page for three seconds.
Prints medians with their ranges.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time

from playwright.sync_api import Page, sync_playwright

REPETITIONS = 5
CURVES = """[...document.querySelectorAll('.panel img')].every(
    (image) => !image.checkVisibility() || image.complete && image.naturalWidth)"""
UNFOLD = """document.querySelectorAll('details.more').forEach((details) => { details.open = true; });
document.querySelectorAll('.panel img').forEach((image) => { image.loading = 'eager'; });"""
SCROLL = """async () => {
    let frames = 0, longest = 0, last = performance.now();
    const end = last + 3000;
    while (performance.now() < end) {
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        longest = Math.max(longest, now - last); last = now; frames++;
        scrollTo(0, frames * 60 % document.body.scrollHeight);
    }
    return [frames / 3, longest];
}"""


def open_once(page: Page, runs: list[str]) -> tuple[float, float, float, float]:
    """Seconds from the command to its address; from there to the text, and to the curves; for the folded curves."""
    command = [sys.executable, "-m", "ireasoner", "view", *runs, "--no-browser"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        found = re.search(r"http://\S+", viewer.stdout.readline())
        assert found, f"{runs} cannot be viewed"
        ready = time.perf_counter()
        page.goto(found[0], wait_until="domcontentloaded")
        text = time.perf_counter()
        wait_for_curves(page)
        done = time.perf_counter()
        page.evaluate(UNFOLD)
        wait_for_curves(page)
        unfolded = time.perf_counter()
        viewer.terminate()
    return ready - began, text - ready, done - ready, unfolded - done


def wait_for_curves(page: Page) -> None:
    """Wait for the curves that are not folded."""
    while not page.evaluate(CURVES):
        page.wait_for_timeout(10)


def main() -> None:
    """Measure the runs that are named on the command line."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        rows = [open_once(page, sys.argv[1:]) for _ in range(REPETITIONS)]
        frames, longest = page.evaluate(SCROLL)
        browser.close()
    names = ("command to address", "address to text", "address to curves", "unfolding the others")
    for what, seconds in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{what:22} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"scrolling              {frames:.0f} frames a second, the longest {longest:.0f} ms")


if __name__ == "__main__":
    main()
