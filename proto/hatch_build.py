"""Generates the Python stubs of cri/api.proto while crisp-proto is built, be it as a wheel or as an editable install."""

import os
import sys
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Runs protoc; the virtual path makes the generated modules import each other as crisp_proto.cri.*."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs. Raises RuntimeError if protoc refuses api.proto."""
        root = Path(self.root)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where protoc-gen-mypy is
        code = protoc.main(
            [
                "protoc",
                f"-Icrisp_proto/cri={root / 'cri'}",
                f"--python_out={root / 'src'}",
                f"--grpc_python_out={root / 'src'}",
                f"--mypy_out={root / 'src'}",
                f"--mypy_grpc_out={root / 'src'}",
                "crisp_proto/cri/api.proto",
            ]
        )
        if code != 0:
            raise RuntimeError(
                f"protoc could not translate {root / 'cri/api.proto'}: exit status {code}, its message is above"
            )
