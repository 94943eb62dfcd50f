"""A program that starts a cluster as a run does, in a process of its own where ray has not been imported, and prints as
JSON what an outsider could see of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil

from cluster.config import ClusterConfig
from cluster.runtime import init_ray

JOIN = "import sys; from cluster.runtime import probe_address; probe_address(sys.argv[1])"


def main() -> None:
    ray = init_ray(ClusterConfig(), num_cpus_needed=1)
    worker_mode = ray.get(ray.remote(num_cpus=0)(lambda: os.environ["RAY_AUTH_MODE"]).remote(), timeout=120)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in family for socket in process.net_connections("tcp")]
    outsider = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    address = ray.get_runtime_context().gcs_address
    joining = subprocess.run(
        [sys.executable, "-c", JOIN, address], env=outsider, capture_output=True, text=True, timeout=120
    )
    seen = {
        "token": os.environ["RAY_AUTH_TOKEN"],
        "mode": worker_mode,
        "listening": sorted({socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}),
        "commands": [" ".join(process.cmdline()) for process in family],
        "outsider": joining.stderr,
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
