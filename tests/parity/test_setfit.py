"Few labels against setfit, sentence-transformers and scikit-learn, and files across the border."

import json, os, subprocess, sys

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from ftbook.fewshot import check as fewshot_check
from ftbook.fewshot.head import fit_head
from ftbook.fewshot.encoder import load_body, read_vectors
from ftbook.fewshot.pairs import count_pairs
from ftbook.fewshot.tuning import Tuning
from ftbook.fewshot.contrast import contrastive_loss, pair_loss, same_class
from ftbook.fewshot.exchange import export_setfit, load_classifier, load_setfit
from cases.fewshot import classifier, fitted, random_batch, save_tiny_encoder, sentences, tiny


# Pairs and losses


class AsIs(nn.Module):
    def forward(self, features):
        return features


def test_pair_loss_is_the_one_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    a, b = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    same = torch.randint(2, (20,)).float()
    ours, theirs = (
        pair_loss(a, b, same),
        CosineSimilarityLoss(AsIs())([{"sentence_embedding": a}, {"sentence_embedding": b}], same),
    )
    assert abs(ours - theirs) < 1e-5
    for p, q in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b))):
        assert (p - q).abs().max() < 1e-5


# Setfit, in its own environment where this one lacks it

SETFIT = os.environ.get("SETFIT_PYTHON") or (
    sys.executable if __import__("importlib.util").util.find_spec("setfit") else None
)
with_setfit = pytest.mark.skipif(
    not SETFIT, reason="setfit is not here, and SETFIT_PYTHON names no interpreter that has it"
)


