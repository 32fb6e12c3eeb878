"""Every command that writes, killed at every one of its file-system events: the sources must be
untouched, the target old, absent or complete, and the same command must work again.

python tests/benchmarks/kill_points.py [--only CASE ...] [--sample N]; prints one JSON object. The
events, the cases and what is compared: tests/support/kill_points.py.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

WALK = Path(__file__).resolve().parents[1] / "support" / "kill_points.py"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run([sys.executable, WALK, folder, *sys.argv[1:]], check=False).returncode)
