"""A container's OCI bundle: config.json, made from the request, the image and the pod.

`build` makes the configuration part by part, `adjust` is the one place where the finished one can
be changed, and `write` puts it on disk (OCI runtime spec, bundle.md).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crisp_proto.config import ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, PodSandboxConfig
from crisp_proto.image import ImageConfig
from runtime_svc.cgroups import limits
from runtime_svc.cgroups.versions import Cgroups
from runtime_svc.sandbox import id_mappings
from runtime_svc.sandbox.sandbox import Sandbox
from runtime_svc.settings import HandlerSettings, RuntimeSettings
from runtime_svc.spec import (
    apparmor,
    capabilities,
    cdi,
    devices,
    hooks,
    mounts,
    namespaces,
    oci,
    process,
    resource_classes,
    resources,
    seccomp,
    seccomp_filter,
    selinux,
    standard_mounts,
    users,
)
from runtime_svc.spec.declared_volumes import NO_VOLUMES, DeclaredVolumes
from runtime_svc.spec.mounts import MountContext, MountFeatures, MountPlan
from runtime_svc.spec.selinux import Labels
from runtime_svc.spec.users import User
from servicekit.errors import InvalidArgument
from servicekit.linux.files import write_atomically

_TYPE = {"io.kubernetes.cri.container-type": "container"}
_RUNTIME_ORDERS = ("run.oci.", "org.systemd.property.")
"""Prefixes of annotations that are orders to crun or systemd."""
# Paths that kubelet's own list may not have yet. That list comes with every request, except with
# procMount: Unmasked.
_MASKED = [
    "/proc/interrupts",
    "/sys/devices/virtual/powercap",
    *(f"/sys/devices/system/cpu/cpu{n}/thermal_throttle" for n in range(os.cpu_count() or 1)),
]
# kubelet's lists, for requests of other clients if the settings say so.
_USUALLY_MASKED = [
    *(
        f"/proc/{name}"
        for name in "acpi asound kcore keys latency_stats sched_debug scsi timer_list timer_stats".split()
    ),
    "/sys/firmware",
]
_USUALLY_READONLY = [f"/proc/{name}" for name in "bus fs irq sys sysrq-trigger".split()]


@dataclass(frozen=True, slots=True)
class PodContext:
    """What a container takes over from its pod, its handler and the other services.

    `netns` is None if the pod uses the node's network; `target_pid` is a process of the container
    whose PID namespace is shared (NamespaceMode TARGET); `volumes` are mounted images by index.
    """

    id: str
    config: PodSandboxConfig
    sandbox: Sandbox
    hostname: str
    cgroups_path: str
    cgroups: Cgroups
    handler: HandlerSettings
    features: MountFeatures
    netns: str | None = None
    target_pid: int | None = None
    volumes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The finished configuration, and the user in it."""

    spec: oci.Spec
    user: User


@dataclass(frozen=True, slots=True)
class _Container:
    """A request with what several parts of its configuration derive from it."""

    config: ContainerConfig
    image: ImageConfig
    rootfs: Path
    pod: PodContext
    settings: RuntimeSettings
    user: User
    labels: Labels | None
    granted: frozenset[str]
    seccomp: oci.Seccomp | None

    @property
    def security(self) -> LinuxContainerSecurityContext:
        return self.config.linux.security_context

    @property
    def annotations(self) -> dict[str, str]:
        """The pod's annotations and the container's, which win."""
        return {**self.pod.config.annotations, **self.config.annotations}


def build(
    config: ContainerConfig,
    image: ImageConfig,
    rootfs: Path,
    pod: PodContext,
    settings: RuntimeSettings,
    devices_by_name: cdi.Registry,
) -> Bundle:
    """Makes the configuration of a container.

    Raises InvalidArgument, FailedPrecondition or Unimplemented that name the field.
    """
    _check(config, pod)
    edits = devices_by_name.edits(cdi.requested((device.name for device in config.CDI_devices), config.annotations))
    container = _resolve(config, image, rootfs, pod, settings)
    mount_plan = _mounts(container)
    spec: oci.Spec = {
        "ociVersion": oci.VERSION,
        "process": _process(container),
        "root": {"path": str(rootfs), "readonly": container.security.readonly_rootfs},
        "mounts": mount_plan.mounts,
        "linux": _linux(container, mount_plan),
        "annotations": _annotations(container),
    }
    cdi.apply(spec, edits)
    spec["mounts"] = mounts.in_order(spec["mounts"])
    hooks.add(spec, settings.hooks_dirs, container.annotations, bind_mounts=bool(config.mounts))
    return Bundle(adjust(spec), container.user)


def adjust(spec: oci.Spec) -> oci.Spec:
    """Returns the configuration that is written to disk.

    Plugins that may change it are called here.
    """
    return spec


