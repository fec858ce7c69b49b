"LoRA on whole models: which layers it finds, what it leaves alone, and what merging rounds."

import gc, math, warnings, weakref

import pytest, torch
from torch import nn

from ftbook.methods.lora_files import as_plain
from ftbook.methods.lora_method import LoRA
from ftbook.methods.lora import LoRALinear
from ftbook.methods.low_rank import low_rank
from ftbook.methods.dora import row_norms
from ftbook.methods.parts import parts_of
from ftbook.methods.files import load_adapter, save_adapter
from ftbook.methods.fold import merge_, remove_, unmerge_
from ftbook.methods.summary import trainable_summary
from tiny import seeded
from cases.lora import at_rest, batch, gap, lively, llama, make, small_models


# Same as the library


def test_initialisation():
    from torch.nn.init import kaiming_uniform_

    torch.manual_seed(5)
    first = LoRA(rank=4, seed=3).apply(make("Llama"))
    torch.manual_seed(99)
    again, other = (LoRA(rank=4, seed=s).apply(llama()) for s in (3, 4))
    pick = lambda m: torch.cat([o.lora_A.flatten() for o in parts_of(m).values()])
    assert torch.equal(pick(first), pick(again)) and not torch.equal(pick(again), pick(other))
    layer = LoRALinear(nn.Linear(400, 300), 100, 1.0)
    like = kaiming_uniform_(torch.empty(100, 400), a=math.sqrt(5))
    assert (
        (layer.lora_B == 0).all()
        and abs(layer.lora_A.std() / like.std() - 1) < 0.02
        and layer.lora_A.abs().max() <= 400**-0.5
    )


def test_own_seed_leaves_the_global_one_alone():
    model = make("Llama")
    state = torch.get_rng_state()
    LoRA(rank=4).apply(model)
    assert torch.equal(torch.get_rng_state(), state)


# Whatever may happen to a family


def test_nothing_is_kept_alive():
    model = lively(make("Llama"))
    out = model(**batch())  # no backward follows
    nodes = [weakref.ref(o) for o in (out.logits,)]
    attention = model.model.layers[0].self_attn
    seen = []
    attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(weakref.ref(k["hidden_states"])), with_kwargs=True
    )
    del out
    model(**batch())
    gc.collect()
    assert at_rest(model) and all(r() is None for r in nodes + seen)


def experts(name):
    "A small mixture of experts, its experts in one parameter."
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    small = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
    )
    own = (
        Qwen3MoeConfig(**small, intermediate_size=64, moe_intermediate_size=48, num_experts=8)
        if name == "Qwen3-MoE"
        else MixtralConfig(**small, intermediate_size=96, num_local_experts=4)
    )
    return seeded(lambda: AutoModelForCausalLM.from_config(own))


def left_out(method, model):
    "What is said of matrices that `method` does not reach."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method.apply(model)
    return [str(w.message) for w in said if "in no linear layer" in str(w.message)]


