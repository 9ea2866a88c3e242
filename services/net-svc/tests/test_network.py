"""Configurations, addresses and rules, without a network."""

import ipaddress
import json
import os
from pathlib import Path

import pytest

from crisp_proto.config import PortMapping, Protocol
from crisp_proto.net import Attachment, AttachmentRequest
from net_svc import cni, netns, nftables
from net_svc.attachments import Attachments
from net_svc.cni import Document, NetworkConfiguration
from net_svc.firewall import Firewall
from net_svc.networks import Networks
from net_svc.nftables import HostPort, Masquerade
from net_svc.plugins import bridge, executable, host_local, portmap
from net_svc.plugins.bridge import NativeBridge
from net_svc.plugins.choice import Plugins
from net_svc.plugins.executable import ExecutablePlugin
from net_svc.plugins.portmap import NativePortmap
from net_svc.settings import NetSettings
from net_svc.store import Store
from servicekit.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from servicekit.places import Places

BRIDGE: Document = {
    "type": "bridge",
    "bridge": "cni9",
    "ipMasq": True,
    "ipam": {"type": "host-local", "subnet": "10.1.0.0/29"},
}
PORTMAP: Document = {"type": "portmap", "capabilities": {"portMappings": True}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "net.db")


def network(*plugins: Document) -> NetworkConfiguration:
    return NetworkConfiguration("n", "1.0.0", plugins, "here")


def test_the_first_valid_file_by_name_is_used(tmp_path: Path) -> None:
    (tmp_path / "10-broken.conflist").write_text("{")
    (tmp_path / "20-good.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "good", "plugins": [BRIDGE]}))
    (tmp_path / "30-later.conf").write_text(json.dumps({"cniVersion": "0.3.1", "name": "later", "type": "ptp"}))
    (tmp_path / "ignored.txt").write_text("x")
    found = cni.load_configuration(tmp_path)
    assert found is not None
    assert (found.name, found.version, len(found.plugins)) == ("good", "1.0.0", 1)
    (tmp_path / "20-good.conflist").unlink()
    found = cni.load_configuration(tmp_path)
    assert found is not None
    assert [plugin["type"] for plugin in found.plugins] == ["ptp"]
    (tmp_path / "30-later.conf").unlink()
    with pytest.raises(FailedPrecondition, match=r"10-broken\.conflist is not JSON"):
        cni.load_configuration(tmp_path)
    assert cni.load_configuration(tmp_path / "none") is None


def test_a_configuration_that_is_nested_too_deeply_or_is_no_text_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate((b"[" * 100_000, b"\xff\xfe\xfd")):
        (tmp_path / f"{number}.conf").write_bytes(content)
    with pytest.raises(FailedPrecondition, match=r"0\.conf is not JSON: nested too deeply; .*1\.conf is not JSON"):
        cni.load_configuration(tmp_path)


def test_a_configuration_that_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "10-pipe.conf")
    with pytest.raises(FailedPrecondition, match="not a regular file"):
        cni.load_configuration(tmp_path)


def test_a_stored_configuration_is_read_back_unchanged(tmp_path: Path) -> None:
    network = cni.parse_configuration(json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [BRIDGE]}), "here")
    assert cni.parse_configuration(network.to_json(), "here") == network


def test_results_of_versions_before_1_0_name_the_family_of_each_address() -> None:
    result = cni.result_from(
        {"ips": [{"version": "4", "address": "10.0.0.2/24"}], "interfaces": [{"name": "eth0"}]}, "0.4.0"
    )
    assert result.ips == [{"address": "10.0.0.2/24"}]
    assert result.to_document()["ips"] == [{"version": "4", "address": "10.0.0.2/24"}]
    result.version = "1.0.0"
    assert "version" not in result.to_document()["ips"][0]


def test_a_plugin_is_found_by_its_type_and_never_by_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    assert executable.find("mine", [tmp_path]) == tmp_path / "mine"
    with pytest.raises(FailedPrecondition, match="containernetworking-plugins"):
        executable.find("../mine", [tmp_path / "sub"])


