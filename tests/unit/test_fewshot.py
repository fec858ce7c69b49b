"Few labels: pairs, losses, gradients, tuning, calibration, reports."

import html, json, math, random, re
from collections import Counter
from dataclasses import asdict

import numpy as np, pytest, torch
import torch.nn.functional as F

from ftbook.fewshot import classifier as fewshot_classifier
from ftbook.fewshot import contrast as fewshot_contrast
from ftbook.fewshot import encoder as fewshot_encoder
from ftbook.fewshot import files as fewshot_files
from ftbook.fewshot import tuning as fewshot_tuning
from ftbook.fewshot.head import HEADS, fit_head
from ftbook.fewshot.encoder import load_body, read_states, read_vectors
from ftbook.fewshot.check import Checked, cross_validate, fit_temperature
from ftbook.fewshot.pairs import Decks, count_pairs
from ftbook.fewshot.evaluation import Evaluation, calibration_error, reliability
from ftbook.fewshot.classifier import FewShotClassifier
from ftbook.fewshot.rows import make_shots
from ftbook.fewshot.tuning import Tuning, suited_tuning
from ftbook.fewshot.report import fewshot_report, FewShotSettings
from ftbook.fewshot.contrast import contrastive_loss, pair_loss, same_class, similarity_loss, tune_
from ftbook.fewshot.exchange import load_classifier
from ftbook.fewshot.uncertain import most_uncertain, next_rows
from ftbook.methods.lora_method import LoRA
from cases.fewshot import classifier, fitted, random_batch, sentences, tiny, write_csv


# Pairs and losses


@pytest.mark.parametrize("counts", [[2, 2], [8] * 5, [1, 7, 3], [64] * 130])
def test_pairs_are_counted_without_a_list(counts):
    found = count_pairs(counts)
    n = sum(counts)
    assert found["alike"] + found["apart"] == math.comb(n, 2)
    if n > 100:
        return
    labels = [c for c, k in enumerate(counts) for _ in range(k)]
    assert found["alike"] == sum(labels[i] == labels[j] for i in range(n) for j in range(i))
    assert found["setfit_steps"] == math.ceil(found["setfit_pairs"] / 16)


def test_one_matrix_holds_all_pairs_of_a_batch():
    "Loss and gradient of the batch against every pair written down, like and unlike ones weighing the same."
    v, y = random_batch()
    same = same_class(y)
    i, j = torch.triu_indices(12, 12, 1)
    on = same[i, j]
    listed = (
        pair_loss(v[i[on]], v[j[on]], torch.ones(on.sum())) + pair_loss(v[i[~on]], v[j[~on]], torch.zeros((~on).sum()))
    ) / 2
    ours = similarity_loss(v, same)
    assert abs(ours - listed) < 1e-6
    tangent = torch.autograd.grad(listed, v)[0]  # the cosine's own gradient has no part along the vector
    plain = torch.autograd.grad(ours, v)[0]
    assert ((plain - (plain * v).sum(1, keepdim=True) * v) - tangent).abs().max() < 1e-5


def test_a_batch_of_one_kind():
    v, _ = random_batch()
    assert (
        abs(
            similarity_loss(v, torch.ones(12, 12, dtype=torch.bool))
            - (1 - (v @ v.t())[tuple(torch.triu_indices(12, 12, 1))]).square().mean()
        )
        < 1e-6
    )
    with pytest.raises(ValueError, match="share a class"):
        contrastive_loss(v, torch.eye(12, dtype=torch.bool))
    assert similarity_loss(v, torch.eye(12, dtype=torch.bool)).isfinite()


def test_contrastive_loss_leaves_out_what_has_no_mate():
    v, y = random_batch(5, k=2)
    same = same_class(torch.cat([y, torch.zeros(5, 1)], 1)) & torch.ones(5, 5, dtype=torch.bool)
    alone = same.clone()
    alone[4], alone[:, 4] = False, False
    alone[4, 4] = True
    loss = contrastive_loss(v, alone)
    loss.backward()
    # it still is among those that the others look at
    assert loss.isfinite() and v.grad.isfinite().all() and v.grad[4].abs().sum() > 0


