"""systemd's manager over D-Bus: slices and scopes for cgroups.

Sources: org.freedesktop.systemd1(5), systemd's CGROUP_DELEGATION.md.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from servicekit.errors import DeadlineExceeded, FailedPrecondition, Internal, NotFound

_NAME, _PATH, _MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
_EXISTS, _UNKNOWN = "org.freedesktop.systemd1.UnitExists", "org.freedesktop.systemd1.NoSuchUnit"
_SECONDS = 60
Properties = Mapping[str, Variant]


def slice_path(name: str) -> str:
    """Returns the cgroup of a slice: /a.slice/a-b.slice for a-b.slice (systemd.slice(5))."""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: count + 1])}.slice" for count in range(len(parts)))


class Systemd:
    """A connection to the manager, made by the first call and again after it was lost."""

    def __init__(self) -> None:
        self._bus: MessageBus | None = None
        self._connecting = asyncio.Lock()
        self._jobs: dict[str, asyncio.Future[str]] = {}

    async def start_slice(self, name: str, properties: Properties) -> None:
        """Starts a slice, or sets the properties of one that runs."""
        accounting = {f"{kind}Accounting": Variant("b", True) for kind in ("CPU", "Memory", "IO", "Tasks")}
        if (
            not await self._start(name, {"Description": Variant("s", "crisp pod"), **accounting, **properties})
            and properties
        ):
            await self.set_properties(name, properties)

    async def start_scope(self, name: str, slice_name: str, pids: Sequence[int]) -> None:
        """Moves processes into a new scope of a slice.

        A scope of this name that a dead predecessor left is stopped first. Raises Internal.
        """
        properties = {
            "Slice": Variant("s", slice_name),
            "PIDs": Variant("au", list(pids)),
            "Delegate": Variant("b", True),
            "DefaultDependencies": Variant("b", False),
            "CollectMode": Variant("s", "inactive-or-failed"),
        }
        if not await self._start(name, properties):
            await self.stop(name)
            if not await self._start(name, properties):
                raise Internal(f"systemd has a scope {name} already, and it does not stop; see systemctl status {name}")

    async def set_properties(self, name: str, properties: Properties) -> None:
        """Changes properties of a unit until the next boot. Raises NotFound if there is no such unit."""
        reply = await self._send("SetUnitProperties", "sba(sv)", [name, True, _pairs(properties)])
        if reply.error_name == _UNKNOWN:
            raise NotFound(f"systemd has no unit {name}")
        if reply.message_type is MessageType.ERROR:
            raise Internal(f"systemd can't change {name}: {_said(reply)}")

    async def stop(self, name: str) -> None:
        """Stops a unit, which ends its processes; fine if there is no such unit. Raises Internal."""
        reply = await self._job(name, "StopUnit", "ss", [name, "replace"])
        if reply.message_type is MessageType.ERROR and reply.error_name != _UNKNOWN:
            raise Internal(f"systemd can't stop {name}: {_said(reply)}")

    async def _start(self, name: str, properties: Properties) -> bool:
        reply = await self._job(
            name, "StartTransientUnit", "ssa(sv)a(sa(sv))", [name, "replace", _pairs(properties), []]
        )
        if reply.message_type is not MessageType.ERROR:
            return True
        if reply.error_name != _EXISTS:
            raise Internal(f"systemd can't start {name}: {_said(reply)}")
        return False

    async def _job(self, unit: str, member: str, signature: str, body: list[Any]) -> Message:
        """Makes a call that starts a job, and returns when the job is done.

        Raises Internal if the job failed, DeadlineExceeded if it did not end.
        """
        done = self._jobs[unit] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._send(member, signature, body)
            if reply.message_type is not MessageType.ERROR:
                async with asyncio.timeout(_SECONDS):
                    result = await done
                if result != "done":
                    raise Internal(f"systemd's job {member} for {unit} ended as {result}; see systemctl status {unit}")
            return reply
        except TimeoutError as error:
            raise DeadlineExceeded(f"systemd did not finish {member} for {unit} within {_SECONDS} s") from error
        finally:
            self._jobs.pop(unit, None)

    async def _send(self, member: str, signature: str, body: list[Any]) -> Message:
        reply = await (await self._connected()).call(_message(member, signature, body))
        assert reply is not None
        return reply

    async def _connected(self) -> MessageBus:
        async with self._connecting:
            if self._bus is not None and self._bus.connected:
                return self._bus
            try:
                bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
                match = f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'"
                bus.add_message_handler(self._on_message)
                await bus.call(
                    Message(
                        "org.freedesktop.DBus",
                        "/org/freedesktop/DBus",
                        "org.freedesktop.DBus",
                        "AddMatch",
                        signature="s",
                        body=[match],
                    )
                )
                await bus.call(_message("Subscribe", "", []))
            except (OSError, EOFError) as error:
                raise FailedPrecondition(
                    f'systemd can\'t be reached over D-Bus: {error}; is dbus running? Otherwise set runtime.cgroup_driver = "cgroupfs"',
                    field="runtime.cgroup_driver",
                ) from error
            self._bus = bus
            return bus

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "JobRemoved":
            _, _, unit, result = message.body
            done = self._jobs.get(unit)
            if done is not None:
                with contextlib.suppress(asyncio.InvalidStateError):
                    done.set_result(result)


def _message(member: str, signature: str, body: list[Any]) -> Message:
    return Message(_NAME, _PATH, _MANAGER, member, signature=signature, body=body)


def _pairs(properties: Properties) -> list[list[Any]]:
    return [[name, value] for name, value in properties.items()]


def _said(reply: Message) -> str:
    return str(reply.body[0]) if reply.body else str(reply.error_name)
