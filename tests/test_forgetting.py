"Hold what a fine-tune is said to have lost, and the remedies, against definitions and against other libraries."

import copy, json, sys
from pathlib import Path

import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from tiny import save_tiny_model, seeded

from ftbook.forgetting import battery as forgetting_battery
from ftbook.forgetting import choices as forgetting_choices
from ftbook.forgetting import divergence as forgetting_divergence
from ftbook.forgetting import harness as forgetting_harness
from ftbook.forgetting import lost as forgetting_lost
from ftbook.forgetting import remedies as forgetting_remedies
from ftbook.forgetting import report as forgetting_report
from ftbook.forgetting import sequences as forgetting_sequences
from ftbook.data.examples import Example
from ftbook.data.encoding import encode
from ftbook.data.packs import pad
from ftbook.data.split import normalise
from ftbook.methods.lora_method import LoRA
from ftbook.methods.fold import merge_, remove_
from ftbook.methods.files import save_adapter
from ftbook.models.load import load_model, load_tokenizer
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.training.objective import Objective
from ftbook.training.evaluate import evaluate
from ftbook.training.tune import finetune


def small_llama(vocab=37, **more):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            **more,
        )
    )


def rows_of_ids(n=6, vocab=37, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, vocab, (k,), generator=rng).tolist() for k in range(4, 4 + n)]
    return [Example(ids, [False, False] + [True] * (len(ids) - 2)) for ids in made]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def loaded(tiny):
    return load_model(str(tiny), dtype="float32", device="cpu")


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


def test_a_run_does_not_go_on_with_another_regulariser(tmp_path):
    rows, base = rows_of_ids(), seeded(small_llama)

    def run(regularizer, **more):
        return finetune(
            copy.deepcopy(base), rows, batch_size=3, out=tmp_path, regularizer=regularizer, progress=False, **more
        )

    def stop(state):
        state.stop = state.step == 1

    run(forgetting_remedies.Spring(base, 1.0), callbacks=[stop])
    with pytest.raises(ValueError, match="regularizer was 'Spring"):
        run(None, resume=True)
    with pytest.raises(ValueError, match="regularizer was 'Spring"):
        run(forgetting_remedies.Spring(base, 2.0), resume=True)
    assert run(forgetting_remedies.Spring(base, 1.0), resume=True).stopped == "finished"


def test_a_rows_fisher_is_its_gradient_squared():
    model, row = seeded(small_llama).eval(), rows_of_ids()[0]
    alone = forgetting_remedies.fisher(model, [row], answers="data")["lm_head.weight"]
    Objective(model)(pad([row])).backward()
    assert torch.allclose(alone * row.n_targets, model.lm_head.weight.grad.square(), atol=1e-5)


def test_remedies_refuse_what_they_cannot_do():
    model, rows = seeded(small_llama), rows_of_ids()
    with pytest.raises(ValueError, match="strength must be at least 0, not -1"):
        forgetting_remedies.Spring(model, -1)
    with pytest.raises(ValueError, match="no row to take the Fisher information over"):
        forgetting_remedies.fisher(model, [])
    with pytest.raises(ValueError, match="no text to distil on"):
        forgetting_remedies.Distill(model, [], 1.0)
    with pytest.raises(ValueError, match="at least 0 and below 1, not 1"):
        forgetting_remedies.replay(rows, rows, 1)
    with pytest.raises(ValueError, match="no old row to replay"):
        forgetting_remedies.replay(rows, [], 0.5)
    with pytest.raises(ValueError, match="taken before the training"):
        forgetting_remedies.Interpolation(model)
    with pytest.raises(ValueError, match="no point at x = 0"):
        forgetting_remedies.pick_interpolation([dict(x=0.5, task=1.0, other=1.0)])
    with pytest.raises(ValueError, match="not finite"):
        forgetting_remedies.pick_interpolation([dict(x=0, task=1.0, other=float("nan"))])


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


def test_transfer_refuses_a_table_with_holes():
    with pytest.raises(ValueError, match="task 2 after task 1 is missing"):
        forgetting_sequences.transfer([[0, 0], [1, float("nan")], [1, 1]])
    with pytest.raises(ValueError, match="T \\+ 1"):
        forgetting_sequences.transfer([[1], [2]])


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


def small_battery(tokenizer, **more):
    return forgetting_battery.make_battery(tokenizer, ["newspaper"], n_prompts=2, rows=3, **more)


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


