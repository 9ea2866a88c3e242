"""Compiles the default seccomp profile once, by libseccomp, to the program that the kernel runs.

An OCI runtime compiles the profile for every container, which takes 11 ms of each start. crun takes
a finished program in an annotation instead (crun(1), run.oci.seccomp_bpf_data). Ours is sorted as a
binary tree, which also makes each system call cheaper than a list does. Other runtimes ignore the
annotation and compile the profile, which stays in the bundle.

Sources: seccomp(2), seccomp_export_bpf(3).
"""

import base64
import ctypes
import os
from collections.abc import Container
from functools import cache

from runtime_svc.spec import oci, seccomp
from servicekit import logs

ANNOTATION = "run.oci.seccomp_bpf_data"
_log = logs.get()
_BINARY_TREE = (8, 2)  # SCMP_FLTATR_CTL_OPTIMIZE, since libseccomp 2.5
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EEXIST = 17
_NOT_A_SYSCALL = -1  # __NR_SCMP_ERROR
_COMPARISONS = {name: number for number, name in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"), start=1)}


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@cache
def compiled_default(capabilities: frozenset[str]) -> str | None:
    """Returns the default profile for these capabilities as base64 of the kernel's program.

    Returns None if libseccomp cannot be used.
    """
    try:
        return base64.b64encode(_compile(seccomp.default_profile(capabilities))).decode()
    except OSError as error:
        _log.warning(
            "seccomp-compile-failed",
            error=str(error),
            consequence="the OCI runtime compiles the profile for each container",
        )
        return None


def _compile(profile: oci.Seccomp) -> bytes:
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    default = ctypes.c_uint32(_action(profile["defaultAction"], profile["defaultErrnoRet"]))
    program = ctypes.c_void_p(library.seccomp_init(default))
    try:
        _check(library.seccomp_attr_set(program, *_BINARY_TREE), "seccomp_attr_set")
        for name in profile["architectures"]:
            token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
            added = library.seccomp_arch_add(program, ctypes.c_uint32(token))
            _check(added, f"seccomp_arch_add {name}", fine=(-_EEXIST,))  # the native one is there already
        for rule in profile["syscalls"]:
            _add_rule(library, program, rule)
        return _export(library, program)
    finally:
        library.seccomp_release(program)


def _add_rule(library: ctypes.CDLL, program: ctypes.c_void_p, rule: oci.SeccompRule) -> None:
    action = ctypes.c_uint32(_action(rule["action"], rule.get("errnoRet", 0)))
    wanted = [_comparison(argument) for argument in rule.get("args", [])]
    comparisons = (_Comparison * len(wanted))(*wanted)
    for name in rule["names"]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _NOT_A_SYSCALL:
            continue  # newer than this libseccomp: it stays forbidden, as with the OCI runtimes
        added = library.seccomp_rule_add_array(program, action, number, len(wanted), comparisons)
        _check(added, f"seccomp_rule_add {name}")


def _export(library: ctypes.CDLL, program: ctypes.c_void_p) -> bytes:
    fd = os.memfd_create("seccomp")
    try:
        _check(library.seccomp_export_bpf(program, fd), "seccomp_export_bpf")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _action(name: str, errno: int) -> int:
    return _ALLOW if name == "SCMP_ACT_ALLOW" else _ERRNO | errno


def _comparison(argument: oci.SeccompArgument) -> _Comparison:
    return _Comparison(
        argument["index"],
        _COMPARISONS[argument["op"].removeprefix("SCMP_CMP_")],
        argument["value"],
        argument.get("valueTwo", 0),
    )


def _check(result: int, what: str, fine: Container[int] = ()) -> None:
    if result != 0 and result not in fine:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
