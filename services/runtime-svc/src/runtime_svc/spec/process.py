"""A container's first process: arguments, environment, working directory.

Source: OCI runtime spec, config.md, process.
"""

from collections.abc import Sequence

from crisp_proto.config import ContainerConfig
from crisp_proto.image import ImageConfig
from runtime_svc.settings import RuntimeSettings
from runtime_svc.spec import capabilities, oci, oom_score, ulimits
from runtime_svc.spec.users import User
from servicekit.errors import InvalidArgument

_DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def plan(
    config: ContainerConfig,
    image: ImageConfig,
    user: User,
    granted: frozenset[str],
    hostname: str,
    settings: RuntimeSettings,
) -> oci.Process:
    """Returns the process with the capabilities `granted`, without labels of security modules.

    Raises InvalidArgument that names the field.
    """
    security = config.linux.security_context
    ambient = capabilities.ambient(security.capabilities.add_ambient_capabilities)
    process: oci.Process = {
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": arguments(config, image),
        "env": environment(config, image, user, hostname, settings.default_env),
        "cwd": config.working_dir or image.working_dir or "/",
        "capabilities": capabilities.to_oci(granted, ambient),
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": oom_score.allowed(config.linux.resources.oom_score_adj),
    }
    if settings.default_ulimits:
        process["rlimits"] = [ulimits.to_oci(text) for text in settings.default_ulimits]
    if not process["cwd"].startswith("/"):
        raise InvalidArgument(f"working_dir = {process['cwd']!r}: must be an absolute path", field="working_dir")
    return process


def arguments(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """Returns the command line (CRI ContainerConfig).

    `command` replaces the image's ENTRYPOINT and clears CMD; `args` alone replace CMD. Raises
    InvalidArgument if nothing is left.
    """
    found = [*config.command, *config.args] if config.command else [*image.entrypoint, *(config.args or image.cmd)]
    if not found:
        raise InvalidArgument(
            "command and args are empty, and the image has no ENTRYPOINT and no CMD: there is nothing to run",
            field="command",
        )
    return found


def environment(
    config: ContainerConfig, image: ImageConfig, user: User, hostname: str, of_node: Sequence[str] = ()
) -> list[str]:
    """Returns the node's variables, the image's and the request's.

    Of two with one name the later wins. PATH, HOSTNAME, TERM and HOME get defaults.
    """
    values: dict[str, str] = {}
    terminal = ["TERM=xterm"] if config.tty else []
    for entry in [_DEFAULT_PATH, f"HOSTNAME={hostname}", *terminal, *of_node, *image.env]:
        name, _, value = entry.partition("=")
        values[name] = value
    for variable in config.envs:
        if not variable.key or "=" in variable.key:
            raise InvalidArgument(f"envs: {variable.key!r} is no name for a variable", field="envs")
        values[variable.key] = variable.value.decode("utf-8", "surrogateescape")
    values.setdefault("HOME", user.home or "/")
    return [f"{name}={value}" for name, value in values.items()]
