"""Tell Ray that this node is about to be taken away: the run that trains on it saves at once.

    python leave.py now --seconds 100     this node goes within 100 s (a pod's preStop hook)
    python leave.py aws --seconds 100     wait for the notice that EC2 gives a spot instance
    python leave.py gcp --seconds 25      wait for that of Google Cloud

Runs on the node, in the environment of its `ray start` (its token), RAY_ADDRESS the head's. Returns
when nothing uses the node any more, or the time is up. Exit code 1: Ray was not told.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

EVERY_S = float(os.environ.get("RAYSFT_NOTICE_EVERY_S", 5.0))  # AWS gives two minutes
# Where a machine asks about itself. RAYSFT_METADATA: another place, for tests.
AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - http above
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return str(answer.read().decode())


def aws_notice() -> bool:
    """Whether EC2 has said that it takes this machine back."""
    host = os.environ.get("RAYSFT_METADATA", AWS)
    lasts = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{host}/latest/api/token", lasts, "PUT")
    place = f"{host}/latest/meta-data/spot/instance-action"
    try:
        return bool(_ask(place, {"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # there is none
            return False
        raise


def gcp_notice() -> bool:
    """Whether Google Cloud has said that it takes this machine back."""
    host = os.environ.get("RAYSFT_METADATA", GCP)
    place = f"{host}/computeMetadata/v1/instance/preempted"
    return _ask(place, {"Metadata-Flavor": "Google"}).strip() == "TRUE"


def wait_for(notice: Callable[[], bool]) -> None:
    """Until there is a notice. What cannot be asked just now is asked again."""
    while True:
        try:
            if notice():
                return
        except OSError as error:
            print(f"leave.py: the machine's metadata: {error}; asking again", flush=True)
        time.sleep(EVERY_S)


def leave(address: str, node_ip: str, seconds: float) -> bool:
    """Tell the cluster at `address` that the node at `node_ip` goes in `seconds`; whether it took
    note. Waits until the node has nothing to do, or for that long."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2 as ray_says

    gcs = GcsClient(address=address)

    def here() -> ray_says.NodeState | None:
        reply = ray_says.GetClusterStatusReply()
        reply.ParseFromString(gcs.get_cluster_status(timeout_s=10))
        found = [
            n for n in reply.cluster_resource_state.node_states if n.node_ip_address == node_ip
        ]
        return next((n for n in found if n.status != ray_says.NodeStatus.DEAD), None)

    node = here()
    if node is None:
        print(f"leave.py: no node of {address} has the address {node_ip}", file=sys.stderr)
        return False
    end = time.time() + seconds
    taken, why_not = gcs.drain_node(
        node.node_id.hex(),
        ray_says.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the machine is taken away",
        int(end * 1000),
    )
    if not taken:
        print(f"leave.py: Ray did not take note: {why_not}", file=sys.stderr)
        return False
    while time.time() < end and (node := here()) is not None:
        if node.available_resources == node.total_resources:
            break
        time.sleep(1.0)
    return True


def main() -> int:
    """Entry point; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("when", choices=("now", "aws", "gcp"))
    parser.add_argument("--seconds", type=float, default=100.0, help="until the node is gone")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", ""), help="host:port")
    parser.add_argument("--node-ip", default="", help="of this node (default: asked from Ray)")
    given = parser.parse_args()
    if not given.address:
        parser.error("--address: not given, and RAY_ADDRESS is not set; name the head's host:port")
    if given.when != "now":
        wait_for(aws_notice if given.when == "aws" else gcp_notice)
    import ray.util

    return (
        0
        if leave(given.address, given.node_ip or ray.util.get_node_ip_address(), given.seconds)
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
