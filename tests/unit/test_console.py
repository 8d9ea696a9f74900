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
OUTPUT = """
from trainer.console import progress_bar, say
with progress_bar(None, "checkpoint", "verify") as bar:
    for n in range(5):
        bar.refresh() if n == 2 else None
        say(f"{n} good")
        bar.update()
"""


def shown_on_terminal(program: str) -> list[str]:
    """The lines of output and errors together, with what wiped them."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert done.wait() == 0
    return shown.decode().replace("\r\n", "\n").split("\n")


def test_a_line_is_alone_on_a_terminal() -> None:
    lines = shown_on_terminal(PROGRAM)
    (line,) = [line for line in lines if "damaged" in line]
    written, _, over = line.rpartition("\r")
    assert over == "WARNING a part was damaged"
    assert written.rpartition("\r")[2].isspace(), "the bar was wiped first"
    assert "10/10" in "".join(lines)


def test_output_is_alone_on_a_terminal() -> None:
    lines = [line for line in shown_on_terminal(OUTPUT) if "good" in line]
    assert [line.rpartition("\r")[2] for line in lines] == [f"{n} good" for n in range(5)]
    written = lines[2].rpartition("\r")[0]
    assert written.rpartition("\r")[2].isspace(), "the bar was wiped first"


def test_output_draws_no_bar_anew_in_a_log_file() -> None:
    done = subprocess.run([sys.executable, "-c", OUTPUT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{n} good" for n in range(5)]
    bars = [line.strip("\r") for line in done.stderr.split("\n") if line.strip()]
    assert [bar.split()[1] for bar in bars] == ["0/?", "2/?", "5/?"], "the second is the refresh"


def test_in_a_log_file_each_has_its_own_lines() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [line.strip("\r") for line in done.stderr.split("\n")]
    assert "WARNING a part was damaged" in lines
    assert [line for line in lines if line.startswith("purge: 10/10 [")]
    assert not [line for line in lines if "\r" in line]
