"Counts and embeddings against peft, bitsandbytes and sentence-transformers."

import pytest
import torch

from ftbook.models.count import count_parameters, role_of
from ftbook.models.load import embed, load_encoder
from ftbook.models.scale import adapter_parameters
from ftbook.models.shipped import model_folder
from cases.models import families


# Counting


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
