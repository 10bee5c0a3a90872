"""Workers of a study end with it."""

import os
import signal
import subprocess
import sys
import time

import pytest

STUDY = """
import os, time
from benchmarks.harness import parallel

if __name__ == "__main__":
    with parallel.pool(1) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        workers.submit(time.sleep, 600)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_ends_with_its_parent(number, tmp_path):
    (tmp_path / "study.py").write_text(STUDY)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, str(tmp_path / "study.py")], stdout=subprocess.PIPE, text=True, env=environment) as study:
        worker = int(study.stdout.readline())
        study.send_signal(number)
    assert ends(worker)


def ends(process: int, seconds: float = 30) -> bool:
    """Return whether a process ends in time."""
    for _ in range(round(seconds / 0.1)):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
