"""A pod on disk and in the kernel while the machine is up, apart from its cgroup and network.

<run>/pods/<id>/ns/user, ipc, uts, pid         namespaces, pinned (namespaces(7))
<run>/pods/<id>/shm                            tmpfs that is /dev/shm of its containers
<run>/pods/<id>/etc/resolv.conf, hostname …    tmpfs with files of its containers (etc_files.py)
<run>/pods/<id>/pause.pid                      pid and start time of the pause process
<run>/pods/<id>/pod.json                       the pod as JSON, which other services read
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp_proto.config import NamespaceMode, PodSandboxConfig
from runtime_svc.sandbox import id_mappings, sysctls
from runtime_svc.sandbox.etc_files import EtcFiles, hostname_of
from runtime_svc.sandbox.pause import Pause
from servicekit.crashpoints import crashpoint
from servicekit.linux import namespaces, selinux, syscalls, trees

_FLAGS = {"uts": syscalls.CLONE_NEWUTS, "ipc": syscalls.CLONE_NEWIPC}
_MAX_HOSTNAME = 64  # the kernel's limit


@dataclass(frozen=True, slots=True)
class NodeDefaults:
    """What each pod of the node gets.

    The executable of its pause process, the size of its /dev/shm, the time zone of its containers
    ("" for the image's), and values of sysctls that the pod does not set.
    """

    pause: Path
    shm_bytes: int
    timezone: str
    sysctls: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The folder of a pod."""

    folder: Path

    def namespace(self, kind: str) -> Path:
        """Returns the path that a namespace (user, ipc, uts, pid) is pinned at."""
        return self.folder / "ns" / kind

    @property
    def pause(self) -> Pause:
        """The pause process, whether the pod has one or not."""
        return Pause(self.folder / "pause.pid", self.namespace("pid"))

    @property
    def shm(self) -> Path:
        """The pod's /dev/shm."""
        return self.folder / "shm"

    @property
    def etc(self) -> EtcFiles:
        """The files that containers see in /etc."""
        return EtcFiles(self.folder)

    async def create(self, config: PodSandboxConfig, cgroups: list[str], given: NodeDefaults) -> None:
        """Makes files, namespaces, shm and the pause process; can be repeated after a crash.

        `cgroups` are the folders that the pause process is started in. Raises OSError, Internal,
        FailedPrecondition for the time zone, or InvalidArgument that names a sysctl or dns_config.
        """
        self.remove()
        (self.folder / "ns").mkdir(parents=True)

        def in_new_namespaces() -> None:
            self.etc.create(config, given.timezone)
            crashpoint("pod-etc-mounted")
            self._make_namespaces(config, hostname_of(config), given.shm_bytes)
            user_namespace = self.namespace("user") if config.own_user_namespace else None
            sysctls.write(config, given.sysctls, user_namespace, self.namespace("ipc"))
            if config.linux.security_context.namespace_options.pid is not NamespaceMode.POD:
                return
            if user_namespace is not None:
                self.pause.start_in_user_namespace(user_namespace, given.pause, cgroups)
            else:
                self.pause.start(given.pause, cgroups)

        await namespaces.in_own_thread(in_new_namespaces)

    def _make_namespaces(self, config: PodSandboxConfig, hostname: str, shm_bytes: int) -> None:
        """Makes and pins the pod's own UTS and IPC namespaces, and sets them up.

        Moves the calling thread into them.
        """
        kinds = [] if config.on_node_network else ["uts"]
        if config.linux.security_context.namespace_options.ipc is not NamespaceMode.NODE:
            kinds.append("ipc")
        if config.own_user_namespace:
            self._make_user_namespace(config, kinds)
        elif kinds:
            syscalls.unshare(sum(_FLAGS[kind] for kind in kinds))
            for kind in kinds:
                namespaces.pin(kind, self.namespace(kind))
        if "uts" in kinds:
            syscalls.sethostname(hostname[:_MAX_HOSTNAME])
        if "ipc" in kinds:
            self.shm.mkdir()
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            syscalls.mount("shm", self.shm, "tmpfs", flags, f"mode=1777,size={shm_bytes}")

    def _make_user_namespace(self, config: PodSandboxConfig, kinds: Sequence[str]) -> None:
        """Pins a user namespace with the pod's mappings and the namespaces that it owns.

        Moves the calling thread into the latter.
        """
        with namespaces.new(["user"]) as pid:
            namespaces.write_mappings(pid, *id_mappings.of(config))
            namespaces.pin("user", self.namespace("user"), pid)
        if kinds:
            with namespaces.new(kinds, self.namespace("user")) as pid:
                for kind in kinds:
                    namespaces.pin(kind, self.namespace(kind), pid)
        for kind in kinds:
            namespaces.enter(self.namespace(kind), _FLAGS[kind])

    def relabel(self, label: str) -> None:
        """Gives an SELinux label to everything that containers see."""
        for path in (self.shm, *self.etc.by_container_path().values()):
            if path.exists():
                selinux.relabel(path, label)

    def release(self) -> None:
        """Stops the pause process, and releases the namespaces and the mounts."""
        self.pause.stop()
        if (self.folder / "ns").exists():
            for pin in (self.folder / "ns").iterdir():
                namespaces.unpin(pin)
        while syscalls.unmount(self.shm):
            pass
        self.etc.unmount()

    def remove(self) -> None:
        """Removes everything; fine if there is nothing."""
        self.release()
        trees.remove_quietly(self.folder)
