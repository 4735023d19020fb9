"""What the processes of `tests.ranks` need, imported once for all of them."""

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

from ema_triton import EMAHandler  # noqa: F401
