"""The example of averages that are chosen afterwards: they are those that were kept."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("ignite", "sklearn", "matplotlib", "safetensors"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).parent.parent / "examples" / "posthoc.py"


def test_rebuilt_averages_are_those_that_were_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--epochs=4", f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(0\.\d\d) +(\d\.\d+) +(\d\.\d+) +(\d\S+) +(\d\S+)$", done.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == [
        f"{w:.2f}" for w in (0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2)
    ]
    for _, rebuilt, kept, apart, expected in rows:
        # The expectation is of weights with nothing in common. Rounding of fp32: two averages', and
        # the coefficients' 2-norm is below 10.
        assert float(apart) <= float(expected) + 12 * 2**-24
        assert abs(float(rebuilt) - float(kept)) < 0.02  # 14 of 719 digits
    assert float(rows[0][3]) > 10 * float(rows[2][3])  # a control: 0.05 is there, 0.03 is not
    assert (tmp_path / "posthoc.png").read_bytes()[:4] == b"\x89PNG"
