"""A container's OCI bundle: config.json out of what kubelet asked for, what the image says, and where the pod's things are.

OCI runtime spec 1.0.2 (crun 1.8 refuses a later ociVersion). `adjust` is the one place where the finished document can still
be changed before it is written.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crisp_proto.config import ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, PodSandboxConfig
from crisp_proto.image import ImageConfig
from runtime_svc import (
    capabilities,
    cdi,
    devices,
    hooks,
    id_mappings,
    lsm,
    mounts,
    namespaces,
    resources,
    seccomp,
    seccomp_filter,
    users,
)
from runtime_svc.features import Features
from runtime_svc.mounts import MountContext
from runtime_svc.pod_files import Sandbox
from runtime_svc.settings import HandlerSettings, RuntimeSettings
from runtime_svc.users import User
from servicekit.errors import InvalidArgument

Document = dict[str, Any]
_ORDERS = ("run.oci.", "org.systemd.property.")
_DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What kubelet's own list (it comes with every request but procMount: Unmasked) does not have yet.
_MASKED = [
    "/proc/interrupts",
    "/sys/devices/virtual/powercap",
    *(f"/sys/devices/system/cpu/cpu{n}/thermal_throttle" for n in range(os.cpu_count() or 1)),
]


@dataclass(frozen=True, slots=True)
class PodContext:
    """What a container takes over from its pod, its handler and the other services."""

    config: PodSandboxConfig
    files: Sandbox
    hostname: str
    cgroups_path: str
    cgroup_version: int
    handler: HandlerSettings
    features: Features
    netns: str = ""
    target_pid: int = 0
    volumes: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The finished document and the user it names."""

    document: Document
    user: User


def build(
    pod_id: str,
    config: ContainerConfig,
    image: ImageConfig,
    rootfs: Path,
    pod: PodContext,
    settings: RuntimeSettings,
    devices_by_name: cdi.Registry,
) -> Bundle:
    """config.json for a container. Raises InvalidArgument, FailedPrecondition or Unimplemented that name the field."""
    security = config.linux.security_context
    pod_security = pod.config.linux.security_context
    if security.privileged and not pod_security.privileged:
        raise InvalidArgument(
            "linux.security_context.privileged: a privileged container needs a privileged pod",
            field="linux.security_context.privileged",
        )
    id_mappings.check_container(security.namespace_options, pod.config)
    edits = devices_by_name.edits(cdi.requested((device.name for device in config.CDI_devices), config.annotations))
    user = users.resolve(security, image.user, rootfs)
    process_label, file_label = lsm.selinux_labels(security, pod_security.selinux_options, pod_id)
    own_users = pod.config.own_user_namespace
    host_ipc = security.namespace_options.ipc is NamespaceMode.NODE
    device_plan = devices.plan(
        config.devices, privileged=security.privileged, all_devices=not pod.handler.privileged_without_host_devices
    )
    mount_plan = mounts.plan(
        config.mounts,
        MountContext(rootfs, pod.features, pod.volumes, file_label),
        mounts.standard(
            privileged=security.privileged,
            host_ipc=host_ipc,
            shm=str(pod.files.shm),
            node_sysfs=own_users is not None and pod.config.on_node_network,
            node_mqueue=own_users is not None and host_ipc,
        ),
        pod.files.mounted_files(),
        readonly_rootfs=security.readonly_rootfs,
    )
    granted = capabilities.wanted(
        security.capabilities.add_capabilities, security.capabilities.drop_capabilities, privileged=security.privileged
    )
    resources.check(config.linux.resources, "linux.resources")
    limits = resources.to_oci(config.linux.resources, cgroup_version=pod.cgroup_version, pids_limit=settings.pids_limit)
    classes = resources.classes(pod.config.annotations, config.metadata.name, settings)
    linux: Document = {
        "cgroupsPath": pod.cgroups_path,
        "namespaces": namespaces.plan(
            security.namespace_options,
            pod.files,
            host_network=pod.config.on_node_network,
            netns=pod.netns,
            user_namespace=own_users is not None,
            target_pid=pod.target_pid,
            own_cgroup=pod.cgroup_version == 2 and not security.privileged,
        ),
        "resources": {"devices": device_plan.rules, **limits, **classes.block_io},
        "devices": device_plan.nodes,
        **classes.rdt,
    }
    if mount_plan.root_propagation:
        linux["rootfsPropagation"] = mount_plan.root_propagation
    if own_users is not None:
        linux |= {"uidMappings": id_mappings.to_oci(own_users.uids), "gidMappings": id_mappings.to_oci(own_users.gids)}
    all_annotations = {**pod.config.annotations, **config.annotations}
    annotations = {
        "io.kubernetes.cri.container-type": "container",
        **pod.handler.default_annotations,
        **_handed_on(all_annotations, config.annotations, pod.handler.allowed_annotations),
    }
    if not security.privileged:
        linux["maskedPaths"] = list(dict.fromkeys([*security.masked_paths, *_MASKED])) if security.masked_paths else []
        linux["readonlyPaths"] = security.readonly_paths
        profile = seccomp.wanted(security, granted, settings)
        if profile:
            linux["seccomp"] = profile
        if profile is seccomp.default_profile(granted) and (program := seccomp_filter.compiled_default(granted)):
            annotations[seccomp_filter.ANNOTATION] = program
    if file_label:
        linux["mountLabel"] = file_label
    process = _process(config, image, user, security, granted, pod.hostname)
    process |= {
        key: value
        for key, value in (("apparmorProfile", lsm.apparmor(security)), ("selinuxLabel", process_label))
        if value
    }
    document: Document = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(rootfs), "readonly": security.readonly_rootfs},
        "mounts": mount_plan.mounts,
        "linux": linux,
        "annotations": annotations,
    }
    cdi.apply(document, edits)
    hooks.add(document, settings.hooks_dirs, all_annotations, bind_mounts=bool(config.mounts))
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
    config: ContainerConfig,
    image: ImageConfig,
    user: User,
    security: LinuxContainerSecurityContext,
    granted: frozenset[str],
    hostname: str,
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
            "command and args are empty, and the image has no ENTRYPOINT and no CMD: there is nothing to run",
            field="command",
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


def _handed_on(all_annotations: dict[str, str], own: dict[str, str], allowed: list[str]) -> dict[str, str]:
    """The container's annotations as the OCI runtime gets them, and the pod's that the handler's settings allow.

    Some are orders to the runtime (crun: run.oci.*; systemd units: org.systemd.property.*): only those that the settings allow.
    """
    handed = {name: value for name, value in own.items() if not name.startswith(_ORDERS)}
    return handed | {
        name: value for name, value in all_annotations.items() if any(re.match(pattern, name) for pattern in allowed)
    }
