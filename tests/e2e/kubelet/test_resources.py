"""Resources: cgroups by quality of service, limits, resizes in place, statistics from CRI alone."""

from pathlib import Path

import pytest
from cluster import Cluster, container_status, shell, terminated
from expect import wait_for

LIMITS = {"cpu": "200m", "memory": "64Mi"}


def _memory(folder: Path) -> int:
    file = folder / "memory.max"
    return int((file if file.exists() else folder / "memory.limit_in_bytes").read_text())


def _cpu(folder: Path) -> float:
    """Returns the limit of a cgroup in processors."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return int((folder / "cpu.cfs_quota_us").read_text()) / int((folder / "cpu.cfs_period_us").read_text())


@pytest.mark.parametrize(
    ("quality", "resources"),
    [
        ("BestEffort", {}),
        ("Burstable", {"requests": {"cpu": "100m"}}),
        ("Guaranteed", {"limits": LIMITS, "requests": LIMITS}),
    ],
)
def test_pods_are_in_the_cgroup_of_their_quality_of_service(
    cluster: Cluster, quality: str, resources: dict[str, object]
) -> None:
    with cluster.pod({"containers": [shell("exec sleep 600", resources=resources)]}) as name:
        pod = cluster.ready(name)
        assert pod["status"]["qosClass"] == quality
        folder = cluster.cgroups(pod, "memory")
        assert any(quality.lower() in part for part in folder.parts) == (quality != "Guaranteed")
        if quality == "Guaranteed":
            assert _memory(folder) == 64 << 20
            assert _cpu(cluster.cgroups(pod, "cpu")) == 0.2


def test_a_container_over_its_memory_is_oom_killed(cluster: Cluster) -> None:
    main = shell("tail /dev/zero", resources={"limits": {"memory": "24Mi"}})
    with cluster.pod({"containers": [main], "restartPolicy": "Never"}) as name:
        ended = terminated(cluster.ended(name)["status"])
        assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_limits_change_in_place(cluster: Cluster) -> None:
    with cluster.pod(
        {"containers": [shell("exec sleep 600", resources={"limits": LIMITS, "requests": LIMITS})]}
    ) as name:
        pod = cluster.ready(name)
        more = {"cpu": "300m", "memory": "96Mi"}
        cluster.patch(
            name,
            {"spec": {"containers": [{"name": "main", "resources": {"limits": more, "requests": more}}]}},
            "resize",
        )
        cluster.wait(name, lambda status: container_status(status).get("resources", {}).get("limits") == more)
        status = cluster.get(name)["status"]
        assert container_status(status)["restartCount"] == 0
        assert _memory(cluster.cgroups(pod, "memory")) == 96 << 20
        container = container_status(status)["containerID"].removeprefix("crisp://")
        (folder,) = (
            path
            for path in cluster.cgroups(pod, "cpu").rglob(f"*{container}*")
            if "helpers" not in path.name and "conmon" not in path.name
        )
        assert _cpu(folder) == pytest.approx(0.3)


def test_statistics_and_metrics_come_from_cri(cluster: Cluster) -> None:
    with (
        cluster.pod({"containers": [shell("head -c 20000000 /dev/zero > /file; exec sleep 600")]}) as name,
        cluster.kubelet.client() as kubelet,
    ):
        cluster.ready(name)

        def counted() -> dict[str, object] | None:
            pods = kubelet.get("/stats/summary").raise_for_status().json()["pods"]
            (pod,) = (pod for pod in pods if pod["podRef"]["name"] == name)
            (main,) = pod.get("containers") or [{}]
            return pod if main.get("rootfs", {}).get("usedBytes", 0) >= 20_000_000 else None

        pod = wait_for(counted)
        assert pod["memory"]["workingSetBytes"] > 0  # type: ignore[index]
        assert pod["network"]["rxBytes"] > 0  # type: ignore[index]
        assert pod["process_stats"]["process_count"] >= 1  # type: ignore[index]
        text = kubelet.get("/metrics/cadvisor").raise_for_status().text
        assert f'pod="{name}"' in "".join(
            line for line in text.splitlines() if line.startswith("container_memory_working_set_bytes")
        )
