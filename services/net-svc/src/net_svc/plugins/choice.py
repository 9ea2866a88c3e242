"""Decides how each plugin of a network is carried out: natively, or by its executable."""

from net_svc.cni import Document, NetworkConfiguration
from net_svc.plugins import bridge, portmap
from net_svc.plugins.bridge import NativeBridge
from net_svc.plugins.executable import ExecutablePlugin
from net_svc.plugins.interface import Plugin
from net_svc.plugins.portmap import NativePortmap
from net_svc.settings import NetSettings
from net_svc.store import Store


class Plugins:
    """Makes the plugins of networks."""

    def __init__(self, store: Store, settings: NetSettings) -> None:
        self._store = store
        self._settings = settings

    def of(self, network: NetworkConfiguration) -> list[Plugin]:
        """Returns a network's plugins in the order of ADD."""
        first, *others = network.plugins
        return [self._first(first, network), *(self._later(plugin, network) for plugin in others)]

    def _first(self, plugin: Document, network: NetworkConfiguration) -> Plugin:
        """Only the first plugin may be our bridge, which takes no previous result."""
        if self._settings.native_plugins and bridge.understands(plugin):
            return NativeBridge(plugin, network, self._store)
        return self._later(plugin, network)

    def _later(self, plugin: Document, network: NetworkConfiguration) -> Plugin:
        if self._settings.native_plugins and portmap.understands(plugin):
            return NativePortmap()
        return ExecutablePlugin(plugin, network, self._settings.cni_bin_dirs, self._settings.cni_timeout)
