"""encfs_js keeps a NATS JetStream store encrypted at rest under an unmodified nats-server."""

__version__ = "0.1.0"
