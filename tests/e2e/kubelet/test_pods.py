"""The life of pods and containers under kubelet."""

import time

import pytest
from cluster import THE_END, Cluster, Object, container_status, shell, terminated, waiting
from expect import wait_for, when

from crisplab import clone


def test_init_containers_run_one_after_the_other_then_a_sidecar_and_the_rest(cluster: Cluster) -> None:
    volume: Object = {"volumeMounts": [{"name": "work", "mountPath": "/common"}]}
    written = {
        "exec": {"command": ["grep", "side", "/common/order"]},
        "periodSeconds": 1,
        "timeoutSeconds": 10,
        "failureThreshold": 60,
    }
    spec = {
        "volumes": [{"name": "work", "emptyDir": {}}],
        "initContainers": [
            shell("echo one >> /common/order", "first", **volume),
            shell(
                "echo side >> /common/order; exec sleep 600",
                "side",
                restartPolicy="Always",
                startupProbe=written,
                **volume,
            ),
            shell("echo two >> /common/order", "second", **volume),
        ],
        "containers": [shell("cat /common/order; echo main ends", **volume)],
        "restartPolicy": "Never",
    }
    with cluster.pod(spec) as name:
        pod = cluster.ended(name)
        assert pod["status"]["phase"] == "Succeeded"
        assert cluster.kubectl("logs", name).split() == ["one", "side", "two", "main", "ends"]
        # kubelet ends a sidecar after the main container.
        assert terminated(pod["status"], "side")["reason"] in ("Completed", "Error")


def test_an_init_container_that_fails_ends_a_pod_that_is_never_restarted(cluster: Cluster) -> None:
    spec = {"initContainers": [shell("exit 7", "first")], "containers": [shell("true")], "restartPolicy": "Never"}
    with cluster.pod(spec) as name:
        status = cluster.ended(name)["status"]
        assert status["phase"] == "Failed"
        assert terminated(status, "first")["exitCode"] == 7
        assert "waiting" in container_status(status)["state"]


@pytest.mark.parametrize(
    ("policy", "script", "phase"), [("Never", "exit 3", "Failed"), ("OnFailure", "exit 0", "Succeeded")]
)
def test_restart_policies_that_end(cluster: Cluster, policy: str, script: str, phase: str) -> None:
    with cluster.pod({"containers": [shell(script)], "restartPolicy": policy}) as name:
        status = cluster.ended(name)["status"]
        assert status["phase"] == phase
        assert container_status(status)["restartCount"] == 0
        ended = terminated(status)
        assert (ended["exitCode"], ended["reason"]) == ((3, "Error") if phase == "Failed" else (0, "Completed"))
        assert ended["startedAt"] <= ended["finishedAt"]
        assert ended["containerID"].startswith("crisp://")


def test_a_container_that_fails_is_started_again_after_a_back_off(cluster: Cluster) -> None:
    with cluster.pod({"containers": [shell("echo again; exit 1")], "restartPolicy": "OnFailure"}) as name:
        pod = cluster.wait(name, lambda status: container_status(status).get("restartCount", 0) >= 2)
        assert pod["status"]["phase"] == "Running"
        cluster.event(name, "BackOff", "restarting failed container")
        wait_for(lambda: cluster.kubectl("logs", "--previous", name).strip() == "again")


def test_a_container_that_cannot_be_started_has_the_reason_in_its_status(cluster: Cluster) -> None:
    with cluster.pod(
        {"containers": [{"name": "main", "command": ["/no/such/program"]}], "restartPolicy": "Never"}
    ) as name:
        status = cluster.wait(name, lambda status: "message" in waiting(status))["status"]
        said = waiting(status)
        assert said["reason"] == "CreateContainerError"
        assert "/no/such/program" in said["message"]


