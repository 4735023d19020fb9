"""The TensorBoard example as a user runs it: the curves are in the log, with the right values."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ignite")
event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

from ema_triton import LinearWarmup  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "tensorboard.py"


def curves(log: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step; the log is records of a length (8 bytes), a CRC (4), data, a CRC."""
    found: dict[str, dict[int, float]] = {}
    data = log.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_momentum_and_distance_are_logged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--iterations=100", "--every=10", f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.iterdir()
    found = curves(log)
    steps = list(range(10, 101, 10))
    schedule = LinearWarmup(0.2, 0.005, 500)
    momentum = found["training/ema_momentum"]
    assert [*momentum] == steps
    assert [*momentum.values()] == pytest.approx([schedule(step) for step in steps])
    distance, norm = (found[f"training/ema_distance/{name}"] for name in ("distance", "norm"))
    assert [*distance] == [*norm] == steps
    assert all(0 < distance[step] < norm[step] for step in steps)
    for index, whole in enumerate((distance, norm)):
        parts = [found[f"training/ema_distance/modules/{name}/{index}"] for name in ("0", "2")]
        for step in steps:  # squares add up; the log has fp32
            assert sum(part[step] ** 2 for part in parts) == pytest.approx(whole[step] ** 2)
    assert f"{distance[100]:.3f} from weights of norm {norm[100]:.3f}" in done.stdout