def test_rows_with_several_classes_are_alike_if_they_share_one():
    assert same_class(torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]


# Heads


@pytest.mark.parametrize("kind", HEADS)
def test_a_class_without_rows_is_never_said(kind):
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), F.one_hot(torch.arange(20) % 2 * 2, 4).float()
    assert set(fit_head(x, y, kind).scores(torch.randn(500, 6)).argmax(1).tolist()) <= {0, 2}


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_several_classes_a_row_are_separate_questions(kind):
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    y = torch.stack(
        [x[:, 0] > 0, x[:, 1] > 0, torch.zeros(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)], 1
    ).float()
    head = fit_head(x, y, kind, exclusive=False)
    said = (head.probabilities(x) >= 0.5).float()
    assert (said == y).float().mean() > 0.95 and not said[:, 2].any() and said[:, 3].all()
    alone = fit_head(x, y[:, :1], kind, exclusive=False)
    assert (head.scores(x)[:, 0] - alone.scores(x)[:, 0]).abs().max() < 1e-4


# Reading


@pytest.mark.parametrize("start", [1, 2, 3])
def test_layers_that_stay_run_once(tiny, start):
    body, texts = load_body(tiny, "cpu", torch.float32), sentences(4)[0] + ["A"]
    ids = body.ids(texts)[0]
    with torch.no_grad():
        assert (
            read_vectors(body, read_states(body, ids, start, 3), start, 5) - read_vectors(body, ids)
        ).abs().max() < 1e-5


def test_gradients_from_kept_states_are_those_of_the_whole_encoder(tiny):
    body, (texts, labels) = load_body(tiny, "cpu", torch.float32), sentences(4)
    targets, ids = make_shots(texts, labels).targets, body.ids(texts)[0]
    params = fewshot_tuning.trained_(body, Tuning(layers=2))
    states = read_states(body, ids, 2)
    one = torch.autograd.grad(fewshot_contrast.batch_loss(body, states, targets, Tuning(layers=2)), params)
    other = torch.autograd.grad(similarity_loss(read_vectors(body, ids), same_class(targets)), params)
    assert all((p - q).abs().max() < 1e-5 for p, q in zip(one, other))


def test_portions_of_a_batch_change_only_its_padding(tiny, monkeypatch):
    texts, labels = sentences(12)

    def learnt(size):
        monkeypatch.setattr(fewshot_contrast, "_portion", lambda n, device: asked.append(n) or size)
        body = load_body(tiny, "cpu", torch.float32)
        params = list(fewshot_tuning.trained_(body, Tuning(layers=2)))
        loss = fewshot_contrast.batch_loss(
            body, body.ids(texts)[0], make_shots(texts, labels).targets, Tuning(layers=0)
        )
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    assert [fewshot_encoder._portion(n, "cpu") for n in (2, 16, 17, 32, 33)] == [
        4,
        4,
        8,
        8,
        16,
    ] and fewshot_encoder._portion(8, "cuda") == 16
    asked = []
    (loss, gradient), (other, another) = learnt(len(texts)), learnt(3)
    assert (
        asked == [len(texts)] * 2
        and (loss - other).abs() < 1e-6
        and (gradient - another).abs().max() < 1e-5 < gradient.abs().max()
    )


