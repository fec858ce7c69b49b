"More than one device: the arithmetic, and the configurations that are ready."

import pytest, torch, yaml
from hypothesis import given, strategies as st

from book import root
from ftbook.models.scale import training_bytes
from ftbook.training.processes import DIVIDED
from ftbook.scale import (
    KINDS,
    all_reduce_bytes,
    bubble,
    gather,
    pipeline_schedule,
    ring_all_reduce,
    shard,
    sharded_bytes,
    sliced_linear,
    traffic,
)
from ftbook.show.schedule import draw_schedule
from ftbook.training.launch import check_config, config_files, launch_config


# --- arithmetic --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 40))
def test_ring_sums_for_everybody(n, size):
    parts = [torch.randint(-9, 9, (size,)) for _ in range(n)]
    sums, sent = ring_all_reduce(parts)
    assert all(torch.equal(s, sum(parts)) for s in sums)
    assert sum(sent) == 2 * (n - 1) * size == pytest.approx(n * all_reduce_bytes(size, n))
    assert max(sent) - min(sent) <= 2 * n


@given(st.integers(1, 10**9), st.integers(1, 512), st.sampled_from(list(DIVIDED)))
def test_a_share_is_no_more_than_the_whole_and_no_less_than_its_part(n, devices, sharding):
    items = training_bytes(n)
    held = sharded_bytes(items, devices, sharding)
    assert held.keys() == items.keys() and all(items[k] / devices <= held[k] <= items[k] for k in items)
    if sharding in ("zero3", "fsdp2"):
        assert sum(held.values()) <= sum(items.values()) / devices + len(items)


def test_each_stage_holds_less_and_only_the_last_sends_more():
    items = training_bytes(10**9)
    held = [sum(sharded_bytes(items, 8, s).values()) for s in ("ddp", "zero1", "zero2", "zero3")]
    sent = [traffic(items, 8, s) for s in ("ddp", "zero1", "zero2", "zero3")]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert sent[0] == sent[1] == sent[2] and sent[3] == 1.5 * sent[0]
    assert traffic(items, 8, "fsdp2", pieces=3) == 3 * sent[3] and traffic(items, 1, "fsdp2") == 0


def test_one_vocabulary():
    items = training_bytes(10**9)
    assert items.keys() <= KINDS.keys() and set(KINDS.values()) <= set(DIVIDED["zero3"])
    assert sharded_bytes(items, 4, "fsdp") == sharded_bytes(items, 4, "fsdp2") and traffic(items, 4, "fsdp") == traffic(
        items, 4, "fsdp2"
    )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9))
def test_slices_are_equal_and_come_together(shape, n):
    t = torch.randn(shape)
    slices = shard(t, n)
    assert len(slices) == n and len({len(s) for s in slices}) == 1 and torch.equal(gather(slices, tuple(shape)), t)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_sliced_layer_is_the_layer(n):
    torch.manual_seed(n)
    x, w = (
        torch.randn(4, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
    )
    slices = [s.detach().requires_grad_() for s in shard(w, n)]
    got, want = sliced_linear(x, slices, w.shape), x @ w.t()
    g = torch.randn_like(want)
    want_x, want_w = torch.autograd.grad(want, (x, w), g)
    got_x, *got_w = torch.autograd.grad(got, (x, *slices), g)
    assert torch.equal(got, want) and torch.equal(got_x, want_x) and torch.equal(gather(got_w, w.shape), want_w)


@given(st.integers(1, 8), st.integers(1, 12))
def test_a_pipeline_does_all_its_work_in_order(p, m):
    lines = pipeline_schedule(p, m)
    assert all(sorted(filter(None, line)) == sorted([f"{k}{i + 1}" for i in range(m) for k in "FB"]) for line in lines)
    for a, b in zip(lines, lines[1:]):
        assert all(
            a.index(f"F{i + 1}") < b.index(f"F{i + 1}") and a.index(f"B{i + 1}") > b.index(f"B{i + 1}")
            for i in range(m)
        )
    assert sum(line.count("") for line in lines) / len(lines) / len(lines[0]) == pytest.approx(bubble(p, m))
    assert draw_schedule(lines).html.count("<rect") == p * 2 * (m + p - 1)


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", config_files())
def test_a_ready_file_is_valid_and_accelerate_reads_it(kind, tmp_path):
    from accelerate.commands.config.config_args import ClusterConfig

    check_config(config_files()[kind])
    config = launch_config(kind, 8, mixed_precision="bf16", path=tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()) == config == check_config(tmp_path / "c.yaml")
    assert ClusterConfig.from_yaml_file(str(tmp_path / "c.yaml")).num_processes == 8


def test_a_ready_file_is_in_the_package():
    text = (root / "setup.py").read_text()
    assert '"assets/**"' in text and all(p.parts[-3:-1] == ("assets", "accelerate") for p in config_files().values())


def test_launch_config_names_the_kinds():
    with pytest.raises(ValueError, match="zero3-offload"):
        launch_config("fsdp1")
    with pytest.raises(ValueError, match="unknown key nproc"):
        launch_config("ddp", 2, nproc=3)
    assert (
        launch_config("zero3-offload", offload_param_device="none")["deepspeed_config"]["offload_param_device"]
        == "none"
    )
