"""crispctl: what an operator asks a node, service by service. It speaks REST to the services' sockets, as curl would."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from crisp_proto.streams import LogRequest
from crispctl import streams, tables
from crispctl.node import Node
from servicekit.errors import CrispError, InvalidArgument

Command = Callable[[Node, argparse.Namespace, Console], Awaitable[int]]


async def status(node: Node, _options: argparse.Namespace, console: Console) -> int:
    """Each service's replicas and whether they are ready; exit code 1 if one is not."""
    states = await node.states()
    console.print(tables.states(states))
    return 0 if all(state.fault is None for state in states) else 1


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
    """What happened to containers and pods, oldest first."""
    found = await node.events(options.after)
    console.print(tables.events(found))
    while options.follow:
        cursor = found[-1].cursor if found else options.after
        found = await node.events(cursor, wait=20) or found
        for event in found:
            if event.cursor > cursor:
                print(*tables.event(event), flush=True)
    return 0


async def logs(node: Node, options: argparse.Namespace, _console: Console) -> int:
    """A container's output, from its log."""
    request = LogRequest(
        follow=options.follow, tail=options.tail, since=_moment(options.since) if options.since else ""
    )
    return await streams.logs(node, options.container, request, timestamps=options.timestamps)


async def execute(node: Node, options: argparse.Namespace, _console: Console) -> int:
    """Runs a command in a container, with its exit code as ours."""
    return await streams.execute(
        node, options.container, options.words, interactive=options.stdin, terminal=options.tty
    )


async def attach(node: Node, options: argparse.Namespace, _console: Console) -> int:
    """Joins this terminal to a container's output, and with -i to its input; Ctrl-P Ctrl-Q leaves a container with a terminal alone again."""
    return await streams.attach(node, options.container, interactive=options.stdin)


async def port_forward(node: Node, options: argparse.Namespace, _console: Console) -> int:
    """Passes connections to ports of this machine on to a pod's."""
    return await streams.port_forward(node, options.pod, options.ports, options.address)


async def top(node: Node, options: argparse.Namespace, console: Console) -> int:
    """What containers use, the busiest first."""
    before = await node.usages()
    await asyncio.sleep(options.seconds)
    console.print(tables.top(*await asyncio.gather(node.pods(), node.containers()), before, await node.usages()))
    return 0


def _moment(text: str) -> str:
    """90s, 5m, 2h, 1d ago, or a time with an offset. Raises InvalidArgument."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if text[-1:] in units and text[:-1].isdecimal():
            return (datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * units[text[-1]])).isoformat()
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidArgument(
            f"--since {text!r}: write it as 90s, 5m, 2h, 1d, or as 2026-11-24T12:00:00+00:00", field="--since"
        ) from error
    return (moment if moment.tzinfo else moment.astimezone()).isoformat()


COMMANDS: dict[str, Command] = {
    "status": status,
    "pods": pods,
    "containers": containers,
    "images": images,
    "pull": pull,
    "load": load,
    "events": events,
    "logs": logs,
    "exec": execute,
    "attach": attach,
    "port-forward": port_forward,
    "top": top,
}


def main(arguments: list[str] | None = None) -> int:
    """The command crispctl."""
    parser = argparse.ArgumentParser(prog="crispctl", description=__doc__)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("/run/crisp"), help="where the services' sockets are (default /run/crisp)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=(function.__doc__ or "").partition(".")[0])
        for name, function in COMMANDS.items()
    }
    parsers["pull"].add_argument("reference")
    parsers["load"].add_argument("path", type=Path, help="a folder or a tar")
    parsers["load"].add_argument("--name", default="", help="reference for an image whose layout gives it none")
    parsers["events"].add_argument(
        "--after", type=int, default=0, metavar="CURSOR", help="only events later than this one"
    )
    parsers["events"].add_argument("-f", "--follow", action="store_true", help="go on with those that come")
    for name in ("logs", "exec", "attach"):
        parsers[name].add_argument("container", help="its name, or the beginning of its id")
    parsers["logs"].add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    parsers["logs"].add_argument("--tail", type=int, metavar="N", help="only the last N lines")
    parsers["logs"].add_argument(
        "--since", default="", metavar="TIME", help="only from then on: 90s, 5m, 2h, 1d ago, or a time"
    )
    parsers["logs"].add_argument("-t", "--timestamps", action="store_true", help="show when each line was written")
    for name in ("exec", "attach"):
        parsers[name].add_argument("-i", "--stdin", action="store_true", help="pass our input on")
    parsers["exec"].add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parsers["exec"].add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments"
    )
    parsers["port-forward"].add_argument("pod", help="its name, or the beginning of its id")
    parsers["port-forward"].add_argument("ports", nargs="+", metavar="[LOCAL:]REMOTE")
    parsers["port-forward"].add_argument(
        "--address", default="127.0.0.1", help="address to listen on (default 127.0.0.1)"
    )
    parsers["top"].add_argument("--seconds", type=float, default=1, help="time between the two readings (default 1)")
    options = parser.parse_args(arguments)
    if options.command == "exec" and not options.words:
        parsers["exec"].error("give the command to run")
    try:
        return asyncio.run(_run(options))
    except KeyboardInterrupt:
        return 130
    except CrispError as error:
        print(f"crispctl: {error.message}", file=sys.stderr)
        return 1


async def _run(options: argparse.Namespace) -> int:
    async with Node.at(options.run_dir) as node:
        return await COMMANDS[options.command](node, options, Console())


if __name__ == "__main__":
    raise SystemExit(main())