def test_attention_in_float32_changes_the_gradient_by_less_than_bfloat16_does(tiny):
    texts, labels = sentences(6)

    def gradient(dtype, attention):
        body = load_body(tiny, "cpu", dtype)
        if body.encoder.config._attn_implementation == "ftbook_float" and not attention:
            body.encoder.set_attn_implementation("sdpa")
        params = fewshot_tuning.trained_(body, Tuning(layers=0))
        loss = fewshot_contrast.batch_loss(
            body, body.ids(texts)[0], make_shots(texts, labels).targets, Tuning(layers=0)
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, allow_unused=True) if g is not None])

    assert load_body(tiny, "cpu", torch.bfloat16).encoder.config._attn_implementation == "ftbook_float"
    exact, mended, plain = (
        gradient(torch.float32, False),
        gradient(torch.bfloat16, True),
        gradient(torch.bfloat16, False),
    )
    assert torch.equal(exact, gradient(torch.float32, True))
    assert (
        0 < (mended - plain).norm() < (plain - exact).norm()
        and max((g - exact).norm() for g in (mended, plain)) < 0.2 * exact.norm()
    )


def test_attention_computes_in_float32_where_gradients_are_wanted(tiny, monkeypatch):
    import transformers.integrations.sdpa_attention as sdpa

    seen, real = [], sdpa.sdpa_attention_forward
    monkeypatch.setattr(
        sdpa,
        "sdpa_attention_forward",
        lambda m, q, k, v, *a, **kw: (
            seen.append((q.dtype, torch.is_autocast_enabled("cpu"))) or real(m, q, k, v, *a, **kw)
        ),
    )
    body = load_body(tiny, "cpu", torch.bfloat16)
    ids = body.ids(sentences(2)[0])[0]
    with torch.no_grad():
        read_vectors(body, ids)
    assert set(seen) == {(torch.bfloat16, True)}
    seen.clear()
    body.encoder.requires_grad_(True)
    read_vectors(body, ids).sum().backward()
    assert set(seen) == {(torch.float32, False)} and len(seen) == 4


def test_a_saved_encoder_does_not_name_our_attention(tiny, tmp_path):
    fewshot_files.save_body(load_body(tiny, "cpu", torch.bfloat16), tmp_path / "a")
    assert "ftbook" not in (tmp_path / "a" / "config.json").read_text()


def test_another_family_attends_in_float32_too(tmp_path):
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel
    from ftbook.models.shipped import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm-l6"))
    torch.manual_seed(0)
    DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts, labels = sentences(6)
    bodies = [load_body(tmp_path, "cpu", d) for d in (torch.bfloat16, torch.float32)]
    assert bodies[0].encoder.config._attn_implementation == "ftbook_float"
    with torch.no_grad():
        a, b = (read_vectors(body, body.ids(texts)[0]) for body in bodies)
    assert (a * b).sum(1).min() > 0.999
    model = FewShotClassifier(tmp_path, device="cpu", dtype=torch.bfloat16, tuning=Tuning(steps=8, lr=1e-3)).fit(
        texts, labels, check=False
    )
    assert model.losses[-1] < model.losses[0]


def test_what_is_cut_is_counted(tiny):
    body = load_body(tiny, "cpu", torch.float32)
    ids, n, lost = body.ids(["word " * 100, "short", "word " * 30])
    assert (n, lost, [len(i) for i in ids]) == (1, 70, [32, 3, 32])
    assert ids == body.tokenizer(["word " * 100, "short", "word " * 30], truncation=True)["input_ids"]


# Batches


@pytest.mark.parametrize("classes, shots, size", [(2, 8, 40), (5, 8, 20), (130, 8, 64), (3, 1, 40), (2, 1000, 32)])
def test_batches_hold_several_of_several_classes(classes, shots, size):
    codes = torch.arange(classes).repeat(shots)
    decks = Decks(F.one_hot(codes, classes).float(), seed=1)
    for _ in range(20):
        rows = decks.batch(size)
        counts = Counter(codes[rows].tolist())
        assert len(set(rows)) == len(rows) <= max(size, 2 * 2) and len(counts) >= min(2, classes)
        assert shots == 1 or min(counts.values()) >= 2


def test_all_classes_have_their_turn():
    codes = torch.arange(130).repeat(4)
    decks = Decks(F.one_hot(codes).float())
    seen = Counter(c for _ in range(13) for c in set(codes[decks.batch(20)].tolist()))
    assert len(seen) == 130 and set(seen.values()) == {1}


