"""AppArmor profiles and SELinux labels: what is chosen where the kernel has them, and the errors where it hasn't."""

from pathlib import Path

import pytest

from crisp_proto.config import (
    LinuxContainerSecurityContext,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
    SecurityProfile,
    SELinuxOption,
)
from runtime_svc import lsm
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import selinux

PLAIN = LinuxContainerSecurityContext()


@pytest.fixture
def apparmor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = tmp_path / "profiles"
    profiles.write_text("crisp-default (enforce)\nmine (complain)\n/usr/bin/man (enforce)\n")
    monkeypatch.setattr(lsm, "_PROFILES", profiles)
    monkeypatch.setattr(lsm, "has_apparmor", lambda: True)


def named(kind: ProfileType, name: str = "") -> LinuxContainerSecurityContext:
    return LinuxContainerSecurityContext(apparmor=SecurityProfile(profile_type=kind, localhost_ref=name))


@pytest.mark.usefixtures("apparmor")
def test_apparmor_profiles() -> None:
    assert lsm.apparmor(PLAIN) == "crisp-default"
    assert lsm.apparmor(LinuxContainerSecurityContext(privileged=True)) == ""
    assert lsm.apparmor(named(ProfileType.UNCONFINED)) == "unconfined"
    assert lsm.apparmor(named(ProfileType.LOCALHOST, "mine")) == "mine"
    assert lsm.apparmor(LinuxContainerSecurityContext(apparmor_profile="localhost/mine")) == "mine"
    assert lsm.apparmor(LinuxContainerSecurityContext(apparmor_profile="runtime/default")) == "crisp-default"
    with pytest.raises(InvalidArgument, match="'other' is not loaded"):
        lsm.apparmor(named(ProfileType.LOCALHOST, "other"))
    with pytest.raises(InvalidArgument, match="localhost/NAME"):
        lsm.apparmor(LinuxContainerSecurityContext(apparmor_profile="mine"))


def test_without_apparmor_a_named_profile_is_an_error_and_the_default_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsm, "has_apparmor", lambda: False)
    assert lsm.apparmor(PLAIN) == ""
    with pytest.raises(FailedPrecondition, match="no AppArmor"):
        lsm.apparmor(named(ProfileType.LOCALHOST, "mine"))


def test_selinux_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "enabled", lambda: True)
    monkeypatch.setattr(selinux, "knows", lambda label: True)
    lsm._policy_has_containers.cache_clear()
    process, file = lsm.selinux_labels(PLAIN, None, "pod")
    assert process.startswith("system_u:system_r:container_t:s0:c")
    assert file == process.replace("system_r:container_t", "object_r:container_file_t")
    assert lsm.selinux_labels(PLAIN, None, "pod") == (process, file)
    assert lsm.selinux_labels(PLAIN, None, "other") != (process, file)
    asked = SELinuxOption(type="my_t", level="s0:c1,c2")
    for security, pod in ((LinuxContainerSecurityContext(selinux_options=asked), None), (PLAIN, asked)):
        assert lsm.selinux_labels(security, pod, "pod") == (
            "system_u:system_r:my_t:s0:c1,c2",
            "system_u:object_r:container_file_t:s0:c1,c2",
        )
    assert lsm.selinux_labels(LinuxContainerSecurityContext(privileged=True), None, "pod") == ("", "")
    on_node = LinuxContainerSecurityContext(namespace_options=NamespaceOption(pid=NamespaceMode.NODE))
    assert lsm.selinux_labels(on_node, None, "pod") == ("", "")


def test_a_label_that_the_policy_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "enabled", lambda: True)
    monkeypatch.setattr(selinux, "knows", lambda label: False)
    lsm._policy_has_containers.cache_clear()
    assert lsm.selinux_labels(PLAIN, None, "pod") == ("", "")  # Debian's policy has nothing for containers
    with pytest.raises(InvalidArgument, match="my_t"):
        lsm.selinux_labels(PLAIN, SELinuxOption(type="my_t"), "pod")


def test_without_selinux_a_label_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "enabled", lambda: False)
    assert lsm.selinux_labels(PLAIN, SELinuxOption(), "pod") == ("", "")
    with pytest.raises(FailedPrecondition, match="no SELinux"):
        lsm.selinux_labels(PLAIN, SELinuxOption(level="s0"), "pod")