def test_bad_input_is_named(loaded, tiny, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="battery is empty"):
        forgetting_battery.make_battery(tokenizer, [], [], 0)
    bigger, battery = copy.deepcopy(model), small_battery(tokenizer)
    bigger.resize_token_embeddings(49160)
    with pytest.raises(ValueError, match="49,152 tokens and after 49,160"):
        forgetting_report.forgetting_report(model, bigger, battery)
    smaller = seeded(small_llama)
    with pytest.raises(ValueError, match="battery's tokenizer"):
        forgetting_battery.measure_battery(smaller, battery)
    other = load_tokenizer(str(tiny))
    other.add_tokens(["<new>"])
    bigger.save_pretrained(tmp_path / "bigger")
    other.save_pretrained(tmp_path / "bigger")
    with pytest.raises(ValueError, match="before has 49,152"):
        forgetting_report.forgetting_report(model, tmp_path / "bigger", battery)
    shuffled = json.loads((tmp_path / "bigger/tokenizer.json").read_text())
    vocab = shuffled["model"]["vocab"]
    a, b = list(vocab)[500:502]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "bigger/tokenizer.json").write_text(json.dumps(shuffled))
    with pytest.raises(ValueError, match="with one tokenizer"):
        forgetting_report.forgetting_report(model, tmp_path / "bigger", battery)


def test_what_cannot_be_asked_is_named(loaded):
    tokenizer = loaded[1]
    with pytest.raises(ValueError, match="a choice takes 2 to 50"):
        forgetting_choices.make_task("one", forgetting_choices.shipped_battery()["facts"][:1], tokenizer)
    everything = [normalise(t) for t in forgetting_lost.forgetting_texts("newspaper", 9999)]
    with pytest.raises(ValueError, match="newspaper has 0 texts"):
        forgetting_lost.forgetting_texts("newspaper", 5, everything)


def test_an_adapter_for_another_base_is_refused_and_leaves_the_base(loaded, tmp_path):
    model, tokenizer = loaded
    wide = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    save_adapter(LoRA(rank=2).apply(wide), tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        forgetting_report.forgetting_report(model, tmp_path, small_battery(tokenizer))
    assert getattr(model, "ftbook_method", None) is None and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())
    )


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


# The evaluation harness

