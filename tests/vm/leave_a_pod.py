"""Leaves a pod running on the installed crisp for the power cut that follows.

test_rebooted.py checks what is left of it.
"""

import json
import time
from pathlib import Path

from crisp_proto.cri import api_pb2 as cri
from crisplab import clone, images, registry, scratch
from crisplab.cri import Cri, container_config, pod_config

LEFT = Path("/root/left.json")


def main() -> None:
    with (
        Cri("/run/crisp/cri.sock") as client,
        scratch.folder("left") as folder,
        registry.running(folder / "registry") as address,
    ):
        images.busybox_image().push(address, "test/busybox", "1")
        image = f"{address}/test/busybox:1"
        client.pull(image)
        config = pod_config("left", log_directory="/var/log/pods/left")
        pod = client.run_pod(config)
        running = client.run(pod, container_config(image, ["sleep", "600"]), config)
        ended = client.run(pod, container_config(image, ["sh", "-c", "exit 7"], name="ended"), config)
        deadline = time.monotonic() + 60 * clone.SLOWNESS
        while client.status(ended).state != cri.CONTAINER_EXITED:
            assert time.monotonic() < deadline, "the container does not end"
            time.sleep(0.1)
        LEFT.write_text(json.dumps({"image": image, "pod": pod, "running": running, "ended": ended}))


if __name__ == "__main__":
    main()
