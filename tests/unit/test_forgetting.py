"What a fine-tune is said to have lost, and the remedies, against definitions."

import copy, json

import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st

from tiny import seeded
from ftbook.forgetting import battery as forgetting_battery
from ftbook.forgetting import divergence as forgetting_divergence
from ftbook.forgetting import lost as forgetting_lost
from ftbook.forgetting import remedies as forgetting_remedies
from ftbook.forgetting import report as forgetting_report
from ftbook.forgetting import sequences as forgetting_sequences
from ftbook.data.examples import Example
from ftbook.data.packs import pad
from ftbook.methods.lora_method import LoRA
from ftbook.methods.fold import merge_, remove_
from ftbook.methods.files import save_adapter
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.training.objective import Objective
from ftbook.training.tune import finetune
from cases.forgetting import loaded, rows_of_ids, small_battery, small_llama, tiny


# Divergence


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 999))
def test_merging_outcomes_lowers_a_divergence(vocab, k, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, vocab, generator=rng) * 3
    ids = a.topk(min(k, vocab)).indices
    p, q = (forgetting_lost.merged_log_probabilities(x, ids) for x in (a, b))
    assert torch.allclose(p.exp().sum(1), torch.ones(5), atol=1e-4)
    part, whole = (
        forgetting_lost.divergence(p, q),
        forgetting_lost.divergence(a.log_softmax(-1), b.log_softmax(-1)),
    )
    assert (part >= -1e-4).all() and (part <= whole + 1e-3).all()


def test_remembered_divergence_is_torchs():
    base, other, rows = seeded(small_llama), seeded(small_llama, 1), rows_of_ids()
    found = forgetting_divergence.token_divergence(forgetting_divergence.remember(base, rows, top=37), other, rows)
    for e, nats in zip(rows, found):
        ids = torch.tensor([e.input_ids])
        with torch.no_grad():
            p, q = (m.eval()(ids).logits[0, 1:-1].log_softmax(-1) for m in (base, other))
        want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        assert torch.allclose(torch.tensor(nats), want, atol=1e-3)


# Fisher, spring, teacher


def test_fisher_is_the_mean_square_over_the_models_own_answers():
    "With one target and a small vocabulary, the expectation over answers can be summed exactly."
    model, e = seeded(lambda: small_llama(vocab=5)).eval(), Example([1, 2, 3], [False, False, True])
    p = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1).detach()
    want = 0
    for token in range(5):
        model.zero_grad()
        Objective(model)(
            dict(
                input_ids=torch.tensor([[1, 2, token]]),
                attention_mask=torch.ones(1, 3),
                labels=torch.tensor([[-100, -100, token]]),
            )
        ).backward()
        want = want + p[token] * model.lm_head.weight.grad.square()
    model.zero_grad()
    drawn = sum(forgetting_remedies.fisher(model, [e] * 50, seed=s)["lm_head.weight"] for s in range(20)) / 20
    assert torch.allclose(drawn, want, rtol=0.15, atol=1e-3)


def test_fisher_streams_and_leaves_the_model_as_it_was():
    model, rows = seeded(small_llama), rows_of_ids()
    before = copy.deepcopy(model.state_dict())
    whole, parts = (
        forgetting_remedies.fisher(model, rows, answers="data"),
        [forgetting_remedies.fisher(model, [e], answers="data") for e in rows],
    )
    n = [e.n_targets for e in rows]
    for name, t in whole.items():
        assert torch.allclose(t, sum(k * p[name] for k, p in zip(n, parts)) / sum(n), atol=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="'model' or 'data'"):
        forgetting_remedies.fisher(model, rows, answers="both")


def test_a_spring_pulls_with_its_stiffness():
    model = seeded(small_llama)
    stiff = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    spring = forgetting_remedies.Spring(model, 3.0, stiff)
    assert spring(model).item() == 0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    spring(model).backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, 0.3 * stiff[n], atol=1e-5)


def test_a_stiffer_spring_holds_tighter_and_a_teacher_keeps_its_answers():
    rows, base = rows_of_ids(), seeded(small_llama)

    def run(regularizer):
        model = copy.deepcopy(base)
        history = finetune(
            model, rows, lr=1e-2, epochs=4, batch_size=3, regularizer=regularizer, progress=False
        ).history
        assert ("penalty" in history[0]) == (regularizer is not None)
        return sum((p - q).square().sum().item() for p, q in zip(model.parameters(), base.parameters())), model

    free, loose, tight = (
        run(r)[0] for r in (None, forgetting_remedies.Spring(base, 0.1), forgetting_remedies.Spring(base, 10.0))
    )
    assert tight < loose < free
    other = rows_of_ids(seed=5)
    apart = [
        np.mean(
            sum(
                forgetting_divergence.token_divergence(forgetting_divergence.remember(base, other), run(r)[1], other),
                [],
            )
        )
        for r in (None, forgetting_remedies.Distill(base, other, 10.0, batch_size=6))
    ]
    assert apart[1] < 0.5 * apart[0]


def test_a_rows_fisher_is_its_gradient_squared():
    model, row = seeded(small_llama).eval(), rows_of_ids()[0]
    alone = forgetting_remedies.fisher(model, [row], answers="data")["lm_head.weight"]
    Objective(model)(pad([row])).backward()
    assert torch.allclose(alone * row.n_targets, model.lm_head.weight.grad.square(), atol=1e-5)


# The line


