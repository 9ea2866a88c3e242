"""`make test-vm`: runs tests in a Debian 12 machine with systemd and cgroup version 2.

The machine is made here, and crisp is installed in it as docs/install.md says. It has no network:
packages and wheels are put on its disk. It boots under QEMU without KVM, so it is 5 to 15 times
slower than this machine. It runs tests/vm/inside, reports the exit code on its serial line, and
powers off.

python tests/vm/vm.py [--drivers systemd,cgroupfs] [--selinux] [--minutes N] [-- PYTEST ARGUMENTS]

The pytest arguments are words without spaces, such as `-m vm tests/e2e`.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crisplab import base_image, clone, golang

HERE = Path(__file__).parent
CACHE = clone.ROOT / ".cache/vm"
# Beyond the packages of a node: those of a machine, those that crisp uses where they are installed,
# and those that tests/e2e and critest (sudo) need.
_PACKAGES = "systemd-sysv dbus udev linux-image-cloud-amd64 kmod e2fsprogs apparmor criu busybox curl iptables procps sudo".split()
_SELINUX = ["selinux-policy-default", "selinux-utils", "policycoreutils"]
# For an emulated processor: code at the same address is translated once and not at each exec (7 ms
# instead of 30 for /bin/true), the time is read without a device, page tables have four levels
# (-la57), and there are no mitigations for faults of real processors.
_FASTER = "norandmaps tsc=reliable clocksource=tsc mitigations=off"
_CPUS = min(max(os.cpu_count() or 1, 2), 8)
_DONE = re.compile(r"^crisp-vm: exit (\d+)", re.M)
_POWER_CUT = re.compile(r"^crisp-vm: a power cut", re.M)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--drivers", default="systemd,cgroupfs", help="cgroup drivers with which the tests run, one after the other"
    )
    parser.add_argument(
        "--selinux",
        action="store_true",
        help="use SELinux with Debian's policy, at first permissive, instead of AppArmor",
    )
    parser.add_argument("--minutes", type=float, default=240, help="time after which the machine is switched off")
    parser.add_argument("--keep", action="store_true", help="keep the machine's tree and disk in .cache/vm/kept")
    parser.add_argument("arguments", nargs="*", help="arguments of pytest in place of tests/e2e")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    with _workplace(options.keep) as folder:
        tree = folder / "tree"
        tree.mkdir()
        started = time.monotonic()
        _say("unpacking Debian")
        subprocess.run(["tar", "-C", str(tree), "-xf", str(_base(_SELINUX if options.selinux else []))], check=True)
        _say("installing crisp as docs/install.md says")
        _install(tree)
        if options.selinux:
            _say("labelling its files")
            _label(tree)
        (tree / "root/vm.env").write_text(
            f'DRIVERS="{options.drivers.replace(",", " ")}"\nARGUMENTS="{" ".join(options.arguments)}"\n'
        )
        kernel, initrd = sorted((tree / "boot").glob("vmlinuz-*"))[-1], sorted((tree / "boot").glob("initrd.img-*"))[-1]
        for file in (kernel, initrd):
            shutil.copy(file, folder / file.name)
        disk = folder / "disk.img"
        with open(disk, "wb") as image:
            image.truncate(8 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(tree), str(disk)], check=True)
        if not options.keep:
            shutil.rmtree(tree)
        _say(f"booting it ({time.monotonic() - started:.0f} s so far)")
        code = _boot(
            folder / kernel.name,
            folder / initrd.name,
            disk,
            options.minutes * 60,
            "selinux" if options.selinux else "apparmor",
        )
        _say(f"the machine is off after {time.monotonic() - started:.0f} s; its tests ended with {code}")
        return code


@contextlib.contextmanager
def _workplace(keep: bool) -> Iterator[Path]:
    if keep:
        kept = CACHE / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        yield kept
        return
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as folder:
        yield Path(folder)


def _base(more: list[str]) -> Path:
    """Returns a tar of Debian with these packages, made once for each list of packages."""
    packages = [*_PACKAGES, *more, *base_image.runtime_packages()]
    path = CACHE / f"base-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}.tar"
    if not path.exists():
        _say("making a Debian 12 with systemd, once; this takes a minute or two")
        beside = path.with_name(f"{path.stem}-{os.getpid()}.part.tar")
        base_image.debian(beside, packages, "--dpkgopt=path-exclude=/usr/share/locale/*")
        beside.rename(path)
    return path


def _wheels() -> Path:
    """Returns a folder with the packages of requirements.lock, fetched once per version of it."""
    lock = clone.ROOT / "requirements.lock"
    folder = CACHE / f"wheels-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        _say("fetching the locked Python packages")
        beside = folder.with_name(f"{folder.name}-{os.getpid()}.part")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*download, "--require-hashes", "-r", str(lock), "-d", str(beside)], check=True)
        beside.rename(folder)
    return folder


def _install(tree: Path) -> None:
    """Runs the steps of docs/install.md in the machine's tree, and adds what its tests need."""
    source = tree / "root/crisp"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=clone.ROOT,
        capture_output=True,
        check=True,
    )
    files = [name for name in listed.stdout.split(b"\0") if name and (clone.ROOT / os.fsdecode(name)).exists()]
    packed = subprocess.run(
        ["tar", "-C", str(clone.ROOT), "--null", "-T", "-", "-c"],
        input=b"\0".join(files),
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-C", str(source), "-x"], input=packed.stdout, check=True)
    shutil.copytree(_wheels(), tree / "wheels")
    registry = source / ".cache/debian"
    for entry in ("usr/bin/docker-registry", "etc/docker"):
        origin = clone.ROOT / ".cache/debian" / entry
        if origin.is_dir():
            shutil.copytree(origin, registry / entry)
        elif origin.exists():
            (registry / entry).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, registry / entry)
    shutil.copytree(
        clone.ROOT / ".cache/debian/usr/share/gocode", registry / "usr/share/gocode", symlinks=True
    )  # OCI's schemas
    built = clone.ROOT / ".cache/conformance"  # the machine has no Go
    for program in ("webserver", "whoami", "ginkgo", "critest.test"):
        if (built / program).exists():
            (source / ".cache/conformance").mkdir(exist_ok=True)
            shutil.copy(built / program, source / ".cache/conformance" / program)
    programs = source / ".cache/go"
    programs.mkdir()
    with contextlib.suppress(golang.NoGo):  # the machine's tests then report it
        for name in golang.PROGRAMS:
            golang.program(name)
            for file in (name, f"{name}.of"):
                shutil.copy(golang.BUILT / file, programs / file)
    (tree / "etc/hostname").write_text("crisp-vm\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost crisp-vm\n::1 localhost\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 noatime 0 1\n")
    shutil.copy(HERE / "crisp-vm.service", tree / "etc/systemd/system/crisp-vm.service")
    environment = {
        "HOME": "/root",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SYSTEMD_OFFLINE": "1",
    }
    _in_tree(tree, "crisp could not be installed", "/bin/bash", "/root/crisp/tests/vm/install", environment=environment)
    shutil.rmtree(tree / "wheels")


