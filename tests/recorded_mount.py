"""encfs-js whose `mount STORE ...` records what it does to STORE, into the file that POWERCUT_SINK names."""

from __future__ import annotations

import json
import os
import sys

from recording import Recording

from encfs_js import cli, mount, worker


class Recorded(Recording):
    """Without the reserve, whose content means nothing."""

    def fallocate(self, fd, mode, offset, length):
        pass


def serve() -> None:
    options = json.loads(os.pread(json.loads(sys.argv[-1])["options"], 1 << 20, 0))
    worker.main(Recorded(options["store"], os.environ["POWERCUT_SINK"]))


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        serve()
    else:
        mount.mount.__kwdefaults__["worker"] = (sys.executable, os.path.abspath(__file__), "--worker")
        cli.main()