def test_batches_follow_the_seed():
    y = F.one_hot(torch.arange(3).repeat(30)).float()
    first, again, other = (Decks(y, seed) for seed in (0, 0, 1))
    a, b, c = ([d.batch(12) for _ in range(5)] for d in (first, again, other))
    assert a == b != c


# Tuning


def test_tuning_moves_the_upper_layers_only(tiny):
    body, (texts, labels) = load_body(tiny, "cpu", torch.float32), sentences(6)
    before = {n: p.clone() for n, p in body.encoder.named_parameters()}
    losses = tune_(
        body, read_states(body, body.ids(texts)[0], 2), make_shots(texts, labels).targets, Tuning(steps=8, lr=2e-3)
    )
    moved = {n for n, p in body.encoder.named_parameters() if not torch.equal(p, before[n])}
    assert losses[-1] < losses[0] and moved and all(".layer.2." in f".{n}" or ".layer.3." in f".{n}" for n in moved)
    assert not any(p.requires_grad for p in body.encoder.parameters())


@pytest.mark.parametrize("loss", ["similarity", "contrastive"])
@pytest.mark.parametrize("layers", [0, 1, None])
def test_every_way_of_tuning_lowers_its_loss(tiny, loss, layers):
    texts, labels = sentences(6)
    model = classifier(tiny, tuning=Tuning(steps=10, lr=2e-3, loss=loss, layers=layers)).fit(texts, labels, check=False)
    assert np.mean(model.losses[-3:]) < np.mean(model.losses[:3]) and model.tuned and not model.calibrated


def test_lora_is_merged_and_gone(tiny):
    texts, labels = sentences(6)
    model = classifier(tiny, tuning=Tuning(steps=8, lr=1e-2, lora=LoRA(rank=4))).fit(texts, labels)
    assert model.checked is not None and model.losses[-1] < model.losses[0] or not model.tuned
    assert not hasattr(model.body.encoder, "ftbook_method")
    assert {n for n, _ in model.body.encoder.named_parameters()} == {
        n for n, _ in load_body(tiny, "cpu").encoder.named_parameters()
    }


def test_the_check_leaves_the_encoder_as_it_was(tiny):
    texts, labels = sentences(6)
    for tuning in (
        Tuning(steps=3, lr=5e-3),
        Tuning(steps=3, lr=5e-3, layers=0),
        Tuning(steps=3, lr=5e-3, lora=LoRA(rank=2)),
    ):
        body = load_body(tiny, "cpu", torch.float32)
        before = {n: p.clone() for n, p in body.encoder.named_parameters()}
        start, ids = tuning.start(body), body.ids(texts)[0]
        cross_validate(
            body, read_states(body, ids, start) if start else ids, make_shots(texts, labels), tuning, n_folds=3
        )
        assert all(torch.equal(p, before[n]) for n, p in body.encoder.named_parameters())


def test_where_tuning_hurts_the_encoder_stays_and_it_is_said(tiny):
    texts, labels = sentences(20)
    wrecking = Tuning(steps=10, lr=0.5)  # destroys what the encoder knew
    with pytest.warns(UserWarning, match="tuning hurts"):
        model = classifier(tiny, tuning=wrecking).fit(texts, labels)
    assert not model.tuned and not model.losses and model.checked.right("frozen") > model.checked.right("tuned")
    plain = classifier(tiny, tuning=None).fit(texts, labels)
    new = sentences(5, seed=3)[0]
    assert model.predict(new) == plain.predict(new)


