"""What a plugin does for a pod, whoever carries it out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from crisp_proto.net import AttachmentRequest
from net_svc.cni import PodRef, Result
from net_svc.nftables import HostPort, Masquerade

Cleanup = Callable[[], Coroutine[Any, Any, None]]
"""Work that may run after the caller has got its answer."""


class Plugin(ABC):
    """One plugin of one network (CNI spec section 2)."""

    @abstractmethod
    async def add(self, pod: PodRef, previous: Result | None) -> Result | None:
        """Does ADD and returns the result for the next plugin.

        `previous` is the result of the plugin before, None for the first one.
        A failed ADD leaves what it made; `delete` undoes it. Raises CrispError.
        """

    @abstractmethod
    async def delete(self, pod: PodRef) -> Cleanup | None:
        """Does DEL while the pod's namespace still exists; succeeds if there is nothing to undo.

        The returned work, if any, runs once the namespace and the attachment's row are gone.
        Raises CrispError.
        """

    def masquerades(self) -> Sequence[Masquerade]:
        """Returns the subnets that our nftables table masquerades. Raises FailedPrecondition."""
        return ()

    def host_ports(self, request: AttachmentRequest, ips: Sequence[str]) -> Sequence[HostPort]:
        """Returns the host ports of a pod with these addresses that our nftables table forwards."""
        return ()

    async def collect_garbage(self, attached: Callable[[], Iterable[str]]) -> Sequence[str]:
        """Removes interfaces that a killed predecessor left, and returns their names.

        `attached` returns the namespace paths of all attachments at the time of the call. A row is
        written before its interface is made, so `attached` must be called after the interfaces have
        been listed.
        """
        return ()
