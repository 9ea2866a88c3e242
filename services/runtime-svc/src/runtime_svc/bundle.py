"""A container's OCI bundle: config.json out of what kubelet asked for, what the image says, and where the pod's things are.

OCI runtime spec 1.0.2 (crun 1.8 refuses a later ociVersion). `adjust` is the one place where the finished document can still
be changed before it is written.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_proto.config import (
    ContainerConfig,
    LinuxContainerSecurityContext,
    NamespaceMode,
    ProfileType,
    SecurityProfile,
)  # fmt: skip
from crisp_proto.image import ImageConfig
from runtime_svc import capabilities, devices, mounts, resources, seccomp, seccomp_filter, users
from runtime_svc.pod_files import PodFiles
from runtime_svc.settings import RuntimeSettings
from runtime_svc.users import User
from servicekit.errors import FailedPrecondition, InvalidArgument, Unimplemented

Document = dict[str, Any]
_ORDERS = ("run.oci.", "org.systemd.property.")
_DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


@dataclass(frozen=True, slots=True)
class PodContext:
    """What a container takes over from its pod and from the other services."""

    files: PodFiles
    host_network: bool
    netns: str
    hostname: str
    privileged: bool
    cgroup: str
    cgroup_version: int
    target_pid_namespace: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The finished document and the user it names."""

    document: Document
    user: User


def build(
    container_id: str, config: ContainerConfig, image: ImageConfig, rootfs: Path, pod: PodContext, settings: RuntimeSettings
) -> Bundle:
    """config.json for a container. Raises InvalidArgument, FailedPrecondition or Unimplemented that name the field."""
    security = config.linux.security_context
    if security.privileged and not pod.privileged:
        raise InvalidArgument(
            "linux.security_context.privileged: a privileged container needs a privileged pod", field="linux.security_context.privileged"
        )
    if config.CDI_devices:
        raise Unimplemented("CDI_devices: CDI is not supported yet", field="CDI_devices")
    user = users.resolve(security, image.user, rootfs)
    host_ipc = security.namespace_options.ipc is NamespaceMode.NODE
    device_plan = devices.plan(config.devices, privileged=security.privileged)
    mount_plan = mounts.plan(
        config.mounts,
        rootfs,
        mounts.standard(privileged=security.privileged, host_ipc=host_ipc, shm=str(pod.files.shm)),
        pod.files.mounted_files(),
        readonly_rootfs=security.readonly_rootfs,
    )
    granted = capabilities.wanted(
        security.capabilities.add_capabilities, security.capabilities.drop_capabilities, privileged=security.privileged
    )
    linux: Document = {
        "cgroupsPath": f"{pod.cgroup}/{container_id}",
        "namespaces": _namespaces(security, pod),
        "resources": {
            "devices": device_plan.rules,
            **resources.to_oci(config.linux.resources, cgroup_version=pod.cgroup_version, pids_limit=settings.pids_limit),
        },
        "devices": device_plan.nodes,
        "rootfsPropagation": mount_plan.root_propagation,
    }
    annotations = {"io.kubernetes.cri.container-type": "container", **_harmless(config.annotations)}
    if not security.privileged:
        linux["maskedPaths"] = security.masked_paths or _MASKED
        linux["readonlyPaths"] = security.readonly_paths or _READONLY
        profile = _seccomp(security, granted, settings)
        if profile:
            linux["seccomp"] = profile
        if profile is seccomp.default_profile(granted) and (program := seccomp_filter.compiled_default(granted)):
            annotations[seccomp_filter.ANNOTATION] = program
    _check_lsm(security)
    document: Document = {
        "ociVersion": "1.0.2",
        "process": _process(config, image, user, security, granted, pod.hostname),
        "root": {"path": str(rootfs), "readonly": security.readonly_rootfs},
        "mounts": mount_plan.mounts,
        "linux": linux,
        "annotations": annotations,
    }
    return Bundle(adjust(document), user)


def adjust(document: Document) -> Document:
    """The finished document on its way to disk; plugins that may change it are called here."""
    return document


