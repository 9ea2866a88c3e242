"""CNI configurations like those that network add-ons write, and a plugin that is slow."""

import json
import sys
from pathlib import Path

from crisplab.node import Node


def conflist(node: Node, **plugin: object) -> str:
    """Returns a configuration list for the node's own bridge and subnet."""
    bridge = {
        "type": "bridge",
        "bridge": node.names.bridge,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": node.names.subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(node.root / "leases"),
        },
        **plugin,
    }
    return json.dumps(
        {
            "cniVersion": "0.4.0",
            "name": "addon",
            "plugins": [bridge, {"type": "tuning"}, {"type": "portmap", "capabilities": {"portMappings": True}}],
        }
    )


def use(node: Node, plugin: Path) -> None:
    """Adds a plugin at the end of the node's CNI configuration.

    The plugin's folder must be one of net.cni_bin_dirs.
    """
    plugin.chmod(0o755)
    document = json.loads(conflist(node))
    document["plugins"].append({"type": plugin.name})
    (node.root / f"cni/10-{plugin.name}.conflist").write_text(json.dumps(document))


def slow(node: Node, folder: Path) -> tuple[Path, Path]:
    """Makes the node's pods wait for a plugin in this folder.

    The folder must be one of net.cni_bin_dirs. Returns two files: the plugin makes the first when
    it is asked to add a pod, and answers once the second exists.
    """
    asked, go = folder / "asked", folder / "go"
    plugin = folder / "slow"
    plugin.write_text(
        f"#!{sys.executable} -I\n"
        "import json, os, pathlib, sys, time\n"
        "if os.environ['CNI_COMMAND'] == 'ADD':\n"
        f"    pathlib.Path({str(asked)!r}).touch()\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.05)\n"
        "    print(json.dumps(json.load(sys.stdin)['prevResult']))\n"
    )
    use(node, plugin)
    return asked, go