def write(folder: Path, bundle: Bundle) -> None:
    """Writes config.json into the bundle's folder. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(bundle.spec))


def _check(config: ContainerConfig, pod: PodContext) -> None:
    security = config.linux.security_context
    if security.privileged and not pod.config.linux.security_context.privileged:
        raise InvalidArgument(
            "linux.security_context.privileged: a privileged container needs a privileged pod",
            field="linux.security_context.privileged",
        )
    id_mappings.check_container(security.namespace_options, pod.config)
    limits.check(config.linux.resources, "linux.resources")


def _resolve(
    config: ContainerConfig, image: ImageConfig, rootfs: Path, pod: PodContext, settings: RuntimeSettings
) -> _Container:
    security = config.linux.security_context
    granted = capabilities.wanted(
        security.capabilities.add_capabilities,
        security.capabilities.drop_capabilities,
        privileged=security.privileged,
        default=capabilities.configured(settings.default_capabilities),
    )
    return _Container(
        config=config,
        image=image,
        rootfs=rootfs,
        pod=pod,
        settings=settings,
        user=users.resolve(security, image.user, rootfs),
        labels=selinux.labels(security, pod.config.linux.security_context.selinux_options, pod.id),
        granted=granted,
        seccomp=None if security.privileged else seccomp.wanted(security, granted, settings),
    )


def _process(container: _Container) -> oci.Process:
    planned = process.plan(
        container.config, container.image, container.user, container.granted, container.pod.hostname, container.settings
    )
    if (profile := apparmor.profile(container.security)) is not None:
        planned["apparmorProfile"] = profile
    if container.labels is not None:
        planned["selinuxLabel"] = container.labels.process
    return planned


def _mounts(container: _Container) -> MountPlan:
    pod = container.pod
    host_ipc = container.security.namespace_options.ipc is NamespaceMode.NODE
    has_user_namespace = pod.config.own_user_namespace is not None
    standard = standard_mounts.plan(
        privileged=container.security.privileged,
        host_ipc=host_ipc,
        shm=str(pod.sandbox.shm),
        node_sysfs=has_user_namespace and pod.config.on_node_network,
        node_mqueue=has_user_namespace and host_ipc,
    )
    label = None if container.labels is None else container.labels.file
    return mounts.plan(
        container.config.mounts,
        MountContext(
            container.rootfs, pod.features, pod.volumes, label, container.settings.absent_mount_sources_to_reject
        ),
        standard,
        pod.sandbox.etc.by_container_path(),
        _declared_volumes(container),
        readonly_rootfs=container.security.readonly_rootfs,
    )


def _declared_volumes(container: _Container) -> DeclaredVolumes:
    mode = container.settings.image_volumes
    if mode == "ignore":
        return NO_VOLUMES
    owner = id_mappings.on_the_node(container.pod.config, container.user.uid, container.user.gid)
    return DeclaredVolumes(container.image.volumes, owner, writable=mode == "bind")


def _linux(container: _Container, mount_plan: MountPlan) -> oci.Linux:
    pod, config = container.pod, container.config
    device_plan = devices.plan(
        devices.requested(config.devices, container.annotations, container.settings),
        privileged=container.security.privileged,
        all_devices=not pod.handler.privileged_without_host_devices,
    )
    classes = resource_classes.choose(pod.config.annotations, config.metadata.name, container.settings)
    linux: oci.Linux = {
        "cgroupsPath": pod.cgroups_path,
        "namespaces": _namespaces(container),
        "resources": _resources(container, device_plan.rules, classes.block_io),
        "devices": device_plan.nodes,
    }
    if classes.rdt is not None:
        linux["intelRdt"] = classes.rdt
    if mount_plan.root_propagation is not None:
        linux["rootfsPropagation"] = mount_plan.root_propagation
    if (own_users := pod.config.own_user_namespace) is not None:
        linux["uidMappings"] = namespaces.id_mappings(own_users.uids)
        linux["gidMappings"] = namespaces.id_mappings(own_users.gids)
    if container.labels is not None:
        linux["mountLabel"] = container.labels.file
    _confine(linux, container)
    return linux


def _namespaces(container: _Container) -> list[oci.Namespace]:
    pod = container.pod
    return namespaces.plan(
        container.security.namespace_options,
        pod.sandbox,
        host_network=pod.config.on_node_network,
        netns=pod.netns,
        user_namespace=pod.config.own_user_namespace is not None,
        target_pid=pod.target_pid,
        own_cgroup=pod.cgroups.has_namespaces and not container.security.privileged,
    )


def _resources(container: _Container, rules: list[oci.DeviceRule], block_io: oci.BlockIo | None) -> oci.Resources:
    found = resources.to_oci(
        container.config.linux.resources, container.pod.cgroups, pids_limit=container.settings.pids_limit
    )
    found["devices"] = rules
    if block_io is not None:
        found["blockIO"] = block_io
    return found


def _confine(linux: oci.Linux, container: _Container) -> None:
    """Hides paths and filters system calls, unless the container is privileged."""
    security = container.security
    if security.privileged:
        return
    by_default = container.settings.unset_masked_paths == "runtime/default"
    masked = security.masked_paths or (_USUALLY_MASKED if by_default else [])
    linux["maskedPaths"] = list(dict.fromkeys([*masked, *_MASKED])) if masked else []
    linux["readonlyPaths"] = security.readonly_paths or (_USUALLY_READONLY if by_default else [])
    if container.seccomp is not None:
        linux["seccomp"] = container.seccomp


def _annotations(container: _Container) -> dict[str, str]:
    """Returns the annotations that the OCI runtime gets.

    Passes on the container's own, apart from orders to the runtime. Passes on orders and the pod's
    annotations only if the handler's settings allow them.
    """
    handler = container.pod.handler
    own = {name: value for name, value in container.config.annotations.items() if not name.startswith(_RUNTIME_ORDERS)}
    allowed = {
        name: value
        for name, value in container.annotations.items()
        if any(re.match(pattern, name) for pattern in handler.allowed_annotations)
    }
    return {**_TYPE, **handler.default_annotations, **own, **allowed, **_compiled_seccomp(container)}


def _compiled_seccomp(container: _Container) -> dict[str, str]:
    """Returns the annotation with the compiled profile, if the container has the default one."""
    if container.seccomp is None or container.seccomp is not seccomp.default_profile(container.granted):
        return {}
    program = seccomp_filter.compiled_default(container.granted)
    return {} if program is None else {seccomp_filter.ANNOTATION: program}
