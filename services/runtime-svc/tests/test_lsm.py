"""AppArmor profiles and SELinux labels, also on kernels without them."""

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
from runtime_svc.spec import apparmor, selinux
from servicekit.errors import FailedPrecondition, InvalidArgument
from servicekit.linux import selinux as kernel

PLAIN = LinuxContainerSecurityContext()


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tmp_path / "profiles"
    loaded.write_text("crisp-default (enforce)\nmine (complain)\n/usr/bin/man (enforce)\n")
    monkeypatch.setattr(apparmor, "_PROFILES", loaded)
    monkeypatch.setattr(apparmor, "enabled", lambda: True)


def named(kind: ProfileType, name: str = "") -> LinuxContainerSecurityContext:
    return LinuxContainerSecurityContext(apparmor=SecurityProfile(profile_type=kind, localhost_ref=name))


@pytest.mark.usefixtures("profiles")
def test_apparmor_profiles() -> None:
    assert apparmor.profile(PLAIN) == "crisp-default"
    assert apparmor.profile(LinuxContainerSecurityContext(privileged=True)) is None
    assert apparmor.profile(named(ProfileType.UNCONFINED)) == "unconfined"
    assert apparmor.profile(named(ProfileType.LOCALHOST, "mine")) == "mine"
    assert apparmor.profile(LinuxContainerSecurityContext(apparmor_profile="localhost/mine")) == "mine"
    assert apparmor.profile(LinuxContainerSecurityContext(apparmor_profile="runtime/default")) == "crisp-default"
    with pytest.raises(InvalidArgument, match="'other' is not loaded"):
        apparmor.profile(named(ProfileType.LOCALHOST, "other"))
    with pytest.raises(InvalidArgument, match="localhost/NAME"):
        apparmor.profile(LinuxContainerSecurityContext(apparmor_profile="mine"))


def test_without_apparmor_a_named_profile_is_an_error_and_the_default_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "enabled", lambda: False)
    assert apparmor.profile(PLAIN) is None
    with pytest.raises(FailedPrecondition, match="no AppArmor"):
        apparmor.profile(named(ProfileType.LOCALHOST, "mine"))


def test_selinux_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "enabled", lambda: True)
    monkeypatch.setattr(kernel, "knows", lambda label: True)
    selinux._policy_knows.cache_clear()
    found = selinux.labels(PLAIN, None, "pod")
    assert found is not None
    process, file = found
    assert process.startswith("system_u:system_r:container_t:s0:c")
    assert file == process.replace("system_r:container_t", "object_r:container_file_t")
    assert selinux.labels(PLAIN, None, "pod") == (process, file)
    assert selinux.labels(PLAIN, None, "other") != (process, file)
    asked = SELinuxOption(type="my_t", level="s0:c1,c2")
    for security, pod in ((LinuxContainerSecurityContext(selinux_options=asked), None), (PLAIN, asked)):
        assert selinux.labels(security, pod, "pod") == (
            "system_u:system_r:my_t:s0:c1,c2",
            "system_u:object_r:container_file_t:s0:c1,c2",
        )
    assert selinux.labels(LinuxContainerSecurityContext(privileged=True), None, "pod") is None
    on_node = LinuxContainerSecurityContext(namespace_options=NamespaceOption(pid=NamespaceMode.NODE))
    assert selinux.labels(on_node, None, "pod") is None


def test_a_label_that_the_policy_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "enabled", lambda: True)
    monkeypatch.setattr(kernel, "knows", lambda label: False)
    selinux._policy_knows.cache_clear()
    assert selinux.labels(PLAIN, None, "pod") is None  # Debian's policy has nothing for containers
    with pytest.raises(InvalidArgument, match="my_t"):
        selinux.labels(PLAIN, SELinuxOption(type="my_t"), "pod")


def test_without_selinux_options_are_ignored_with_one_log_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "enabled", lambda: False)
    selinux._tell_once.cache_clear()
    assert selinux.labels(PLAIN, SELinuxOption(), "pod") is None
    assert "selinux" not in "".join(capsys.readouterr())
    for asked in (
        SELinuxOption(type="spc_t"),
        SELinuxOption(level="s0"),
        SELinuxOption(user="no", role="such", type="t"),
    ):
        assert selinux.labels(PLAIN, asked, "pod") is None
        assert selinux.labels(LinuxContainerSecurityContext(selinux_options=asked), None, "pod") is None
        assert selinux.pod_label(asked, "pod") is None
    assert "".join(capsys.readouterr()).count("selinux-options-ignored") == 1
