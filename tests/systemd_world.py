"""The system's own systemd as PID 1 of a world of its own: namespaces, and a copy of / that vanishes (overlayfs on tmpfs).

In it encfs_js is installed as an operator does it, in /opt/encfs-js, and a nats-server.service runs a real nats-server as
user nats. The world has the host's network, where everything takes its ports from the system. Nothing outside of it is
changed, and nothing outlives it: when the process that booted it ends, the kernel ends everything inside.

Run as a program this is what boots: first it takes a cgroup of its own, then, as PID 1, builds the root and becomes systemd.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INIT = "/lib/systemd/systemd"
TOOLS = ("unshare", "nsenter", "setpriv", "systemctl", "journalctl", "systemd-sysusers", "pivot_root")
NAMESPACES = ("--pid", "--mount", "--cgroup", "--uts", "--ipc")
OLDEST = 252  # looks for credentials in /etc/credstore
REPOSITORY = Path(__file__).parent.parent
PREFIX = "/opt/encfs-js"
HIDDEN = ("/root", "/home", "/run", "/tmp", "/var/tmp")  # from the daemon, by its sandbox
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse")
# What has no business in a world without hardware, or would cost time.
MASKED = """
    systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket
    systemd-sysctl.service systemd-modules-load.service systemd-timesyncd.service systemd-random-seed.service
    systemd-update-utmp.service systemd-remount-fs.service systemd-firstboot.service systemd-machine-id-commit.service
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-journal-flush.service sys-kernel-debug.mount
    sys-kernel-tracing.mount sys-kernel-config.mount dev-hugepages.mount dev-mqueue.mount kmod-static-nodes.service
    systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service systemd-sysusers.service ldconfig.service
    systemd-pcrphase-sysinit.service systemd-boot-system-token.service systemd-logind.service dbus.socket
