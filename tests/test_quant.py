"NF4 and its kin against bitsandbytes, the quantised layer against the dense one, and adapters on it against peft."
import copy, json, logging, math, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn

from ftbook.lora import LoRA
from ftbook.methods import load_adapter, merge_, parts_of, remove_, save_adapter
from ftbook.quant import (BLOCK_SIZES, VALUES, QuantLinear, bits_per_weight, dequantize_, dynamic_code, load_quantized, merge_quantized_, nearest, normal_float,
    quantizable, quantize_, quantize_blocks, quantize_constants, quantize_tensor, quantized_layers, scale_blocks)
from tiny import random_batch, seeded

logging.getLogger("bitsandbytes").setLevel("ERROR")
vocab = 60
cpu = "cpu"


def llama(tied=False, hidden=64):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=2*hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=vocab, tie_word_embeddings=tied))


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM      # biases on q, k and v
    return Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=vocab))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel        # Conv1D, a tied head
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=vocab, n_positions=64, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=0, eos_token_id=0))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration
    return T5ForConditionalGeneration(T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=vocab, dropout_rate=0., feed_forward_proj="gated-gelu", decoder_start_token_id=0))


small_models = {"Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "T5": t5}


def make(name, seed=0): return seeded(small_models[name], seed)
def batch(**kw): return random_batch(vocab, **kw)


def logits(model): return model(**batch()).logits.detach()
def gap(p, q): return float((p.detach().float() - q.detach().float()).abs().max())
def relative(w, near): return float((w - near).norm()/w.norm())


def shaken(model, std=.1):
    "Give every trained number another value; B must not stay zero."
    torch.manual_seed(5)
    for n in model.ftbook_added:
        p = model.get_parameter(n)
        p.data.add_(std*torch.randn_like(p))
    return model


def grads(model):
    model.zero_grad()
    model(**batch()).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    moving = sum(g.abs().max() > 1e-8 for g in found.values())                     # a bias on keys has no gradient, whatever it is
    assert moving > .8*len(found), "a comparison of zeros proves nothing"
    return found


# Codes

shapes = [(64, 64), (48, 100), (7, 9), (1, 33), (1, 1), (33,), (2, 3, 70), (500, 333)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_constants_equal_bitsandbytes(kind, dtype):
    import bitsandbytes.functional as bnb
    for i, shape in enumerate(shapes):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        w = (w*torch.logspace(-3, 1, w.numel()).view(shape)).to(dtype)             # blocks of very different sizes
        for block_size in BLOCK_SIZES:
            codes, absmax = quantize_blocks(w, kind, block_size)
            theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind)
            assert torch.equal(codes, theirs.flatten()) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_on_a_midpoint_go_where_bitsandbytes_puts_them(kind):
    import bitsandbytes.functional as bnb
    values = VALUES[kind].sort().values
    ties = torch.cat([(values[1:] + values[:-1])/2, torch.tensor([1., 0., -0.])])
    w = torch.stack([ties.repeat(8)[:64]*s for s in (1., .5, 4.)])                  # scaled by powers of two: still ties
    w[:, 0] = torch.tensor([1., .5, 4.])
    assert torch.equal(quantize_blocks(w, kind, 64)[0], bnb.quantize_4bit(w, quant_type=kind)[0].flatten())


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000, 70_000])
def test_double_quantisation_equals_bitsandbytes(n):
    import bitsandbytes.functional as bnb
    for scale in (1., 1e-3, 1e-9):
        absmax = torch.rand(n, generator=torch.Generator().manual_seed(n))*scale
        codes, nested, mean = quantize_constants(absmax)
        want = absmax.mean()
        theirs, state = bnb.quantize_blockwise(absmax - want, blocksize=256)
        assert torch.equal(mean, want) and torch.equal(codes, theirs) and torch.equal(nested, state.absmax)


def test_constants_that_are_all_equal_come_back():
    q = quantize_tensor(torch.ones(64, 64))
    assert torch.equal(q.dequantize(), torch.ones(64, 64)) and not quantize_tensor(torch.zeros(64, 64)).dequantize().any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_values_equal_bitsandbytes(kind, dtype, double_quant):
    import bitsandbytes.functional as bnb
    for shape, block_size in [((64, 64), 64), ((300, 768), 64), ((300, 768), 256), ((9, 1024), 1024), ((700, 512), 32)]: # whole blocks to a row: elsewhere its AVX-512 kernel may err
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        ours = quantize_tensor(w, kind, block_size, double_quant).dequantize(dtype)
        theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(w, blocksize=block_size, quant_type=kind, compress_statistics=double_quant))
        assert gap(ours, theirs) <= 1e-6 and ours.dtype == dtype


