"""The benchmark: JetStream and file loads on a plain directory and on a sealed one, pair by pair.

    python -m tests.bench                           every load, every backend but gocryptfs, 5 pairs
    python -m tests.bench --backend sealed:aes --load jetstream --json result.json
    python -m tests.bench --quick                   a minute, to see that it works; its figures mean nothing

It judges nothing: it prints each figure beside its target, and exits with 1 only when a run failed or lost a message.
Run it as root for cold figures (it drops the page cache) and on a machine that does nothing else.
"""
