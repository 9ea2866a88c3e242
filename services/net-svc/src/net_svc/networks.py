"""Networks: which one connects new pods, and whether there is one."""

import ipaddress

from crisp_proto.net import NetworkStatus
from net_svc import cni
from net_svc.cni import NetworkConfiguration
from net_svc.settings import NetSettings
from net_svc.store import Store
from servicekit.errors import CrispError, FailedPrecondition, InvalidArgument


class Networks:
    """Chooses the network configuration for new pods."""

    def __init__(self, store: Store, settings: NetSettings) -> None:
        self._store = store
        self._settings = settings

    def choose(self, handler: str = "") -> NetworkConfiguration:
        """Returns the network for new pods of a runtime handler; "" is the default handler.

        A handler's own configuration folder comes first, then net.cni_conf_dir, then the built-in
        network. Raises FailedPrecondition if there is no usable configuration.
        """
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
        pod_cidr = self._store.pod_cidr()
        subnets = pod_cidr.split(",") if pod_cidr else self._settings.builtin_subnets
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": subnet.strip()}] for subnet in subnets],
            "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
        }
        bridge = {
            "type": "bridge",
            "bridge": self._settings.builtin_bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": ipam,
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return NetworkConfiguration("crisp", "1.0.0", (bridge, portmap), "built in")

    def status(self) -> NetworkStatus:
        """Tells whether new pods can be connected (CRI: the condition NetworkReady)."""
        try:
            network = self.choose()
        except CrispError as error:
            return NetworkStatus(ready=False, reason="NetworkPluginNotReady", message=error.message)
        return NetworkStatus(ready=True, network=network.name, configuration=network.to_json())

    def set_pod_cidr(self, pod_cidr: str) -> None:
        """Sets the CIDR of the built-in network for new pods (CRI: UpdateRuntimeConfig).

        A dual-stack CIDR is two subnets joined by a comma; an empty one restores
        net.builtin_subnets. Raises InvalidArgument for what is no CIDR.
        """
        for subnet in pod_cidr.split(",") if pod_cidr else ():
            try:
                ipaddress.ip_network(subnet.strip(), strict=False)
            except ValueError as error:
                raise InvalidArgument(
                    f"pod_cidr = {pod_cidr[:200]!r}: {subnet.strip()[:100]!r} is no subnet like 10.85.0.0/16",
                    field="pod_cidr",
                ) from error
        self._store.set_pod_cidr(pod_cidr)
