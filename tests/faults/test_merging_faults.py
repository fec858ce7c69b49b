"Merging: interruption, full disks, configurations and models that do not fit."

import errno, json, math, os, shutil, subprocess, sys

import pytest, torch, yaml
from safetensors.torch import save_file

from book import root
from ftbook.merging import write as merging_write
from ftbook.merging.recipes import RECIPES
from ftbook.merging.checkpoints import INDEX, MODEL
from ftbook.merging.engine import merge
from ftbook.merging.plan import plan_merge
from ftbook.merging.config import read_config
from cases.merge import adapter, config, gap, llama, models, NAMES, recipe_for, source, tensors, words


# Small models


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


# The engine


def test_interrupted_it_goes_on(source, tmp_path, monkeypatch):
    c, made = recipe_for(source, "dare_ties", density=0.5), []
    whole = tensors(merge(c, tmp_path / "whole").folder)
    make = merging_write._make

    def stops(plan, job, *rest):
        if len(made) == 9:
            raise KeyboardInterrupt
        make(plan, job, *rest)
        made.append(job.name)

    monkeypatch.setattr(merging_write, "_make", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(c, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(
        merging_write, "_make", lambda plan, job, *rest: (make(plan, job, *rest), again.append(job.name))
    )
    merge(c, tmp_path / "out", threads=2)
    assert len(made) == 9 and not set(made[:8]) & set(again) and same(tensors(tmp_path / "out"), whole)


def test_another_merge_does_not_go_on(source, tmp_path, monkeypatch):
    make, made = merging_write._make, []

    def stops(plan, job, *rest):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(make(plan, job, *rest))

    monkeypatch.setattr(merging_write, "_make", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe_for(source, density=0.5), tmp_path / "out", threads=1)
    monkeypatch.setattr(merging_write, "_make", make)
    other = recipe_for(source, density=0.2)
    assert same(tensors(merge(other, tmp_path / "out").folder), tensors(merge(other, tmp_path / "fresh").folder))


def test_killed_it_goes_on(source, tmp_path):
    c = recipe_for(source, density=0.5)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(c))
    code = f"""
import os
from ftbook.merging import engine, write
make, made = write._make, []
def dies(*a):
    if len(made) == 7: os._exit(9)
    made.append(make(*a))
write._make = dies
engine.merge({str(tmp_path / 'c.yml')!r}, {str(tmp_path / 'out')!r}, threads=1)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 9
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.merging").is_dir()
    assert same(tensors(merge(c, tmp_path / "out").folder), tensors(merge(c, tmp_path / "fresh").folder))


def test_a_full_disk(source, tmp_path, monkeypatch):
    c, write, count = recipe_for(source, density=0.5), os.pwrite, []

    def full(*a):
        count.append(1)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*a)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="the disk is full.*goes on where it was") as e:
        merge(c, tmp_path / "out", threads=2)
    assert e.value.errno == errno.ENOSPC and not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", write)
    assert same(tensors(merge(c, tmp_path / "out").folder), tensors(merge(c, tmp_path / "fresh").folder))


def test_a_disk_that_is_too_small(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="takes .* MB and .* has 0 MB free"):
        merge(recipe_for(source), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_overwriting(source, tmp_path):
    merge(recipe_for(source), tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: choose another"):
        merge(recipe_for(source), tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("x")
    merge(recipe_for(source), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    with pytest.raises(ValueError, match="is one of the models"):
        merge(recipe_for(source), source / "red", overwrite=True)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux only")
def test_a_merge_that_fails_closes_its_files(source, tmp_path, monkeypatch):
    def fails(*a):
        raise ValueError("no number")

    monkeypatch.setattr(merging_write, "_make", fails)
    with pytest.raises(ValueError, match="no number") as kept:  # its traceback keeps every local name alive
        merge(recipe_for(source, density=0.5), tmp_path / "out", threads=1)
    held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert kept.tb and not [o for o in held if ".out.merging" in o]


# Configurations

REFUSED = {  # published too, and not supported: what is named
    "models:\n  - model: a\n  - model: b\nmerge_method: arcee_fusion\nbase_model: a\n": "merge_method 'arcee_fusion' is not supported",
    (
        "models:\n  - model: a\n  - model: b\nmerge_method: nuslerp\nparameters:\n  geodesic: true\ntokenizer:\n  "
        "source: union\n"
    ): "merge_method 'nuslerp' is not supported",
    "models:\n  - model: a\n  - model: b\nmetric_method: scale\ndtype: float32\n": "'metric_method' is not supported",
    (
        "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 40]\n      - model: b\n        "
        "layer_range: [0, 40]\nmerge_method: slerp\nbase_model: a\nparameters:\n  t:\n    - pattern: self_attn\n   "
        "   value: [0, 1]\n    - value: 0.5\n"
    ): "parameters.t.pattern: 'pattern' is not supported",
    "models:\n  - model: a\n    lora: b\n    parameters:\n      weight: 0.6\nmerge_method: linear\n": "'lora' is not supported",
    "models:\n  - model: a\n    parameters:\n      encoder_weight: 0.8\nmerge_method: linear\n": "'encoder_weight' is not supported",
    "models:\n  - model: a\nmerge_method: linear\nout_path: x\n": "'out_path' is not supported",
    "models:\n  - model: a\nmerge_method: linear\n---\nmodels:\n  - model: b\nmerge_method: linear\n": "mergekit-mega",
    "modules:\n  text: {models: [{model: a}]}\n  vision: {models: [{model: a}]}\nmerge_method: linear\n": "text, vision are several",
    "models:\n  - model: a\nmerge_method: linear\ntokenizer:\n  source: union\n  tokens: {x: {source: a}}\n": "tokenizer.tokens: 'tokens' is not supported",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_supported_is_named(text):
    with pytest.raises(ValueError) as e:
        read_config(text)
    assert REFUSED[text] in str(e.value)


# Vocabularies and tied heads


def test_shuffled_tokens_are_refused_and_united(tmp_path):
    plain = [f"w{i}" for i in range(90)]
    for i, (name, order) in enumerate((("base", plain), ("red", plain[::-1]))):
        llama(0).save_pretrained(tmp_path / name)
        words(tmp_path / name, order)
    t = tensors(tmp_path / "red")
    save_file(
        t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"].flip(0).contiguous()},
        tmp_path / "red" / MODEL,
    )
    c = recipe_for(tmp_path, "task_arithmetic", NAMES[1:2])
    with pytest.raises(ValueError, match="rows of the embeddings would be mixed up"):
        plan_merge(c)
    merge(c | dict(tokenizer_source="union"), tmp_path / "out")
    assert gap(tensors(tmp_path / "out"), tensors(tmp_path / "base")) < 1e-7


def test_other_languages_of_tokens_are_refused(tmp_path):
    for i, (name, order) in enumerate((("base", [f"w{i}" for i in range(90)]), ("red", [f"v{i}" for i in range(90)]))):
        llama(i).save_pretrained(tmp_path / name)
        words(tmp_path / name, order)
    for source in ("union", "base"):
        with pytest.raises(ValueError, match="a merge of the two makes no sense"):
            plan_merge(recipe_for(tmp_path, "task_arithmetic", NAMES[1:2], tokenizer_source=source))


# Adapters


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["norm"]), "norm.weight, which is more than a product"),
        (dict(lora_bias=True), "lora_B.bias"),
    ],
)
def test_adapters_that_are_more_than_products(source, tmp_path, options, said):
    adapter(tmp_path / "a", llama(0), 1, **options)
    with pytest.raises(ValueError, match=said):
        plan_merge(
            dict(
                merge_method="linear",
                models=[dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0))],
            )
        )


def test_an_adapter_of_another_base(source, tmp_path):
    adapter(tmp_path / "a", llama(0, intermediate_size=40), 1)
    with pytest.raises(ValueError, match="it was made for another base"):
        plan_merge(
            dict(
                merge_method="linear",
                models=[dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0))],
            )
        )


# Bad input


def spoil(models, name, change):
    t = tensors(models / name)
    for f in (models / name).glob("*.safetensors"):
        f.unlink()
    (models / name / INDEX).unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in change(t).items()}, models / name / MODEL)


def refuses(c, said):
    with pytest.raises(ValueError) as e:
        plan_merge(c)
    assert said in str(e.value), str(e.value)


def test_different_architectures(models):
    c = json.loads((models / "red" / "config.json").read_text())
    (models / "red" / "config.json").write_text(
        json.dumps(c | dict(model_type="mistral", architectures=["MistralForCausalLM"]))
    )
    refuses(recipe_for(models), "is of another architecture")


def test_a_missing_and_an_extra_tensor(models):
    spoil(models, "red", lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    refuses(recipe_for(models), "red lacks model.norm.weight")
    spoil(models, "red", lambda t: t | {"model.norm.weight": torch.ones(32), "more": torch.ones(3)})
    refuses(recipe_for(models), "red has more, which")


def test_a_shape_that_is_off(models):
    spoil(models, "green", lambda t: t | {"model.norm.weight": torch.ones(33)})
    refuses(recipe_for(models), "model.norm.weight is (33,) in")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "model_stock", "slerp", "sce", "karcher"])
def test_numbers_that_are_none(models, tmp_path, bad, method):
    def change(t):
        t["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        return t

    spoil(models, "red", change)
    p = {"parameters": dict(t=0.5)} if method == "slerp" else {}
    c = recipe_for(
        models, method, NAMES[1:2] if method == "slerp" else NAMES[1:], "base" if RECIPES[method].base else None, **p
    )
    with pytest.raises(ValueError, match=r"red: model.layers.1.mlp.up_proj.weight has 1 values"):
        merge(c, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_nothing_but_nan(models, tmp_path):
    "A threshold cannot be found in it, and the merge says so all the same."
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(models, "red", lambda t: t | {name: torch.full_like(t[name], math.nan)})
    with pytest.raises(ValueError, match=f"red: {name} has .* values"):
        merge(recipe_for(models, "ties", density=0.4), tmp_path / "out")


def test_an_overflow_is_named(models, tmp_path):
    spoil(models, "red", lambda t: t | {"model.norm.weight": torch.full((32,), 60000.0)})
    with pytest.raises(ValueError, match="model.norm.weight comes out larger than F16 can say"):
        merge(recipe_for(models, "task_arithmetic", dtype="float16", weight=2.0), tmp_path / "out")


def test_a_zero_task_vector_is_noted(models, tmp_path):
    shutil.copytree(models / "base", models / "twin")
    done = merge(recipe_for(models, "ties", ("red", "twin"), density=0.5), tmp_path / "out")
    assert (
        done.notes == [f"{models / 'twin'} equals the base: its task vector is zero"]
        and done.notes[0] in (done.folder / "README.md").read_text()
    )
    assert merge(recipe_for(models, "ties", ("red", "blue"), density=0.5), tmp_path / "out2").notes == []


@pytest.mark.parametrize("method", ["linear", "ties", "della", "task_arithmetic"])
def test_weights_that_sum_to_zero(source, method):
    c = recipe_for(
        source, method, NAMES[1:3], "base" if RECIPES[method].base else None, parameters=dict(normalize=True)
    )
    for m, w in zip(c["models"], (0.5, -0.5)):
        m["parameters"]["weight"] = w
    refuses(c, "the weights sum to zero")
    plan_merge(c | dict(parameters=dict(normalize=False)))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(density=0.0), "density=0"),
        (dict(density=-0.1), "density=-0.1"),
        (dict(density=1.2), "density=1.2"),
        (dict(density=math.nan), "must be finite"),
        (dict(weight=math.inf), "must be finite"),
        (dict(density=0.5, parameters={"lambda": math.nan}), "must be finite"),
        (dict(weight=None), "needs a weight"),
    ],
)
def test_parameters_out_of_range(source, given, said):
    refuses(recipe_for(source, **given), said)


def test_more_parameters_out_of_range(source):
    refuses(recipe_for(source, "della", density=0.9, epsilon=0.2), "must stay between 0 and 1")
    refuses(recipe_for(source, "breadcrumbs", density=0.9, gamma=1.0), "gamma=1.0")
    refuses(recipe_for(source, "sce", parameters=dict(select_topk=0)), "select_topk=0")
    refuses(recipe_for(source, "ties_paper", density=[0.2, 0.5]), "cannot differ between tensors")


def test_unknown_keys(source):
    c = recipe_for(source)
    for change, said in [
        (dict(metod=1), "'metod' is not supported"),
        (dict(parameters=dict(densty=1)), "'densty' is not supported"),
        (dict(models=[dict(model="a", weigth=1)]), "'weigth' is not supported"),
        (dict(chat_template="chatml"), "chat_template 'chatml' is not supported"),
        (dict(slices=[]), "either models or slices"),
        (dict(models=[]), "no model is listed"),
        (dict(models=3), "models must be a list, not 3"),
        (dict(models=["red"]), "a model must be a mapping"),
        (dict(models=[dict(parameters={})]), "names no model"),
        (dict(dtype="int4"), "dtype must be one of"),
    ]:
        with pytest.raises(ValueError) as e:
            merge(c | change, source.parent / "never")
        assert said in str(e.value), str(e.value)


def test_paths_that_lead_out(models):
    index = json.loads((models / "blue" / INDEX).read_text())
    for path in ("../red/model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "sub\\x.safetensors"):
        (models / "blue" / INDEX).write_text(
            json.dumps(index | dict(weight_map={k: path for k in index["weight_map"]}))
        )
        refuses(recipe_for(models), "leads out of its folder")


def test_pickles_are_refused(models):
    (models / "red" / MODEL).unlink()
    torch.save({"a": 1}, models / "red" / "pytorch_model.bin")
    refuses(recipe_for(models), "holds only pickled weights")
    refuses(recipe_for(models), "To convert it: python -c")


def test_truncated_and_missing_shards(models):
    shards = sorted((models / "blue").glob("*.safetensors"))
    with open(shards[-1], "r+b") as f:
        f.truncate(shards[-1].stat().st_size - 2)
    refuses(recipe_for(models), "is truncated or damaged")
    shards[-1].unlink()
    refuses(recipe_for(models), f"lacks {shards[-1].name}")


def test_headers_that_point_elsewhere(models):
    "Offsets that leave the file, or that are not as long as the tensor."
    file = models / "red" / MODEL
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    for ends in ([-8, 120], [0, 64], [10**9, 10**9 + 128]):
        text = json.dumps(
            header | {"model.norm.weight": header["model.norm.weight"] | dict(data_offsets=ends)}
        ).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
        refuses(recipe_for(models), "truncated or damaged, model.norm.weight does not lie in it")
    file.write_bytes(b"\xff" * 40)
    refuses(recipe_for(models), "is truncated or damaged")


def test_a_fine_tune_of_another_base_is_noted(models):
    from transformers import LlamaForCausalLM

    assert plan_merge(recipe_for(models)).notes == []
    torch.manual_seed(7)
    LlamaForCausalLM(config()).save_pretrained(models / "green")
    notes = plan_merge(recipe_for(models)).notes
    assert len(notes) == 1 and f"the task vector of {models / 'green'} is 1.4 times as long" in notes[0]


def test_an_adapter_that_names_another_base_is_noted(source, tmp_path):
    adapter(tmp_path / "a", llama(0), 1)
    c = recipe_for(source, "task_arithmetic", ("red",))
    c["models"].append(dict(model=f"{source / 'base'}+{tmp_path / 'a'}", parameters=dict(weight=1.0)))
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for name, noted in ((str(source / "base"), 0), ("someone/BASE", 0), ("someone/another", 1)):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said | dict(base_model_name_or_path=name)))
        assert sum("was trained on someone/another" in n for n in plan_merge(c).notes) == noted


def test_a_merge_onto_another_base_is_noted(models, tmp_path):
    done = merge(recipe_for(models, "task_arithmetic", ("red", "blue"), weight=0.5), tmp_path / "first")
    again = recipe_for(models, "task_arithmetic", ("green",), weight=0.5)
    again["models"].append(dict(model=str(done.folder), parameters=dict(weight=0.5)))
    assert merge(again, tmp_path / "second").notes == []
    spoil(models, "base", lambda t: {k: v * 1.01 for k, v in t.items()})
    assert "is a merge onto another base" in merge(again, tmp_path / "third").notes[-1]


def test_the_base_among_the_models(source, tmp_path):
    c = recipe_for(source, density=0.5)
    listed = c | dict(models=[dict(model=str(source / "base"), parameters=dict(weight=5.0)), *c["models"]])
    assert "is the base and is listed among the models" in plan_merge(listed).notes[0]
    assert same(tensors(merge(listed, tmp_path / "a").folder), tensors(merge(c, tmp_path / "b").folder))


def test_one_model_only(source, tmp_path):
    done = merge(recipe_for(source, "linear", ("red",), None), tmp_path / "out")
    assert "one model only" in done.notes[0] and gap(tensors(done.folder), tensors(source / "red")) == 0
    refuses(recipe_for(source, "model_stock", ("red",)), "takes at least 2 models beside the base, and 1 is given")
    refuses(
        recipe_for(source, "slerp", parameters=dict(t=0.5)), "takes exactly 1 model beside the base, and 3 are given"
    )
    refuses(recipe_for(source, base=None), "needs a base_model")
    refuses(recipe_for(source, "linear", ("red", "red"), None), "is listed twice")


def test_mixed_precision_is_noted(models, tmp_path):
    spoil(models, "red", lambda t: {k: v.bfloat16() for k, v in t.items()})
    c = recipe_for(models, "linear", ("red", "blue"), None)
    assert "are stored as" in plan_merge(c).notes[0]
    a, b = tensors(models / "red"), tensors(models / "blue")
    assert gap(tensors(merge(c, tmp_path / "out").folder), {k: (t.float() + b[k]) / 2 for k, t in a.items()}) < 1e-7


def test_integers_are_copied_or_refused(models, tmp_path):
    for n in NAMES:
        spoil(models, n, lambda t: t | {"steps": torch.tensor([7, 8])})
    assert tensors(merge(recipe_for(models), tmp_path / "out").folder)["steps"].tolist() == [7, 8]
    spoil(models, "red", lambda t: t | {"steps": torch.tensor([7, 9])})
    refuses(recipe_for(models), "steps is stored in integers")


def test_quantised_models_are_refused(models):
    c = json.loads((models / "red" / "config.json").read_text())
    (models / "red" / "config.json").write_text(
        json.dumps(c | dict(quantization_config=dict(quant_method="bitsandbytes")))
    )
    refuses(recipe_for(models), "is quantised (bitsandbytes)")


def test_a_model_that_is_nowhere(source):
    refuses(recipe_for(source, names=("red", "nobody")), "neither a folder here nor")


def test_layer_ranges(source):
    def slices(*ranges):
        return dict(
            merge_method="slerp",
            base_model=str(source / "base"),
            parameters=dict(t=0.5),
            slices=[
                dict(sources=[dict(model=str(source / n), layer_range=r) for n, r in zip(("base", "red"), ranges)])
            ],
        )

    refuses(slices([0, 2], [0, 3]), "they must have the same number")
    refuses(slices([0, 4], [0, 4]), "it has layers 0 to 3")