def test_a_command_probe_makes_ready_and_a_liveness_probe_restarts(cluster: Cluster) -> None:
    probe = {"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 1}
    main = shell(
        "touch /alive; sleep 600",
        readinessProbe={"exec": {"command": ["test", "-e", "/ready"]}, **probe},
        livenessProbe={"exec": {"command": ["test", "-e", "/alive"]}, **probe, "initialDelaySeconds": 1},
        startupProbe={"exec": {"command": ["test", "-e", "/alive"]}, **probe, "failureThreshold": 60},
    )
    with cluster.pod({"containers": [main]}) as name:
        cluster.wait(name, lambda status: container_status(status).get("started"))
        assert not container_status(cluster.get(name)["status"])["ready"]
        cluster.kubectl("exec", name, "--", "touch", "/ready")
        cluster.ready(name)
        cluster.kubectl("exec", name, "--", "rm", "/alive")
        status = cluster.wait(name, lambda status: container_status(status).get("restartCount", 0) >= 1)["status"]
        assert container_status(status)["lastState"]["terminated"]["exitCode"] in (137, 143)
        cluster.event(name, "Unhealthy", "Liveness probe failed")


@pytest.mark.parametrize("probe", [{"httpGet": {"path": "/", "port": 80}}, {"tcpSocket": {"port": 80}}])
def test_network_probes(cluster: Cluster, probe: dict[str, object]) -> None:
    with cluster.pod({"containers": [{"name": "main", "readinessProbe": {**probe, "periodSeconds": 1}}]}) as name:
        cluster.ready(name)
    with cluster.pod({"containers": [shell("sleep 600", readinessProbe={**probe, "periodSeconds": 1})]}) as name:
        cluster.event(name, "Unhealthy", "Readiness probe failed")


def test_lifecycle_hooks_run_after_the_start_and_before_the_end(cluster: Cluster) -> None:
    main = shell(
        f"{when('/started')} echo main; echo {THE_END}; {when('/stop')}",
        lifecycle={
            "postStart": {"exec": {"command": ["touch", "/started"]}},
            "preStop": {"exec": {"command": ["sh", "-c", "touch /host/stopped /stop"]}},
        },
        volumeMounts=[{"name": "host", "mountPath": "/host"}],
    )
    folder = cluster.kubelet.root / "hooks"
    spec = {
        "containers": [main],
        "volumes": [{"name": "host", "hostPath": {"path": str(folder), "type": "DirectoryOrCreate"}}],
        "terminationGracePeriodSeconds": 50,  # for the hook, after which main ends by itself
    }
    with cluster.pod(spec) as name:
        assert cluster.output(name) == "main\n"
    assert (folder / "stopped").exists()


def test_a_post_start_hook_that_fails_is_reported(cluster: Cluster) -> None:
    hook = {"postStart": {"exec": {"command": ["sh", "-c", "exit 4"]}}}
    with cluster.pod({"containers": [shell("sleep 600", lifecycle=hook)], "restartPolicy": "Never"}) as name:
        cluster.event(name, "FailedPostStartHook")


def test_a_container_is_killed_when_its_grace_period_is_over(cluster: Cluster) -> None:
    long = int(30 * clone.SLOWNESS)
    gentle = cluster.create(
        {
            "containers": [shell(f"trap 'exit 0' TERM; echo {THE_END}; while :; do sleep 0.1; done")],
            "terminationGracePeriodSeconds": long,
        }
    )
    deaf = cluster.create(
        {
            "containers": [shell(f"trap '' TERM; echo {THE_END}; while :; do sleep 0.1; done")],
            "terminationGracePeriodSeconds": 3,
        }
    )
    for name in (gentle, deaf):
        cluster.output(name)  # the trap is set from now on
    begun = time.monotonic()
    cluster.delete(gentle)
    assert time.monotonic() - begun < long / 2
    begun = time.monotonic()
    cluster.delete(deaf)
    assert 3 <= time.monotonic() - begun < 20 * clone.SLOWNESS


def test_termination_messages_come_from_the_file_or_the_log(cluster: Cluster) -> None:
    containers = [
        shell("echo from the file > /dev/termination-log; exit 1", "file"),
        shell("echo from the log; exit 1", "log", terminationMessagePolicy="FallbackToLogsOnError"),
    ]
    with cluster.pod({"containers": containers, "restartPolicy": "Never"}) as name:
        status = cluster.ended(name)["status"]
        assert terminated(status, "file")["message"] == "from the file\n"
        assert terminated(status, "log")["message"] == "from the log\n"


def test_an_ephemeral_container_sees_its_target_s_processes(cluster: Cluster) -> None:
    with cluster.pod({"containers": [shell("exec sleep 4321")]}) as name:
        cluster.ready(name)
        debugger = {
            "name": "debugger",
            "image": cluster.image,
            "command": ["sh", "-c", "cat /proc/1/cmdline"],
            "targetContainerName": "main",
        }
        cluster.patch(name, {"spec": {"ephemeralContainers": [debugger]}}, "ephemeralcontainers")
        cluster.wait(name, lambda status: terminated(status, "debugger"))
        assert "4321" in cluster.kubectl("logs", name, "-c", "debugger")
