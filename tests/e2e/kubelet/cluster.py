"""A cluster for tests: API server, kubelet and kubectl, and the pods that tests make."""

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cgroup_files import ROOT, VERSION_2
from expect import wait_for
from traces import started
from world import World

from crisplab import clone, control_plane, golang
from crisplab.certificates import Authority
from crisplab.control_plane import ControlPlane
from crisplab.kubelet import Kubelet
from crisplab.node import Node

Object = dict[str, Any]

# Statistics come from CRI alone; the rest makes tests short.
SETTINGS = {
    "featureGates": {"PodAndContainerStatsFromCRI": True},
    "containerLogMaxSize": "256Ki",
    "containerLogMaxFiles": 5,
    "containerLogMonitorInterval": "3s",
    "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
}


# The last line of a script whose end a test waits for.
THE_END = "that was all"


@dataclass(frozen=True)
class Cluster:
    """An API server with one node, on which kubelet uses crisp."""

    plane: ControlPlane
    kubelet: Kubelet
    node: Node
    image: str
    api: httpx.Client

    # Pods

    @contextmanager
    def pod(self, spec: Object, **metadata: Any) -> Iterator[str]:
        """Runs a pod for as long as the block lasts, and gives its name.

        Afterwards the API server no longer has it, which means that kubelet has ended all of it.
        """
        name = self.create(spec, **metadata)
        try:
            yield name
        finally:
            self.delete(name)

    def create(self, spec: Object, **metadata: Any) -> str:
        """Creates a pod on the node and returns its name.

        The default image of `containers` is the one with a web server.
        """
        name = metadata.pop("name", f"pod-{uuid.uuid4().hex[:8]}")
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            container.setdefault("image", self.image)
        spec = {
            "nodeName": self.kubelet.name,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            **spec,
        }
        body = {"metadata": {"name": name, **metadata}, "spec": spec}
        self.said(self.api.post("/api/v1/namespaces/default/pods", json=body))
        return str(name)

    def delete(self, name: str) -> None:
        """Deletes a pod and waits until kubelet has ended it."""
        self.api.delete(f"/api/v1/namespaces/default/pods/{name}")
        wait_for(lambda: self.api.get(f"/api/v1/namespaces/default/pods/{name}").status_code == 404, seconds=60)

    def get(self, name: str) -> Object:
        """Returns a pod as the API server has it."""
        return self.said(self.api.get(f"/api/v1/namespaces/default/pods/{name}"))

    def patch(self, name: str, change: Object, subresource: str = "") -> Object:
        """Changes a pod (a strategic merge patch)."""
        path = f"/api/v1/namespaces/default/pods/{name}{subresource and '/' + subresource}"
        return self.said(
            self.api.patch(path, json=change, headers={"content-type": "application/strategic-merge-patch+json"})
        )

    def put(self, kind: str, name: str, **fields: Any) -> None:
        """Creates or replaces a ConfigMap, Secret or the like."""
        path = f"/api/v1/namespaces/default/{kind}"
        body = {"metadata": {"name": name}, **fields}
        if self.api.put(f"{path}/{name}", json=body).status_code == 404:
            self.said(self.api.post(path, json=body))

    @staticmethod
    def said(answer: httpx.Response) -> Object:
        """Returns the object of a successful answer; AssertionError has the text of another one."""
        assert answer.is_success, f"{answer.status_code}: {answer.text}"
        found: Object = answer.json()
        return found

    # Waiting

    def wait(self, name: str, wanted: Callable[[Object], Any], seconds: float = 60) -> Object:
        """Waits for a status as wanted and returns the pod; fails with the last status."""
        last: Object = {}

        def ask() -> Object | None:
            nonlocal last
            last = self.get(name)
            return last if wanted(last.get("status", {})) else None

        try:
            return wait_for(ask, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {json.dumps(last.get('status'), indent=1)[:4000]}") from error

    def ready(self, name: str) -> Object:
        """Waits until all containers of the pod are ready, and returns the pod."""
        return self.wait(name, is_ready)

    def output(self, name: str, container: str = "main") -> str:
        """Returns what a script of `then_sleeps` printed, once it has ended.

        A container is ready as soon as it runs, not when its script has come to its end.
        """
        self.ready(name)
        end = f"{THE_END}\n"
        text = wait_for(lambda: text if (text := self.kubectl("logs", name, "-c", container)).endswith(end) else None)
        return text.removesuffix(end)

    def ended(self, name: str) -> Object:
        """Waits until the pod is Succeeded or Failed, and returns it."""
        return self.wait(name, lambda status: status.get("phase") in ("Succeeded", "Failed"))

    def events(self, name: str) -> list[Object]:
        """Returns the events about a pod."""
        answer = self.api.get(
            "/api/v1/namespaces/default/events", params={"fieldSelector": f"involvedObject.name={name}"}
        )
        return list(self.said(answer)["items"])

    def event(self, name: str, reason: str, text: str = "", seconds: float = 60) -> Object:
        """Waits for an event of this reason with this text in its message, and returns it."""
        return wait_for(
            lambda: next(
                (event for event in self.events(name) if event["reason"] == reason and text in event["message"]), None
            ),
            seconds=seconds,
        )

    # kubectl

    def kubectl(self, *words: str, stdin: str = "", code: int = 0, environment: Mapping[str, str] | None = None) -> str:
        """Runs a kubectl that must end with this code, and returns its standard output."""
        done = subprocess.run(
            self.command(*words), input=stdin, capture_output=True, text=True, check=False, timeout=90 * clone.SLOWNESS,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def command(self, *words: str) -> list[str]:
        """Returns a command line of kubectl."""
        config = self.plane.kubeconfig("admin", "/O=system:masters/CN=admin")
        return [str(golang.program("kubectl")), "--kubeconfig", str(config), *words]

    def cgroups(self, pod: Object, controller: str) -> Path:
        """Returns the folder of a pod's cgroup, on version 1 in this controller's hierarchy."""
        base = ROOT if VERSION_2 else ROOT / controller
        uid = pod["metadata"]["uid"]
        found = [
            path
            for spelled in (uid, uid.replace("-", "_"))
            for path in base.glob(f"{self.node.names.cgroup.lstrip('/')}/**/*{spelled}*")
        ]
        return min(found, key=lambda path: len(path.parts))


@contextmanager
def running(folder: Path, world: World) -> Iterator[Cluster]:
    """Runs a cluster in a folder. At the end the node must have no trace of a pod."""
    authority = Authority(folder / "pki")
    with (
        started(Node(folder / "node"), world.image) as node,
        control_plane.running(folder / "plane", authority) as plane,
    ):
        kubeconfig = plane.kubeconfig("kubelet", "/O=system:masters/CN=system:node:localhost")
        kubelet = Kubelet(node, folder / "kubelet", SETTINGS, authority, kubeconfig)
        with httpx.Client(
            base_url=plane.url, verify=authority.client_context(), timeout=60 * clone.SLOWNESS, trust_env=False
        ) as api:
            try:
                kubelet.start()
                wait_for(lambda: api.get(f"/api/v1/nodes/{kubelet.name}").is_success, seconds=60)
                yield Cluster(plane, kubelet, node, world.image, api)
            finally:
                kubelet.end()


def is_ready(status: Object) -> bool:
    """Tells whether a pod's status has the condition Ready."""
    return any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in status.get("conditions", [])
    )


def manifest(kubelet: Kubelet, image: str, spec: Object, name: str = "static") -> str:
    """Has kubelet run a static pod, and returns its name on this node."""
    for container in spec["containers"]:
        container.setdefault("image", image)
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec}
    beside = kubelet.root / f"{name}.json"
    beside.write_text(json.dumps(body))
    beside.rename(kubelet.manifests / f"{name}.json")
    return f"{name}-{kubelet.name}"