def test_a_configuration_with_keys_that_we_do_not_support_is_left_to_the_executable() -> None:
    assert bridge.understands(BRIDGE)
    assert not bridge.understands({**BRIDGE, "vlan": 5})
    assert not bridge.understands({**BRIDGE, "ipam": {"type": "dhcp"}})
    assert not bridge.understands({**BRIDGE, "ipam": "host-local"})
    assert portmap.understands(PORTMAP)
    assert not portmap.understands({"type": "portmap", "conditionsV4": ["-d", "1.2.3.4"]})


def test_plugins_are_native_where_possible_and_a_bridge_only_in_the_first_place(store: Store) -> None:
    plugins = Plugins(store, NetSettings())
    chosen = [type(plugin) for plugin in plugins.of(network(BRIDGE, PORTMAP, BRIDGE, {"type": "tuning"}))]
    assert chosen == [NativeBridge, NativePortmap, ExecutablePlugin, ExecutablePlugin]
    assert [type(plugin) for plugin in plugins.of(network({**BRIDGE, "vlan": 5}))] == [ExecutablePlugin]
    without = Plugins(store, NetSettings(native_plugins=False))
    assert {type(plugin) for plugin in without.of(network(BRIDGE, PORTMAP))} == {ExecutablePlugin}


def ranges(**ipam: object) -> list[list[host_local.Range]]:
    return host_local.range_sets({"type": "host-local", **ipam}, "here")


def test_addresses_are_leased_round_robin_and_become_free_again(store: Store) -> None:
    ((entry,),) = ranges(subnet="10.1.0.0/29")
    for number in range(1, 6):
        store.begin(f"pod{number}", "{}", "{}")
    given = [str(host_local.allocate(store, "n", [entry], f"pod{number}").address) for number in range(1, 6)]
    assert given == [f"10.1.0.{last}" for last in (2, 3, 4, 5, 6)]
    store.begin("late", "{}", "{}")
    with pytest.raises(ResourceExhausted, match=r"10\.1\.0\.1-10\.1\.0\.6"):
        host_local.allocate(store, "n", [entry], "late")
    store.remove("pod2")
    assert str(host_local.allocate(store, "n", [entry], "late").address) == "10.1.0.3"


def test_an_address_that_was_just_freed_is_not_leased_next(store: Store) -> None:
    ((entry,),) = ranges(subnet="10.1.0.0/28")
    store.begin("a", "{}", "{}")
    first = host_local.allocate(store, "n", [entry], "a").address
    store.remove("a")
    store.begin("b", "{}", "{}")
    assert host_local.allocate(store, "n", [entry], "b").address != first


def test_ranges_are_parsed_and_wrong_ones_are_refused() -> None:
    ((entry,),) = ranges(
        ranges=[[{"subnet": "fd00::/64", "rangeStart": "fd00::10", "rangeEnd": "fd00::20", "gateway": "fd00::1"}]]
    )
    assert (entry.first, entry.last, entry.gateway) == tuple(
        map(ipaddress.ip_address, ("fd00::10", "fd00::20", "fd00::1"))
    )
    for wrong, said in (
        ({"subnet": "x"}, "ranges of host-local are wrong"),
        ({}, "has no subnet"),
        ({"subnet": "10.0.0.0/31"}, "too small"),
    ):
        with pytest.raises(FailedPrecondition, match=said):
            ranges(**wrong)


def test_the_table_is_rendered_as_a_whole() -> None:
    script = nftables.render(
        "t",
        [Masquerade("10.1.0.0/24", "br"), Masquerade("fd00::/64", "br")],
        [
            HostPort("tcp", None, 8080, "10.1.0.2", 80),
            HostPort("udp", "192.0.2.1", 53, "10.1.0.3", 5353),
            HostPort("tcp", "::", 8080, "fd00::2", 80),
        ],
    )
    assert script.startswith("add table inet t\ndelete table inet t\n")
    for rule in (
        "meta nfproto ipv4 tcp dport 8080 dnat ip to 10.1.0.2:80",
        "ip daddr 192.0.2.1 udp dport 53 dnat ip to 10.1.0.3:5353",
        "meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd00::2]:80",
        "ip saddr 10.1.0.0/24 ip daddr != { 10.1.0.0/24, 224.0.0.0/4 } masquerade",
        'ip saddr 127.0.0.0/8 oifname "br" masquerade',
        "ip saddr 10.1.0.2 ip daddr 10.1.0.2 masquerade",
    ):
        assert rule in script
    assert nftables.render("t", [], []) == "add table inet t\ndelete table inet t\n"


