"""One merge as a whole process, and the same merges by mergekit.

    python sides/merging.py SIDE CONFIG OUT    one merge; prints processor time, time once it was up, peak memory
    python sides/merging.py answer FOLDER      mergekit merges every configuration in FOLDER

A side is 'ours', 'unhashed' (ours without the SHA-256 of every file), 'limited' (the same with no more than LIMIT
bytes of data), one of TRIED, 'copy' (read the inputs and write the output's bytes) or 'theirs' (mergekit; run by its
interpreter, needs no ftbook).
"""

import json, os, resource, sys, time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

# bytes of data (heap, anonymous mappings, stacks) that the merging process may have
LIMIT = 512 << 20


# mergekit


class Coins:
    """Stands in for `torch.bernoulli`: knows which tensor of which model mergekit is at, and reads the random numbers
    that came with the question."""

    def __init__(self, file):
        from safetensors.torch import load_file

        self.numbers, self.group, self.at = load_file(file), None, 0

    def install(self):
        import torch
        from mergekit.merge_methods import generalized_task_arithmetic as g

        merge_group, sparsify = g.GeneralizedTaskArithmeticMerge.merge_group, g.sparsify

        def named(method, group, /, **parameters):
            self.group, self.at = group, -1
            return merge_group(method, group, **parameters)

        def counted(*args, **kw):
            self.at += 1
            return sparsify(*args, **kw)

        g.GeneralizedTaskArithmeticMerge.merge_group, g.sparsify, torch.bernoulli = named, counted, self.draw

    def draw(self, chances):
        drawn = self.numbers[f'{self.group.metadata.name}/{self.group.non_base[self.at].id}']
        return (drawn < (chances.double() * 2**32).long().view(-1)).view(chances.shape).to(chances.dtype)


def theirs(config, out, **options):
    "One merge by mergekit."
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # the card asks the hub for every name
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(Path(config).read_text())),
        str(out),
        MergeOptions(quiet=True, write_model_card=False, **options),
    )


def answer(folder):
    "Merge every configuration, with the random numbers that came with them."
    Coins(folder / 'coins.safetensors').install()
    os.chdir(folder)
    for i in range(len(list(folder.glob('*.yml')))):
        theirs(f'{i}.yml', folder / f'theirs {i}', lora_merge_cache=str(folder / 'loras'))
    (folder / 'versions.json').write_text(json.dumps({p: version(p) for p in ('mergekit', 'transformers', 'torch')}))


# What no merge can do without


def copy(config, out):
    "Read every input, and write as many bytes as the output has, in blocks: the least that a merge does."
    import yaml

    c = yaml.safe_load(Path(config).read_text())
    files = [next(Path(m).glob('*.safetensors')) for m in [c['base_model'], *(o['model'] for o in c['models'])]]
    out.mkdir(parents=True)
    with open(out / 'model.safetensors', 'wb') as to:
        for f in files:
            with open(f, 'rb', buffering=0) as source:
                while block := source.read(1 << 20):
                    if f == files[0]:
                        to.write(block)
        to.flush()
        os.fsync(to.fileno())


# What was tried against the distance to a copy


def fill_forked(plan, folder, names, threads, hashes, progress):
    """In place of `_fill_files`: a forked process for each core, all of them taking tensors from one pipe, the largest
    first."""
    import numpy as np
    from ftbook.merging import write

    files, todo = {n: open(folder / n, 'r+b', buffering=0) for n in names}, sorted(plan.jobs, key=lambda j: -j.n)
    np.seterr(all='ignore')
    write._keep_memory()
    take, give = os.pipe()
    os.write(give, b''.join(i.to_bytes(2, 'little') for i in range(len(todo))))
    os.close(give)

    def work():
        while got := os.read(take, 2):
            write._make(
                plan, job := todo[int.from_bytes(got, 'little')], files[job.file], map, [True] * len(job.models)
            )

    def child():
        if pid := os.fork():
            return pid
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)

    if any(os.waitpid(pid, 0)[1] for pid in [child() for _ in range(threads)]):
        raise RuntimeError('a process failed')
    for f in files.values():
        os.fsync(f.fileno())
    (folder / write._DONE).write_text('')
    return {}, [True] * len(plan.jobs[0].models)


# Each sets a name in the module that uses it: the engine calls `_fill_files`, every tensor's `Parts` reads CHUNK.


def forked():
    from ftbook.merging import engine

    engine._fill_files = fill_forked


def small_pieces():
    from ftbook.merging import parts

    parts.CHUNK //= 4


def unkept():
    from ftbook.merging import write

    write._keep_memory = lambda: None


TRIED = dict(forked=forked, small=small_pieces, unkept=unkept)


# The process


def peak():
    "The most memory that this process has held, in KiB; it counts from its own start, which `getrusage` does not."
    return next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')).split()[1]


def used():
    "Processor time of this process and of those that it has started, in seconds."
    return sum(sum(resource.getrusage(o)[:2]) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(side, config, out):
    "One merge by ftbook; the time at which it began."
    if side == 'limited':
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    from ftbook.merging import engine

    if side in TRIED:
        TRIED[side]()
    start = time.perf_counter()
    engine.merge(config, out, hashes=side == 'ours')
    return start


def main(side, *given):
    "One side."
    start = time.perf_counter()
    given = [Path(o) for o in given]
    if side == 'answer':
        return answer(*given)
    if side in ('theirs', 'copy'):
        dict(theirs=theirs, copy=copy)[side](*given)
    else:
        start = ours(side, *given)
    print(round(used(), 3), round(time.perf_counter() - start, 3), peak())


if __name__ == '__main__':
    main(*sys.argv[1:])
