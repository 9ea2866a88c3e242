"""Calls to systemd's manager over D-Bus: slices and scopes for cgroups.

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
_DBUS, _DBUS_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"
_EXISTS, _UNKNOWN = "org.freedesktop.systemd1.UnitExists", "org.freedesktop.systemd1.NoSuchUnit"
_SECONDS = 60
Properties = Mapping[str, Variant]
_ACCOUNTING: Properties = {f"{kind}Accounting": Variant("b", True) for kind in ("CPU", "Memory", "IO", "Tasks")}


def slice_path(name: str) -> str:
    """Returns the cgroup of a slice: /a.slice/a-b.slice for a-b.slice (systemd.slice(5))."""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: count + 1])}.slice" for count in range(len(parts)))


class Systemd:
    """A connection to the manager, opened by the first call and reopened after it was lost."""

    def __init__(self) -> None:
        self._bus: MessageBus | None = None
        self._connecting = asyncio.Lock()
        self._jobs: dict[str, asyncio.Future[str]] = {}

    async def start_slice(self, name: str, properties: Properties) -> None:
        """Starts a slice, or sets the properties of one that is active. Raises Internal."""
        all_properties = {"Description": Variant("s", "crisp pod"), **_ACCOUNTING, **properties}
        if not await self._start(name, all_properties) and properties:
            await self.set_properties(name, properties)

    async def start_scope(self, name: str, slice_name: str, pids: Sequence[int]) -> None:
        """Moves processes into a new scope of a slice.

        Stops a scope of the same name first, if a predecessor died and left it. Raises Internal.
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
                raise Internal(
                    f"systemd has a scope {name} already, and it does not stop", hint=f"see systemctl status {name}"
                )

    async def set_properties(self, name: str, properties: Properties) -> None:
        """Changes properties of a unit until the next boot.

        Raises NotFound if there is no such unit.
        """
        reply = await self._send("SetUnitProperties", "sba(sv)", [name, True, _pairs(properties)])
        if reply.error_name == _UNKNOWN:
            raise NotFound(f"systemd has no unit {name}")
        if reply.message_type is MessageType.ERROR:
            raise Internal(f"systemd can't change {name}: {_said(reply)}")

    async def stop(self, name: str) -> None:
        """Stops a unit and thereby its processes. Raises Internal.

        Does nothing if there is no such unit.
        """
        reply = await self._job(name, "StopUnit", "ss", [name, "replace"])
        if reply.message_type is MessageType.ERROR and reply.error_name != _UNKNOWN:
            raise Internal(f"systemd can't stop {name}: {_said(reply)}")

    async def _start(self, name: str, properties: Properties) -> bool:
        """Starts a transient unit; returns False if there is a unit of this name already."""
        reply = await self._job(
            name, "StartTransientUnit", "ssa(sv)a(sa(sv))", [name, "replace", _pairs(properties), []]
        )
        if reply.message_type is not MessageType.ERROR:
            return True
        if reply.error_name != _EXISTS:
            raise Internal(f"systemd can't start {name}: {_said(reply)}")
        return False

    async def _job(self, unit: str, member: str, signature: str, body: list[Any]) -> Message:
        """Makes a call that starts a job, and waits until the job is done.

        Raises Internal if the job failed, DeadlineExceeded if it did not end.
        """
        done = self._jobs[unit] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._send(member, signature, body)
            if reply.message_type is not MessageType.ERROR:
                async with asyncio.timeout(_SECONDS):
                    result = await done
                if result != "done":
                    raise Internal(
                        f"systemd's job {member} for {unit} ended as {result}", hint=f"see systemctl status {unit}"
                    )
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
                self._bus = await self._connect()
            except (OSError, EOFError) as error:
                raise FailedPrecondition(
                    f"systemd can't be reached over D-Bus: {error}",
                    hint='is dbus running? Otherwise set runtime.cgroup_driver = "cgroupfs"',
                    field="runtime.cgroup_driver",
                ) from error
            return self._bus

    async def _connect(self) -> MessageBus:
        """Opens a connection that receives the manager's JobRemoved signals.

        Raises OSError or EOFError.
        """
        bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
        bus.add_message_handler(self._on_message)
        rule = f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'"
        await bus.call(Message(_DBUS, _DBUS_PATH, _DBUS, "AddMatch", signature="s", body=[rule]))
        await bus.call(_message("Subscribe", "", []))
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
