"Processes end with the program that started them, and leave nothing half done."
import signal
import subprocess
import sys

import pytest

CALL = """import os, time
try:
    os.write(1, b'on\\n')  # in one piece: both processes write to the same pipe
    time.sleep(60)
finally: os.write(1, b'off\\n')"""
CODE = f"""import signal
from fastai_lp.utils.jobs import in_processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in a background process
in_processes(exec, [[({CALL!r},)]]*2, 2, print)"""


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda o: o.name)
def test_processes_end_with_their_parent(sig):
    with subprocess.Popen([sys.executable, '-c', CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(2): assert process.stdout.readline() == 'on\n'
        process.send_signal(sig)
        out, err = process.communicate(timeout=30)  # until the last process has closed its output
    assert out == 'off\n'*2
    assert err.count('KeyboardInterrupt') == (sig == signal.SIGINT)
