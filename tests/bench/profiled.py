"""encfs-js whose `mount` has workers that profile themselves with cProfile, into the file that BENCH_PROFILE names."""

import cProfile
import os
import sys

from encfs_js import cli, mount, worker

if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        profile = cProfile.Profile()
        try:
            profile.runcall(worker.main)
        finally:
            profile.dump_stats(os.environ["BENCH_PROFILE"])  # of the one that served: it is the last to end by itself
    else:
        mount.mount.__kwdefaults__["worker"] = (sys.executable, os.path.abspath(__file__), "--worker")
        cli.main()
