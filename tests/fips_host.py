"""A host whose OpenSSL takes FIPS algorithms only, as the processes see it that are started with an environment of ours.

The OpenSSL is the one that `cryptography` really uses; its configuration (OPENSSL_CONF) loads a FIPS provider and demands
`fips=yes`, as a FIPS host does. That provider is OpenSSL's own where the host has one (Debian 13: openssl-provider-fips, or
the file that FIPS_MODULE names), and else a stand-in that is built here (fips_provider.c). Who refuses ChaCha20-Poly1305 and
Argon2id is `cryptography` and OpenSSL in both cases.

Only `cryptography` gets that configuration: Python's own hashlib has another OpenSSL, and two in one process cannot share the
module's memory. On a host where everything is linked with one OpenSSL they do not have to.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import mounts

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fips_provider.c")
CONFIGURATION = """
config_diagnostics = 1
openssl_conf = init
[init]
providers = providers
alg_section = algorithms
[providers]
{providers}
[active]
activate = 1
[algorithms]
default_properties = fips=yes
{more}
"""
FIRST = """\"\"\"Runs before everything else: Python's own OpenSSL is set up without the configuration.\"\"\"

import os

configuration = os.environ.pop("OPENSSL_CONF")
import hashlib

hashlib.sha256(b"").digest()
os.environ["OPENSSL_CONF"] = configuration
"""


def real_module() -> str | None:
    """OpenSSL's own FIPS provider, if this host has it, and the command that sets it up."""
    found = [os.environ.get("FIPS_MODULE", ""), *sorted(glob.glob("/usr/lib/*/ossl-modules/fips.so"))]
    return next((path for path in found if os.path.exists(path)), None) if shutil.which("openssl") else None


def needs_provider() -> str:
    """Why there can be no FIPS provider here, or an empty string."""
    return "" if real_module() or shutil.which("cc") else "no FIPS provider and no C compiler: install build-essential"


def build(directory: Path) -> dict[str, str]:
    """Make a host in a new directory, and return what the environment of its processes has more than ours."""
    directory.mkdir()
    module, more = directory / "fips.so", ""
    real = real_module()
    if real is not None:
        shutil.copy(real, module)
        # Self-tests, and the checksum of the module, without which it does not load.
        install = ["openssl", "fipsinstall", "-module", str(module), "-out", str(directory / "fipsmodule.cnf")]
        subprocess.run(install, check=True, capture_output=True, timeout=mounts.PATIENCE)
        more = (directory / "fipsmodule.cnf").read_text()
    else:
        compiler = ["cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(module), SOURCE]
        subprocess.run([*compiler, "-l:libcrypto.so.3"], check=True, timeout=mounts.PATIENCE)
    fips = "fips = fips_sect" if real is not None else "fips = active"
    return _environment(directory, CONFIGURATION.format(providers=f"{fips}\nbase = active", more=more))


def build_empty(directory: Path) -> dict[str, str]:
    """Make a host that demands FIPS algorithms and has no FIPS provider: somebody has set it up in half."""
    directory.mkdir()
    return _environment(directory, CONFIGURATION.format(providers="base = active", more=""))


def _environment(directory: Path, configuration: str) -> dict[str, str]:
    (directory / "openssl.cnf").write_text(configuration)
    (directory / "python").mkdir()
    (directory / "python" / "sitecustomize.py").write_text(FIRST)
    return {
        "OPENSSL_CONF": str(directory / "openssl.cnf"),
        "OPENSSL_MODULES": str(directory),
        "PYTHONPATH": str(directory / "python"),
    }


def says(environ: dict[str, str], program: str) -> str:
    """What a Python program prints on that host."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=mounts.environment(None) | environ,
        capture_output=True,
        text=True,
        timeout=mounts.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
