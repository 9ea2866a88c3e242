"""AppArmor profiles are enforced by a kernel that has AppArmor.

Errors on a kernel without it are tested in test_lsm.py and test_bad_input.py.
"""

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from expect import error_of
from world import World

from crisp_proto.cri import api_pb2 as cri
from crisplab.cri import Cri, container_config, pod_config

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
pytestmark = pytest.mark.skipif(
    not ENABLED.exists() or not ENABLED.read_text().startswith("Y"),
    reason="the kernel of this machine has no AppArmor (make test-vm has)",
)
Profile = cri.SecurityProfile
OWN = "crisp-test-no-tmp"
OWN_PROFILE = f"profile {OWN} flags=(attach_disconnected) {{ file, network, capability, signal, deny /tmp/** wl, }}"
TRY = (
    "cat /proc/self/attr/current; mkdir /mnt 2>/dev/null; mount -t tmpfs none /mnt 2>/dev/null && echo mounted;"
    " echo x > /tmp/file && echo written; cat /sys/kernel/security/lsm 2>/dev/null; true"
)


@pytest.fixture
def own_profile(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "profile"
    file.write_text(OWN_PROFILE)
    subprocess.run(["apparmor_parser", "--skip-cache", "--replace", str(file)], check=True)
    yield OWN
    subprocess.run(["apparmor_parser", "--remove", str(file)], check=True)


def tried(client: Cri, world: World, logs: Path, **security: object) -> list[str]:
    """Returns what a container could do that only AppArmor may keep from it."""
    pod = pod_config("apparmor", log_directory=logs)
    pod.linux.security_context.privileged = bool(security.get("privileged"))
    with client.pod(pod) as pod_id:
        capabilities = cri.Capability(add_capabilities=["SYS_ADMIN"])
        context = cri.LinuxContainerSecurityContext(capabilities=capabilities, **security)  # type: ignore[arg-type]
        linux = cri.LinuxContainerConfig(security_context=context)
        container = client.run(pod_id, container_config(world.image, ["sleep", "600"], linux=linux), pod)
        return client.exec(container, "sh", "-c", TRY, timeout=60).stdout.decode().splitlines()


def test_the_default_profile_is_enforced(cri_client: Cri, world: World, tmp_path: Path) -> None:
    for security in (
        {},
        {"apparmor": Profile(profile_type=Profile.RuntimeDefault)},
        {"apparmor_profile": "runtime/default"},
    ):
        assert tried(cri_client, world, tmp_path, **security) == ["crisp-default (enforce)", "written"]


def test_unconfined_and_privileged_are_not_confined(cri_client: Cri, world: World, tmp_path: Path) -> None:
    assert tried(cri_client, world, tmp_path, apparmor=Profile(profile_type=Profile.Unconfined))[:3] == [
        "unconfined",
        "mounted",
        "written",
    ]
    assert tried(cri_client, world, tmp_path, privileged=True)[:3] == ["unconfined", "mounted", "written"]


def test_a_profile_of_the_nodes_own(cri_client: Cri, world: World, tmp_path: Path, own_profile: str) -> None:
    for security in (
        {"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref=own_profile)},
        {"apparmor_profile": f"localhost/{own_profile}"},
    ):
        assert tried(cri_client, world, tmp_path, **security) == [f"{own_profile} (enforce)"]


def test_a_profile_that_is_not_loaded_is_named(cri_client: Cri, world: World, tmp_path: Path) -> None:
    profile = Profile(profile_type=Profile.Localhost, localhost_ref="crisp-nobody-loaded")
    code, message = error_of(partial(tried, cri_client, world, tmp_path, apparmor=profile))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "AppArmor profile 'crisp-nobody-loaded' is not loaded" in message