@pytest.mark.parametrize("kind", list(VALUES))
@pytest.mark.parametrize("shape", [(7, 9), (256, 144), (1, 1), (33,), (1500, 1111)])
def test_every_weight_comes_back_within_half_a_step(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, flat = VALUES[kind].sort().values, w.flatten()
    step = float((values[1:] - values[:-1]).max())/2
    for block_size in (32, 64, 4096):
        near = quantize_tensor(w, kind, block_size, double_quant=False).dequantize()
        absmax = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size).abs().amax(1).repeat_interleave(block_size)[:len(flat)]
        assert near.shape == w.shape and ((near - w).abs().flatten() <= 1.0001*step*absmax + 1e-7).all()


def test_the_tables_are_bitsandbytes_own():
    import bitsandbytes.functional as bnb
    assert torch.equal(normal_float(), bnb.get_4bit_type("nf4", device=cpu)) and torch.equal(VALUES["fp4"], bnb.get_4bit_type("fp4", device=cpu))
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


def test_bits_are_what_is_stored():
    w = torch.randn(512, 2048)
    for kind in VALUES:
        for double_quant in (True, False): assert math.isclose(8*quantize_tensor(w, kind, 64, double_quant).n_bytes/w.numel(), bits_per_weight(kind, 64, double_quant), rel_tol=1e-4)


def test_quantising_needs_little_beside_the_layer():
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): sizes.append(out.untyped_storage().nbytes())
            return out
    w = torch.randn(4096, 4096)
    with Sizes(): quantize_blocks(w, "nf4", 64)
    assert max(s for s in sizes if s != w.untyped_storage().nbytes()) < w.untyped_storage().nbytes()/4


# The layer

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(VALUES))
def test_the_layer_is_its_dense_twin(dtype, bias, kind):
    torch.manual_seed(0)
    dense = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    layer = QuantLinear.from_layer(dense, kind)
    twin = copy.deepcopy(dense)
    twin.weight.data = layer.weight
    twin = twin.to(dtype)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    for ours, want in zip(*([y := m(x), *torch.autograd.grad(y.float().square().sum(), x)] for m in (layer, twin))):
        assert torch.equal(ours, want) and ours.dtype == dtype


def test_under_autocast_it_runs_in_the_lower_precision():
    layer, x = QuantLinear.from_layer(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True)
    with torch.autocast(cpu, dtype=torch.bfloat16): y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert gap(x.grad[0], layer.weight.sum(0)) < .1


def test_nothing_is_kept_and_a_bias_may_be_trained():
    layer, x, kept = QuantLinear.from_layer(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): layer(x)
    assert not kept
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 3.))


def test_a_model_keeps_less_for_backward_than_if_it_unpacked_for_good():
    def kept(model):
        own, seen = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}
        def note(t):
            s = t.untyped_storage()
            if s.data_ptr() not in own: seen[s.data_ptr()] = s.nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): model(**batch(n=1, length=2)).loss.backward()
        return sum(seen.values())
    quant = LoRA(rank=2).apply(quantize_(make("Llama")))
    held = kept(quant)
    for o in quantized_layers(quant).values(): o.forward = lambda x, o=o: F.linear(x, o.weight)
    needed = {n: o for n, o in quantized_layers(quant).items() if not any(k in n for k in ("layers.0.self_attn.q", "layers.0.self_attn.k", "layers.0.self_attn.v"))} # what those read needs no gradient
    assert kept(quant) - held == sum(4*o.in_features*o.out_features for o in needed.values())


def test_buffers_travel():
    import safetensors.torch as st
    model = quantize_(make("Qwen2"))
    want, state = logits(model), model.state_dict()
    again = quantize_(make("Qwen2", seed=3))
    again.load_state_dict(state)
    assert torch.equal(logits(again), want)
    again = quantize_(make("Qwen2", seed=3))
    again.load_state_dict(st.load(st.save({k: v.contiguous() for k, v in state.items()})))
    assert torch.equal(logits(again), want) and torch.equal(logits(copy.deepcopy(model)), want)
    with pytest.raises(RuntimeError, match="saved as nf4 in blocks of 64, and this layer is fp4"): quantize_(make("Qwen2"), "fp4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="nested|Missing"): quantize_(make("Qwen2"), double_quant=False).load_state_dict(state)


def test_a_change_of_precision_leaves_the_constants_alone():
    model = quantize_(make("Llama"))
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("nested", "mean"))}
    model.to(torch.bfloat16)
    assert before and all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert all(o.weight.dtype == torch.bfloat16 for o in quantized_layers(model).values()) and model(**batch()).logits.dtype == torch.bfloat16


