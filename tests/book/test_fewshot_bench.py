"The bench of few labels has the rows that it says."

from studies import fewshot as study
from tasks import FEW_TASKS, MADE, MANY, split_few


def test_the_bench_has_its_rows():
    assert set(study.WAYS) <= set(vars(study)) and len(FEW_TASKS) == 6 and study.SEEDS >= 10
    train, test = split_few("news", 8, 0)
    more, same = split_few("news", 16, 0)
    assert [r["text"] for r in test] == [r["text"] for r in same] and {r["text"] for r in train} <= {
        r["text"] for r in more
    }
    assert not {r["text"] for r in split_few("news", 64, 0)[0]} & {r["text"] for r in test}


def test_a_plan_knows_the_classes_without_their_rows():
    for task in (*FEW_TASKS, MANY, MADE):
        assert len({r["label"] for r in split_few(task, 8, 0)[0]}) == study.n_classes(task)
