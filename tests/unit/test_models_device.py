"Errors and private helpers of ftbook.models.device and ftbook.models.threads."

import os
import subprocess
import sys

import pytest
import torch

from ftbook.models import threads
from ftbook.models.device import Facts, _choose_dtype, _is_there, fastest_device, peak_memory, probe_device
from ftbook.models.threads import Cores, choose_threads, free_threads, read_quota, read_times, sample_load


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


# Threads


@pytest.fixture
def nobody_asked(monkeypatch):
    "Nobody has given a number of threads, and PyTorch's own is four, for as many cores."
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_known", [4])
    monkeypatch.setattr(threads, "_usable", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "read_quota", lambda: None)
    yield
    torch.set_num_threads(before)


def busy(monkeypatch, others):
    "Other processes use so many cores."
    monkeypatch.setattr(threads, "sample_load", lambda seconds: (others, 0.0))


@pytest.mark.parametrize("others, n", [(0, 4), (0.4, 4), (1, 3), (2.6, 1), (9, 1)])
def test_a_thread_for_every_free_core(nobody_asked, monkeypatch, others, n):
    busy(monkeypatch, others)
    with free_threads("cpu") as chosen:
        assert (chosen.n, torch.get_num_threads()) == (n, n)
        assert f"use {others:.1f} of 4 cores" in chosen.why and ("late" in chosen.why) == (n < 4)
    assert torch.get_num_threads() == 4


def test_the_number_follows_the_load_within_a_run(nobody_asked, monkeypatch):
    busy(monkeypatch, 3)
    with free_threads() as outer:
        busy(monkeypatch, 1)
        with free_threads() as inner:
            assert (outer.n, inner.n, torch.get_num_threads()) == (1, 3, 3)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_what_the_user_gave_is_kept(nobody_asked, monkeypatch):
    busy(monkeypatch, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.probe_threads().why == "OMP_NUM_THREADS asks for 4 threads."
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    with free_threads() as chosen:
        assert (chosen.n, torch.get_num_threads()) == (2, 2)
    assert chosen.why == "torch.set_num_threads asks for 2 threads."
    torch.set_num_threads(3)  # before the module was imported: neither all cores nor half of them
    monkeypatch.setattr(threads, "_known", [3])
    assert threads.probe_threads().n == 3


def test_a_number_from_within_a_run_is_taken_back_after_an_error(nobody_asked, monkeypatch):
    busy(monkeypatch, 3)
    with pytest.raises(KeyError), free_threads():
        raise KeyError
    assert torch.get_num_threads() == 4 and threads._known == [4]


def test_the_limit_of_a_container(tmp_path, nobody_asked, monkeypatch):
    assert read_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert read_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert read_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert read_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert read_quota(tmp_path) == 1.5
    monkeypatch.setattr(threads, "read_quota", lambda: 3.0)
    monkeypatch.setattr(threads, "sample_load", lambda seconds: (0.0, 1.0))
    assert threads.probe_threads().n == 2 and "leaves 2.0" in threads.probe_threads().why


def test_where_the_kernel_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "gone")
    monkeypatch.setattr(threads, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0), raising=False)
    assert 2 < sample_load(0.01)[0] <= 3.0
    (tmp_path / "gone").write_text("cpu  1 1 1 1\ncpu0 garbage\n")
    assert 2 < sample_load(0.01)[0] <= 3.0
    monkeypatch.delattr(os, "getloadavg")
    assert sample_load(0.01)[0] == 0


@pytest.mark.skipif(not threads.STAT.exists(), reason="the load of each core is read from /proc/stat")
def test_a_busy_neighbour_is_seen_and_own_work_is_not():
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with_it = sample_load(1.0)[0]
    finally:
        neighbour.kill()
        neighbour.wait()
    assert with_it > 0.3
    assert read_times(threads.STAT.read_text(), threads._usable())[1] > 0


def test_the_device_says_its_threads_on_a_cpu_alone():
    here = probe_device("cpu")
    assert here.explain().split("\n")[0].endswith(f", {here.threads}") and here.reasons[-1] == here.threads.why
    assert fastest_device("cpu").threads is None
    assert choose_threads(Cores(2)).why == "Other processes use 0.0 of 2 cores."
    with free_threads("meta") as chosen:
        assert chosen is None
