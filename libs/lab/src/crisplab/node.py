"""A whole crisp node of its own: five services under supervisord, in a folder, with names that meet nobody else's.

    <root>/crisp.toml, supervisord.conf, logs/, cni/     configuration and logs
    <root>/run/, state/                                  the services' own

Own are also: the bridge and its subnet, the nftables table, the cgroup parent, and a mount namespace. That one takes over what
the host mounts later but gives nothing back, so all mounts go with the last process (namespaces.py).
"""

import contextlib
import hashlib
import ipaddress
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from crisplab import clone, namespaces
from servicekit.client import PATIENCE

SERVICES = {
    "image-svc": "image_svc",
    "runtime-svc": "runtime_svc",
    "net-svc": "net_svc",
    "monitor-svc": "monitor_svc",
    "cri-gateway": "cri_gateway",
}
_START_SECONDS = 60 * clone.SLOWNESS
_REFUSED = 2  # the exit code of a service that refuses its settings, and would do so again
_LEFTOVER_SECONDS = 5 * clone.SLOWNESS


def uses_systemd() -> bool:
    """Whether nodes are to use the systemd cgroup driver."""
    return os.environ.get("CRISP_RUNTIME_CGROUP_DRIVER") == "systemd"


@dataclass(frozen=True, slots=True)
class Names:
    """What this node is called wherever the machine has one name space for all."""

    tag: str
    subnet: str

    @property
    def bridge(self) -> str:
        """Its bridge."""
        return f"cb{self.tag}"

    @property
    def table(self) -> str:
        """Its nftables table."""
        return f"crisp-{self.tag}"

    @property
    def cgroup(self) -> str:
        """The path of its cgroup parent."""
        return f"/{self.cgroup_parent.lstrip('/')}"

    @property
    def cgroup_parent(self) -> str:
        """Its cgroup parent as the settings have it; with CRISP_RUNTIME_CGROUP_DRIVER=systemd, which the services read too, a slice."""
        return f"crisp{self.tag}.slice" if uses_systemd() else f"/crisp-{self.tag}"

    def pod_cgroup(self, pod_id: str) -> str:
        """The path of a pod's cgroup."""
        return f"{self.cgroup}/{f'crisp{self.tag}-crisp{pod_id}.slice' if uses_systemd() else f'crisp-{pod_id}'}"

    def container_cgroup(self, pod_id: str, container_id: str) -> str:
        """The path of a container's cgroup."""
        return (
            f"{self.pod_cgroup(pod_id)}/{f'crisp{self.tag}-{container_id}.scope' if uses_systemd() else container_id}"
        )