@pytest.mark.parametrize("wrong, kept", [(1, True), (4, False)])
def test_one_row_less_is_no_reason_to_drop_the_tuning(wrong, kept):
    y = torch.eye(2).repeat(8, 1)
    tuned = torch.cat([y[:-wrong], 1 - y[-wrong:]]) * 4
    c = Checked(y, dict(frozen=y * 4, tuned=tuned))
    assert c.gain[0] < 0 and c.change[0] == -wrong / 16 and c.helps == kept
    assert (
        Checked(
            torch.cat([y, y], 1),
            dict(frozen=torch.cat([y, y], 1) * 8 - 4, tuned=torch.cat([tuned, tuned], 1) * 2 - 4),
            exclusive=False,
        ).helps
        == kept
    )


def test_a_report_says_its_verdict_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Checked, "helps", property(lambda self: False))
    texts, labels = sentences(4)
    report = fewshot_report(
        write_csv(tmp_path / "rows.csv", [("text", "label"), *zip(texts, labels)]),
        out=tmp_path / "out",
        settings=FewShotSettings(tiny, device="cpu"),
    )
    assert str(report).count("Tuning hurts") == 1 and not [w for w in report.facts["warnings"] if "hurts" in w]


def test_the_check_sees_no_held_out_row(tiny):
    "Labels by lot: a judge that had seen the rows would find them right."
    rng = random.Random(0)
    texts, _ = sentences(20)
    labels = [rng.choice("ab") for _ in texts]
    body = load_body(tiny, "cpu", torch.float32)
    found = cross_validate(
        body, read_states(body, body.ids(texts)[0], 2), make_shots(texts, labels), Tuning(steps=20, lr=2e-3), n_folds=4
    )
    assert found.right("tuned") < 0.7


def test_temperature_and_its_edges():
    torch.manual_seed(0)
    scores = torch.randn(3000, 3) * 2
    y = F.one_hot(torch.distributions.Categorical(logits=scores).sample(), 3).float()
    for t in (0.3, 1, 4):
        assert abs(fit_temperature(scores * t, y) / t - 1) < 0.1
    sure = torch.eye(3) * 9
    assert 0.02 <= fit_temperature(sure, torch.eye(3)) <= 50
    several = (torch.rand(3000, 3) < (scores / 2).sigmoid()).float()
    assert abs(fit_temperature(scores, several, False) / 2 - 1) < 0.1


def test_calibration_error_is_measured():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 5000)
    y = np.eye(3)[[rng.choice(3, p=q) for q in p]]
    sharp = p**4 / (p**4).sum(1, keepdims=True)
    assert (
        calibration_error(Evaluation(list("abc"), p, y))
        < 0.03
        < 0.1
        < calibration_error(Evaluation(list("abc"), sharp, y))
    )
    assert sum(g["n"] for g in reliability(Evaluation(list("abc"), p, y))) == 5000


# The classifier


def test_fit_and_predict(fitted):
    texts, labels = sentences(10, seed=5)
    judged = fitted.evaluate(texts, labels)
    assert judged.accuracy > 0.6 and judged.confusion.sum() == 30 and 0 <= judged.f1 <= 1
    assert fitted.predict(texts) == [fitted.classes[k] for k in fitted.predict_proba(texts).argmax(1)]
    assert "3 classes" in repr(fitted)


def test_order_and_company_do_not_matter(fitted):
    texts = sentences(10, seed=6)[0] + ["A", "word " * 50]
    p = fitted.predict_proba(texts)
    assert np.abs(fitted.predict_proba(texts[::-1])[::-1] - p).max() < 1e-5
    assert np.abs(np.concatenate([fitted.predict_proba([t]) for t in texts]) - p).max() < 1e-5


def test_several_labels(tiny):
    texts, labels = sentences(8)
    tags = [[c, "odd"] if i % 2 else {c} for i, c in enumerate(labels)]
    tags[0] = "garden"  # a single label is a list of one
    model = classifier(tiny, tuning=Tuning(steps=6, lr=2e-3)).fit(texts, tags)
    assert model.classes == ["garden", "kitchen", "odd", "sea"] and model.calibrated
    said = model.predict(texts)
    assert all(isinstance(s, list) for s in said) and any(len(s) for s in said)
    judged = model.evaluate(texts, tags)
    assert 0 <= judged.accuracy <= 1 and 0 < judged.f1 <= 1
    with pytest.raises(ValueError, match="no confusion"):
        judged.confusion


