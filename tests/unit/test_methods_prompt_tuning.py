"Errors and private helpers of ftbook.methods.prompt_tuning."

from fastcore.test import test_eq as check_eq, test_fail as check_fail
from ftbook.methods.prompt_tuning import PromptTuning
from ftbook.models.load import load_model


def test_dict_1():
    model, tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu')
    for wrong, said in [
        (dict(num_virtual_tokens=0), 'at least 1'),
        (dict(init='best'), "one of 'random'"),
        (dict(init='text'), 'needs `text`'),
        (dict(init='text', text='hi'), '`tokenizer` is needed'),
        (dict(init='text', text='', tokenizer=tokenizer), 'has no tokens'),
        (dict(text='hi'), 'makes no use of it'),
    ]:
        check_fail(lambda: PromptTuning(**wrong), contains=said)
    check_eq(PromptTuning(4, 'text', text=[7, 8, 9]).token_ids(), [7, 8, 9, 7])
    check_fail(lambda: PromptTuning(4, 'text', text=[49152]).apply(model), contains='tokenizer of another model')
