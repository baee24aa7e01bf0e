"""The benchmark of developers: the loads of `encfs-js compare` one by one, and loads of plain files, pair by pair, with profiles.

    python -m tests.bench                                       every load on plain and both mounts, 5 pairs
    python -m tests.bench --mode "mount aes" --load stream --json result.json
    python -m tests.bench --mode "mount aes" --load always --profile perf
    python -m tests.bench --quick                               a minute, to see that it works; its figures mean nothing

It judges nothing, and exits with 1 only when a run failed or lost a message. Run it as root for cold figures (it drops the
page cache), and on a machine that does nothing else.
"""
