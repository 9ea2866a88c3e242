"""The mounts that every container gets: /proc, /dev, /sys and what is in them.

Source: OCI runtime spec, config.md, mounts, and config-linux.md, default filesystems.
"""

from runtime_svc.spec import oci

_RESTRICTED = ["nosuid", "noexec", "nodev"]


def plan(*, privileged: bool, host_ipc: bool, shm: str, node_sysfs: bool, node_mqueue: bool) -> list[oci.Mount]:
    """Returns the mounts in the order in which they are made; `shm` is the pod's /dev/shm.

    A user namespace can mount sysfs and mqueue only if it owns the network and the IPC namespace.
    If those are the node's (`node_sysfs`, `node_mqueue`), the node's own mounts are bound instead.
    """
    read = "rw" if privileged else "ro"
    return [
        _mount("/proc", "proc", *_RESTRICTED),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        # In the node's IPC namespace this shows the node's queues, even if the node has not mounted
        # them itself.
        _bind("/dev/mqueue", "/dev/mqueue") if node_mqueue else _mount("/dev/mqueue", "mqueue", *_RESTRICTED),
        _bind("/sys", "/sys", "rslave", "ro") if node_sysfs else _mount("/sys", "sysfs", *_RESTRICTED, read),
        _mount("/sys/fs/cgroup", "cgroup", *_RESTRICTED, "relatime", read),
        _bind("/dev/shm", "/dev/shm" if host_ipc else shm, "rw"),
    ]


def _mount(destination: str, kind: str, *options: str) -> oci.Mount:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _bind(destination: str, source: str, *options: str) -> oci.Mount:
    return {
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["rbind", *_RESTRICTED, *options],
    }