def test_the_line_of_lora_is_the_line_of_its_products():
    base, ids = seeded(small_llama).eval(), torch.arange(3, 12)[None]
    tuned = LoRA(rank=2, seed=0).apply(copy.deepcopy(base))
    finetune(tuned, rows_of_ids(), lr=1e-2, batch_size=3, progress=False)
    whole = remove_(merge_(copy.deepcopy(tuned), keep=False))
    line = forgetting_remedies.Interpolation(tuned)
    for x in (0.0, 0.3, 1.0, 1.5):
        by_hand = copy.deepcopy(base)
        with torch.no_grad():
            for p, a, b in zip(by_hand.parameters(), base.parameters(), whole.parameters()):
                p.copy_(a + x * (b - a))
            assert torch.allclose(line.put_(x).eval()(ids).logits, by_hand(ids).logits, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=8), st.floats(0, 2))
def test_a_picked_place_keeps_its_limit(points, limit):
    curve = [dict(x=0.0, task=5.0, other=0.0)] + [
        dict(x=(k + 1) / len(points), task=t, other=o) for k, (t, o) in enumerate(points)
    ]
    best = next(p for p in curve if p["x"] == forgetting_remedies.pick_interpolation(curve, limit))
    assert best["other"] <= limit and all(p["task"] >= best["task"] for p in curve if p["other"] <= limit)


# Sequences


def test_what_goes_on_improving_is_not_forgotten():
    "As in Chaudhry et al. 2018, the best before the last task counts, so forgetting can be below zero."
    said = forgetting_sequences.transfer([[0.5, 0.5], [0.6, 0.5], [0.8, 0.9]])
    assert said["forgetting"] == pytest.approx(-0.2) and said["backward"] == pytest.approx(0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 999))
def test_forgetting_is_never_less_than_what_backward_transfer_lost(T, seed):
    R = np.random.default_rng(seed).random((T + 1, T))
    said = forgetting_sequences.transfer(R)
    assert said["forgetting"] >= -said["backward"] - 1e-12
    assert abs(forgetting_sequences.transfer(np.tile(R[0], (T + 1, 1)))["backward"]) < 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 9), st.floats(0, 0.95))
def test_replay_keeps_its_share(n_new, n_old, share):
    mixed = forgetting_remedies.replay(list(range(n_new)), [-k - 1 for k in range(n_old)], share)
    old = [e for e in mixed if e < 0]
    assert len(old) == round(share / (1 - share) * n_new) and mixed[:n_new] == list(range(n_new))
    assert max([old.count(e) for e in old], default=0) - min([old.count(-k - 1) for k in range(n_old)]) <= 1


# The battery


def test_a_report_of_any_two_models(loaded, tiny, tmp_path):
    model, tokenizer = loaded
    battery, other = small_battery(tokenizer), copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(3)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    by_model, by_folder = (forgetting_report.forgetting_report(model, o, battery) for o in (other, tmp_path / "other"))
    assert by_model.facts() == by_folder.facts()
    assert [m["name"] for m in by_model.moved] == ["model.layers.0.mlp.up_proj"] and abs(
        by_model.moved[0]["share"] - 2
    ) < 1e-3
    html = by_model._repr_html_()
    assert "newspaper" in html and "capitals" in html and "<script" not in html


def test_a_soft_prompt_moves_no_weight(loaded):
    model, tokenizer = loaded
    report = forgetting_report.forgetting_report(
        model, PromptTuning(num_virtual_tokens=4, seed=0).apply(copy.deepcopy(model)), small_battery(tokenizer)
    )
    assert report.moved == [] and report.divergence[0] > 0


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoRA(rank=2, target_modules=["embed_tokens", "q_proj"]),
    ],
    ids=["whole", "low rank"],
)
def test_a_trained_embedding_is_measured(loaded, tmp_path, method):
    model, tokenizer = loaded
    tuned, before = method.apply(copy.deepcopy(model)), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.01)
    save_adapter(tuned, tmp_path)
    by_model, by_folder = (
        forgetting_report.forgetting_report(model, o, small_battery(tokenizer)) for o in (tuned, tmp_path)
    )
    assert "model.embed_tokens" in [m["name"] for m in by_model.moved] and by_model.divergence[0] > 0
    assert forgetting_battery.n_tokens(tuned) == forgetting_battery.n_tokens(model) == 49152
    assert by_folder.divergence == pytest.approx(by_model.divergence) and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())
    )


def test_tasks_from_a_file(loaded, tmp_path):
    _, tokenizer = loaded
    rows = [dict(prompt=f"{i} is", completion=" even" if i % 2 == 0 else " odd") for i in range(10)]
    (tmp_path / "parity.jsonl").write_text("\n".join(map(json.dumps, rows)))
    battery = forgetting_battery.make_battery(tokenizer, [], [str(tmp_path / "parity.jsonl")], 0)
    assert [t.name for t in battery.tasks] == ["parity"] and battery.tasks[0].gold == [0, 1] * 5


def test_measurements_survive_json_and_order(loaded):
    model, tokenizer = loaded
    battery = small_battery(tokenizer)
    then = forgetting_battery.measure_battery(model, battery)
    assert json.loads(json.dumps(then)) == json.loads(json.dumps(json.loads(json.dumps(then))))
    same = forgetting_battery.measure_battery(model, battery, json.loads(json.dumps(then)))
    assert max(map(max, same["divergence"])) < 1e-3 and same["tasks"] == then["tasks"]
    with pytest.raises(ValueError, match="one battery"):
        forgetting_report.compare_batteries(then, dict(same, tasks={}), tokenizer)
