"""A whole crisp node in one folder: five services under supervisord, with unique names.

    <root>/crisp.toml, supervisord.conf, logs/, cni/     configuration and logs
    <root>/run/, state/                                  the services' run_dir and state_dir

The node also has its own bridge and subnet, nftables table, cgroup parent and mount namespace. The
mount namespace receives mounts of the host but propagates none back, so that all mounts go away
with the last process (namespaces.py).
"""

import contextlib
import hashlib
import ipaddress
import itertools
import json
import os
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

from crisplab import clone, configuration, namespaces
from crisplab.cgroups import cgroup_folders, processes_in, remove_cgroup
from servicekit.client import PATIENCE
from servicekit.linux import mount_table, processes, trees
from servicekit.linux.processes import ProcessRef

SERVICES = {
    "image-svc": "image_svc",
    "runtime-svc": "runtime_svc",
    "net-svc": "net_svc",
    "monitor-svc": "monitor_svc",
    "cri-gateway": "cri_gateway",
}
_START_SECONDS = 60 * clone.SLOWNESS
_END_SECONDS = 60
_LEFTOVER_SECONDS = 5 * clone.SLOWNESS
_PROGRAMS = (b"conmon", b"_svc\0", b"cri_gateway\0")  # in the command lines of a node's processes


def uses_systemd() -> bool:
    """Tells whether nodes use the systemd cgroup driver."""
    return os.environ.get("CRISP_RUNTIME_CGROUP_DRIVER") == "systemd"


@dataclass(frozen=True, slots=True)
class Names:
    """A node's subnet, and the names of its bridge, nftables table and cgroups."""

    tag: str
    subnet: str

    @property
    def bridge(self) -> str:
        """The name of its bridge."""
        return f"cb{self.tag}"

    @property
    def table(self) -> str:
        """The name of its nftables table."""
        return f"crisp-{self.tag}"

    @property
    def cgroup(self) -> str:
        """The path of its cgroup parent."""
        return f"/{self.cgroup_parent.lstrip('/')}"

    @property
    def cgroup_parent(self) -> str:
        """Its cgroup parent as in the settings: a slice if CRISP_RUNTIME_CGROUP_DRIVER is systemd.

        The services read this variable as well.
        """
        return f"crisp{self.tag}.slice" if uses_systemd() else f"/crisp-{self.tag}"

    def pod_cgroup(self, pod_id: str) -> str:
        """Returns the path of a pod's cgroup."""
        name = f"crisp{self.tag}-crisp{pod_id}.slice" if uses_systemd() else f"crisp-{pod_id}"
        return f"{self.cgroup}/{name}"

    def container_cgroup(self, pod_id: str, container_id: str) -> str:
        """Returns the path of a container's cgroup."""
        name = f"crisp{self.tag}-{container_id}.scope" if uses_systemd() else container_id
        return f"{self.pod_cgroup(pod_id)}/{name}"


