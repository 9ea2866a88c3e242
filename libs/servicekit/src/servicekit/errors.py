"""The exception tree of crisp, and its mapping to problem+json.

Errors travel between services as problem+json (RFC 9457) and leave the gateway as a gRPC status.
Both carry the same code.
"""

from typing import ClassVar


class CrispError(Exception):
    """An error that a caller can act on.

    `problem` says what was asked and what went wrong; `hint` says what to do about it, if anything
    can be done; `message` joins both. `field` names the part of the request that is wrong, if one
    is.
    """

    code: ClassVar[str] = "UNKNOWN"
    status: ClassVar[int] = 500

    def __init__(self, problem: str, *, hint: str = "", field: str = "") -> None:
        # A path may hold bytes that are not UTF-8, which neither HTTP nor gRPC can carry.
        self.problem = problem.encode(errors="backslashreplace").decode()
        self.hint = hint
        self.field = field
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The problem and the hint, as clients and logs see them."""
        return f"{self.problem}; {self.hint}" if self.hint else self.problem


class InvalidArgument(CrispError):
    """The request can never succeed as it is."""

    code, status = "INVALID_ARGUMENT", 400


class Unauthenticated(CrispError):
    """A registry asks for credentials, or refuses those that it got."""

    code, status = "UNAUTHENTICATED", 401


class PermissionDenied(CrispError):
    """The caller, or crisp itself, is not allowed to do this."""

    code, status = "PERMISSION_DENIED", 403


class NotFound(CrispError):
    """The resource that the request names does not exist."""

    code, status = "NOT_FOUND", 404


class AlreadyExists(CrispError):
    """The id belongs to something that differs from what the request describes."""

    code, status = "ALREADY_EXISTS", 409


class FailedPrecondition(CrispError):
    """The request is valid, but the current state does not allow it."""

    code, status = "FAILED_PRECONDITION", 412


class ResourceExhausted(CrispError):
    """No address, port, disk or memory is left for this."""

    code, status = "RESOURCE_EXHAUSTED", 429


class Internal(CrispError):
    """A tool or the kernel refused something that should have worked."""

    code, status = "INTERNAL", 500


class Unknown(CrispError):
    """The OCI runtime failed; the message is its own."""

    code, status = "UNKNOWN", 500


class Unimplemented(CrispError):
    """crisp, or this machine, does not support this."""

    code, status = "UNIMPLEMENTED", 501


class Unavailable(CrispError):
    """A service or registry cannot be reached; the same call may succeed later."""

    code, status = "UNAVAILABLE", 503


class DeadlineExceeded(CrispError):
    """The operation took longer than the caller, or crisp, is willing to wait."""

    code, status = "DEADLINE_EXCEEDED", 504


BY_CODE: dict[str, type[CrispError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument, Unauthenticated, PermissionDenied, NotFound, AlreadyExists, FailedPrecondition,
        ResourceExhausted, Internal, Unknown, Unimplemented, Unavailable, DeadlineExceeded,
    )
}  # fmt: skip


def to_problem(error: CrispError) -> dict[str, str | int]:
    """Returns an error as problem+json (RFC 9457); the members `code` and `field` are ours."""
    problem: dict[str, str | int] = {
        "type": f"urn:crisp:error:{error.code.lower().replace('_', '-')}",
        "title": type(error).__name__,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
    }
    if error.field:
        problem["field"] = error.field
    return problem


def from_problem(status: int, problem: object, service: str) -> CrispError:
    """Returns the error that a service answered, even if the answer is not problem+json."""
    if not isinstance(problem, dict):
        return Internal(f"{service} answered {status} without saying why; its log has more")
    kind = BY_CODE.get(str(problem.get("code")), NotFound if status == 404 else Internal)
    return kind(str(problem.get("detail", f"{service} answered {status}")), field=str(problem.get("field", "")))