@dataclass(slots=True)
class Node:
    """A node in `root`; the same root names the same node, also for a later process."""

    root: Path
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    gateway_user: str = "64001:64001"
    own_network: bool = False
    """Whether it has a network namespace of its own too: for what would change the machine's iptables."""

    @property
    def run(self) -> Path:
        """The services' run_dir."""
        return self.root / "run"

    @property
    def socket(self) -> Path:
        """CRI's socket."""
        return self.run / "cri.sock"

    @property
    def names(self) -> Names:
        """Chosen at the first start, then kept in the root."""
        file = self.root / "names.json"
        if not file.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            tag = hashlib.sha256(f"{self.root}{os.getpid()}{time.time_ns()}".encode()).hexdigest()[:8]
            file.write_text(json.dumps({"tag": tag, "subnet": _free_subnet(tag)}))
        return Names(**json.loads(file.read_text()))

    # Start and stop

    def start(self) -> None:
        """Starts all five services and waits until they are ready. Raises RuntimeError with the end of the log of one that isn't."""
        if self.pid() is not None:
            return
        self.configure()
        supervisord = [
            sys.executable,
            "-m",
            "supervisor.supervisord",
            "--nodaemon",
            "-c",
            str(self.root / "supervisord.conf"),
        ]
        command = namespaces.private(supervisord, network=self.own_network)
        with open(self.root / "logs" / "supervisord.log", "ab") as log:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        deadline = time.monotonic() + _START_SECONDS
        for look in itertools.count(1):
            if self.ready():
                return
            if time.monotonic() > deadline or (look % 50 == 0 and self._gave_up()):
                raise RuntimeError(f"the node in {self.root} did not start:\n{self._log_ends()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stops the services; containers keep running."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            _wait_gone(pid)

    def destroy(self) -> None:
        """Stops everything and takes away all that the node has made, whatever state it is in."""
        self.stop()
        names = self.names
        _kill_all(_processes_of(self.root, names.cgroup))
        subprocess.run(["nft", "delete", "table", "inet", names.table], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", names.bridge], capture_output=True, check=False)
        if uses_systemd():
            subprocess.run(["systemctl", "stop", names.cgroup_parent], capture_output=True, check=False)
        for folder in cgroup_folders(names.cgroup):
            remove_cgroup(folder)
        for mount in _mounts_below(self.root):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def leftovers(self, names: Names) -> list[str]:
        """What of this node exists outside of its root; empty after `destroy` (which takes the root, so its names are asked for before)."""
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        while True:
            found = [f"mount {mount}" for mount in _mounts_below(self.root)] + leftovers_of(names)
            found += [f"process {pid}" for pid in _processes_of(self.root, names.cgroup)]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)  # the kernel takes interfaces down a moment after their namespace

    def pid(self) -> int | None:
        """supervisord's pid, if it runs."""
        try:
            pid = int((self.root / "supervisord.pid").read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        return pid

    def ready(self) -> bool:
        """Whether all five answer."""
        return self.socket.exists() and all((self.run / name / "0.sock").exists() for name in SERVICES)

    # One service

    def service_pid(self, service: str) -> int:
        """The pid of a service's first replica."""
        return int(self._supervisor().getProcessInfo(f"crisp:{service}")["pid"])  # type: ignore[call-overload, index]

    def helper_pids(self) -> list[int]:
        """The pids of all conmons and pause processes: what runs beside the containers' own programs."""
        found: set[int] = set()
        for folder in cgroup_folders(self.names.cgroup):
            for pattern in ("*/helpers", "*/*-conmon-*.scope", "*/*-pause-*.scope"):
                for file in folder.glob(f"{pattern}/cgroup.procs"):
                    found.update(int(pid) for pid in file.read_text().split())
        return sorted(found)

    def stop_service(self, service: str) -> None:
        """Stops one service, as supervisorctl does it; returns when it has ended."""
        self._supervisor().stopProcess(f"crisp:{service}")

    def start_service(self, service: str) -> None:
        """Starts one that was stopped; returns when it answers."""
        self._supervisor().startProcess(f"crisp:{service}")
        self.wait_for_new(service, 0)

    def start_replica(self, service: str, replica: str) -> "subprocess.Popen[bytes]":
        """Another process of a service, beside the supervised one; the caller ends it."""
        command = [
            *self.enter(),
            sys.executable,
            "-m",
            SERVICES[service],
            "--config",
            str(self.root / "crisp.toml"),
            "--replica",
            replica,
        ]
        with open(self.root / "logs" / f"{service}.log", "ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.environment}
            )

    def kill(self, service: str) -> None:
        """SIGKILL to a service; supervisord starts it again. Returns when it answers again."""
        pid = self.service_pid(service)
        os.kill(pid, signal.SIGKILL)
        self.wait_for_new(service, pid)

    def wait_for_new(self, service: str, old_pid: int) -> None:
        """Waits until a service has another pid than `old_pid` and accepts connections."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, xmlrpc.client.Fault):
                if self.service_pid(service) not in (0, old_pid) and self.answers(service):
                    return
            time.sleep(0.02)
        raise RuntimeError(f"{service} did not come back:\n{self._log_ends()}")

    def answers(self, service: str, replica: str = "0") -> bool:
        """Whether somebody accepts connections on the replica's socket."""
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.run / service / f"{replica}.sock"))
            return True
        return False

    def log(self, service: str) -> str:
        """A service's log so far."""
        return (self.root / "logs" / f"{service}.log").read_text(errors="replace")

    def enter(self) -> list[str]:
        """Put before a command, it runs in the node's mount namespace, and in its network namespace if it has one."""
        return ["nsenter", "--mount", *(["--net"] if self.own_network else []), "--target", str(self.pid()), "--"]

    # Inside

    def _supervisor(self) -> xmlrpc.client.ServerProxy:
        transport = SupervisorTransport(None, None, f"unix://{self.root / 'supervisor.sock'}")
        return xmlrpc.client.ServerProxy("http://localhost", transport).supervisor  # type: ignore[return-value]

    def _gave_up(self) -> bool:
        """Whether a service refuses its settings, and so is not started again."""
        with contextlib.suppress(OSError):
            processes: Any = self._supervisor().getAllProcessInfo()
            return any((process["statename"], process["exitstatus"]) == ("EXITED", _REFUSED) for process in processes)
        return False

    def configure(self) -> None:
        """Writes its settings; what is started from now on has them."""
        names = self.names
        for folder in ("logs", "cni", "run", "state"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "run").chmod(0o755)
        group = self.gateway_user.partition(":")[2] or "0"
        tables: dict[str, dict[str, object]] = {
            "node": {
                "run_dir": str(self.run),
                "state_dir": str(self.root / "state"),
                "group": group,
                "log_level": "info",
            },
            "image": {"registries_conf": str(self.root / "registries.conf"), "auth_file": str(self.root / "auth.json")},
            "runtime": {"cgroup_parent": names.cgroup_parent},
            "net": {
                "cni_conf_dir": str(self.root / "cni"),
                "builtin_bridge": names.bridge,
                "builtin_subnets": [names.subnet],
                "nft_table": names.table,
            },
            "gateway": {"user": self.gateway_user, "patience": PATIENCE * clone.SLOWNESS},
        }
        for section, values in self.settings.items():
            tables.setdefault(section, {}).update(values)
        lines = []
        for section, values in tables.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
        (self.root / "crisp.toml").write_text("\n".join(lines))
        (self.root / "supervisord.conf").write_text(self._supervisord_conf())

    def _supervisord_conf(self) -> str:
        programs = [
            f"""[program:{name}]
command={sys.executable} -m {module} --config {self.root}/crisp.toml
autorestart=unexpected
exitcodes={_REFUSED}
startsecs=0
startretries=1000
stopwaitsecs=30
redirect_stderr=true
stdout_logfile={self.root}/logs/{name}.log
stdout_logfile_maxbytes=50MB
"""
            for name, module in SERVICES.items()
        ]
        # One group: supervisord stops groups one after another, and looks once a second whether one has ended.
        group = f"[group:crisp]\nprograms={','.join(SERVICES)}\n"
        return f"""[supervisord]
pidfile={self.root}/supervisord.pid
logfile={self.root}/logs/supervisord.log
minfds=16384
[unix_http_server]
file={self.root}/supervisor.sock
chmod=0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{self.root}/supervisor.sock
""" + "".join([*programs, group])

    def _log_ends(self) -> str:
        files = sorted((self.root / "logs").glob("*.log"))
        return "\n".join(
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:]) for file in files
        )