def test_host_ports_of_one_family_go_to_addresses_of_that_family(store: Store) -> None:
    mappings = [
        PortMapping(protocol=Protocol.TCP, container_port=80, host_port=8080),
        PortMapping(protocol=Protocol.UDP, container_port=53, host_port=53, host_ip="127.0.0.1"),
        PortMapping(protocol=Protocol.TCP, container_port=443),
    ]
    request = AttachmentRequest(namespace="n", name="p", uid="u", port_mappings=mappings)
    found = NativePortmap().host_ports(request, ["10.0.0.2", "fd00::2"])
    assert [(port.protocol, port.host_port, port.pod_ip) for port in found] == [
        ("tcp", 8080, "10.0.0.2"),
        ("tcp", 8080, "fd00::2"),
        ("udp", 53, "10.0.0.2"),
    ]
    (without_portmap,) = Plugins(store, NetSettings()).of(network(BRIDGE))
    assert list(without_portmap.host_ports(request, ["10.0.0.2"])) == []


def firewall(store: Store, conf_dir: Path) -> Firewall:
    settings = NetSettings(cni_conf_dir=conf_dir)
    return Firewall("t", store, Networks(store, settings), Plugins(store, settings))


def test_the_table_has_the_rules_of_stored_networks_and_of_the_present_one(store: Store, tmp_path: Path) -> None:
    request = AttachmentRequest(
        namespace="n", name="p", uid="u", port_mappings=[PortMapping(container_port=80, host_port=8080)]
    )
    store.begin("pod", request.model_dump_json(), network(BRIDGE, PORTMAP).to_json())
    assert "8080" not in firewall(store, tmp_path / "none").render()
    store.complete("pod", Attachment(id="pod", netns="/x", ips=["10.1.0.2"]).model_dump_json())
    script = firewall(store, tmp_path / "none").render()
    assert "tcp dport 8080 dnat ip to 10.1.0.2:80" in script
    assert "ip saddr 10.1.0.0/29 " in script
    assert "ip saddr 10.88.0.0/16 " in script


def test_a_network_whose_ranges_are_wrong_does_not_keep_other_rules_from_being_applied(
    store: Store, tmp_path: Path
) -> None:
    store.begin("pod", "{}", network(BRIDGE).to_json())
    wrong = {**BRIDGE, "ipam": {"type": "host-local", "subnet": "10.2.0.0/31"}}
    (tmp_path / "10-wrong.conflist").write_text(network(wrong).to_json())
    assert "ip saddr 10.1.0.0/29 " in firewall(store, tmp_path).render()


@pytest.mark.parametrize("address", ["localhost", "10.0.0", "fe80::1%eth0", "::1%x\n flush ruleset"])
async def test_a_host_address_that_is_no_ip_address_is_refused(store: Store, tmp_path: Path, address: str) -> None:
    settings = NetSettings(cni_conf_dir=tmp_path / "none")
    networks, plugins = Networks(store, settings), Plugins(store, settings)
    attachments = Attachments(store, networks, plugins, firewall(store, tmp_path / "none"), Places(tmp_path, tmp_path))
    mapping = PortMapping(container_port=80, host_port=8080, host_ip=address)
    with pytest.raises(InvalidArgument, match="is no IP address"):
        await attachments.attach("a", AttachmentRequest(namespace="n", name="p", uid="u", port_mappings=[mapping]))
    assert store.all() == []


def test_only_sysctls_of_the_network_are_accepted() -> None:
    netns.check_sysctls({"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.conf.eth0/100.forwarding": "1"})
    for name in ("kernel.shmmax", "net", "net/../kernel/x", "net..x", "net.x\n", "net.a" + "/a.a" * 60 + "!"):
        with pytest.raises(InvalidArgument, match="network namespace"):
            netns.check_sysctls({name: "1"})
