"Errors and private helpers of ftbook.models.device."

import pytest
import torch

from ftbook.models.device import Facts, _choose_dtype, _is_there, peak_memory, probe_device


def test_a_device_that_is_not_there_is_refused():
    absent = next(k for k in ("cuda", "xpu", "mps") if not _is_there(k))
    with pytest.raises(ValueError, match=f"no {absent} device here: PyTorch .* sees .*cpu"):
        probe_device(absent)


def test_a_pascal_gpu_is_not_said_to_be_slow_in_16_bits():
    "A P100 multiplies float16 twice as fast as float32; the reason for float32 is another one."
    dtype, why = _choose_dtype(Facts("cuda", "Tesla P100", (6, 0)))
    assert dtype == torch.float32 and "would not be faster" not in why and "P100" in why


def test_the_peak_grows_with_what_is_held():
    before = peak_memory()
    held = torch.ones(before // 4)  # float32: as many bytes again
    assert peak_memory() > 1.2 * before and held.nbytes > 0.9 * before
