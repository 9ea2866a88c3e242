"""Attachments: a pod's network namespace and its connection, made by a CNI configuration.

    <run>/netns/<pod id>     the namespace, pinned

An attachment's row holds the request and the configuration. It is written before anything is made
and removed last, since the configuration that added something must also delete it (CNI spec section
4). A row without a record stands for an interrupted ADD: its remains are deleted, then ADD starts
anew.
"""

import asyncio
import ipaddress
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from crisp_proto.config import PortMapping
from crisp_proto.net import Attachment, AttachmentList, AttachmentRequest, Interface, NetworkUsages
from crisp_proto.streams import Channel, DialRequest, failed
from net_svc import cni, forwarding, netns, usage
from net_svc.cni import Document, NetworkConfiguration, PodRef, Result
from net_svc.firewall import Firewall
from net_svc.networks import Networks
from net_svc.plugins.choice import Plugins
from net_svc.plugins.interface import Cleanup
from net_svc.store import Row, Store
from servicekit import logs
from servicekit.channels import Channels
from servicekit.crashpoints import crashpoint
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument, NotFound
from servicekit.linux import namespaces
from servicekit.places import Places
from servicekit.tasks import KeyedQueue

_log = logs.get()


class Attachments:
    """All attachments of this node."""

    def __init__(
        self,
        store: Store,
        networks: Networks,
        plugins: Plugins,
        firewall: Firewall,
        places: Places,
        default_sysctls: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._networks = networks
        self._plugins = plugins
        self._firewall = firewall
        self._default_sysctls = {name: value for name, _, value in (text.partition("=") for text in default_sysctls)}
        self._places = places
        self._netns = places.netns
        self._netns.mkdir(parents=True, exist_ok=True)
        self._queue = KeyedQueue(places.turns("net-svc"))
        self._background: set[asyncio.Task[None]] = set()

    # ADD

    async def attach(self, attachment_id: str, request: AttachmentRequest) -> Attachment:
        """Gives a pod its namespace and connects it.

        A repeated call returns the existing attachment. Raises InvalidArgument, FailedPrecondition
        without a usable configuration, ResourceExhausted without a free address, Internal if a
        plugin or the kernel fails.
        """
        netns.check_sysctls(request.sysctls)
        _check_host_addresses(request.port_mappings)
        return await self._queue.run(attachment_id, "attach", lambda: self._attach(attachment_id, request))

    async def _attach(self, attachment_id: str, request: AttachmentRequest) -> Attachment:
        row = self._store.get(attachment_id)
        if row is not None:
            if (existing := row.attachment()) is not None:
                return existing
            await self._detach_row(row)
        network = self._networks.choose(request.handler)
        self._store.begin(attachment_id, request.model_dump_json(), network.to_json())
        crashpoint("attachment-recorded")
        path = self._netns / attachment_id
        try:
            owner = self._owner(attachment_id, request)
            await netns.create(path, request.sysctls, owner, self._default_sysctls)
            crashpoint("netns-pinned")
            result = await self._add(network, _pod_ref(attachment_id, path, request))
            crashpoint("attachment-added")
            attachment = _attachment(attachment_id, path, network.name, result)
            self._store.complete(attachment_id, attachment.model_dump_json())
            await self._firewall.refresh()
        except BaseException:
            await self._detach(attachment_id)
            raise
        _log.info("pod-attached", attachment=attachment_id, network=network.name, ips=attachment.ips)
        return attachment

    def _owner(self, pod_id: str, request: AttachmentRequest) -> Path | None:
        """Returns the user namespace that will own the network namespace; None for the node's.

        Raises FailedPrecondition if runtime-svc has not made it.
        """
        if not request.own_user_namespace:
            return None
        path = self._places.user_namespace(pod_id)
        if not namespaces.is_pinned("user", path):
            raise FailedPrecondition(
                f"pod {pod_id} has no user namespace at {path}",
                hint=f"have runtime-svc make the pod first: PUT /v1/pods/{pod_id}",
            )
        return path

    async def _add(self, network: NetworkConfiguration, pod: PodRef) -> Result:
        result: Result | None = None
        for plugin in self._plugins.of(network):
            result = await plugin.add(pod, result)
        return result or Result(network.version)

    # DEL

    async def detach(self, attachment_id: str) -> None:
        """Disconnects a pod and removes its namespace; succeeds if there is none.

        Raises Internal.
        """
        await self._queue.run(attachment_id, "detach", lambda: self._detach(attachment_id))

    async def _detach(self, attachment_id: str) -> None:
        row = self._store.get(attachment_id)
        if row is not None:
            await self._detach_row(row)
            _log.info("pod-detached", attachment=attachment_id)

    async def _detach_row(self, row: Row) -> None:
        path = self._netns / row.id
        cleanups = await self._delete(row, path)
        crashpoint("attachment-deleted")
        await asyncio.to_thread(netns.remove, path)
        crashpoint("netns-removed")
        self._store.remove(row.id)
        await self._firewall.refresh()
        for cleanup in cleanups:
            self._in_background(cleanup)

    async def _delete(self, row: Row, path: Path) -> list[Cleanup]:
        network = cni.parse_configuration(row.network, f"attachment {row.id}")
        pod = _pod_ref(row.id, path, row.attachment_request())
        deleted = [await plugin.delete(pod) for plugin in reversed(self._plugins.of(network))]
        return [cleanup for cleanup in deleted if cleanup is not None]

    def _in_background(self, work: Cleanup) -> None:
        """Starts work that no caller waits for; `close` waits for it."""
        task = asyncio.create_task(work())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Waits for the background work."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def sweep(self) -> None:
        """Removes interfaces that a killed predecessor was about to remove.

        Runs at the start of the service.
        """
        try:
            plugins = self._plugins.of(self._networks.choose())
        except CrispError:
            return  # the network's status reports the fault
        for plugin in plugins:
            for interface in await plugin.collect_garbage(self._attached):
                _log.warning("leftover-removed", kind="interface", id=interface)

    def _attached(self) -> list[str]:
        return [str(self._netns / row.id) for row in self._store.all()]

    # Queries

    def get(self, attachment_id: str) -> Attachment:
        """Returns a complete attachment. Raises NotFound."""
        row = self._store.get(attachment_id)
        attachment = None if row is None else row.attachment()
        if attachment is None:
            raise NotFound(f"there is no attachment {attachment_id}")
        return attachment

    def all(self) -> AttachmentList:
        """Returns all complete attachments, and the ages of all rows, complete or not."""
        rows = self._store.all()
        now = time.time()
        attachments = (row.attachment() for row in rows)
        return AttachmentList(
            attachments=[attachment for attachment in attachments if attachment is not None],
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
        """Returns the interface counters of all attached pods."""
        paths = {row.id: self._netns / row.id for row in self._store.all() if row.record is not None}
        return NetworkUsages(pods=await usage.read(paths))


def _check_host_addresses(mappings: Iterable[PortMapping]) -> None:
    """Raises InvalidArgument for a host address that is no IP address.

    An address with a zone is refused too: the zone may hold any characters, and would reach nft's
    script.
    """
    for mapping in mappings:
        if mapping.host_ip and not _is_address(mapping.host_ip):
            raise InvalidArgument(
                f"host address {mapping.host_ip!r} of port {mapping.host_port} is no IP address",
                field="port_mappings.host_ip",
            )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _pod_ref(attachment_id: str, path: Path, request: AttachmentRequest) -> PodRef:
    mappings = tuple(_port_mapping(mapping) for mapping in request.port_mappings if mapping.host_port)
    return PodRef(attachment_id, str(path), request.namespace, request.name, request.uid, mappings)


def _port_mapping(mapping: PortMapping) -> Document:
    """Returns a port mapping in the form of CNI's capability portMappings."""
    document: Document = {
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": mapping.protocol.value.lower(),
    }
    return {**document, "hostIP": mapping.host_ip} if mapping.host_ip else document


def _attachment(attachment_id: str, path: Path, network: str, result: Result) -> Attachment:
    addresses = [(ip.get("interface"), str(ip["address"])) for ip in result.ips]
    return Attachment(
        id=attachment_id,
        netns=str(path),
        network=network,
        interfaces=[
            _interface(entry, [address for owner, address in addresses if owner == index])
            for index, entry in enumerate(result.interfaces)
            if entry.get("sandbox")
        ],
        ips=[address.partition("/")[0] for _, address in addresses],
    )


def _interface(entry: Document, addresses: Sequence[str]) -> Interface:
    return Interface(name=entry["name"], mac=entry.get("mac", ""), addresses=list(addresses))
