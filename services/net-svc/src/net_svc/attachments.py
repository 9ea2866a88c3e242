"""Attachments: a pod's network namespace and what connects it, made by a CNI configuration.

    <run>/netns/<pod id>     the namespace, pinned

The row with the request and the configuration comes before any of it and goes last (CNI spec section 4: what was added by a
configuration is deleted by the same one). A row without a record stands for an ADD that died: it is deleted, then done anew.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from crisp_proto.net import (
    Attachment,
    AttachmentList,
    AttachmentRequest,
    Interface,
    InterfaceUsage,
    NetworkStatus,
    NetworkUsage,
    NetworkUsages,
)  # fmt: skip
from crisp_proto.streams import Channel, DialRequest, failed
from net_svc import bridge, cni, firewall, forwarding, netns
from net_svc.cni import Document, NetworkConfiguration, PodRef, Result
from net_svc.firewall import Firewall
from net_svc.settings import NetSettings
from net_svc.store import Row, Store
from servicekit import logs
from servicekit.channels import Channels
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, FailedPrecondition, NotFound
from servicekit.linux import namespaces, syscalls
from servicekit.linux.namespaces import in_own_thread
from servicekit.tasks import KeyedQueue

_log = logs.get()


class Attachments:
    """All attachments of this node."""

    def __init__(self, store: Store, settings: NetSettings, run: Path) -> None:
        self._store = store
        self._settings = settings
        self._netns = run / "netns"
        self._netns.mkdir(parents=True, exist_ok=True)
        self._queue = KeyedQueue()
        self._background: set[asyncio.Task[None]] = set()
        self.firewall = Firewall(settings.nft_table, self._render_firewall)

    # Which network

    def configuration(self, handler: str = "") -> NetworkConfiguration:
        """The network that new pods of a runtime handler are connected to. Raises FailedPrecondition if there is no usable one."""
        own = self._settings.handler_conf_dirs.get(handler)
        if own is not None:
            of_handler = cni.load_configuration(own)
            if of_handler is None:
                raise FailedPrecondition(
                    f"no CNI configuration in {own}, the folder of runtime handler {handler!r}",
                    field="handler_conf_dirs",
                )
            return of_handler
        found = cni.load_configuration(self._settings.cni_conf_dir)
        if found is not None:
            return found
        if not self._settings.builtin_network:
            raise FailedPrecondition(
                f"no CNI configuration in {self._settings.cni_conf_dir}: install a network add-on, or set net.builtin_network = true",
                field="cni_conf_dir",
            )
        return self._builtin()

    def _builtin(self) -> NetworkConfiguration:
        pod_cidr = self._store.node("pod_cidr")
        subnets = pod_cidr.split(",") if pod_cidr else self._settings.builtin_subnets
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": subnet.strip()}] for subnet in subnets],
            "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
        }
        plugin = {
            "type": "bridge",
            "bridge": self._settings.builtin_bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": ipam,
        }
        return NetworkConfiguration(
            "crisp", "1.0.0", (plugin, {"type": "portmap", "capabilities": {"portMappings": True}}), "built in"
        )

    def status(self) -> NetworkStatus:
        """Whether pods can be connected (CRI: the condition NetworkReady)."""
        try:
            network = self.configuration()
        except CrispError as error:
            return NetworkStatus(ready=False, reason="NetworkPluginNotReady", message=error.message)
        return NetworkStatus(ready=True, network=network.name, configuration=network.to_json())

    def set_pod_cidr(self, pod_cidr: str) -> None:
        """kubelet's UpdateRuntimeConfig: the built-in network gives its addresses from here from now on."""
        self._store.set_node("pod_cidr", pod_cidr)

    # ADD

    async def attach(self, attachment_id: str, request: AttachmentRequest) -> Attachment:
        """Gives a pod its namespace and connects it; the same id again answers what there is."""
        netns.check_sysctls(request.sysctls)
        return await self._queue.run(attachment_id, "attach", lambda: self._attach(attachment_id, request))

    async def _attach(self, attachment_id: str, request: AttachmentRequest) -> Attachment:
        row = self._store.get(attachment_id)
        if row is not None and row.record:
            return Attachment.model_validate_json(row.record)
        if row is not None:
            await self._detach_row(row)
        network = self.configuration(request.handler)
        self._store.begin(attachment_id, request.model_dump_json(), network.to_json())
        crashpoint("attachment-recorded")
        path = self._netns / attachment_id
        try:
            await netns.create(path, request.sysctls, Path(request.user_namespace) if request.user_namespace else None)
            crashpoint("netns-pinned")
            result = await self._add_all(network, self._pod(attachment_id, request))
            crashpoint("attachment-added")
            attachment = _attachment(attachment_id, str(path), network.name, result)
            self._store.complete(attachment_id, attachment.model_dump_json())
            await self.firewall.refresh()
        except BaseException:
            await self._detach(attachment_id)
            raise
        _log.info("attached", attachment=attachment_id, network=network.name, ips=attachment.ips)
        return attachment

    async def _add_all(self, network: NetworkConfiguration, pod: PodRef) -> Result:
        result: Result | None = None
        for plugin in network.plugins:
            result = await self._add(plugin, network, pod, result)
        return result or Result(network.version)

    async def _add(
        self, plugin: Document, network: NetworkConfiguration, pod: PodRef, previous: Result | None
    ) -> Result | None:
        if self._is_native_bridge(plugin, network):
            return await bridge.add(plugin, network.name, network.version, pod, self._store)
        if self._is_native_portmap(plugin):
            return previous  # the firewall is rendered from the attachments
        return await cni.execute(
            "ADD", plugin, network, pod, previous, self._settings.cni_bin_dirs, self._settings.cni_timeout
        )

    def _is_native_bridge(self, plugin: Document, network: NetworkConfiguration) -> bool:
        """Whether we do this plugin's ADD and DEL: a bridge that comes first, since ours takes no previous result."""
        return self._settings.native_plugins and plugin is network.plugins[0] and bridge.understands(plugin)

    def _is_native_portmap(self, plugin: Document) -> bool:
        return self._settings.native_plugins and firewall.understands_portmap(plugin)

    # DEL

    async def detach(self, attachment_id: str) -> None:
        """Disconnects a pod and removes its namespace; fine if there is none."""
        await self._queue.run(attachment_id, "detach", lambda: self._detach(attachment_id))

    async def _detach(self, attachment_id: str) -> None:
        row = self._store.get(attachment_id)
        if row is not None:
            await self._detach_row(row)
            _log.info("detached", attachment=attachment_id)

    async def _detach_row(self, row: Row) -> None:
        network = cni.parse_configuration(row.network, f"attachment {row.id}")
        request = AttachmentRequest.model_validate_json(row.request)
        pod = self._pod(row.id, request)
        for plugin in reversed(network.plugins):
            if not (self._is_native_bridge(plugin, network) or self._is_native_portmap(plugin)):
                await self._execute_delete(plugin, network, pod)
        crashpoint("attachment-deleted")
        port = bridge.port_of(pod) if self._is_native_bridge(network.plugins[0], network) else None
        await asyncio.to_thread(netns.remove, Path(pod.netns))
        crashpoint("netns-removed")
        self._store.remove(row.id)
        await self.firewall.refresh()
        if port is not None:
            self._in_background(bridge.delete(port))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets something end behind the answer. The veth goes with its namespace anyway, but the kernel takes some 15 ms for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Waits for what goes on behind answers that were given."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def sweep(self) -> None:
        """At start: deletes pods' interfaces of the bridges we use whose attachment is gone (a killed predecessor was about to)."""
        interfaces = bridge.host_interfaces()  # before the rows: an interface's row is older than the interface
        known = {bridge.host_interface(str(self._netns / row.id)) for row in self._store.all()}
        try:
            bridges = {bridge.name_of(plugin) for plugin in self.configuration().plugins if bridge.understands(plugin)}
        except CrispError:
            return
        for index, interface in interfaces:
            if interface not in known and bridge.bridge_of(interface) in bridges:
                _log.warning("leftover-removed", kind="interface", id=interface)
                await bridge.delete(index)

    async def _execute_delete(self, plugin: Document, network: NetworkConfiguration, pod: PodRef) -> None:
        try:
            await cni.execute(
                "DEL", plugin, network, pod, None, self._settings.cni_bin_dirs, self._settings.cni_timeout
            )
        except FailedPrecondition as error:
            # A plugin that has been uninstalled must not keep pods from being removed (CNI spec section 2: DEL should succeed).
            _log.error("cni-delete-skipped", plugin=plugin["type"], attachment=pod.id, error=error.message)

    # Looking

    def get(self, attachment_id: str) -> Attachment:
        """An attachment. Raises NotFound."""
        row = self._store.get(attachment_id)
        if row is None or not row.record:
            raise NotFound(f"there is no attachment {attachment_id}")
        return Attachment.model_validate_json(row.record)

    def all(self) -> AttachmentList:
        """All attachments, and the age of every row, also of those that are not complete."""
        rows = self._store.all()
        now = time.time()
        return AttachmentList(
            attachments=[Attachment.model_validate_json(row.record) for row in rows if row.record],
            ages={row.id: now - row.created for row in rows},
        )

    async def dial(self, request: DialRequest, channels: Channels) -> None:
        """Joins the client's channels to a TCP port on the pod's loopback interface."""
        try:
            namespace = Path(self.get(request.pod_id).netns) if request.pod_id else None
        except NotFound as error:
            await channels.send(Channel.ERROR, failed(error.message))
            return
        await forwarding.forward(namespace, request.port, channels)

    async def usage(self) -> NetworkUsages:
        """Interface counters of all pods, read in one thread that visits their namespaces."""
        paths = {row.id: self._netns / row.id for row in self._store.all() if row.record}
        return NetworkUsages(pods=await in_own_thread(lambda: _read_usages(paths)))

    def _pod(self, attachment_id: str, request: AttachmentRequest) -> PodRef:
        mappings = tuple(
            {
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": mapping.protocol.value.lower(),
                **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
            }
            for mapping in request.port_mappings
            if mapping.host_port
        )
        return PodRef(
            attachment_id, str(self._netns / attachment_id), request.namespace, request.name, request.uid, mappings
        )

    def _render_firewall(self) -> str:
        rows = self._store.all() if self._settings.native_plugins else []
        networks = [cni.parse_configuration(text, "stored") for text in dict.fromkeys(row.network for row in rows)]
        if self._settings.native_plugins:
            try:
                networks.append(self.configuration())
            except CrispError:
                pass  # said by status() and by the next attach
        return firewall.render(self._settings.nft_table, networks, rows)