def write(folder: Path, bundle: Bundle) -> None:
    """Puts config.json into the bundle's folder: beside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".config.json"
    beside.write_text(json.dumps(bundle.document))
    beside.rename(folder / "config.json")


def _process(
    config: ContainerConfig, image: ImageConfig, user: User, security: LinuxContainerSecurityContext, granted: frozenset[str], hostname: str
) -> Document:
    ambient = capabilities.ambient(security.capabilities.add_ambient_capabilities)
    names = capabilities.in_order(granted | ambient)
    process: Document = {
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": arguments(config, image),
        "env": environment(config, image, user, hostname),
        "cwd": config.working_dir or image.working_dir or "/",
        "capabilities": {
            "bounding": names,
            "effective": names,
            "permitted": names,
            "inheritable": capabilities.in_order(ambient),
            "ambient": capabilities.in_order(ambient),
        },
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": resources.oom_score_adj(config.linux.resources.oom_score_adj),
    }
    if not process["cwd"].startswith("/"):
        raise InvalidArgument(f"working_dir = {process['cwd']!r}: must be an absolute path", field="working_dir")
    return process


def arguments(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """command replaces ENTRYPOINT and clears CMD; args alone replace CMD (CRI ContainerConfig). Raises InvalidArgument for none."""
    found = [*config.command, *config.args] if config.command else [*image.entrypoint, *(config.args or image.cmd)]
    if not found:
        raise InvalidArgument(
            "command and args are empty, and the image has no ENTRYPOINT and no CMD: there is nothing to run", field="command"
        )
    return found


def environment(config: ContainerConfig, image: ImageConfig, user: User, hostname: str) -> list[str]:
    """The image's variables, then the request's, later ones winning; PATH, HOSTNAME, TERM and HOME where nobody set them."""
    values: dict[str, str] = {}
    for entry in [_DEFAULT_PATH, f"HOSTNAME={hostname}", *(["TERM=xterm"] if config.tty else []), *image.env]:
        name, _, value = entry.partition("=")
        values[name] = value
    for variable in config.envs:
        if not variable.key or "=" in variable.key:
            raise InvalidArgument(f"envs: {variable.key!r} is no name for a variable", field="envs")
        values[variable.key] = variable.value.decode("utf-8", "surrogateescape")
    values.setdefault("HOME", user.home or "/")
    return [f"{name}={value}" for name, value in values.items()]


def _namespaces(security: LinuxContainerSecurityContext, pod: PodContext) -> list[Document]:
    options = security.namespace_options
    if options.userns_options is not None and options.userns_options.mode is not NamespaceMode.NODE:
        raise Unimplemented(
            "namespace_options.userns_options: the runtime handler does not offer user namespaces (Status.runtime_handlers)",
            field="linux.security_context.namespace_options.userns_options",
        )
    namespaces: list[Document] = [{"type": "mount"}]
    if not pod.host_network:
        if not pod.netns:
            raise FailedPrecondition("the pod has no network namespace; was it stopped?")
        namespaces.append({"type": "network", "path": pod.netns})
        namespaces.append({"type": "uts", "path": str(pod.files.namespace("uts"))})
    if options.ipc is not NamespaceMode.NODE:
        namespaces.append({"type": "ipc", "path": str(pod.files.namespace("ipc"))} if options.ipc is NamespaceMode.POD else {"type": "ipc"})
    if options.pid is NamespaceMode.POD:
        path = pod.files.namespace("pid")
        if not path.exists():
            raise InvalidArgument(
                "namespace_options.pid is POD, but the pod was made without a shared PID namespace",
                field="linux.security_context.namespace_options.pid",
            )
        namespaces.append({"type": "pid", "path": str(path)})
    elif options.pid is NamespaceMode.TARGET:
        namespaces.append({"type": "pid", "path": pod.target_pid_namespace})
    elif options.pid is NamespaceMode.CONTAINER:
        namespaces.append({"type": "pid"})
    if pod.cgroup_version == 2 and not security.privileged:
        namespaces.append({"type": "cgroup"})
    return namespaces


def _harmless(annotations: dict[str, str]) -> dict[str, str]:
    """Without those that an OCI runtime takes as orders (crun: run.oci.*; systemd units: org.systemd.property.*)."""
    return {name: value for name, value in annotations.items() if not name.startswith(_ORDERS)}


def _seccomp(security: LinuxContainerSecurityContext, granted: frozenset[str], settings: RuntimeSettings) -> Document | None:
    """The profile of a container. One that names none is unconfined, as with CRI's other runtimes, unless the settings say otherwise."""
    profile = security.seccomp
    if profile is None:
        old = security.seccomp_profile_path or settings.unset_seccomp  # the path is deprecated in CRI, and still sent by old clients
        kinds = {
            "unconfined": ProfileType.UNCONFINED,
            "runtime/default": ProfileType.RUNTIME_DEFAULT,
            "docker/default": ProfileType.RUNTIME_DEFAULT,
        }
        profile = SecurityProfile(profile_type=kinds.get(old, ProfileType.LOCALHOST), localhost_ref=old)
    if profile.profile_type is ProfileType.UNCONFINED:
        return None
    if profile.profile_type is ProfileType.LOCALHOST:
        return seccomp.localhost_profile(profile.localhost_ref, settings.seccomp_profiles)
    return seccomp.default_profile(granted)


def _check_lsm(security: LinuxContainerSecurityContext) -> None:
    """AppArmor and SELinux profiles that are named must be applied, and this version applies none."""
    named = security.apparmor is not None and security.apparmor.profile_type is ProfileType.LOCALHOST
    if named or security.apparmor_profile.startswith("localhost/"):
        here = "" if os.path.isdir("/sys/kernel/security/apparmor") else " and this kernel has no AppArmor"
        raise Unimplemented(
            f"linux.security_context.apparmor: named profiles are not supported yet{here}", field="linux.security_context.apparmor"
        )
    labels = security.selinux_options
    if labels is not None and (labels.type or labels.level or labels.role or labels.user) and os.path.isdir("/sys/fs/selinux/booleans"):
        raise Unimplemented(
            "linux.security_context.selinux_options: SELinux labels are not supported yet", field="linux.security_context.selinux_options"
        )
