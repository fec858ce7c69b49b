"Files, rows and templates that cannot be used are named."

import json, re

import pytest
from hypothesis import given, strategies as st

from ftbook.data import corpora as data_corpora
from ftbook.data.rows import assistant, row_parts, user
from ftbook.data.split import deduplicate, normalise, split_rows
from ftbook.data.encoding import encode
from ftbook.data.layouts import layout_of
from ftbook.data.read import read_rows
from cases.data import chatml, model, plain_llama, tokenizer_of, words


# Rows and files


@given(
    st.lists(words, min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from(['{"text": ', '{"text": "a"', '[', '{"text" 1}', "{'text': 1}"]),
)
def test_a_broken_line_is_named(tmp_path_factory, texts, at, broken):
    lines = [json.dumps(dict(text=t), ensure_ascii=False) for t in texts]
    lines.insert(min(at, len(lines)), broken)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}:{lines.index(broken) + 1}: broken JSON")):
        read_rows(path)


def test_a_hub_id_without_a_hub_is_a_plain_error():
    with pytest.raises(FileNotFoundError, match="no file here, and `datasets` does not load it"):
        read_rows("nobody/no-such-data-set")


def test_a_folder_and_a_missing_file_list_what_is_there(tmp_path):
    (tmp_path / "good.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="is a folder: name one of its files: good.csv"):
        read_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="beside it: good.csv"):
        read_rows(tmp_path / "god.csv")


def test_a_dictionary_that_cannot_be_fetched_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install dict-jargon"):
        data_corpora._fetch_dictionary("jargon", tmp_path / "dictd")
    assert not (tmp_path / "dictd").exists()


@given(
    st.lists(st.sampled_from(["a", "A ", "b", "\uff22", "c d", "C  D", "e"]), min_size=2, max_size=30),
    st.integers(0, 99),
    st.data(),
)
def test_no_text_on_both_sides(texts, seed, more):
    rows = [dict(text=t, n=i) for i, t in enumerate(texts)]
    n_test = more.draw(st.integers(1, len(rows) - 1))
    train, test = split_rows(rows, n_test, seed)
    assert sorted(r["n"] for r in train + test) == list(range(len(rows))) and len(test) <= n_test
    assert not {normalise(r["text"]) for r in train} & {normalise(r["text"]) for r in test}
    once = deduplicate(rows)
    assert deduplicate(once) == once and len(once) == len({normalise(t) for t in texts})


# Templates and masks


def test_a_template_that_rewrites_is_refused():
    tk = tokenizer_of(chatml.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)"))
    talk = [dict(messages=[user("a"), assistant("b"), user("c"), assistant("d")])]
    with pytest.raises(
        ValueError,
        match="row 0: the prompt is not .*: token 29 is 70 'c' when the model is asked, 38 'C' when it is trained",
    ):
        encode(talk, tk)


def test_a_template_that_refuses_is_quoted():
    tk = tokenizer_of("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="row 0: the chat template refuses this conversation: roles must alternate"):
        encode([dict(prompt=[user("a")], completion=[assistant("b")])], tk)


@given(st.integers(2, 80))
def test_nothing_is_cut_in_silence(max_length):
    tk = tokenizer_of(chatml)
    rows = [dict(prompt=[user("q" * k)], completion=[assistant("a" * (30 - k))]) for k in range(1, 30)]
    full = {e.index: len(e) for e in encode(rows, tk)}
    try:
        got = encode(rows, tk, max_length=max_length, bad_rows="skip")
    except ValueError as e:
        assert "none of 29 rows can be used" in str(e)
    else:
        report = got.report()
        assert len(got) + len(report["refused"]) == 29 and all(
            len(e) + e.n_cut == full[e.index] and len(e) <= max_length for e in got
        )
        assert report["tokens_cut"] == sum(e.n_cut for e in got) and all(e.n_targets for e in got)
        assert all("every label is masked" in why.why for _, why in report["refused"])


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(loss_on="answers"), "loss_on must be"),
        (dict(max_length=0), "max_length must be"),
        (dict(bad_rows="drop"), "bad_rows must be"),
    ],
)
def test_a_wrong_choice_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        encode([dict(text="a")], tokenizer_of(None), **bad)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "text", "prompt"]), x, max_size=3)
        ),
        max_leaves=8,
    ),
    st.sampled_from(["messages", "prompt", "text", "completion"]),
)
def test_any_row_is_taken_or_refused_with_its_number(value, field):
    for row in {field: value}, {field: value, "completion": value}, value:
        try:
            prompt, completion = row_parts(row, 41)
        except ValueError as e:
            assert "row 41" in str(e)
        else:
            assert type(prompt) is type(completion) or isinstance(prompt, (list, str))


# Isolation, in families that differ in their attention


def test_a_model_that_runs_nothing_is_refused():
    model = plain_llama(vocab_size=135)

    def fail(module, args, out):
        raise RuntimeError("no such kernel")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(
        ValueError,
        match=(
            "LlamaForCausalLM does not run even a single row of 6 tokens: RuntimeError: no such kernel. Load it in "
            "another dtype"
        ),
    ):
        layout_of(model)
