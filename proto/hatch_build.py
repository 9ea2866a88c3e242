"""Generates the Python stubs of cri/api.proto when a wheel or editable install is built."""

import os
import sys
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Runs protoc.

    The virtual path makes the generated modules import each other as crisp_proto.cri.*.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the stubs before hatchling packs the package.

        Raises RuntimeError if protoc fails.
        """
        root = Path(self.root)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # finds protoc-gen-mypy
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
