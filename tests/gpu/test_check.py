"""The script for the day that a GPU is at hand starts, and says why it measures nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_without_a_gpu_it_says_so():
    script = Path(__file__).parent / "check"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) in ({"skipped": "there is no GPU"}, {"skipped": "PyTorch is not installed"})