def test_the_skeleton_has_the_sizes_of_the_model():
    from transformers import AutoModelForCausalLM
    model = quantize_(make("GPT-2"))
    with torch.device("meta"): ghost = AutoModelForCausalLM.from_config(model.config)
    quantize_(ghost)
    assert {n: (t.shape, t.dtype) for n, t in ghost.state_dict().items()} == {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    assert all(t.is_meta for n, t in ghost.state_dict().items())
    x = torch.zeros(1, 4, 64, device="meta", requires_grad=True)
    y = ghost.transformer.h[0].mlp.c_fc(x)
    y.sum().backward()
    assert y.shape == (1, 4, 256) and x.grad.shape == x.shape


# Models and methods

@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize("kind", list(VALUES))
def test_quantised_equals_dequantised(name, kind):
    model = quantize_(make(name), kind, 32)
    names = list(quantized_layers(model))
    plain = dequantize_(copy.deepcopy(model))
    assert gap(logits(model), logits(plain)) < 1e-5 and not quantized_layers(plain)
    assert quantizable(plain) == names and {type(m) for m in plain.modules()} == {type(m) for m in make(name).modules()}


@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize("options", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(init="gaussian"), dict(target_modules=r".*(q_proj|c_attn|\.q)"), dict(lora_bias=True)],
    ids=lambda o: "-".join(o) or "plain")
def test_lora_on_quantised_equals_lora_on_dequantised(name, options):
    quant = shaken(LoRA(rank=4, alpha=8, **options).apply(quantize_(make(name))))
    plain = shaken(LoRA(rank=4, alpha=8, **options).apply(dequantize_(quantize_(make(name)))))
    assert quant.ftbook_added == plain.ftbook_added
    assert gap(logits(quant), logits(plain)) < 1e-4
    theirs = grads(plain)
    assert all(gap(g, theirs[n]) < 1e-4*max(1, float(theirs[n].abs().max())) for n, g in grads(quant).items())


def test_what_changes_frozen_weights_is_refused():
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="q_proj is quantised: use 'kaiming'"): LoRA(rank=2, init=init).apply(quantize_(make("Llama")))


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_equals_peft_with_bitsandbytes(name, kind, double_quant):
    import peft
    ours = LoRA(rank=4, alpha=8).apply(quantize_(make(name), kind, double_quant=double_quant))
    theirs = peft.get_peft_model(quantize_(make(name), kind, double_quant=double_quant, backend="bitsandbytes"), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert any(type(m).__module__ == "peft.tuners.lora.bnb" for m in theirs.modules())
    shaken(ours)
    pairs = {n: (ours.get_parameter(n), theirs.get_parameter(f"base_model.model.{n}.default.weight")) for n in ours.ftbook_added}
    for p, q in pairs.values(): q.data.copy_(p.data)
    assert gap(logits(ours), logits(theirs)) < 1e-4
    grads(ours), grads(theirs)
    assert max(gap(p.grad, q.grad) for p, q in pairs.values()) < 1e-4


def test_training_after_an_evaluation_is_the_same_through_bitsandbytes():
    model = LoRA(rank=4).apply(quantize_(make("Llama"), backend="bitsandbytes"))
    shaken(model)
    before = grads(model)
    with torch.no_grad(): model.eval()(**batch())
    model.train()
    assert all(torch.equal(g, before[n]) for n, g in grads(model).items())


def test_dora_is_refused_or_right_through_bitsandbytes():
    "A layer of bitsandbytes has no weight to read; what cannot be computed must not be computed wrongly."
    with pytest.raises((ValueError, RuntimeError)):
        model = LoRA(rank=4, use_dora=True).apply(quantize_(make("Llama"), backend="bitsandbytes"))
        model(**batch())


def test_adapters_cross_every_border(tmp_path):
    import peft
    ours = shaken(LoRA(rank=4, alpha=8).apply(quantize_(make("Llama"))))
    ours.name_or_path = "some/base"
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path/"adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and "quant" not in json.dumps(config)
    want = logits(ours)
    for backend in ("ftbook", "bitsandbytes"): assert gap(logits(load_adapter(quantize_(make("Llama"), backend=backend), tmp_path)), want) < 1e-4
    assert gap(logits(peft.PeftModel.from_pretrained(quantize_(make("Llama"), backend="bitsandbytes"), tmp_path)), want) < 1e-4
    assert gap(logits(load_adapter(dequantize_(quantize_(make("Llama"))), tmp_path)), want) < 1e-4
    assert torch.equal(logits(remove_(ours)), logits(quantize_(make("Llama"))))


# What no linear layer holds

def experts(name):
    "A small mixture of experts, its experts in one parameter."
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
    small = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts_per_tok=2)
    own = Qwen3MoeConfig(**small, intermediate_size=128, moe_intermediate_size=64, num_experts=8) if name == "Qwen3-MoE" else MixtralConfig(**small, intermediate_size=128, num_local_experts=4)
    return seeded(lambda: AutoModelForCausalLM.from_config(own))


