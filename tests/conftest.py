"""Runs before any test file is imported: offline, one thread, tests/ importable, shared data."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch, transformers or huggingface_hub are imported, as they read these only once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test has two, they do not spin

for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:  # in the background of a script, under nohup
        signal.signal(number, usual)

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lorica-tests-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

TESTS = Path(__file__).parent
sys.path.append(str(TESTS))  # at the end: a folder here must not hide an installed package


def _stay_home(event: str, arguments: tuple) -> None:
    """Refuse connections that leave this machine: nothing here may need, or make, one."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else ""  # otherwise a Unix socket
    elif event == "socket.getaddrinfo":
        host = arguments[0] or ""
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in ("", "localhost", "::1", "0.0.0.0") and not host.startswith("127."):
        raise ConnectionError(f"a test tried to reach {host}")


sys.addaudithook(_stay_home)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and models, which lies outside the repository."""
    given = os.environ.get("LORICA_TEST_DATA")
    folder = Path(given) if given else (TESTS.parent / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; LORICA_TEST_DATA names another folder")
    return folder
