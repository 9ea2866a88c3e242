"""Configurations, addresses and rules, without a network."""

import ipaddress
import json
from pathlib import Path

import pytest

from crisp_proto.config import PortMapping, Protocol
from crisp_proto.net import AttachmentRequest
from net_svc import bridge, cni, firewall, host_local, netns, nftables
from net_svc.nftables import HostPort, Masquerade
from net_svc.store import Store
from servicekit.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

BRIDGE = {"type": "bridge", "bridge": "cni9", "ipMasq": True, "ipam": {"type": "host-local", "subnet": "10.1.0.0/29"}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "net.db")


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


def test_a_stored_configuration_reads_as_it_was(tmp_path: Path) -> None:
    network = cni.parse_configuration(json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [BRIDGE]}), "here")
    assert cni.parse_configuration(network.to_json(), "here") == network


def test_old_versions_get_addresses_with_their_family() -> None:
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
    assert cni.find_plugin("mine", [tmp_path]) == tmp_path / "mine"
    with pytest.raises(FailedPrecondition, match="containernetworking-plugins"):
        cni.find_plugin("../mine", [tmp_path / "sub"])


def test_what_the_native_plugin_does_not_know_goes_to_the_real_one() -> None:
    assert bridge.understands(BRIDGE)
    assert not bridge.understands({**BRIDGE, "vlan": 5})
    assert not bridge.understands({**BRIDGE, "ipam": {"type": "dhcp"}})
    assert firewall.understands_portmap({"type": "portmap", "capabilities": {"portMappings": True}})
    assert not firewall.understands_portmap({"type": "portmap", "conditionsV4": ["-d", "1.2.3.4"]})


def ranges(**ipam: object) -> list[list[host_local.Range]]:
    return host_local.range_sets({"type": "host-local", **ipam}, "here")


def test_addresses_go_round_and_return(store: Store) -> None:
    ((entry,),) = ranges(subnet="10.1.0.0/29")
    for number in range(1, 6):
        store.begin(f"pod{number}", "{}", "{}")
    given = [str(host_local.allocate(store, "n", [entry], f"pod{number}")[1]) for number in range(1, 6)]
    assert given == [f"10.1.0.{last}" for last in (2, 3, 4, 5, 6)]
    store.begin("late", "{}", "{}")
    with pytest.raises(ResourceExhausted, match=r"10\.1\.0\.1-10\.1\.0\.6"):
        host_local.allocate(store, "n", [entry], "late")
    store.remove("pod2")
    assert str(host_local.allocate(store, "n", [entry], "late")[1]) == "10.1.0.3"


def test_an_address_just_freed_is_the_last_to_be_used_again(store: Store) -> None:
    ((entry,),) = ranges(subnet="10.1.0.0/28")
    store.begin("a", "{}", "{}")
    first = host_local.allocate(store, "n", [entry], "a")[1]
    store.remove("a")
    store.begin("b", "{}", "{}")
    assert host_local.allocate(store, "n", [entry], "b")[1] != first


def test_ranges() -> None:
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


def test_the_table_is_rendered_whole() -> None:
    script = nftables.render(
        "t",
        [Masquerade("10.1.0.0/24", "br"), Masquerade("fd00::/64", "br")],
        [
            HostPort("tcp", "", 8080, "10.1.0.2", 80),
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


def test_host_ports_of_one_family_go_to_addresses_of_that_family() -> None:
    mappings = [
        PortMapping(protocol=Protocol.TCP, container_port=80, host_port=8080),
        PortMapping(protocol=Protocol.UDP, container_port=53, host_port=53, host_ip="127.0.0.1"),
        PortMapping(protocol=Protocol.TCP, container_port=443),
    ]
    request = AttachmentRequest(namespace="n", name="p", uid="u", port_mappings=mappings)
    network = json.dumps({"plugins": [{"type": "portmap", "capabilities": {"portMappings": True}}]})
    found = firewall.host_ports(request, ["10.0.0.2", "fd00::2"], network)
    assert [(port.protocol, port.host_port, port.pod_ip) for port in found] == [
        ("tcp", 8080, "10.0.0.2"),
        ("tcp", 8080, "fd00::2"),
        ("udp", 53, "10.0.0.2"),
    ]
    assert firewall.host_ports(request, ["10.0.0.2"], json.dumps({"plugins": [BRIDGE]})) == []


def test_only_sysctls_of_the_network_are_taken() -> None:
    netns.check_sysctls({"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.conf.eth0/100.forwarding": "1"})
    for name in ("kernel.shmmax", "net", "net/../kernel/x", "net..x"):
        with pytest.raises(InvalidArgument, match="network namespace"):
            netns.check_sysctls({name: "1"})
