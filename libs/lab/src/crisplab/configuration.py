"""The files that a node's services and supervisord are configured with."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

REFUSED = 2
"""The exit status of a service that refuses its settings; starting it again would not help."""


def settings_file(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Returns the text of crisp.toml."""
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def supervisord_file(root: Path, modules: Mapping[str, str]) -> str:
    """Returns the text of supervisord.conf, for services given by name and Python module."""
    programs = [_program(root, name, module) for name, module in modules.items()]
    # supervisord stops groups one after another, and checks once per second whether one has ended.
    # All services are therefore in one group.
    group = f"[group:crisp]\nprograms={','.join(modules)}\n"
    return f"""[supervisord]
pidfile={root}/supervisord.pid
logfile={root}/logs/supervisord.log
minfds=16384
[unix_http_server]
file={root}/supervisor.sock
chmod=0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{root}/supervisor.sock
""" + "".join([*programs, group])


def _program(root: Path, name: str, module: str) -> str:
    return f"""[program:{name}]
command={sys.executable} -m {module} --config {root}/crisp.toml
autorestart=unexpected
exitcodes={REFUSED}
startsecs=0
startretries=1000
stopwaitsecs=30
redirect_stderr=true
stdout_logfile={root}/logs/{name}.log
stdout_logfile_maxbytes=50MB
"""
