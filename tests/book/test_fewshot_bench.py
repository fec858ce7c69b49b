"The bench of few labels has the rows that it says."

from book import nbs


# The bench


def test_the_bench_has_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(nbs / "bench")
    import fewshot_worker as W

    assert set(W.WAYS) <= set(vars(W)) and len(W.TASKS) == 6 and W.SEEDS >= 10
    train, test = W.split("news", 8, 0)
    more, same = W.split("news", 16, 0)
    assert [r["text"] for r in test] == [r["text"] for r in same] and {r["text"] for r in train} <= {
        r["text"] for r in more
    }
    assert not {r["text"] for r in W.split("news", 64, 0)[0]} & {r["text"] for r in test}
