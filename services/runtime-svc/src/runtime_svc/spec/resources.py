"""CRI's LinuxContainerResources as OCI's linux.resources (OCI runtime spec, config-linux.md)."""

from crisp_proto.config import LinuxContainerResources
from runtime_svc.cgroups.versions import Cgroups
from runtime_svc.spec import oci


def to_oci(resources: LinuxContainerResources, cgroups: Cgroups, *, pids_limit: int = 0) -> oci.Resources:
    """Translates limits that `cgroups.limits.check` has accepted; leaves out what is 0 or empty.

    Raises InvalidArgument for `unified` on a machine that has no such files.
    """
    cgroups.check_unified(resources)
    found: oci.Resources = {}
    if cpu := _cpu(resources):
        found["cpu"] = cpu
    if memory := _memory(resources, cgroups):
        found["memory"] = memory
    if pages := _huge_pages(resources, cgroups):
        found["hugepageLimits"] = pages
    if resources.unified:
        found["unified"] = resources.unified
    if pids_limit:
        found["pids"] = {"limit": pids_limit}
    return found


def _cpu(resources: LinuxContainerResources) -> oci.Cpu:
    cpu: oci.Cpu = {}
    if resources.cpu_shares:
        cpu["shares"] = resources.cpu_shares
    if resources.cpu_quota > 0:  # -1 is no limit, which a new container has anyway; crun 1.8 fails on it
        cpu["quota"] = resources.cpu_quota
    if resources.cpu_period:
        cpu["period"] = resources.cpu_period
    if resources.cpuset_cpus:
        cpu["cpus"] = resources.cpuset_cpus
    if resources.cpuset_mems:
        cpu["mems"] = resources.cpuset_mems
    return cpu


def _memory(resources: LinuxContainerResources, cgroups: Cgroups) -> oci.Memory:
    memory: oci.Memory = {}
    if resources.memory_limit_in_bytes:
        memory["limit"] = resources.memory_limit_in_bytes
    if resources.memory_swap_limit_in_bytes and cgroups.accounts_swap:
        memory["swap"] = resources.memory_swap_limit_in_bytes
    return memory


def _huge_pages(resources: LinuxContainerResources, cgroups: Cgroups) -> list[oci.HugepageLimit]:
    """Leaves out sizes that the kernel does not count.

    kubelet sends a limit of 0 for every page size of the machine; without the controller there is
    nothing to limit.
    """
    return [
        {"pageSize": limit.page_size, "limit": limit.limit}
        for limit in resources.hugepage_limits
        if cgroups.accounts_huge_pages(limit.page_size)
    ]