@pytest.mark.parametrize("name, router", [("Qwen3-MoE", 8), ("Mixtral", 4)])
def test_fused_experts_are_not_left_out_silently(name, router):
    model = experts(name)
    fused = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    n_router = 2 * router * 32
    (said,) = left_out(LoRA(rank=2), model)
    assert (
        f"reaches {linear / (linear + fused + n_router):.0%} of the numbers" in said
        and f"{fused + n_router:,} numbers ({(fused + n_router) / (linear + fused + n_router):.0%})" in said
    )
    assert (
        f"model.layers.*.mlp.experts.gate_up_proj ({fused * 2 // 3:,}), model.layers.*.mlp.experts.down_proj "
        f"({fused // 3:,}), model.layers.*.mlp.gate.weight ({n_router:,})"
    ) in said
    assert "modules_to_save=['experts']" in said and "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']" in said


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_what_the_warning_advises_ends_it_and_works(name, tmp_path):

    assert left_out(LoRA(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), experts(name)) == []
    model = experts(name)
    assert left_out(LoRA(rank=2, modules_to_save=["experts"]), model) == []
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if ".whole." in n}
    assert len(trained) == 4 and all(p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.sub_(p.grad)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        assert (
            torch.equal(load_adapter(experts(name), tmp_path).eval()(ids).logits, model.eval()(ids).logits)
            and gap([(experts(name).eval()(ids).logits, model(ids).logits)]) > 1e-4
        )


@pytest.mark.parametrize("name", small_models)
def test_dense_models_are_told_nothing(name):
    assert left_out(LoRA(rank=2), make(name)) == []


def test_coverage():
    from ftbook.methods.coverage import coverage
    from ftbook.methods.quant import quantize_

    model, names = make("Llama"), LoRA().targets(make("Llama"))
    whole = coverage(model, names)
    n = sum(m.weight.numel() for k, m in model.named_modules() if isinstance(m, nn.Linear) and k != "lm_head")
    assert (whole.total, whole.reached, whole.outside, whole.share) == (n, n, {}, 1)
    attention = [k for k in names if "self_attn" in k]
    assert coverage(model, attention).reached == sum(model.get_submodule(k).weight.numel() for k in attention) < n
    assert (
        coverage(quantize_(make("Llama")), names) == whole
        and coverage(make("Llama"), ["model.layers"]) == whole
        and coverage(model, ["model.layer"]).reached == 0
    )
    with pytest.raises(ValueError, match="before a method is applied"):
        coverage(LoRA().apply(model), names)


def test_meta_device_costs_nothing():
    with torch.device("meta"):
        model = llama()
    assert (
        trainable_summary(LoRA(rank=4).apply(model)).trained
        == trainable_summary(LoRA(rank=4).apply(make("Llama"))).trained
    )


# Merging


@pytest.mark.parametrize("name", small_models)
def test_merged_is_unmerged(name):
    model = lively(make(name)).eval()
    want, state = model(**batch()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    merge_(model)
    assert gap([(model(**batch()).logits, want)]) < 1e-5
    unmerge_(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(**batch()).logits, want
    )


def test_merging_in_bfloat16_rounds_once():
    model = lively(make("Llama").bfloat16())
    layer = model.model.layers[0].mlp.up_proj
    want = (layer.base.weight.float() + layer.delta()).bfloat16()
    before = layer.base.weight.clone()
    merge_(model)
    assert torch.equal(layer.base.weight, want) and layer.base.weight.dtype == torch.bfloat16
    unmerge_(model)
    assert torch.equal(layer.base.weight, before)


# What it costs


def test_no_gradient_for_frozen_weights():
    from torch.utils.flop_counter import FlopCounterMode

    layer = LoRALinear(nn.Linear(64, 64, bias=False).requires_grad_(False), 2, 1.0)
    x = torch.randn(100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        low_rank(x, [layer])[0].sum().backward()
    full, thin = 2 * 100 * 64 * 64, 2 * 100 * 64 * 2
    # y and dx, three products with A and three with B; the weight's gradient would be a third `full`
    assert 2 * full < counter.get_total_flops() <= 2 * full + 6 * thin


# DoRA


def test_row_norms_without_the_matrix():
    torch.manual_seed(0)
    w, a, b = torch.randn(50, 30), torch.randn(4, 30), torch.randn(50, 4)
    assert gap([(row_norms(w, w.square().sum(1), a, b, 1.7), (w + 1.7 * b @ a).norm(dim=1))]) < 1e-4
    b[0] = 0
    w[0] = 0
    assert row_norms(w, w.square().sum(1), a, b, 1.7)[0] == 0


@pytest.mark.parametrize("name", small_models)
def test_dora_merges_and_leaves(name):
    model, data = make(name).eval(), batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    LoRA(rank=4, alpha=8, use_dora=True).apply(model)
    for o in parts_of(model).values():
        nn.init.normal_(o.lora_B, std=0.1)
        o.lora_magnitude_vector.data.mul_(1.1)
    want = model(**data).logits
    assert gap([(merge_(model)(**data).logits, want)]) < 1e-4
    assert torch.equal(unmerge_(model)(**data).logits, want)
    remove_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_changed_base_has_other_norms():
    layer = LoRALinear(nn.Linear(6, 5).requires_grad_(False), 2, 1.0, use_dora=True)
    first = layer.norms()
    with torch.no_grad():
        layer.base.weight.mul_(2)
    assert torch.allclose(layer.norms(), 2 * first)
    layer.base.weight.data = layer.base.weight.data * 2
    assert torch.allclose(layer.norms(), 4 * first)


# Where it begins


@pytest.mark.parametrize("rslora", [False, True])
def test_as_plain_keeps_the_scaling(rslora):
    method = LoRA(
        rank=4, alpha=8, init="pissa", use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    )
    for name in ("q_proj", "v_proj", "o_proj"):
        assert math.isclose(as_plain(method).scaling_of(name), method.scaling_of(name))
    assert as_plain(LoRA()) == LoRA()


def test_the_weights_of_a_quantised_base_are_not_touched():
    class Linear4(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Linear4 does not allow"):
        LoRA(rank=2, init="pissa").apply(nn.Sequential(Linear4(6, 6)))


# LoRA+


def test_finetune_reads_the_ratio():
    from ftbook.data.examples import Example
    from ftbook.training.settings import Settings
    from ftbook.training.loop import Loop

    model = LoRA(rank=4, lr_ratio=8).apply(make("Llama"))
    groups = Loop(model, [Example([1, 2, 3], [False, True, True])], Settings()).optimizer.param_groups
    assert sorted((g["lr_scale"], len(g["params"])) for g in groups) == [(1.0, 14), (8.0, 14)]
    loop = Loop(
        model, [Example([1, 2, 3], [False, True, True])], Settings(lr=1e-3, warmup=0, schedule="constant"), packs=False
    )
    loop.take_step()
    assert sorted(g["lr"] for g in loop.optimizer.param_groups) == [1e-3, 8e-3]