def test_descriptions_are_examples(tiny):
    texts, labels = sentences(6, classes=("garden", "kitchen"))
    said = dict(sea=["the ship and the sail", "the wave and the tide and the captain"])
    model = classifier(tiny, tuning=None).fit(
        texts, labels, classes=["garden", "kitchen", "sea"], descriptions=said, check=False
    )
    assert "sea" in model.predict(["the ship and the sail"])
    with pytest.raises(ValueError, match="none of the classes"):
        classifier(tiny).fit(texts, labels, descriptions=said)


# Rows that are not as they should be


def test_one_class(tiny):
    with pytest.raises(ValueError, match="needs two or more"):
        classifier(tiny).fit(["a", "b"], ["x", "x"])


def test_one_example_in_a_class(tiny):
    texts, labels = sentences(4, classes=("garden", "kitchen"))
    with pytest.warns(UserWarning) as said:
        model = classifier(tiny, tuning=Tuning(steps=2)).fit(texts + ["the ship and the sail"], labels + ["sea"])
    text = " ".join(str(w.message) for w in said)
    assert "one example" in text and "not calibrated" in text
    assert model.checked is None and not model.calibrated and len(model.classes) == 3


def test_one_example_in_every_class(tiny):
    with pytest.warns(UserWarning, match="one example"):
        model = classifier(tiny, tuning=Tuning(steps=2)).fit(["the ship", "the oven"], ["sea", "kitchen"])
    assert len(model.predict(["the boat"])) == 1


def test_an_empty_text_is_no_reason_to_stop_predicting(fitted):
    assert len(fitted.predict(["", "the ship"])) == 2
    with pytest.raises(ValueError, match="row 1: the text is NoneType"):
        fitted.predict(["a", None])
    with pytest.raises(ValueError, match="not one string"):
        fitted.predict("a text")
    assert fitted.predict([]) == [] and fitted.predict_proba([]).shape == (0, 3)


def test_more_classes_than_are_shown(tiny):
    texts, labels = sentences(4, classes=("garden", "kitchen"))
    with pytest.warns(UserWarning, match="1 classes have no example, the first 'sea'"):
        model = classifier(tiny, tuning=None).fit(texts, labels, classes=["garden", "kitchen", "sea"])
    assert "sea" not in model.predict(sentences(10)[0])
    with pytest.raises(ValueError, match="'desert', which is none of the classes"):
        model.evaluate(["a"], ["desert"])


def test_texts_beyond_the_limit(tiny):
    texts, labels = sentences(4)
    with pytest.warns(UserWarning, match=r"1 of 13 texts are longer than the 32 tokens .*; 70 tokens are cut"):
        classifier(tiny, tuning=None).fit(texts + ["word " * 100], labels + ["sea"])


def test_a_million_rows_stream(fitted):
    "The stream asks for one portion at a time, and holds no more."
    asked = 0

    def lines():
        nonlocal asked
        for i in range(1_000_000):
            asked += 1
            yield f"the ship number {i}"

    stream = fitted.stream(lines(), portion=64)
    for k in range(3):
        assert next(stream).shape == (64, 3) and asked == 64 * (k + 1)


def test_steps_grow_with_the_rows_and_not_with_their_square():
    steps = [Tuning().n_steps(n) for n in (16, 40, 320, 1040, 8320)]
    assert steps[:2] == [15, 15] and all(
        b <= a * n / m + 1 for (a, m), (b, n) in zip(zip(steps[2:], (320, 1040)), zip(steps[3:], (1040, 8320)))
    )
    assert Tuning(steps=4).n_steps(10**6) == 4


