"Errors and private helpers of ftbook.data.encoding."

from fastcore.test import test_fail as check_fail
from ftbook.data.corpora import load_corpus, term_rows
from ftbook.data.encoding import encode
from ftbook.models.load import load_model


def test_encode_1():
    movie, tweets, jargon = map(load_corpus, ('movie', 'tweets', 'jargon'))
    term = term_rows(jargon)
    model, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
    limit, tokenizer.model_max_length = tokenizer.model_max_length, 64
    check_fail(lambda: encode(term, tokenizer), contains="tokens, the model's limit is 64: give `max_length=64`")
    tokenizer.model_max_length = limit
