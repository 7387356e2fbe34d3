"""Somebody else's test: the `easy-vqa` package from PyPI (MIT, not ours) as files.

`python -m ireasoner.playground.easyvqa OUT` writes its 4,000 training images to OUT/unlabeled, without a word about
them, and its 9,673 test questions with their images to OUT/test. Its training labels are never read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

from ireasoner.method.types import UsageError
from ireasoner.playground import dataset


def package_data() -> Path:
    """The folder of the installed package's images and questions; nothing of the package is executed.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the easy-vqa package is not installed: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def write(out: Path) -> Path:
    """Write the unlabeled pool and the labelled test; returns the test's JSONL file."""
    data = package_data()
    shutil.copytree(data / "train" / "images", out / "unlabeled", dirs_exist_ok=True)
    shutil.copytree(data / "test" / "images", out / "test" / "images", dirs_exist_ok=True)
    rows = json.loads((data / "test" / "questions.json").read_text("utf-8"))
    path = out / "test" / "test.jsonl"
    found = ({"image": f"images/{image}.png", "question": text, "answer": answer} for text, answer, image in rows)
    dataset.write_rows(path, found)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write easy-vqa's unlabeled images and labelled test as files.")
    parser.add_argument("out", type=Path)
    print(f"Labelled test questions: {write(parser.parse_args().out)}")
