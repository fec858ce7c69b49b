"Errors and private helpers of ftbook.models.load."

from fastcore.test import test_fail as check_fail
from ftbook.models.load import load_model


def test_load_model_1():
    check_fail(lambda: load_model('smollm'), contains='Shipped with ftbook: smollm2-135m, minilm-l6')
    check_fail(lambda: load_model('minilm-l6'), contains='writes no text: use `load_encoder`')
