"""A small part of what ``python -m tests.kill_runs`` kills; docs/reliability.md has the figures of the whole."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_killed_run_leaves_what_was_there_or_a_whole_file():
    # In a process of its own, for it forks and this one may have threads.
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_runs", "--runs", "16"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [re.findall(r"'(as before|whole)': (\d+)", line) for line in done.stdout.splitlines()]
    assert [sum(int(count) for _, count in found) for found in counts] == [2] * 8, done.stdout
