"""A file in memory, in the place of a segment of another process."""

from __future__ import annotations

import os


class MemoryFile:
    """Made when it is first asked for; `fd` is -1 until then, and once it is closed."""

    def __init__(self) -> None:
        self.fd = -1

    def open(self, mode: int = 0o777) -> int:
        """Its descriptor."""
        if self.fd < 0:
            self.fd = os.memfd_create("segment")
            os.fchmod(self.fd, mode)
        return self.fd

    def close(self) -> None:
        """Give it up."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