def _attachment(attachment_id: str, path: str, network: str, result: Result) -> Attachment:
    names: Iterable[tuple[int, Document]] = enumerate(result.interfaces)
    inside = {index: entry for index, entry in names if entry.get("sandbox")}
    addresses = [(ip.get("interface"), str(ip["address"])) for ip in result.ips]
    interfaces = [
        Interface(
            name=entry["name"],
            mac=entry.get("mac", ""),
            addresses=[address for owner, address in addresses if owner == index],
        )
        for index, entry in inside.items()
    ]
    return Attachment(
        id=attachment_id,
        netns=path,
        network=network,
        interfaces=interfaces,
        ips=[address.partition("/")[0] for _, address in addresses],
    )


def _read_usages(paths: dict[str, Path]) -> dict[str, NetworkUsage]:
    usages = {}
    for pod_id, path in paths.items():
        try:
            namespaces.enter(path, syscalls.CLONE_NEWNET)
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        except OSError:
            continue  # removed while we looked
        interfaces = []
        for line in lines:
            name, _, numbers = line.partition(":")
            fields = numbers.split()
            if name.strip() != "lo":
                interfaces.append(
                    InterfaceUsage(
                        name=name.strip(),
                        rx_bytes=int(fields[0]),
                        rx_packets=int(fields[1]),
                        rx_errors=int(fields[2]),
                        rx_dropped=int(fields[3]),
                        tx_bytes=int(fields[8]),
                        tx_packets=int(fields[9]),
                        tx_errors=int(fields[10]),
                        tx_dropped=int(fields[11]),
                    )
                )
        usages[pod_id] = NetworkUsage(timestamp=time.time_ns(), interfaces=interfaces)
    return usages
