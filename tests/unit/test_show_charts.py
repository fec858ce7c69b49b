"Errors and private helpers of ftbook.show.charts."

from fastcore.test import test_fail as check_fail
from ftbook.show.charts import Frame, plot


def test_a_plot_refuses_what_it_cannot_draw():
    check_fail(lambda: plot({}), contains='nothing to plot')
    check_fail(lambda: plot({'loss': ([], [])}), contains="line 'loss' is empty")
    check_fail(lambda: plot({'loss': ([1, 2], [1])}), contains='2 xs but 1 ys')
    check_fail(
        lambda: plot({'loss': ([1], [0])}, frame=Frame(log_y=True)),
        contains="log_y needs values above 0; line 'loss' has 0",
    )
