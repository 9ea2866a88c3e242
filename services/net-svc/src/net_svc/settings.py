"""The [net] section of the settings."""

import re
from pathlib import Path

from pydantic import Field, field_validator

from servicekit.settings import Section

_SYSCTL = re.compile(r"net(?:\.[A-Za-z0-9_-]+)+(?:/[A-Za-z0-9_.-]+)*=[^\0\n]*")


class NetSettings(Section):
    """The settings of net-svc."""

    cni_conf_dir: Path = Field(
        Path("/etc/cni/net.d"), description="CNI network configurations; the first valid one by name is used"
    )
    handler_conf_dirs: dict[str, Path] = Field(
        {}, description="Folders of CNI configurations for pods of a runtime handler, by the handler's name"
    )
    cni_bin_dirs: list[Path] = Field([Path("/opt/cni/bin"), Path("/usr/lib/cni")], description="Where CNI plugins are")
    cni_timeout: float = Field(60, gt=0, description="Seconds that a CNI plugin may take")
    native_plugins: bool = Field(True, description="Do bridge, host-local and portmap without running their plugins")
    builtin_network: bool = Field(
        True,
        description="Use a bridge of our own while cni_conf_dir has no file; off where a network add-on will bring one",
    )
    builtin_bridge: str = Field(
        "crisp0", pattern=r"^[a-zA-Z0-9._-]{1,15}$", description="The built-in network's bridge"
    )
    builtin_subnets: list[str] = Field(
        ["10.88.0.0/16"], min_length=1, description="The built-in network's subnets, CIDR, one per address family"
    )
    default_sysctls: list[str] = Field(
        ["net.ipv4.ip_unprivileged_port_start=0", "net.ipv4.ping_group_range=0 2147483647"],
        description="Sysctls (net.NAME=VALUE) of pods with a network of their own that do not set them themselves",
    )
    nft_table: str = Field(
        "crisp", pattern=r"^[a-zA-Z][a-zA-Z0-9_-]{0,63}$", description="Name of our nftables table (family inet)"
    )

    @field_validator("default_sysctls")
    @classmethod
    def _are_sysctls(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            if not _SYSCTL.fullmatch(entry):
                raise ValueError(f"{entry!r}: write net.NAME=VALUE; others belong in runtime.default_sysctls")
        return entries