def ask_setfit(code, *args, stdin=None):
    done = subprocess.run(
        [SETFIT, "-c", code, *map(str, args)], input=json.dumps(stdin), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@with_setfit
@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
def test_contrastive_loss_is_the_one_of_setfit(temperature):
    v, y = random_batch()
    code = (
        "import json, sys, torch\nfrom setfit.losses import SupConLoss\nd = json.load(sys.stdin)\nclass "
        "M(torch.nn.Module):\n    def forward(self, f): return f\n"
        "v = torch.tensor(d['v']).requires_grad_()\nloss = SupConLoss(M(), temperature=d['t'], "
        "base_temperature=d['t'])([{'sentence_embedding': v}], torch.tensor(d['y']))\n"
        "loss.backward()\nprint(json.dumps([loss.item(), v.grad.tolist()]))"
    )
    theirs, gradient = ask_setfit(code, stdin=dict(v=v.tolist(), y=y.argmax(1).tolist(), t=temperature))
    ours = contrastive_loss(F.normalize(v, dim=1), same_class(y), temperature)
    assert abs(ours.item() - theirs) < 1e-5
    assert (torch.autograd.grad(ours, v)[0] - torch.tensor(gradient)).abs().max() < 1e-5


@with_setfit
def test_pairs_are_counted_as_setfit_counts_them():
    code = (
        "import json, sys\nfrom setfit.sampler import ContrastiveDataset\nout = []\nfor counts in "
        "json.load(sys.stdin):\n    y = [c for c, n in enumerate(counts) for _ in range(n)]\n"
        "    out.append(len(list(ContrastiveDataset([str(i) for i in range(len(y))], y, "
        "False))))\nprint(json.dumps(out))"
    )
    many = [[8, 8], [8] * 5, [1, 7, 3], [2, 30]]
    assert ask_setfit(code, stdin=many) == [count_pairs(c)["setfit_pairs"] for c in many]


READ = (
    "import json, sys\nfrom setfit import SetFitModel\nm = SetFitModel.from_pretrained(sys.argv[1], "
    "device='cpu')\nt = json.load(sys.stdin)\n"
    "print(json.dumps([[str(x) for x in m.predict(t)] if m.labels and getattr(m.model_head, 'estimators_', "
    "None) is None else [], m.predict_proba(t, as_numpy=True).tolist()]))"
)


@with_setfit
@pytest.mark.parametrize("classes", [("kitchen", "sea"), ("garden", "kitchen", "sea")])
def test_setfit_loads_ours(tiny, tmp_path, classes):
    texts, labels = sentences(6, classes=classes)
    model = classifier(tiny, tuning=Tuning(steps=3, lr=2e-3)).fit(texts, labels)
    new = sentences(5, seed=1, classes=classes)[0]
    said, p = ask_setfit(READ, export_setfit(model, tmp_path / "m"), stdin=new)
    assert said == model.predict(new)
    assert np.abs(np.array(p) - model.predict_proba(new)).max() < 1e-5


@with_setfit
def test_setfit_loads_several_labels(tiny, tmp_path):
    texts, labels = sentences(6)
    model = classifier(tiny, tuning=Tuning(steps=3)).fit(
        texts, [[c, "odd"] if i % 2 else [c] for i, c in enumerate(labels)], check=False
    )
    _, p = ask_setfit(READ, export_setfit(model, tmp_path / "m"), stdin=texts[:5])
    ours = model.predict_proba(texts[:5])
    assert np.abs(np.array(p) - ours / 1).max() < 1e-5


@with_setfit
@pytest.mark.parametrize("how", ["words", "numbers", "several"])
def test_ours_loads_what_setfit_saved(tiny, tmp_path, how):
    texts, labels = sentences(6)
    code = (
        "import json, sys\nimport numpy as np\nfrom sentence_transformers import SentenceTransformer\nfrom "
        "setfit import SetFitModel\nfrom sklearn.linear_model import LogisticRegression\n"
        "from sklearn.multiclass import OneVsRestClassifier\nd = json.load(sys.stdin)\nhead = "
        "OneVsRestClassifier(LogisticRegression()) if d['several'] else LogisticRegression()\n"
        "m = SetFitModel(model_body=SentenceTransformer(d['encoder'], device='cpu'), model_head=head, "
        "labels=d['labels'])\nm.fit(d['texts'], d['y'], num_epochs=1)\n"
        "m.save_pretrained(sys.argv[1])\nprint(json.dumps(m.predict_proba(d['texts'], as_numpy=True).tolist()))"
    )
    names = sorted(set(labels))
    y = (
        labels
        if how == "words"
        else [names.index(c) for c in labels]
        if how == "numbers"
        else [[int(c == n), int(i % 2), 0 + (c != n)][:3] for i, c in enumerate(labels) for n in names[:1]]
    )
    theirs = ask_setfit(
        code, tmp_path / "m", stdin=dict(encoder=str(tiny), texts=texts, y=y, labels=names, several=how == "several")
    )
    with pytest.raises(ValueError, match="can run code"):
        load_setfit(tmp_path / "m")
    with pytest.raises(ValueError, match="trust_pickle"):
        load_classifier(tmp_path / "m")
    model = load_setfit(tmp_path / "m", trust_pickle=True, device="cpu", dtype=torch.float32)
    assert model.classes == names
    assert np.abs(model.predict_proba(texts) - np.array(theirs)).max() < 1e-5


# Heads


def test_heads_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression, Ridge

    torch.manual_seed(0)
    x, codes = F.normalize(torch.randn(60, 10), dim=1), torch.arange(60) % 4
    y, new = F.one_hot(codes).float(), F.normalize(torch.randn(20, 10), dim=1)
    for some, k in ((codes < 2, 2), (codes < 9, 4)):
        fit = LogisticRegression(C=3.0, max_iter=1000).fit(x[some].numpy(), codes[some].numpy())
        assert (
            np.abs(
                fit_head(x[some], y[some][:, :k], C=3.0).probabilities(new).numpy() - fit.predict_proba(new.numpy())
            ).max()
            < 1e-5
        )
    ridge = Ridge(alpha=0.5).fit(x.double().numpy(), (2 * y - 1).numpy())
    assert np.abs(fit_head(x, y, "ridge", C=2.0).scores(new).numpy() - ridge.predict(new.double().numpy())).max() < 1e-5
    means = F.normalize(torch.stack([x[codes == c].mean(0) for c in range(4)]), dim=1)
    assert torch.equal(fit_head(x, y, "mean").scores(new).argmax(1), (new @ means.t()).argmax(1))


# Reading


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_are_those_of_sentence_transformers(tmp_path, pooling, normalise):
    from sentence_transformers import SentenceTransformer

    folder = save_tiny_encoder(tmp_path / "m", pooling, normalise)
    texts = sentences(4)[0] + ["", "word " * 80, "A"]
    body = load_body(folder, "cpu", torch.float32)
    assert (body.pooling, body.normalise) == (pooling, normalise)
    with torch.no_grad():
        ours = read_vectors(body, body.ids(texts)[0], batch_size=3)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    assert (ours - theirs).abs().max() < 1e-5


# Files


def test_sentence_transformers_loads_it(fitted, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = sentences(5, seed=9)[0]
    theirs = SentenceTransformer(str(fitted.save(tmp_path / "m")), device="cpu").encode(texts, convert_to_tensor=True)
    assert (fewshot_check._vectors(fitted.body, fitted.body.ids(texts)[0], 0) - theirs).abs().max() < 1e-5