@dataclass(slots=True)
class Node:
    """A node in `root`. The same root means the same node, in a later process too."""

    root: Path
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    gateway_user: str = "64001:64001"
    own_network: bool = False
    """Gives it a network namespace too, for programs that would change iptables."""

    @property
    def run(self) -> Path:
        """The services' run_dir."""
        return self.root / "run"

    @property
    def socket(self) -> Path:
        """The CRI socket."""
        return self.run / "cri.sock"

    @property
    def names(self) -> Names:
        """Its names, chosen at the first start and kept in the root."""
        file = self.root / "names.json"
        if not file.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            tag = hashlib.sha256(f"{self.root}{os.getpid()}{time.time_ns()}".encode()).hexdigest()[:8]
            file.write_text(json.dumps({"tag": tag, "subnet": _free_subnet(tag)}))
        return Names(**json.loads(file.read_text()))

    # Start and stop

    def start(self) -> None:
        """Starts all five services and waits until they are ready.

        Raises RuntimeError with the end of each log if a service does not become ready.
        """
        if self.pid() is not None:
            return
        self.configure()
        self._start_supervisord()
        deadline = time.monotonic() + _START_SECONDS
        for attempt in itertools.count(1):
            if self.ready():
                return
            if time.monotonic() > deadline or (attempt % 50 == 0 and self._gave_up()):
                raise RuntimeError(f"the node in {self.root} did not start:\n{self._log_ends()}")
            time.sleep(0.02)

    def _start_supervisord(self) -> None:
        supervisord = [sys.executable, "-m", "supervisor.supervisord", "--nodaemon"]
        command = namespaces.private(
            [*supervisord, "-c", str(self.root / "supervisord.conf")], network=self.own_network
        )
        with open(self.root / "logs" / "supervisord.log", "ab") as log:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )

    def stop(self) -> None:
        """Stops the services; containers keep running."""
        pid = self.pid()
        if pid is not None:
            supervisord = ProcessRef.of(pid)
            os.kill(pid, signal.SIGTERM)
            wait_until_ended(supervisord)

    def destroy(self) -> None:
        """Stops everything and removes all that the node has made, whatever state it is in."""
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
        trees.remove_quietly(self.root)

    def leftovers(self, names: Names) -> list[str]:
        """Returns what of this node exists outside its root: nothing after `destroy`.

        `destroy` removes the root and the names in it, so get `names` before.
        """
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        while True:
            found = [f"mount {mount}" for mount in _mounts_below(self.root)] + leftovers_of(names)
            found += [f"process {pid}" for pid in _processes_of(self.root, names.cgroup)]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)  # the kernel removes interfaces a moment after their namespace

    def pid(self) -> int | None:
        """Returns the pid of supervisord; None if it does not run."""
        try:
            pid = int((self.root / "supervisord.pid").read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None
        return pid

    def ready(self) -> bool:
        """Tells whether all five services have their sockets."""
        return self.socket.exists() and all((self.run / name / "0.sock").exists() for name in SERVICES)

    # One service

    def service_pid(self, service: str) -> int:
        """Returns the pid of a service's first replica; 0 if it does not run."""
        return int(self._supervisor().getProcessInfo(f"crisp:{service}")["pid"])  # type: ignore[call-overload, index]

    def helper_pids(self) -> list[int]:
        """Returns the pids of all conmons and pause processes."""
        found: set[int] = set()
        for folder in cgroup_folders(self.names.cgroup):
            for pattern in ("*/helpers", "*/*-conmon-*.scope", "*/*-pause-*.scope"):
                for file in folder.glob(f"{pattern}/cgroup.procs"):
                    found.update(int(pid) for pid in file.read_text().split())
        return sorted(found)

    def stop_service(self, service: str) -> None:
        """Stops one service, as supervisorctl does, and waits for its end."""
        self._supervisor().stopProcess(f"crisp:{service}")

    def start_service(self, service: str) -> None:
        """Starts a stopped service, and waits until it accepts connections."""
        self._supervisor().startProcess(f"crisp:{service}")
        self.wait_for_new(service, None)

    def start_replica(self, service: str, replica: str) -> "subprocess.Popen[bytes]":
        """Starts another replica of a service, beside the supervised one; the caller ends it."""
        program = [sys.executable, "-m", SERVICES[service]]
        command = [*self.enter(), *program, "--config", str(self.root / "crisp.toml"), "--replica", replica]
        with open(self.root / "logs" / f"{service}.log", "ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.environment}
            )

    def kill(self, service: str) -> None:
        """Sends SIGKILL to a service, and waits until supervisord has started it again."""
        pid = self.service_pid(service)
        os.kill(pid, signal.SIGKILL)
        self.wait_for_new(service, pid)

    def wait_for_new(self, service: str, old_pid: int | None) -> None:
        """Waits until a service runs, with another pid than `old_pid`, and accepts connections."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, xmlrpc.client.Fault):
                if self.service_pid(service) not in (0, old_pid) and self.answers(service):
                    return
            time.sleep(0.02)
        raise RuntimeError(f"{service} did not come back:\n{self._log_ends()}")

    def answers(self, service: str, replica: str = "0") -> bool:
        """Tells whether a replica accepts connections on its socket."""
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.run / service / f"{replica}.sock"))
            return True
        return False

    def log(self, service: str) -> str:
        """Returns a service's log so far."""
        return (self.root / "logs" / f"{service}.log").read_text(errors="replace")

    def enter(self) -> list[str]:
        """Returns a command prefix that enters the node's mount and network namespaces."""
        return ["nsenter", "--mount", *(["--net"] if self.own_network else []), "--target", str(self.pid()), "--"]

    # Internals

    def _supervisor(self) -> xmlrpc.client.ServerProxy:
        transport = SupervisorTransport(None, None, f"unix://{self.root / 'supervisor.sock'}")
        return xmlrpc.client.ServerProxy("http://localhost", transport).supervisor  # type: ignore[return-value]

    def _gave_up(self) -> bool:
        """Tells whether a service refused its settings, so that supervisord does not restart it."""
        with contextlib.suppress(OSError):
            states: Any = self._supervisor().getAllProcessInfo()
            refused = ("EXITED", configuration.REFUSED)
            return any((state["statename"], state["exitstatus"]) == refused for state in states)
        return False

    def configure(self) -> None:
        """Writes the settings, for services that are started from now on."""
        for folder in ("logs", "cni", "run", "state"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "run").chmod(0o755)
        sections = self._sections()
        for section, values in self.settings.items():
            sections.setdefault(section, {}).update(values)
        (self.root / "crisp.toml").write_text(configuration.settings_file(sections))
        (self.root / "supervisord.conf").write_text(configuration.supervisord_file(self.root, SERVICES))

    def _sections(self) -> dict[str, dict[str, object]]:
        names = self.names
        return {
            "node": {
                "run_dir": str(self.run),
                "state_dir": str(self.root / "state"),
                "group": self.gateway_user.partition(":")[2] or "0",
                "log_level": "info",
                "checkpoint_dirs": ["/"],
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

    def _log_ends(self) -> str:
        files = sorted((self.root / "logs").glob("*.log"))
        return "\n".join(
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:]) for file in files
        )


def leftovers_of(names: Names) -> list[str]:
    """Returns what a node of these names has left: bridge, veths, nftables table, cgroups."""
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


def wait_until_ended(process: ProcessRef) -> None:
    """Waits until a process has ended, and reaps it if it is a child. Raises RuntimeError."""
    deadline = time.monotonic() + _END_SECONDS
    while process.alive():
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {process.pid} does not end")
        time.sleep(0.01)
    processes.reap(process.pid)


def _free_subnet(tag: str) -> str:
    """Returns a /24 out of 10.64.0.0/10 that overlaps no address and no route of this machine."""
    taken = list(_routed_networks())
    seed = int(tag, 16)
    for step in range(16384):
        subnet = ipaddress.ip_network(((10 << 24) + (64 << 16) + (((seed + step) % 16384) << 8), 24))
        if not any(subnet.overlaps(network) for network in taken):
            return str(subnet)
    raise RuntimeError("no free /24 in 10.64.0.0/10: this machine has routes for all of it")


def _routed_networks() -> Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Yields the networks of all routes, in all tables, those of local addresses included."""
    listed = subprocess.run(
        ["ip", "-o", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=False
    ).stdout
    for line in listed.splitlines():
        with contextlib.suppress(ValueError, IndexError):
            words = line.split()
            yield ipaddress.ip_network(words[1] if words[0] in ("broadcast", "local") else words[0], strict=False)


def _mounts_below(root: Path) -> list[str]:
    """Returns the mount points below a folder, the last mounted first."""
    return [mount.target for mount in mount_table.read() if mount.target.startswith(f"{root}/")][::-1]


def _processes_of(root: Path, cgroup: str) -> list[int]:
    """Returns the pids of a node's processes.

    These are the processes in its cgroups, and services, conmons and pause processes with a path
    below `root` among their arguments.
    """
    found = processes_in(cgroup)
    needle = f"{root}/".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = Path(entry.path, "cmdline").read_bytes()
                if needle in arguments and any(program in arguments for program in _PROGRAMS):
                    found.add(int(entry.name))
    return sorted(found)


def _kill_all(pids: list[int]) -> None:
    victims = [ProcessRef.of(pid) for pid in pids]
    for victim in victims:
        processes.send_signal(victim, signal.SIGKILL)
    for victim in victims:
        wait_until_ended(victim)