def stays(run):
    "What `run` says of matrices that stay as they are."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in said if "in no linear layer" in str(w.message)]


@pytest.mark.parametrize("backend", ["ftbook", "bitsandbytes"])
@pytest.mark.parametrize("name, router", [("Qwen3-MoE", 8), ("Mixtral", 4)])
def test_fused_experts_stay_dense_with_a_word(name, router, backend):
    model = experts(name)
    fused, n_router = sum(p.numel() for p in model.parameters() if p.dim() == 3), 2*router*64
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    said, = stays(lambda: quantize_(model, backend=backend))
    assert len(quantized_layers(model)) == 8
    share = f"{(fused + n_router)/(fused + n_router + linear):.0%}"
    assert said.startswith(f"{share} of the numbers") and f"{fused + n_router:,} of them ({share})" in said and f"take {4*(fused + n_router)/2**30:.2g} GiB" in said
    assert f"model.layers.*.mlp.experts.gate_up_proj ({fused*2//3:,}), model.layers.*.mlp.experts.down_proj ({fused//3:,}), model.layers.*.mlp.gate.weight ({n_router:,})" in said
    assert "skip=['experts']" in said and stays(lambda: quantize_(experts(name), backend=backend, skip=["experts"])) == []


@pytest.mark.parametrize("name", small_models)
def test_dense_models_are_told_nothing(name):
    assert stays(lambda: quantize_(make(name))) == [] and stays(lambda: quantize_(make(name), skip=["q_proj", "c_attn", "q"])) == []


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_loading_says_it_too(name, tmp_path):
    from transformers import AutoTokenizer
    from ftbook.models import model_folder
    experts(name).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(tmp_path)
    said, = stays(lambda: load_quantized(tmp_path, dtype="float32", device=cpu))
    assert "mlp.experts.gate_up_proj" in said


# Loading

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_streaming_gives_the_model_that_loading_gives(tmp_path, tied, shard):
    from transformers import AutoModelForCausalLM
    from ftbook.models import model_folder
    from transformers import AutoTokenizer
    torch.manual_seed(0)
    llama(tied).save_pretrained(tmp_path, max_shard_size=shard)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(tmp_path)
    for backend in ("ftbook", "bitsandbytes"):
        model, _ = load_quantized(tmp_path, dtype="float32", device=cpu, backend=backend)
        want = quantize_(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), backend=backend)
        assert torch.equal(logits(model), logits(want)) and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and not model.training
    model, _ = load_quantized(tmp_path, dtype="bfloat16", device=cpu, skip=["down_proj"])
    assert model.dtype == torch.bfloat16 and type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_streaming_names_the_tensor_that_is_broken(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj has 1 values that are NaN or infinite"): load_quantized(tmp_path, dtype="float32", device=cpu)


def test_a_folder_that_is_quantised_already_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match="quantised already"): load_quantized(tmp_path, device=cpu)