def _label(tree: Path) -> None:
    """Adds the containers' rules to the policy and labels each file (setfiles(8)).

    mkfs keeps the labels.
    """
    (tree / "etc/selinux/config").write_text("SELINUX=permissive\nSELINUXTYPE=default\n")
    label = "mount -t proc proc /proc && semodule -n -i /root/crisp/tests/vm/containers.cil && setfiles -q -e /proc /etc/selinux/default/contexts/files/file_contexts /"
    _in_tree(tree, "the tree could not be labelled", "/bin/sh", "-c", label)


def _in_tree(tree: Path, fault: str, *command: str, environment: dict[str, str] | None = None) -> None:
    """Runs a command in a mount namespace with the tree as its root; exits if it fails."""
    entered = ["unshare", "--mount", "chroot", str(tree), *command]
    finished = subprocess.run(entered, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"vm: {fault}:\n{finished.stdout[-1500:]}{finished.stderr[-2500:]}")


def _boot(kernel: Path, initrd: Path, disk: Path, seconds: float, security: str) -> int:
    """Runs the machine until it is off for good, and returns the exit code that it reported."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise SystemExit("vm: there is no qemu-system-x86_64; install the package qemu-system-x86")
    console = disk.with_name("console.log")
    command = [
        program, "-accel", "tcg,thread=multi", "-smp", str(_CPUS), "-m", str(3072 + 512 * _CPUS), "-cpu", "max,-la57", "-display", "none", "-monitor", "none", "-nic", "none",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"root=/dev/vda rw console=ttyS0 quiet panic=-1 {security}=1 security={security} {_FASTER}",
        "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe", "-serial", f"file:{console}", "-serial", "stdio",
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    said = _powered(command, deadline)
    if _POWER_CUT.search(said):
        said = _powered(command, deadline)
    found = _DONE.search(said)
    if found is None:
        how = (
            f"was switched off after {seconds / 60:g} minutes (--minutes)"
            if time.monotonic() >= deadline
            else "ended without a word"
        )
        _say(f"the machine {how}; its console:\n{console.read_text(errors='replace')[-3000:]}")
        return 1
    return int(found[1])


def _powered(command: list[str], deadline: float) -> str:
    """Runs a machine until it is off or asks for its power to be cut.

    It is ended and started again instead of reset, because a reset of several emulated processors
    may hang. Shows and returns the output of its second serial line.
    """
    said = ""
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert machine.stdout is not None
    off = threading.Timer(deadline - time.monotonic(), machine.kill)
    off.start()
    try:
        while piece := os.read(machine.stdout.fileno(), 65536).decode(errors="replace"):
            said += piece
            print(piece, end="", flush=True)
            if _POWER_CUT.search(said[-1000:]):
                machine.kill()
            if _DONE.search(said[-1000:]):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    machine.wait(60)
                break
    finally:
        machine.kill()
        machine.wait()
        off.cancel()
    return said


def _say(text: str) -> None:
    print(f"vm: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
