"""A test that somebody else made: the `easy-vqa` package from PyPI (MIT) as ordinary files.

`python -m ireasoner.playground.easyvqa OUT` writes its 4,000 training images, without their labels, to OUT/unlabeled,
and its 9,673 test questions with their images to OUT/test. With `--labels`, the 38,575 questions about the training
images are in OUT/labels.jsonl, for experiments with a few labels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

from ireasoner.method.types import UsageError
from ireasoner.playground import dataset


def write(out: Path, with_labels: bool = False) -> Path:
    """Write the unlabeled images and the labeled test, and the labels of the former if they are asked for; returns the
    test's JSONL file.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")  # finds its files without running its code
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the easy-vqa package is not installed: pip install easy-vqa")
    data = Path(spec.submodule_search_locations[0]) / "data"
    shutil.copytree(data / "train" / "images", out / "unlabeled", dirs_exist_ok=True)
    shutil.copytree(data / "test" / "images", out / "test" / "images", dirs_exist_ok=True)
    files = {"test": ("images", path := out / "test" / "test.jsonl")}
    if with_labels:
        files["train"] = "unlabeled", out / "labels.jsonl"
    for split, (folder, file) in files.items():
        rows = json.loads((data / split / "questions.json").read_text("utf-8"))
        named = ({"image": f"{folder}/{image}.png", "question": text, "answer": answer} for text, answer, image in rows)
        dataset.write_rows(file, named)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write easy-vqa's unlabeled images and labeled test as files.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", action="store_true", help="write the labels of the training images too")
    arguments = parser.parse_args()
    print(f"Labeled test questions: {write(arguments.out, arguments.labels)}")