def hub_folder(cache, repo):
    "A model as the hub's cache keeps it: files named by their contents, a snapshot that points at them, and a name for the snapshot."
    from transformers import AutoTokenizer
    from ftbook.models import model_folder
    torch.manual_seed(0)
    home, commit = cache/f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = home/"snapshots"/commit
    llama().save_pretrained(snapshot)
    AutoTokenizer.from_pretrained(model_folder("smollm2-135m")).save_pretrained(snapshot)
    (home/"blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blob := home/"blobs"/f"{i:040x}")
        file.symlink_to(blob)
    (home/"refs").mkdir()
    (home/"refs"/"main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("backend", ["ftbook", "bitsandbytes"])
def test_a_hub_id_is_streamed_from_the_cache(tmp_path, monkeypatch, backend):
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM
    from ftbook import quant
    snapshot = hub_folder(tmp_path, "someone/some-model")
    for file in (constants, __import__("huggingface_hub")._snapshot_download.constants): monkeypatch.setattr(file, "HF_HUB_CACHE", str(tmp_path))
    seen = []
    monkeypatch.setattr(quant, "load_tokenizer", lambda name: seen.append(name))       # it has tests of its own
    monkeypatch.setattr(quant, "load_model", lambda *a, **k: pytest.fail("the whole model was loaded"))
    found = quant._local_files("someone/some-model")
    assert found is not None and found.samefile(snapshot)
    model, _ = load_quantized("someone/some-model", dtype="float32", device=cpu, backend=backend)
    want = quantize_(AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32), backend=backend)
    assert seen == ["someone/some-model"] and len(quantized_layers(model)) == 14 and torch.equal(logits(model), logits(want))


def test_a_hub_id_that_is_not_there_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="someone/no-such-model"): load_quantized("someone/no-such-model", device=cpu)


# Merging

@pytest.mark.parametrize("name", small_models)
@pytest.mark.parametrize("options", [dict(), dict(use_dora=True)], ids=["LoRA", "DoRA"])
def test_merging_three_ways(name, options, tmp_path):
    model = shaken(LoRA(rank=4, alpha=8, **options).apply(quantize_(make(name))), .05)
    save_adapter(model, tmp_path)
    trained = logits(model)
    ways = {into: merge_quantized_(copy.deepcopy(model), into, make(name) if into == "full" else None) for into in ("full", "dequantized", "requantized")}
    assert gap(logits(ways["dequantized"]), trained) < 1e-4
    assert gap(logits(ways["full"]), logits(merge_(load_adapter(make(name), tmp_path)))) < 1e-4
    again = quantize_(copy.deepcopy(ways["dequantized"]))
    assert torch.equal(logits(ways["requantized"]), logits(again)) and list(quantized_layers(again)) == list(quantized_layers(ways["requantized"]))
    assert not any(hasattr(m, "ftbook_method") for m in ways.values())
    if name == "Llama": assert gap(logits(ways["full"]), trained) > 1e-4 < gap(logits(ways["requantized"]), trained)