HARNESS_YAML = """task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    "A manager of the harness that knows one task, our facts about orders."
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(metric="acc"):
        rows = [r for r in forgetting_choices.shipped_battery()["facts"] if r["task"] == "order"]
        answers = sorted({r["completion"] for r in rows})
        (tmp_path / "facts.jsonl").write_text(
            "\n".join(
                json.dumps(dict(prompt=r["prompt"], choices=answers, gold=answers.index(r["completion"]))) for r in rows
            )
        )
        (tmp_path / "facts.yaml").write_text(
            HARNESS_YAML.replace("FILE", str(tmp_path / "facts.jsonl")).replace("METRIC", metric)
        )
        return tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)

    return make


def test_the_harness_finds_the_same_answers_right(harness):
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    ours = forgetting_choices.make_task(
        "facts", [r for r in forgetting_choices.shipped_battery()["facts"] if r["task"] == "order"], tokenizer
    )
    theirs = forgetting_harness.ask_harness(model, tokenizer, forgetting_harness.harness_tasks(["facts"], harness()))
    assert (
        theirs == {"facts": forgetting_choices.ask(model, ours)} and any(theirs["facts"]) and not all(theirs["facts"])
    )


def test_a_battery_asks_what_the_harness_asks(harness, loaded):
    model, tokenizer = loaded
    battery = forgetting_battery.make_battery(
        tokenizer, [], forgetting_harness.harness_tasks(["facts"], harness()), 0, rows=5
    )
    then = forgetting_battery.measure_battery(model, battery)
    assert battery.tasks == [] and len(then["tasks"]["facts"]) == 5
    report = forgetting_report.compare_batteries(
        then, forgetting_battery.measure_battery(model, battery, then), tokenizer
    )
    assert report.tasks["facts"][0] == report.tasks["facts"][1] and report.accuracy == (0, 0, 0)


def test_harness_tasks_that_cannot_be_asked(harness, tmp_path):
    with pytest.raises(ValueError, match="no task 'fatcs'"):
        forgetting_harness.harness_tasks(["fatcs"], harness())
    with pytest.raises(ValueError, match="facts has no answers that are right or wrong, but brier_score"):
        forgetting_harness.harness_tasks(["facts"], harness("brier_score"))
    manager = harness()
    (tmp_path / "facts.jsonl").unlink()
    with pytest.raises(ValueError, match="rows of the harness's task facts cannot be had"):
        forgetting_harness.harness_tasks(["facts"], manager)


def test_without_the_harness_its_tasks_are_refused(monkeypatch, loaded):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        forgetting_battery.make_battery(loaded[1], [], ["lm_eval:arc_easy"])


# What the bench reads from its runs

sys.path.insert(0, str(Path(__file__).parents[1] / 'nbs' / 'bench'))
import forgetting_worker as bench  # noqa: E402


def made_run(variant, seed=0, right=(0.5, 0.6, 0.7, 0.8), end=None, other=(1.0, 1.0), sequence='domains'):
    "A run whose tasks are right so often after their own training, and at the end; .5 and a loss of 1 before."
    tasks = bench.SEQUENCES[sequence]

    def stage(accuracy, text):
        return dict(accuracy=dict(zip(tasks, accuracy)), loss=dict.fromkeys(tasks, 1.0), other=dict(a=text, b=text))

    stages = (
        [stage([0.5] * 4, other[0])]
        + [stage([right[i] if i == k else 0.5 for i in range(4)], other[0]) for k in range(3)]
        + [stage(end or right, other[1])]
    )
    return dict(
        sequence=sequence,
        variant=variant,
        seed=seed,
        **bench.VARIANTS[variant],
        stages=stages,
        steps=[1] * 4,
        train_cpu_seconds=1.0,
    )


def test_learnt_is_counted_against_the_base_and_lost_at_the_end():
    run = made_run('full 1e-05', right=(0.6, 0.7, 0.8, 0.9), end=(0.5, 0.5, 0.5, 0.9), other=(2.0, 2.5))
    assert (
        bench.learnt(run) == pytest.approx(0.25)
        and bench.kept(run) == pytest.approx(0.1)
        and bench.lost(run) == pytest.approx(0.5)
    )


def test_explanations_are_counted_in_nats():
    def stage(movie, jargon):
        return dict(accuracy=dict(movie=movie, jargon=None), loss=dict(movie=1.0, jargon=jargon), other=dict(a=1.0))

    run = dict(sequence='explaining', stages=[stage(0.5, 4.0), stage(0.8, 5.0), stage(0.7, 3.0)])
    assert bench.learnt(run) == pytest.approx(1.0) and bench.fell(run) == pytest.approx(0.5)


@pytest.mark.parametrize('level, paid', [(0, 0.0), (0.05, 0.1), (0.1, 0.2), (0.11, 2.1), (0.13, None)])
def test_the_least_that_is_paid_for_so_much(level, paid):
    found = bench.price([(0.0, 0.0), (0.1, 0.2), (0.12, 4.0), (0.1, 5.0)], level)
    assert found is None if paid is None else found == pytest.approx(paid)


def test_a_remedy_is_set_against_the_cheapest_rate_that_learns_as_much():
    runs = [
        made_run(f'full {lr:g}', right=[0.5 + gain] * 4, other=(1.0, 1.0 + cost))
        for lr, gain, cost in zip(bench.RATES['full'], (0.1, 0.2, 0.3, 0.2), (0.1, 0.4, 0.9, 3.0))
    ]
    remedy = made_run('full, replay 0.5', right=[0.72] * 4, other=(1.0, 1.1))
    # to two points, as much as the second rate
    assert bench.spared([*runs, remedy], remedy) == pytest.approx(0.4 - 0.1)
    # more than any rate learns: against the one that learns most
    better = made_run('full, replay 0.5', right=[0.9] * 4, other=(1.0, 1.1))
    assert bench.spared([*runs, better], better) == pytest.approx(0.4 + 0.5 * 0.8 - 0.1)


def test_the_other_seeds_run_the_better_strength():
    runs = [made_run(v, right=[0.6] * 4, other=(1.0, 1.0 + 0.1 * i)) for i, v in enumerate(bench.VARIANTS)]
    chosen = bench.chosen(runs)
    assert (
        bench.chosen(runs[:-1]) == []
        and 'full, replay 0.2' in chosen
        and 'full, replay 0.5' not in chosen
        and 'lora, rank 64' in chosen
    )
    assert all(v in chosen for v in ('full 1e-05', 'lora 0.003', 'full, freeze 15'))


def test_shares_of_the_work_are_apart_and_whole(monkeypatch):
    monkeypatch.setattr(bench, 'read', lambda: dict(runs=[]))
    parts = [bench.missing(f'{i}/3') for i in range(3)]
    assert sorted(sum(parts, [])) == sorted(bench.missing()) and all(len(p) > 3 for p in parts)


def test_a_report_escapes_names_and_answers(tmp_path):
    evil = "<script>alert(1)</script>"
    lost = forgetting_lost.Forgetting(evil, 1.0, 1.1, 0.1, 0.05, 0.2, 4, 50)
    moved = [dict(name=evil, share=0.1, rank=1.0)]
    report = forgetting_report.ForgettingReport(
        {evil: lost}, {evil: (1, 2, 3)}, (0.1, 0.0, 0.2), (1, 1, 1), [(evil, evil, evil)], (0.1, 0.0, 0.2), moved
    )
    html = report.html()
    assert "<script" not in html and html.count("&lt;script&gt;") > 5
    assert "<script" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()
    folder = report.save(tmp_path / "lost")
    assert json.loads((folder / "report.json").read_text()) == report.facts()
