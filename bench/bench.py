"""Measures this checkout, and a peer if one is named, against the budgets (`make bench`).

    python bench/bench.py [--rounds N] [--peer NAME=SOCKET | --containerd] [--only GROUP,…]

--peer names the socket of a runtime that is running and can pull by plain HTTP from a registry on
127.0.0.1. --containerd starts Debian's containerd, which is unpacked beside the checkout. crisp and
the peer are measured alternately in one run, since the machines are noisy.
"""

import argparse
import contextlib
import sys
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import measures
import peers
from measures import Subject

from crisplab import images, registry, scratch
from crisplab.cri import Cri
from crisplab.node import SERVICES, Node

GROUPS = {
    "pods": lambda subject, rounds: measures.one_pod_at_a_time(subject, rounds),
    "throughput": lambda subject, rounds: measures.pods_per_second(subject),
    "many": lambda subject, rounds: measures.with_many_pods(subject, rounds),
    "pulls": lambda subject, rounds: measures.pulls(subject, rounds),
    "log": lambda subject, rounds: measures.log_speed(subject),
}


def main() -> int:
    options = _options()
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        subjects = _subjects(stack, options)
        for subject in subjects:
            subject.client.pull(subject.image)
        figures: dict[str, dict[str, float]] = {subject.name: {} for subject in subjects}
        for group in options.only.split(","):
            for subject in subjects:
                console.print(f"[dim]{group}: {subject.name} …[/dim]")
                figures[subject.name] |= GROUPS[group](subject, options.rounds)
    _print(figures)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="repetitions of each figure; the median counts")
    parser.add_argument("--peer", metavar="NAME=SOCKET", help="a runtime to measure beside crisp")
    parser.add_argument("--containerd", action="store_true", help="start Debian's containerd as the peer")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups of figures, from: {', '.join(GROUPS)}")
    return parser.parse_args()


def _subjects(stack: contextlib.ExitStack, options: argparse.Namespace) -> list[Subject]:
    """Starts a registry, crisp and the peer, if there is one; crisp is the first subject."""
    root = stack.enter_context(scratch.folder("bench"))
    address = stack.enter_context(registry.running(root / "registry"))
    images.busybox_image().push(address, "bench/busybox", "1")
    node = Node(root / "node")
    stack.callback(node.destroy)
    node.start()
    subjects = [_crisp(stack, node, address)]
    if options.containerd:
        subjects.append(stack.enter_context(peers.containerd(root / "containerd", address)))
    elif options.peer:
        name, _, socket = options.peer.partition("=")
        client = stack.enter_context(Cri(socket))
        image = f"{address}/bench/busybox:1"
        subjects.append(Subject(name, client, address, image, list, list, root, is_peer=True))
    return subjects


def _crisp(stack: contextlib.ExitStack, node: Node, address: str) -> Subject:
    client = stack.enter_context(Cri(node.socket))
    return Subject(
        "crisp",
        client,
        address,
        f"{address}/bench/busybox:1",
        lambda: [node.service_pid(name) for name in SERVICES],
        node.helper_pids,
        node.root.parent,
    )


def _print(figures: dict[str, dict[str, float]]) -> None:
    budgets = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text())
    table = Table(title=f"crisp against its budgets (load average {measures.load_average()})")
    peer = next((name for name in figures if name != "crisp"), None)
    comparison = [] if peer is None else [peer, f"crisp / {peer}"]
    for column in ("what", "unit", "crisp", *comparison, "must", "goal", "CRI-O 1.37*", "containerd 2.4*"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for key, budget in budgets.items():
        own = figures["crisp"].get(key)
        if own is None:
            continue
        colour = "green" if _within(own, budget) else "red"
        table.add_row(
            budget["title"],
            budget["unit"],
            f"[{colour}]{_number(own)}[/{colour}]",
            *([] if peer is None else _compared(own, figures[peer].get(key))),
            *(_number(budget[name]) for name in ("must", "goal", "crio", "containerd")),
        )
    Console(width=150).print(table)
    print("* measured once, on another machine: compare ratios, not figures")


def _within(own: float, budget: dict[str, Any]) -> bool:
    return bool(own >= budget["must"] if budget.get("more_is_better") else own <= budget["must"])


def _compared(own: float, theirs: float | None) -> list[str]:
    """Returns the peer's figure, and the ratio of ours to it."""
    return [_number(theirs), f"{own / theirs:.2f}" if theirs else "-"]


def _number(value: float | None) -> str:
    """Formats a figure with about three digits."""
    if value is None:
        return "-"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