def static_pod(
    kubelet: Kubelet, name: str, wanted: Callable[[Object], Any] | None = None, seconds: float = 60
) -> Object:
    """Waits until kubelet's own API has a static pod as wanted, by default ready."""

    def ask() -> Object | None:
        found = next((pod for pod in kubelet.pods() if pod["metadata"]["name"] == name), None)
        return found if found is not None and (wanted or is_ready)(found["status"]) else None

    try:
        return wait_for(ask, seconds=seconds, ignore=httpx.HTTPError)
    except AssertionError as error:
        raise AssertionError(
            f"{error}; kubelet has {json.dumps(kubelet.pods())[:3000]}; its log ends:\n{kubelet.log()[-6000:]}"
        ) from error


def shell(script: str, name: str = "main", **more: Any) -> Object:
    """Returns a container that runs a script."""
    return {"name": name, "command": ["sh", "-c", script], **more}


def then_sleeps(script: str, name: str = "main", **more: Any) -> Object:
    """Returns a container that runs a script and then sleeps; `Cluster.output` waits for the end.

    All output goes through one pipe. Of two pipes conmon may log the later line first, and the end
    would not be the last line.
    """
    return shell(f"exec 2>&1; {script}; echo {THE_END}; exec sleep 600", name, **more)


def container_status(status: Object, name: str = "main") -> Object:
    """Returns one container's part of a pod's status, or {} if there is none yet."""
    every = [
        *status.get("containerStatuses", []),
        *status.get("initContainerStatuses", []),
        *status.get("ephemeralContainerStatuses", []),
    ]
    return next((found for found in every if found["name"] == name), {})


def waiting(status: Object, name: str = "main") -> Object:
    """Returns a container's waiting state, or {} if it is not waiting."""
    found: Object = container_status(status, name).get("state", {}).get("waiting", {})
    return found


def terminated(status: Object, name: str = "main") -> Object:
    """Returns a container's terminated state, or {} if it has not ended."""
    found: Object = container_status(status, name).get("state", {}).get("terminated", {})
    return found
