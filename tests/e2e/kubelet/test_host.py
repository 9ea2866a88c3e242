"""What pods share with the host and between their containers; security settings; images."""

from cluster import Cluster, container_status, shell, then_sleeps, waiting
from expect import page_once_up, wait_for
from world import PAGE, World

from crisplab.cri import Cri
from crisplab.registry import free_port


def test_a_pod_on_the_host_network_listens_there(cluster: Cluster) -> None:
    port = free_port()
    with cluster.pod(
        {"hostNetwork": True, "containers": [shell(f"exec httpd -f -p 127.0.0.1:{port} -h /www")]}
    ) as name:
        pod = cluster.ready(name)
        assert pod["status"]["podIP"] == pod["status"]["hostIP"]
        page_once_up(f"127.0.0.1:{port}")


def test_a_host_port_leads_to_the_pod(cluster: Cluster) -> None:
    port = free_port()
    with cluster.pod({"containers": [{"name": "main", "ports": [{"containerPort": 80, "hostPort": port}]}]}) as name:
        cluster.ready(name)
        assert page_once_up(f"127.0.0.1:{port}") == PAGE


def test_a_pod_with_the_host_s_processes_sees_kubelet(cluster: Cluster) -> None:
    with cluster.pod(
        {"hostPID": True, "containers": [then_sleeps(f"tr '\\0' ' ' < /proc/{cluster.kubelet.pid()}/cmdline")]}
    ) as name:
        assert "--hostname-override" in cluster.output(name)


def test_containers_that_share_processes_see_and_signal_each_other(cluster: Cluster) -> None:
    containers = [shell("exec sleep 600", "one"), then_sleeps("until pidof sleep; do sleep 0.1; done", "two")]
    with cluster.pod({"shareProcessNamespace": True, "containers": containers}) as name:
        process = cluster.output(name, "two").strip()
        assert cluster.kubectl("exec", name, "-c", "one", "--", "cat", "/proc/1/comm").strip() in ("catatonit", "pause")
        cluster.kubectl("exec", name, "-c", "two", "--", "kill", "-9", process)
        cluster.wait(name, lambda status: container_status(status, "one")["restartCount"] >= 1)


def test_a_security_context_is_the_process_s(cluster: Cluster) -> None:
    context = {
        "runAsUser": 1234, "runAsNonRoot": True, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    with cluster.pod(
        {
            "containers": [
                then_sleeps(
                    "grep -E '^(Uid|NoNewPrivs|CapBnd|Seccomp):' /proc/1/status; touch /x || echo read-only",
                    securityContext=context,
                )
            ]
        }
    ) as name:
        shown = cluster.output(name)
        lines = dict(line.split(":\t") for line in shown.splitlines() if ":\t" in line)
        assert lines["Uid"].split()[0] == "1234"
        assert (lines["NoNewPrivs"], lines["Seccomp"], int(lines["CapBnd"], 16)) == ("1", "2", 0)
        assert "read-only" in shown.splitlines()


def test_root_is_refused_where_it_is_not_wanted(cluster: Cluster) -> None:
    with cluster.pod({"containers": [shell("true", securityContext={"runAsNonRoot": True})]}) as name:
        status = cluster.wait(name, lambda status: "waiting" in container_status(status).get("state", {}))["status"]
        cluster.wait(name, lambda status: waiting(status).get("reason") == "CreateContainerConfigError")
        assert status["phase"] == "Pending"


def test_pod_dns_hosts_and_sysctls(cluster: Cluster) -> None:
    spec = {
        "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["seven"]}],
        "hostname": "someone",
        "dnsPolicy": "None",
        "dnsConfig": {
            "nameservers": ["192.0.2.53"],
            "searches": ["example.org"],
            "options": [{"name": "ndots", "value": "3"}],
        },
        "securityContext": {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "77"}]},
        "containers": [
            then_sleeps("hostname; cat /etc/hosts /etc/resolv.conf /proc/sys/net/ipv4/ip_unprivileged_port_start")
        ],
    }
    with cluster.pod(spec) as name:
        shown = cluster.output(name).splitlines()
        assert shown[0] == "someone"
        assert "192.0.2.7\tseven" in shown
        assert {"nameserver 192.0.2.53", "search example.org", "options ndots:3", "77"} <= set(shown)


def test_pull_policies_and_their_back_off(cluster: Cluster, world: World) -> None:
    absent = f"{world.registry}/test/absent:1"
    with cluster.pod({"containers": [{"name": "main", "image": absent}]}) as name:
        cluster.wait(name, lambda status: waiting(status).get("reason") == "ImagePullBackOff")
        cluster.event(name, "Failed", absent)
    with cluster.pod({"containers": [{"name": "main", "image": absent, "imagePullPolicy": "Never"}]}) as name:
        cluster.wait(name, lambda status: waiting(status).get("reason") == "ErrImageNeverPull")
    world.busybox.push(world.registry, "test/policy", "1")
    image = f"{world.registry}/test/policy:1"
    for policy, text in (
        ("IfNotPresent", "Successfully pulled"),
        ("IfNotPresent", "already present"),
        ("Always", "Successfully pulled"),
    ):
        with cluster.pod({"containers": [{"name": "main", "image": image, "imagePullPolicy": policy}]}) as name:
            pod = cluster.ready(name)
            cluster.event(name, "Pulled", text)
            assert container_status(pod["status"])["image"] == image
    with Cri(cluster.node.socket) as client:
        client.remove_image(image)


def test_dead_containers_are_collected(cluster: Cluster) -> None:
    with cluster.pod({"containers": [shell("exit 1")]}) as name, Cri(cluster.node.socket) as client:
        cluster.wait(name, lambda status: container_status(status).get("restartCount", 0) >= 4)
        labels = {"io.kubernetes.pod.name": name}
        wait_for(lambda: len(client.containers(label_selector=labels)) <= 2)
