"""The unlocked keys of a mount in memory of its own (memfd): a worker inherits them, and no second Argon2 run is needed.

The memory has no name in any file system, cannot be written any more, and is gone with the last process that has it open.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import Final

from encfs_js.format import Suite
from encfs_js.keyring import Keys, Settings

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def keep(keys: Keys) -> int:
    """Return the descriptor of a new memory that holds the keys."""
    keyring_key, volume_keys = keys.secrets()
    document = {
        "store_id": keys.store_id.hex(),
        "cipher": keys.settings.cipher.label,
        "plaintext": keys.settings.plaintext,
        "epoch": keys.settings.epoch,
        "keyring_key": keyring_key.hex(),
        "volume_keys": {str(epoch): key.hex() for epoch, key in volume_keys.items()},
    }
    fd = os.memfd_create("keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, json.dumps(document).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def take(fd: int) -> Keys:
    """Return the keys that `keep` put there."""
    document = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    settings = Settings(Suite.from_name(document["cipher"]), document["plaintext"], document["epoch"])
    volume_keys = {int(epoch): bytes.fromhex(key) for epoch, key in document["volume_keys"].items()}
    return Keys(bytes.fromhex(document["store_id"]), settings, bytes.fromhex(document["keyring_key"]), volume_keys)
