"""The benchmarks run to their end, where ours and the peer computed the same thing, and print what they promise.

How fast they were is no test: it depends on the machine and its neighbours.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multicrop", "decode_crop"])
def test_a_benchmark_ends_with_one_json_object(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == name and {"unit", "peer_name", "goal"} <= result.keys()
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in ("ours", "peer", "ratio"))
    least, most = result["spread"]
    assert 0 < least <= most
    assert {"torch", "numpy", "transformers", "python"} <= result["versions"].keys()
    assert result["max_pixel_difference"] <= 1 and len(result["sizes"]) == 3
