"""Two machines, simulated by two network namespaces: a PPO run under torchrun, compared with one process.

    python -m prove.two_nodes      (`make prove` runs it; as root, with iproute2)

Each namespace has only its own loopback and one end of a virtual cable (veth), so all communication between the two
nodes goes through the cable. They share the file system, like the nodes of a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prove.many_processes import compare, run, words
from prove.runs import environment, prepare

PORT = 29500


@contextmanager
def two_namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """(name, address, interface) of two namespaces with a cable between them; both are removed afterwards."""
    here = os.getpid()
    nodes = [(f"rlchat-{here}-{i}", f"10.77.0.{i + 1}", f"cable{i}") for i in range(2)]
    made = []
    try:
        for name, _, _ in nodes:
            ip("netns", "add", name)
            made.append(name)
        (first, _, end), (second, _, other_end) = nodes
        ip("link", "add", end, "netns", first, "type", "veth", "peer", "name", other_end, "netns", second)
        for name, address, interface in nodes:
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for name in made:
            ip("netns", "delete", name)


def ip(*words: str) -> None:
    """Runs the command ``ip`` of iproute2."""
    subprocess.run(["ip", *words], check=True, timeout=30)


def train_on_two_nodes(folder: Path, fit: list[str], processes: int, seconds: float) -> None:
    """Runs ``rlchat`` with the arguments ``fit`` on two nodes with ``processes`` processes each."""
    rlchat = str(Path(sys.executable).with_name("rlchat"))
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nnodes=2", f"--nproc-per-node={processes}"]
    with two_namespaces() as nodes:
        (_, master, _), _ = nodes
        started = []
        try:
            for number, (name, _, interface) in enumerate(nodes):
                meeting = [f"--node-rank={number}", f"--master-addr={master}", f"--master-port={PORT}"]
                command = ["ip", "netns", "exec", name, *torchrun, *meeting, "--no-python", rlchat, *fit]
                with (folder / f"node{number}.txt").open("w") as output:
                    started.append(
                        subprocess.Popen(
                            command,
                            cwd=folder,
                            env={**environment(), "GLOO_SOCKET_IFNAME": interface},
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            codes = [node.wait(seconds) for node in started]
        finally:
            for node in started:
                node.terminate()  # torchrun takes its workers with it
                node.wait(60)
        output = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("node*.txt")))
        assert codes == [0, 0], output


def why_not() -> str | None:
    """The requirement that is missing on this machine; None if there is none."""
    if os.geteuid() != 0:
        return "only root can create network namespaces"
    return None if shutil.which("ip") else "there is no `ip`; install iproute2"


def main() -> None:
    if reason := why_not():
        print(f"two nodes: skipped, {reason}")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = prepare(Path(place, "runs"))
        run(folder, [words("one", "ppo", 1, "auto")])
        for processes in (1, 2):
            name, ranks = f"nodes-{processes}", 2 * processes
            fit = words(name, "ppo", ranks, "nodes", f"--trainer.devices={processes}", "--trainer.num_nodes=2")
            train_on_two_nodes(folder, fit, processes, 400)
            found = compare(folder / "one", folder / name, ranks, "ppo")
            print(f"ppo on 2 nodes with {processes} processes each (torchrun, gloo): {found}", flush=True)
            found.check()


if __name__ == "__main__":
    main()
