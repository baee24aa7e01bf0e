"""encfs-js whose `mount STORE ...` records what it does to STORE, into the file that POWERCUT_SINK names."""

from __future__ import annotations

import os
import sys

from recording import Recording

from encfs_js import cli, mount


class Recorded(Recording):
    """Without the reserve, whose content means nothing."""

    def fallocate(self, fd, mode, offset, length):
        pass


if __name__ == "__main__":
    if sys.argv[1] == "mount":
        mount.Backing = lambda: Recorded(sys.argv[2], os.environ["POWERCUT_SINK"])
    cli.main()
