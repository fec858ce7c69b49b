"Plans that are refused, each with its reason."

import pytest

from ftbook.merging.plan import plan_merge
from tiny import save_siblings


@pytest.fixture(scope="module")
def ties(tmp_path_factory):
    folder = save_siblings(tmp_path_factory.mktemp("models"))
    models = [
        dict(model=str(folder / n), parameters=dict(weight=w, density=0.4)) for n, w in (("red", 1.0), ("blue", 0.5))
    ]
    return dict(merge_method="ties", base_model=str(folder / "base"), models=models, dtype="float32")


def with_parameters(config, *each, **more):
    "The same configuration with other parameters of its models."
    models = [dict(m, parameters=p) for m, p in zip(config["models"], each)]
    return config | dict(models=models) | more


def test_an_adapter_that_is_nowhere_is_refused(ties):
    missing = [ties["models"][0], dict(ties["models"][1], model=ties["base_model"] + "+lora")]
    with pytest.raises(ValueError, match="neither a folder here"):
        plan_merge(ties | dict(models=missing))


def test_weights_that_sum_to_zero_cannot_be_normalized(ties):
    with pytest.raises(ValueError, match="sum to zero"):
        plan_merge(with_parameters(ties, dict(weight=1), dict(weight=-1), parameters=dict(normalize=True)))


def test_a_density_of_zero_is_refused(ties):
    with pytest.raises(ValueError, match="density=0"):
        plan_merge(with_parameters(ties, *[dict(weight=1, density=0)] * 2))


def test_twice_the_threads_take_half_the_time(ties, monkeypatch):
    plan = plan_merge(ties)
    clock = iter(range(100))  # a second between two looks at it
    monkeypatch.setattr("ftbook.merging.plan.time.perf_counter", lambda: next(clock))
    alone, together = plan.seconds(1), plan.seconds(2)
    assert alone == pytest.approx(2 * together) and alone >= 1