""".split()  # noqa: SIM905
FILES = {
    "/etc/fstab": "",
    "/etc/hostname": "world\n",
    "/etc/systemd/journald.conf.d/world.conf": (
        "[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\nReadKMsg=no\nAudit=no\nForwardToSyslog=no\n"
    ),
    "/etc/systemd/system/world.target": "[Unit]\nRequires=basic.target ready.service\nAfter=basic.target\n",
    "/etc/systemd/system/ready.service": (
        "[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nExecStart=/bin/touch /out/ready\n"
    ),
    # As Debian's, but for the paths.
    "/etc/systemd/system/nats-server.service": (
        "[Unit]\nDescription=NATS Server\n[Service]\nPrivateTmp=true\nType=simple\n"
        "ExecStart=/opt/nats-server -c /etc/nats-server.conf\nExecStop=/bin/kill -s SIGINT $MAINPID\n"
        "User=nats\nGroup=nats\n"
    ),
    "/etc/sysusers.d/nats.conf": "u nats - NATS\n",
    # Where a libpython is that goes with the Python below /opt; harmless without one.
    "/etc/systemd/system.conf.d/world.conf": "[Manager]\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n",
}


def needs_systemd() -> str:
    """Why no systemd can boot here, or an empty string."""
    if os.geteuid() != 0:
        return "only root can boot a systemd of its own"
    missing = [name for name in TOOLS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if not os.access(INIT, os.X_OK) or missing:
        return f"missing: {' '.join(missing) or INIT}: install systemd and util-linux"
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=mounts.PATIENCE).stdout
    if int(version.split()[1].split(".")[0].split("~")[0]) < OLDEST:
        return f"the unit needs systemd {OLDEST}, this is {version.splitlines()[0]}"
    trial = (
        "mount -t tmpfs none /mnt && cd /mnt && mkdir up work root cg && mount -t cgroup2 none cg && "
        "mount -t overlay -o lowerdir=/,upperdir=up,workdir=work none root"
    )
    done = subprocess.run(
        ["unshare", "--fork", *NAMESPACES, "sh", "-c", trial],
        capture_output=True,
        text=True,
        timeout=mounts.PATIENCE,
    )
    return f"namespaces cannot be had here: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class World:
    """A booted systemd. `out` and `state` lie on the host: /out and /var/lib/encfs-js of the world."""

    directory: Path
    process: subprocess.Popen[bytes]
    cgroup: str  # its name, of which there is one on the host
    init: int = 0

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs `command` in the world."""
        return ["nsenter", "-t", str(self.init), "-m", "-p", "-u", "-i", "-C", "--", *command]

    def run(self, *command: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in the world, as root, and check its exit code (None: any)."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run(
            self.enter(*map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=mounts.PATIENCE,
            env={"PATH": path, "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "cat", "SYSTEMD_COLORS": "0"},
        )
        if code is not None and done.returncode != code:
            text = f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(f"{text}\n{self.log()}")
        return done

    def path(self, path: str) -> Path:
        """Return where a file of the world can be seen from outside. Not for mounts that may hang."""
        return Path(f"/proc/{self.init}/root{path}")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def show(self, unit: str) -> dict[str, str]:
        """Return the properties of a unit."""
        lines = self.run("systemctl", "show", "--all", unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def journal(self, *options: str) -> list[dict[str, Any]]:
        """Return the entries of the journal that journalctl's options choose."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "-o", "json", "--all", "--no-pager", *options).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def log(self) -> str:
        """Return the end of the whole journal, for a message of a failed test."""
        command = self.enter("journalctl", "-n", "120", "-o", "short-monotonic", "--no-hostname", "--no-pager")
        return subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE).stdout

    def processes(self, unit: str) -> dict[int, str]:
        """Return the processes of a unit, as numbered outside, with what they are."""
        found = {}
        group = self.show(unit)["ControlGroup"]
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                # Other worlds may run beside this one: their units have the same names.
                if Path("/proc", name, "cgroup").read_text().rstrip().endswith(f"/{self.cgroup}{group}"):
                    found[int(name)] = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found if group else {}


@contextlib.contextmanager
def booted(directory: Path, binds: Mapping[Path, str], files: Mapping[str, str]) -> Iterator[World]:
    """Boot a world. binds: files and directories of the host and where they are in the world; files: what is in it."""
    for name in ("root", "out", "state"):
        (directory / name).mkdir()
    python = Path(sys.base_prefix)
    shared = {
        directory / "out": "/out",
        directory / "state": "/var/lib/encfs-js",
        Path(sysconfig.get_path("purelib")): f"{PREFIX}/dependencies",
        **binds,
    }
    if any(f"{python}/".startswith(f"{hidden}/") for hidden in HIDDEN):
        shared[python] = "/opt/python"
        python = Path("/opt/python")
    plan = {
        "root": str(directory / "root"),
        "binds": [[str(source), target] for source, target in shared.items()],
        "files": {**FILES, "/etc/machine-id": f"{uuid.uuid4().hex}\n", **files},
        "python": str(python),
        "cgroup": f"encfs_js-test-{uuid.uuid4().hex}",
        "repository": str(REPOSITORY),
    }
    (directory / "plan.json").write_text(json.dumps(plan))
    with open(directory / "out" / "console.txt", "wb") as console:
        process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                sys.executable,
                __file__,
                directory / "plan.json",
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
    world = World(directory, process, plan["cgroup"])
    try:
        mounts.until(lambda: _ready(world), "systemd boots")
        world.init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        yield world
    finally:
        process.kill()
        process.wait(mounts.PATIENCE)
        _remove_cgroup(plan["cgroup"], directory / "root")


def _ready(world: World) -> bool:
    console = (world.directory / "out" / "console.txt").read_text(errors="replace")
    assert world.process.poll() is None, f"systemd ended with {world.process.returncode}:\n{console}"
    return (world.directory / "out" / "ready").exists()


def _remove_cgroup(name: str, somewhere: Path) -> None:
    """Remove the world's cgroup, which is possible when every process in it is gone."""
    script = (
        'mount -t cgroup2 none "$1" && cd "$1" && { find . -depth -type d -path "*/$2*" -exec rmdir {} +; '
        '[ -z "$(find . -name "$2")" ]; }'
    )

    def gone() -> bool:
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(somewhere), name]
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=mounts.PATIENCE).returncode == 0

    mounts.until(gone, "the end of the world's processes")


# --- inside ---------------------------------------------------------------------------------------------------------


def take_cgroup(name: str, somewhere: str) -> None:
    """Make a cgroup below our own and move there. The mount is seen by nobody else."""
    mount("-t", "cgroup2", "none", somewhere)
    own = next(
        line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
    )
    group = Path(f"{somewhere}{own}", name)
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    subprocess.run(["umount", somewhere], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def build_root(plan: dict[str, Any]) -> str:
    """Make the new root, all of which is in memory, and return its path."""
    mount("--make-rprivate", "/")
    place = plan["root"]
    mount("-t", "tmpfs", "-o", "mode=755", "world", place)
    for name in ("upper", "work", "root"):
        os.mkdir(f"{place}/{name}")
    root = f"{place}/root"
    mount("-t", "overlay", "-o", f"lowerdir=/,upperdir={place}/upper,workdir={place}/work", "world", root)
    mount("-t", "proc", "proc", f"{root}/proc")
    mount("--bind", f"{root}/proc/sys", f"{root}/proc/sys")
    mount("-o", "remount,ro,bind", f"{root}/proc/sys")
    mount("-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys")
    mount("-t", "cgroup2", "cgroup2", f"{root}/sys/fs/cgroup")
    for name in ("dev", "run", "tmp"):
        mount("-t", "tmpfs", "-o", f"mode={1777 if name == 'tmp' else 755}", name, f"{root}/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"{root}/dev/{name}")
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "devpts", f"{root}/dev/pts")
    mount("-t", "tmpfs", "-o", "mode=1777", "shm", f"{root}/dev/shm")
    os.symlink("pts/ptmx", f"{root}/dev/ptmx")
    for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{number}", f"{root}/dev/{name}")
    for name in DEVICES:
        Path(f"{root}/dev/{name}").touch()
        mount("--bind", f"/dev/{name}", f"{root}/dev/{name}")
    for source, target in plan["binds"]:
        if os.path.isdir(source):
            os.makedirs(root + target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + target), exist_ok=True)
            Path(root + target).touch()
        mount("--bind", source, root + target)
    return root


def install(root: str, python: str, repository: str) -> None:
    """Install encfs_js as pip does from a wheel: the package, systemd/ in it, and its command."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = f"{root}{PREFIX}/lib/{version}/site-packages"
    shutil.copytree(f"{repository}/encfs_js", f"{packages}/encfs_js")
    shutil.copytree(f"{repository}/systemd", f"{packages}/encfs_js/systemd")
    Path(packages, "dependencies.pth").write_text(f"{PREFIX}/dependencies\n")
    Path(f"{root}{PREFIX}/pyvenv.cfg").write_text(f"home = {python}/bin\ninclude-system-site-packages = false\n")
    os.mkdir(f"{root}{PREFIX}/bin")
    os.symlink(f"{python}/bin/{version}", f"{root}{PREFIX}/bin/python")
    command = Path(f"{root}{PREFIX}/bin/encfs-js")
    command.write_text(f"#!{PREFIX}/bin/python\nfrom encfs_js.cli import main\nmain()\n")
    command.chmod(0o755)
    link = f"{root}/usr/local/bin/encfs-js"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(f"{PREFIX}/bin/encfs-js", link)


def become_systemd(plan: dict[str, Any]) -> None:
    """As PID 1: enter the new root and let systemd have this process."""
    root = build_root(plan)
    install(root, plan["python"], plan["repository"])
    units = f"{root}/etc/systemd/system"
    shutil.rmtree(units, ignore_errors=True)
    os.makedirs(units)
    for name in MASKED:
        os.symlink("/dev/null", f"{units}/{name}")
    for path, text in plan["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        Path(root + path).write_text(text)
    os.makedirs(f"{root}/old")
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "old"], check=True)
    subprocess.run(["umount", "-l", "/old"], check=True)
    mount("--make-rshared", "/")
    environ = {"container": "test", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    os.execve(INIT, [INIT, "--unit=world.target", "--show-status=no"], environ)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if os.getpid() == 1:
        become_systemd(plan)
    take_cgroup(plan["cgroup"], plan["root"])
    os.execvp("unshare", ["unshare", "--fork", "--kill-child", *NAMESPACES, sys.executable, __file__, sys.argv[1]])


if __name__ == "__main__":
    main()
