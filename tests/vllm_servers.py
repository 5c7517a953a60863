"""vLLM servers of tiny models on the CPU, from a virtual environment of vLLM's own."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

HERE = Path(__file__).parent
START = 240.0  # seconds until a server must be there; two of them start side by side on two cores
TOKENS = 256  # of a conversation
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or "uni" below is ignored: a process less to start
}  # fmt: skip
HEAD = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}  # the narrowest of vLLM on a CPU


def vllm_python() -> Path | None:
    """The interpreter that has vLLM: of OPD_VLLM_PYTHON, of .venv-vllm (`make vllm`), or this one."""
    if named := os.environ.get("OPD_VLLM_PYTHON"):
        return Path(named)
    own = HERE.parent / ".venv-vllm"
    if (own / ".installed").is_file():  # written last
        return own / "bin" / "python"
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


@dataclass(frozen=True)
class Served:
    """A server and the checkpoint that it began with."""

    url: str
    model: str


@contextlib.contextmanager
def serving(log: Path, *servers: tuple[Path, dict[str, str], list[str]]) -> Iterator[list[Served]]:
    """Servers of (checkpoint, environment, options), started side by side, all of them up."""
    with contextlib.ExitStack() as stack:
        started = []
        for number, (model, environment, options) in enumerate(servers):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            written = log.with_suffix(f".{number}")
            process = stack.enter_context(_process(written, model, port, environment, options))
            started.append((process, written, Served(f"http://127.0.0.1:{port}", str(model))))
        for process, written, served in started:
            _wait(process, written, served.url)
        yield [served for _, _, served in started]


@contextlib.contextmanager
def _process(
    log: Path, model: Path, port: int, environment: dict[str, str], options: list[str]
) -> Iterator["subprocess.Popen[bytes]"]:
    command = [
        str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(TOKENS + 1), "--max-num-seqs", "32",
        "--distributed-executor-backend", "uni", *options,
    ]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=inherited | SETTINGS | environment,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, where it has left any


def _wait(process: "subprocess.Popen[bytes]", log: Path, url: str) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    told = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not start within {START:g} s, or ended ({process.poll()}):\n{told}")
