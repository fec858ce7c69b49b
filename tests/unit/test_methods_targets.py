"Errors and private helpers of ftbook.methods.targets."

from fastcore.test import test_fail as check_fail
from ftbook.methods.targets import find_modules
from ftbook.models.load import load_model


def test_find_modules_1():
    model, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
    check_fail(lambda: find_modules(model, ['q_proj', 'query']), contains='q_proj (30), k_proj (30)')
    check_fail(lambda: find_modules(model, ['embed_tokens']), contains='Embedding')
