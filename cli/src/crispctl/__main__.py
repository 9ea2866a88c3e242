"""crispctl: what an operator asks a node, service by service. It speaks REST to the services' sockets, as curl would."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from crispctl import tables
from crispctl.node import Node
from servicekit.errors import CrispError

Command = Callable[[Node, argparse.Namespace, Console], Awaitable[int]]


async def status(node: Node, _options: argparse.Namespace, console: Console) -> int:
    """Each service's replicas and whether they are ready; exit code 1 if one is not."""
    states = await node.states()
    console.print(tables.states(states))
    return 0 if all(state.fault == "" for state in states) else 1


async def pods(node: Node, _options: argparse.Namespace, console: Console) -> int:
    """Pods with their state and addresses."""
    console.print(tables.pods(*await asyncio.gather(node.pods(), node.attachments())))
    return 0


async def containers(node: Node, _options: argparse.Namespace, console: Console) -> int:
    """Containers with their state, image and pod."""
    console.print(tables.containers(*await asyncio.gather(node.pods(), node.containers(), node.processes())))
    return 0


async def images(node: Node, _options: argparse.Namespace, console: Console) -> int:
    """Images with their names and sizes."""
    console.print(tables.images(await node.images()))
    return 0


async def pull(node: Node, options: argparse.Namespace, console: Console) -> int:
    """Fetches an image from its registry."""
    console.print((await node.pull(options.reference)).id)
    return 0


async def load(node: Node, options: argparse.Namespace, console: Console) -> int:
    """Takes the images of an OCI layout, or of a tar of one, from this machine's disk."""
    for image in await node.load(options.path.resolve(), options.name):
        console.print(image.id, *image.repo_tags)
    return 0


async def events(node: Node, options: argparse.Namespace, console: Console) -> int:
    """What happened to containers, oldest first."""
    console.print(tables.events(await node.events(options.after)))
    return 0


COMMANDS: dict[str, Command] = {
    "status": status,
    "pods": pods,
    "containers": containers,
    "images": images,
    "pull": pull,
    "load": load,
    "events": events,
}


def main(arguments: list[str] | None = None) -> int:
    """The command crispctl."""
    parser = argparse.ArgumentParser(prog="crispctl", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("/run/crisp"), help="where the services' sockets are (default /run/crisp)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=(function.__doc__ or "").partition(".")[0]) for name, function in COMMANDS.items()}
    parsers["pull"].add_argument("reference")
    parsers["load"].add_argument("path", type=Path, help="a folder or a tar")
    parsers["load"].add_argument("--name", default="", help="reference for an image whose layout gives it none")
    parsers["events"].add_argument("--after", type=int, default=0, metavar="CURSOR", help="only events later than this one")
    options = parser.parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except CrispError as error:
        print(f"crispctl: {error.message}", file=sys.stderr)
        return 1


async def _run(options: argparse.Namespace) -> int:
    async with Node.at(options.run_dir) as node:
        return await COMMANDS[options.command](node, options, Console())


if __name__ == "__main__":
    raise SystemExit(main())
