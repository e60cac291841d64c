"""`phicore ray-serve` as a user runs it: what it says, how it drains, and what it leaves behind."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from ray_clusters import ENDLESS, HI, WAIT_S, descendants, wait_until
from unit.throwaway import Install, install

from phicore.backend import VERSION

__all__ = ["install"]


class Process:
    """`phicore ray-serve` as a process.

    Attributes:
        url: The beginning of its addresses.
        lines: What it has written on standard error.
    """

    def __init__(self, *options: object) -> None:
        command = [sys.executable, "-m", "phicore", "ray-serve", "-b", "numpy", "--port", "0"]
        # A temporary folder of its own, since other clusters of the machine use the usual one.
        self.process = subprocess.Popen(
            [*command, *map(str, options)], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_until_listening(self) -> str:
        """Return the address."""

        def address() -> str | None:
            assert self.process.poll() is None, self.said
            found = re.search(r"listening at (http://\S+)", self.said)
            return found[1] if found else None

        return wait_until(address, "listening")

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def ended(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return code


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows the processes")
def test_signal_lets_answers_finish_and_leaves_nothing(endless_path: Path):
    running = Process("-m", endless_path, "--replicas", 2, "--grace", 300)
    url = running.wait_until_listening()
    started = descendants(running.process.pid)
    assert len(started) > 4
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=WAIT_S)
    stream = client.chat.completions.create(
        model="endless", messages=HI, stream=True, **{**ENDLESS, "max_tokens": 1500}
    )
    next(stream)
    running.process.send_signal(signal.SIGTERM)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    assert running.ended() == 0
    assert [line.partition(": ")[0] for line in running.lines] == ["phicore ray-serve"] * 2
    wait_until(lambda: not any(map(is_running, started)), "the end of Ray's processes")
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind((host, int(port)))


SLOW = """
    import time
    from phicore import hookimpl

    def create(options):
        time.sleep(3600)

    @hookimpl
    def phicore_register_backends(register):
        register("slow", create=create, devices=lambda: ["cpu"], protocol=PROTOCOL)
"""


def test_plugin_that_blocks_a_replica_is_named_and_the_interrupt_ends_all(
    install: Install, endless_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install("phicore-slow", "slow", SLOW.replace("PROTOCOL", str(VERSION)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "phicore-slow"))
    running = Process("-m", endless_path, "-b", "slow", "--replicas", 2)
    said = "phicore ray-serve: still waiting for plugin phicore-slow to create the backend slow ("
    wait_until(lambda: running.process.poll() is not None or said in running.said, said)
    assert running.said.count(said) == 1, running.said
    running.process.send_signal(signal.SIGINT)
    assert running.ended() == 130
    assert "Traceback" not in running.said


def test_damaged_model_is_one_line(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    running = Process("-m", path)
    assert running.ended() == 1
    first, last = running.lines
    assert first.startswith("phicore ray-serve: starting 1 of ")
    assert last.startswith("phicore: broken.gguf: ")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--replicas", "3..2"], 2, "--replicas: expected a number from 1 to 10000, or two"),
        (["--replicas", "0"], 2, "--replicas: expected a number from 1 to 10000, or two"),
        (["--replicas", "many"], 2, "--replicas: expected a number from 1 to 10000, or two"),
        (["--num-gpus", "-1"], 2, "--num-gpus: expected 0 or more"),
        (["--num-cpus", "0"], 2, "--num-cpus: expected more than 0"),
        (["--host", "0.0.0.0"], 2, "--host: others can reach 0.0.0.0; give --api-key"),
        (["-m", "no-such-model"], 1, "'no-such-model' is not a file and not a known model"),
        (["-m", "absent.gguf"], 1, "absent.gguf: no such file"),
        (["-b", "absent"], 1, "no backend 'absent'"),
    ],
)
def test_wrong_option_is_one_line_before_ray_starts(
    options: list[str], code: int, said: str, endless_path: Path, tmp_path: Path
):
    command = [sys.executable, "-m", "phicore", "ray-serve", "-m", str(endless_path), *options]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=WAIT_S, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"phicore: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_port_in_use_is_one_line(endless_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "phicore", "ray-serve", "-m", str(endless_path)]
        done = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, timeout=WAIT_S
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"phicore: --port: cannot listen at 127.0.0.1:{port}")
    assert len(done.stderr.splitlines()) == 1


def test_more_gpus_than_there_are_is_one_line(endless_path: Path):
    running = Process("-m", endless_path, "--replicas", 2, "--num-gpus", 64)
    assert running.ended() == 2
    assert running.lines == ["phicore: --num-gpus: 2 replicas need 128 GPUs; the cluster has 0\n"]


def without(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run phicore in a process that cannot import a module."""
    given = ["phicore", *map(str, arguments)]
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = {given!r}"
        "; from phicore.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S
    )


def test_without_ray_a_line_says_what_to_install(endless_path: Path):
    done = without("ray", "ray-serve", "-m", endless_path)
    assert done.returncode == 1
    assert done.stderr == (
        "phicore: the command ray-serve needs Ray Serve; install it with: pip install "
        "'ray[serve]'\n"
    )


def test_help_imports_neither_ray_nor_numpy():
    program = (
        "import sys\n"
        "sys.argv = ['phicore', '--help']\n"
        "from phicore.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    found = {'ray', 'numpy', 'starlette', 'jax'} & set(sys.modules)\n"
        "    print('imported:', *found)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ray-serve" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