def leftovers_of(names: Names) -> list[str]:
    """What a node of these names has left in the kernel: bridge, veths, nftables table, cgroups."""
    found = []
    links = subprocess.run(
        ["ip", "-o", "link", "show", "master", names.bridge], capture_output=True, text=True, check=False
    ).stdout
    found += [f"interface {line.split(':')[1].strip()}" for line in links.splitlines()]
    if Path(f"/sys/class/net/{names.bridge}").exists():
        found.append(f"bridge {names.bridge}")
    if subprocess.run(["nft", "list", "table", "inet", names.table], capture_output=True, check=False).returncode == 0:
        found.append(f"nftables table inet {names.table}")
    return found + [f"cgroup {folder}" for folder in cgroup_folders(names.cgroup)]


def _free_subnet(tag: str) -> str:
    """A /24 out of 10.64.0.0/10 that no address or route of this machine touches."""
    listed = subprocess.run(
        ["ip", "-o", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=False
    ).stdout
    taken = []
    for line in listed.splitlines():
        with contextlib.suppress(ValueError, IndexError):
            words = line.split()
            taken.append(
                ipaddress.ip_network(words[1] if words[0] in ("broadcast", "local") else words[0], strict=False)
            )
    seed = int(tag, 16)
    for step in range(16384):
        subnet = ipaddress.ip_network(((10 << 24) + (64 << 16) + (((seed + step) % 16384) << 8), 24))
        if not any(subnet.overlaps(network) for network in taken):
            return str(subnet)
    raise RuntimeError("no free /24 in 10.64.0.0/10: this machine has routes for all of it")


def _mounts_below(root: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [target for line in lines if (target := line.split()[1]).startswith(f"{root}/")][::-1]


def cgroup_folders(path: str) -> Iterator[Path]:
    """The folders that a cgroup has: one for each hierarchy."""
    base = Path("/sys/fs/cgroup")
    for folder in (base, *base.iterdir()):
        if (here := folder / path.lstrip("/")).is_dir():
            yield here


def remove_cgroup(folder: Path) -> None:
    """Removes a cgroup that has no processes any more, with all below it."""
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        for here, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(here)
        time.sleep(0.01)


def _processes_of(root: Path, cgroup: str) -> list[int]:
    """Processes that were started with a path below root (services, conmons, pauses) or live in the node's cgroups."""
    found: set[int] = set()
    for folder in cgroup_folders(cgroup):
        for here, _, _ in os.walk(folder):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in Path(here, "cgroup.procs").read_text().split())
    needle = f"{root}/".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = Path(entry.path, "cmdline").read_bytes()
                if needle in arguments and (
                    b"conmon" in arguments or b"_svc\0" in arguments or b"cri_gateway\0" in arguments
                ):
                    found.add(int(entry.name))
    return sorted(found)


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        _wait_gone(pid)


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            return
        time.sleep(0.01)
    raise RuntimeError(f"process {pid} does not end")