@pytest.mark.parametrize("shots, layers", [(8, {2, 3}), (15, {2, 3}), (16, {0, 1, 2, 3})])
def test_more_rows_a_class_move_all_of_the_encoder(tiny, shots, layers):
    texts, labels = sentences(shots)
    before = load_body(tiny, "cpu", torch.float32).encoder
    model = classifier(tiny).fit(texts, labels, check=False)
    moved = {
        int(n.split("layer.")[1].split(".")[0])
        for n, p in model.body.encoder.named_parameters()
        if "layer." in n and not torch.equal(p, before.get_parameter(n))
    }
    assert (
        moved == layers
        and model.chosen == suited_tuning(len(texts), len(set(labels)))
        and len(model.losses) == model.chosen.n_steps(len(texts))
    )


def test_the_choice_follows_the_rows_a_class_and_not_the_rows():
    assert suited_tuning(15 * 130, 130) == Tuning() and suited_tuning(32, 2) != Tuning() == suited_tuning(31, 2)
    assert suited_tuning(32, 2, seed=5).seed == suited_tuning(8, 2, seed=5).seed == 5
    with pytest.raises(ValueError, match="rows and n_classes must be 1 or more, not 10 and 0"):
        suited_tuning(10, 0)


def test_the_seed_is_that_of_the_batches(tiny):
    texts, labels = sentences(15)  # more than a batch, or the seed would not matter
    a, b, c = (classifier(tiny, seed=s).fit(texts, labels, check=False).losses for s in (0, 0, 1))
    d = classifier(tiny, tuning=Tuning(seed=1)).fit(texts, labels, check=False).losses
    assert a == b != c == d


def test_a_second_fit_begins_with_the_encoder_as_it_came(tiny, tmp_path):
    texts, labels = sentences(8)
    model = classifier(tiny, tuning=Tuning(steps=4, lr=2e-3))
    first, checked = model.fit(texts, labels).losses, model.checked.scores
    assert model.fit(texts, labels).losses == first and all(
        torch.equal(model.checked.scores[k], checked[k]) for k in checked
    )
    again = load_classifier(model.save(tmp_path / "m"), "cpu", torch.float32)
    # what was saved is where it begins
    assert again.fit(texts, labels, check=False).losses[0] < first[0]


def test_the_bar_counts_the_steps_of_check_and_tuning(tiny, monkeypatch):
    made = []

    class Bar(fewshot_classifier.tqdm):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw | dict(delay=0, disable=kw["disable"], file=open("/dev/null", "w")))
            made.append(self)

    monkeypatch.setattr(fewshot_classifier, "tqdm", Bar)
    texts, labels = sentences(8)
    for check, n in ((True, 12), (3, 16), (False, 4)):
        classifier(tiny, tuning=Tuning(steps=4, lr=2e-3)).fit(texts, labels, check=check)
        assert (made[-1].n, made[-1].total) == (n, n)
    classifier(tiny, tuning=Tuning(steps=4)).fit(texts, labels, progress=False)
    assert len(made) == 4 and made[-1].disable
    classifier(tiny, tuning=None).fit(texts, labels)
    assert len(made) == 4, "nothing is tuned, so there is nothing to count"


# Files


def test_saved_and_read_again(fitted, tmp_path):
    new, folder = sentences(5, seed=8)[0], fitted.save(tmp_path / "a" / "model")
    again = load_classifier(folder, "cpu", torch.float32)
    assert np.abs(again.predict_proba(new) - fitted.predict_proba(new)).max() < 1e-6
    assert (again.tuned, again.calibrated, again.classes) == (fitted.tuned, fitted.calibrated, fitted.classes)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt"}
    again.save(tmp_path / "b")
    assert (
        np.abs(
            load_classifier(tmp_path / "b", "cpu", torch.float32).predict_proba(new) - fitted.predict_proba(new)
        ).max()
        < 1e-6
    )


# From a file


