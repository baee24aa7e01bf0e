"""encfs-js whose `mount STORE ...` records what it does to STORE, into the file that POWERCUT_SINK names."""

from __future__ import annotations

import json
import os
import sys

from recording import Recording

from encfs_js import cli, mount, worker
from encfs_js.backing import Backing


class Recorded(Recording):
    """Without the reserve, whose content means nothing."""

    def fallocate(self, fd, mode, offset, length):
        pass


def serve() -> None:
    options = json.loads(os.pread(json.loads(sys.argv[-1])["options"], 1 << 20, 0))
    sink = os.environ["POWERCUT_SINK"]
    # The worker that stands by serves nothing here, and a recording of its own would cut off the one that is under way.
    worker.main(Backing() if os.stat(sink).st_size else Recorded(options["store"], sink))


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        serve()
    else:
        mount.mount.__kwdefaults__["worker"] = (sys.executable, os.path.abspath(__file__), "--worker")
        cli.main()
