"""What the studies measure with: one copy of the model, precisions, peak memory, intervals."""

import copy, logging, random, resource, statistics, threading, warnings
from functools import cache


def hush():
    "Keep the warnings of libraries out of what a study prints."
    warnings.filterwarnings('ignore')
    logging.getLogger('bitsandbytes').setLevel('ERROR')


@cache
def loaded(dtype, name='smollm2-135m'):
    "(model, tokenizer) on the CPU, loaded once; copy it before it is changed."
    from ftbook.models.load import load_model

    return load_model(name, dtype=dtype, device='cpu')


def half():
    "The 16-bit precision that this CPU multiplies in hardware, or 'float32'."
    from ftbook.models.device import probe_device

    return str(probe_device('cpu').dtype).removeprefix('torch.')


def fresh(full):
    """(model, tokenizer, precision): full fine-tuning needs weights in float32, everything else trains float32 beside
    bfloat16."""
    model, tokenizer = loaded('float32' if full else half())
    return copy.deepcopy(model), tokenizer, 'bfloat16' if full and half() == 'bfloat16' else None


def unrelated(tokenizer, n=24):
    "Explanations from the Jargon File as plain text: nothing that either task is about."
    from ftbook.data.encoding import encode
    from ftbook.data.corpora import load_corpus

    texts = [r['definition'] for r in load_corpus('jargon') if 200 < len(r['definition']) < 500]
    return encode([dict(text=t) for t in random.Random(0).sample(texts, n)], tokenizer)


def interval(values):
    "Mean, and half the width of its 95 % interval from Student's distribution."
    from scipy.stats import t

    n = len(values)
    return statistics.mean(values), t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5


class Memory(threading.Thread):
    "The highest resident size while training, above that of the loaded weights."

    def __init__(self):
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.start_rss = self.peak = self.now()
        self.start()

    @staticmethod
    def now():
        return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()

    def run(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def stop(self):
        self.done.set()
        self.join()
        return max(self.peak, self.now()) - self.start_rss
