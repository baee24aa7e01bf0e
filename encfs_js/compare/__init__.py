"""What `encfs-js compare` does: the same work, and the same attacks, on a real nats-server in each mode of encryption at rest.

It runs apart from every mount, on stores that it makes and removes itself, through the command line that operators use:
nothing here sees the key or the inside of a daemon. `result` says what comes out; the rooms below it measure and attack, the
others show it.
"""