def test_requantised_is_what_peft_makes():
    import peft
    ours = shaken(LoRA(rank=4, alpha=8).apply(quantize_(make("Llama"))))
    theirs = peft.get_peft_model(quantize_(make("Llama"), backend="bitsandbytes"), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for n in ours.ftbook_added: theirs.get_parameter(f"base_model.model.{n}.default.weight").data.copy_(ours.get_parameter(n).data)
    ours, theirs = merge_quantized_(ours, "requantized"), theirs.merge_and_unload()
    assert all(torch.equal(o.codes, theirs.get_submodule(n).weight.flatten()) for n, o in quantized_layers(ours).items())


def test_merging_through_bitsandbytes_and_of_some_layers_only():
    ours, other = (shaken(LoRA(rank=4, target_modules=["q_proj"]).apply(quantize_(make("Llama"), backend=b))) for b in ("ftbook", "bitsandbytes"))
    for into in ("dequantized", "requantized"):
        a, b = (merge_quantized_(copy.deepcopy(m), into) for m in (ours, other))
        assert gap(logits(a), logits(b)) < 1e-4 and len(quantized_layers(a)) == len(quantized_layers(b)) == 14*(into == "requantized")


def test_modules_trained_whole_are_merged_too():
    model = LoRA(rank=4, modules_to_save=["lm_head", "norm"]).apply(quantize_(make("Llama")))
    shaken(model, .05)
    trained = logits(model)
    assert gap(logits(merge_quantized_(model, "dequantized")), trained) < 1e-4


def test_merging_is_all_or_nothing():
    model = shaken(LoRA(rank=2).apply(quantize_(make("Llama"))))
    before = logits(model)
    wrong = make("Llama")
    wrong.model.layers[1].mlp.down_proj = nn.Linear(3, 3)
    for args, said in [(("whole",), "say 'full'"), (("full",), "needs `base`"), (("dequantized", make("Llama")), "take none"), (("full", wrong), "layers.1.mlp.down_proj of 128 x 64"),
                       (("full", quantize_(make("Llama"))), "in full precision"), (("full", make("GPT-2")), "no linear layer")]:
        with pytest.raises(ValueError, match=said): merge_quantized_(model, *args)
    with pytest.raises(ValueError, match="requantized"): merge_(model)
    assert torch.equal(logits(model), before) and len(parts_of(model)) == 14
    with pytest.raises(ValueError, match="no layer of the model is quantised"): merge_quantized_(LoRA(rank=2).apply(make("Llama")), "dequantized")
    with pytest.raises(ValueError, match="no method"): merge_quantized_(quantize_(make("Llama")), "dequantized")


# Bad input

def test_a_refusal_leaves_the_model_as_it_was():
    model = make("Llama")
    before = logits(model)
    model.model.layers[1].self_attn.o_proj.weight.data = model.model.layers[1].self_attn.o_proj.weight.data.clone()
    for args, said in [(dict(kind="nf3"), "choose nf4"), (dict(block_size=48), "one of 32"), (dict(block_size="64"), "one of 32"), (dict(backend="gptq"), "choose 'ftbook'"),
                       (dict(kind="int8", backend="bitsandbytes"), "has no int8"), (dict(skip=["proj"], kind="nf3"), "choose nf4"), (dict(skip=[n for n in quantizable(model)]), "no linear layer is left")]:
        with pytest.raises(ValueError, match=said): quantize_(model, **args)
    assert torch.equal(logits(model), before)
    for bad in (math.nan, math.inf, -math.inf):
        broken = make("GPT-2")
        broken.transformer.h[1].mlp.c_proj.weight.data[0, 1] = bad
        with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_proj.weight has 1 values"): quantize_(broken)
        assert not quantized_layers(broken)
    with pytest.raises(ValueError, match="float64, and only"): quantize_(make("Llama").double())
    with pytest.raises(ValueError, match="uint8, and only .* quantised already"): quantize_tensor(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty"): quantize_tensor(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="is not quantised"): dequantize_(make("Llama"))


def test_what_is_quantised_is_not_quantised_again():
    for backend in ("ftbook", "bitsandbytes"):
        model = quantize_(make("Llama"), backend=backend)
        with pytest.raises(ValueError, match="quantised already .* and 13 more"): quantize_(model)
    model = make("Llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"GgufConfig\(dequantize=True\)"): quantize_(model)
    with pytest.raises(ValueError, match="quantise first"): quantize_(LoRA(rank=2).apply(make("Llama")))
    with pytest.raises(ValueError, match="merge_quantized_"): dequantize_(LoRA(rank=2).apply(quantize_(make("Llama"))))


def test_bitsandbytes_is_never_wrong_in_silence():
    "Rows that are no whole number of blocks: either its layer gives what ours gives, or it is refused."
    model = nn.ModuleDict({"one": nn.Linear(144, 256, bias=False)})
    ours, x = quantize_(copy.deepcopy(model)), torch.randn(3, 144, requires_grad=True)
    try: theirs = quantize_(copy.deepcopy(model), backend="bitsandbytes")
    except ValueError as e: assert "no whole number of blocks of 64" in str(e)
    else: assert gap(theirs["one"](x), ours["one"](x)) < 1e-4


def test_odd_layers_work():
    layer = QuantLinear.from_layer(nn.Linear(9, 7))
    assert len(layer.codes) == 32 and len(layer.absmax) == 1
    x = torch.randn(4, 9, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, 9), atol=1e-5)


def test_the_book_knows_a_quantised_layer():
    from ftbook.methods import is_quantized, trainable_summary
    from ftbook.models import count_parameters
    plain, n = make("Llama"), sum(count_parameters(make("Llama")).values())
    model = LoRA(rank=2).apply(quantize_(make("Llama")))
    assert trainable_summary(model).total == n + trainable_summary(model).trained and not any(map(is_quantized, plain.modules()))
    bnb = LoRA(rank=2).apply(quantize_(make("Llama"), backend="bitsandbytes"))
    for m in (model, bnb):
        with pytest.raises(ValueError, match="q_proj is quantised: .*merge_quantized_"): merge_(m)
    with pytest.raises(ValueError, match="DoRA needs the norms of the weights, and Linear4bit hides them"): LoRA(rank=2, use_dora=True).apply(quantize_(make("Llama"), backend="bitsandbytes"))
