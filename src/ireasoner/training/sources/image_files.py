"""Image files behind an address, or some of those in a folder."""

from __future__ import annotations

import errno
import os

from ireasoner.training.images import require_at_most
from ireasoner.training.sources.files import Files
from ireasoner.training.sources.source import Names


class ImageFiles:
    """Files that each are an image, by their names."""

    def __init__(self, files: Files) -> None:
        self._files, self.where, self.skipped = files, files.where, dict[str, str]()
        self.names = Names.of(files.names)

    def read(self, name: str, max_bytes: int) -> bytes:
        if name not in self.names:  # removed since the run began
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with self._files.open(name, streams=True) as file:
            data = file.read(max_bytes + 1)
        require_at_most(max_bytes, len(data))
        return data