def test_a_report_of_sixteen_rows(tiny, tmp_path, monkeypatch):
    texts, labels = sentences(8, classes=("kitchen", "sea"))
    file = write_csv(tmp_path / "rows.csv", [("text", "label"), *zip(texts, labels), ("the ship and the oven", "")])
    report = fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "next.csv", "report.html", "report.json"]
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["n_train"] == 16 and "cross-validation" in facts["judge"] and facts["n_judged"] == 16
    assert facts["tuning"] == (asdict(suited_tuning(16, 2)) if facts["tuned"] else None)
    assert [r["text"] for r in report.next_rows] == ["the ship and the oven"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Label these next" in page and "said kitchen" in page and "http" not in page.replace("http://www.w3.org", "")
    assert load_classifier(tmp_path / "out" / "model", "cpu").predict(["the ship"]) == report.model.predict(
        ["the ship"]
    )
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(html.unescape(re.search(r"<pre>(from ftbook.*?)</pre>", page, re.S)[1]), names)
    assert names["model"].classes == report.model.classes


def test_a_report_escapes_rows_labels_and_file_names(tiny, tmp_path):
    texts, labels = sentences(4, classes=("kitchen", "sea"))
    evil = "<script>alert(1)</script>"
    named = [evil if c == "sea" else c for c in labels]
    file = write_csv(tmp_path / "<script>.csv", [("text", "label"), *zip(texts, named), (evil, "")])
    report = fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"))
    for shown in (report.html(), (tmp_path / "out" / "report.html").read_text(), report._repr_html_()):
        assert "<script" not in shown and "&lt;script&gt;" in shown
    assert report.html().count("&lt;script&gt;") >= 5  # the title twice, two classes, a row to label
    assert report.save(tmp_path / "alone.html").read_text() == report.html()


def test_shots_and_other_judges(tiny, tmp_path):
    texts, labels = sentences(10)
    file = write_csv(tmp_path / "rows.csv", [("body", "kind"), *zip(texts, labels)])
    rest = fewshot_report(file, out=tmp_path / "a", settings=FewShotSettings(tiny, device="cpu"), shots=4)
    assert (
        rest.facts["n_train"] == 12
        and rest.facts["n_judged"] == 18
        and "not trained on" in rest.facts["judge"]
        and len(rest.next_rows) == 10
    )
    test = write_csv(tmp_path / "test.csv", [("kind", "body"), *((c, t) for t, c in zip(*sentences(5, seed=4)))])
    tested = fewshot_report(file, out=tmp_path / "b", settings=FewShotSettings(tiny, device="cpu"), shots=4, test=test)
    assert tested.facts["judge"] == "the test file" and tested.facts["n_judged"] == 15


def test_a_report_says_what_was_warned(tiny, tmp_path):
    texts, labels = sentences(4)
    file = write_csv(
        tmp_path / "rows.csv", [("text", "label"), *zip(texts, labels), ("word " * 99, "sea"), (texts[0], "sea")]
    )
    report = fewshot_report(file, out=tmp_path / "out", settings=FewShotSettings(tiny, device="cpu"))
    said = " ".join(report.facts["warnings"])
    assert "two labels" in said and "tokens are cut" in said and "tokens are cut" in report.html()


def test_rows_to_label_next_are_named_with_two_answers(fitted):
    texts = sentences(3, seed=11)[0]
    p = fitted.predict_proba(texts)
    found = next_rows(fitted, texts, 2)
    assert [r["text"] for r in found] == [texts[i] for i in most_uncertain(p, 2)]
    for r in found:
        first, second = np.argsort(-p[texts.index(r["text"])])[:2]
        assert (r["says"], r["otherwise"]) == (fitted.classes[first], fitted.classes[second])
        assert r["sure"] == pytest.approx(p[texts.index(r["text"])].max())
    assert next_rows(fitted, [], 2) == []


def test_uncertain_rows():
    p = np.array([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.5, 0.5, 0], [0.6, 0.2, 0.2]])
    assert most_uncertain(p, 2) == [2, 1] and most_uncertain(p, 99) == [2, 1, 3, 0]
