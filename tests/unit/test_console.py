"""What a terminal and a log file show of lines and bars that are written at the same time."""

import os
import pty
import subprocess
import sys
import termios

PROGRAM = """
import logging
from trainer.console import configure_logging, progress_bar
configure_logging()
with progress_bar(10, "part", "purge") as bar:
    for n in range(10):
        bar.update()
        if n == 4:
            bar.refresh()
            logging.getLogger("x").warning("a part was damaged")
"""


def test_a_line_is_alone_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert done.wait() == 0
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    (line,) = [line for line in lines if "damaged" in line]
    written, _, over = line.rpartition("\r")
    assert over == "WARNING a part was damaged"
    assert written.rpartition("\r")[2].isspace(), "the bar was wiped first"
    assert "10/10" in shown.decode()


def test_in_a_log_file_each_has_its_own_lines() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [line.strip("\r") for line in done.stderr.split("\n")]
    assert "WARNING a part was damaged" in lines
    assert [line for line in lines if line.startswith("purge: 10/10 [")]
    assert not [line for line in lines if "\r" in line]
