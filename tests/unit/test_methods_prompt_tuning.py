"Errors of ftbook.methods.prompt_tuning."

import pytest

from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.models.load import load_model, load_tokenizer


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(num_virtual_tokens=0), "at least 1"),
        (dict(init="best"), "one of 'random'"),
        (dict(init="text"), "needs `text`"),
        (dict(init="text", text="hi"), "`tokenizer` is needed"),
        (dict(text="hi"), "makes no use of it"),
    ],
)
def test_a_wrong_setting_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        PromptTuning(**wrong)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="has no tokens"):
        PromptTuning(init="text", text="", tokenizer=load_tokenizer("smollm2-135m"))


def test_a_short_text_is_repeated():
    assert PromptTuning(4, "text", text=[7, 8, 9]).token_ids() == [7, 8, 9, 7]


def test_a_token_that_the_model_lacks_is_refused():
    model, _ = load_model("smollm2-135m", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="tokenizer of another model"):
        PromptTuning(4, "text", text=[49152]).apply(model)
