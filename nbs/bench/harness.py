"""One way to measure: plan, share, resume, be alone, append, summarise.

    python -m nbs.bench                                what there is: runs made, runs planned, and the rivals
    python -m nbs.bench plan curves                    the runs of a study that are missing
    python -m nbs.bench run curves                     make them; Ctrl-C keeps what is finished, the same line goes on
    python -m nbs.bench run curves --only task=movie   some of them
    python -m nbs.bench run curves --share 1/2         the second of two shares; two processes take two shares side by side
    python -m nbs.bench run curves --most 3            no more than three
    python -m nbs.bench run gpu_memory --go-on         a run that fails says why, and the next one is made
    python -m nbs.bench run training --this-machine    all of them again, where the results are another machine's
    python -m nbs.bench summary methods                write what lessons read of a long file of runs
    python -m nbs.bench rival mergekit                 build the environment of a rival
    python -m nbs.bench check                          read every results file, and see that every run names its machine

A study is a module in `studies`. It says what is to be measured and measures one run:

    KEY = 'task', 'lr', 'seed'      the fields that name a run
    plan(runs)                      yields the runs to make, as dicts of KEY, in order; `runs` are those that are there. A run that is
                                    yielded three times is made three times
    run(job)                        makes one run and returns what it found, a dict, or a list of dicts. `others`, the share of its time
                                    that other processes took, is added unless it is there

and, where it needs them:

    PACKAGES = 'torch',             versions that are noted with every run
    ALONE = 0.05                    the largest share of the time that other processes may take; a disturbed run is made again, in a
                                    new process where PER_PROCESS is 1
    RESERVE = 1.5e9                 bytes of memory that stay free; a process that leaves less is ended
    PER_PROCESS = 8                 runs in one process, 1 if not said; 0 makes all in this one
    THREADS = 1                     threads of a run, for the libraries that read it when they are imported
    ABOUT = dict(...)               what a reader of the results must know of the study; it is kept in their file
    summarize(results)              a dict, written to `results/NAME_summary.jsonl`; None where it wrote something else

Results are `results/NAME.jsonl`, one run a line, as `ftbook.results.read_results` reads them.
"""

import argparse, importlib, json, math, os, platform, resource, subprocess, sys, time, traceback
from collections import Counter
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zlib import crc32

from ftbook.problem import Problem
from ftbook.results import read_results, result_lines

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results'
TRIES, WAIT = 4, 20  # of a run that others disturb; seconds before it is tried again
DISTURBED = 75  # what a process says that was disturbed
THREAD_NAMES = 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'RAYON_NUM_THREADS'


# The machine


def cpu_name():
    "What the processor calls itself."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((o.split(':')[1].strip() for o in lines if o.startswith('model name')), platform.processor())


def version_of(package):
    "The version that is installed here, or None."
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(packages=()):
    "Where a run is made: processor, cores, commit, versions."
    asked = ['git', 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return dict(cpu=cpu_name(), cores=os.cpu_count(), commit=commit, versions={p: version_of(p) for p in packages})


def busy():
    "Seconds of work that all cores together have done since the machine started, or None where that is not told."
    if not Path('/proc/stat').exists():
        return None
    user, nice, system, *_ = map(int, Path('/proc/stat').read_text().split('\n')[0].split()[1:])
    return (user + nice + system) / os.sysconf('SC_CLK_TCK')


def own():
    "Seconds of work of this process and of those that it has started and waited for."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def disturbed(action):
    "Run `action`: its result, and the share of its time that other processes took."
    start, before, mine = time.perf_counter(), busy(), own()
    result = action()
    others = 0.0 if before is None else busy() - before - (own() - mine)
    return result, max(0.0, others) / (time.perf_counter() - start)


def undisturbed(action, limit=0.05, tries=TRIES, wait=WAIT):
    """Run `action` until nobody disturbs it: (result, share that others took), or None where the machine was never
    quiet."""
    for again in range(tries):
        if again:
            time.sleep(wait)
        result, others = disturbed(action)
        if others <= limit:
            return result, others
        print(f'others took {others:.0%} of the time', file=sys.stderr)


def free_memory():
    "Bytes that can still be had, where that is told."
    info = Path('/proc/meminfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(o.split()[1]) * 1024 for o in lines if o.startswith('MemAvailable')), math.inf)


# A study


class Disturbed(Problem):
    "Other processes never left a run alone."


class Study:
    "One study: its module, its results, and what is still to be measured."

    def __init__(self, name, results=RESULTS):
        self.name = name
        self.path = Path(results) / f'{name}.jsonl'

    @cached_property
    def module(self):
        "The module in `studies`."
        if self.name not in studies():
            known = ', '.join(studies())
            raise Problem(f'there is no study {self.name!r}', f'one of {known}', key='study')
        return importlib.import_module(f'studies.{self.name}')

    def setting(self, name, usual=None):
        "A constant of the module."
        return getattr(self.module, name, usual)

    def read(self):
        "Machines and runs, empty before the first run."
        if not self.path.exists():
            return dict(machines=[], runs=[])
        with taking_turns(self.path):
            return dict(machines=[], runs=[]) | read_results(mend(self.path))

    def key(self, run):
        "What names a run, so that it can be counted."
        return json.dumps([run.get(k) for k in self.module.KEY])

    def runs(self, this_machine=False):
        "The runs that have been made, here or anywhere."
        results, here = self.read(), machine(self.setting('PACKAGES', ()))
        same = lambda m: all(m[k] == here[k] for k in ('cpu', 'cores', 'versions'))
        return [r for r in results['runs'] if not this_machine or same(results['machines'][r['machine']])]

    def made(self, this_machine=False):
        "How often each run has been made, here or anywhere."
        return Counter(map(self.key, self.runs(this_machine)))

    def missing(self, only=(), share=(0, 1), this_machine=False):
        "The planned runs that have not been made. A run belongs to one share, whatever else is missing."
        if unknown := [k for k, _ in only if k not in self.module.KEY]:
            raise Problem(f'a run of {self.name} has no {unknown[0]!r}', f"one of {', '.join(self.module.KEY)}", key='only')
        runs, found = self.runs(this_machine), []
        made = Counter(map(self.key, runs))
        for job in self.module.plan(runs):
            key = self.key(job)
            if made[key] > 0:
                made[key] -= 1
            elif crc32(key.encode()) % share[1] == share[0] and all(str(job.get(k)) == v for k, v in only):
                found.append(job)
        return found

    def append(self, runs):
        "Add finished runs and the machine that made them."
        append(self.path, runs, machine(self.setting('PACKAGES', ())), self.setting('ABOUT', {}))

    def measure(self, job, tries=TRIES):
        "Make one run and append it; Disturbed where other processes never left it alone."
        limit, action = self.setting('ALONE'), lambda: self.module.run(job)
        found = disturbed(action) if limit is None else undisturbed(action, limit, tries)
        if found is None:
            raise Disturbed(
                f'other processes disturbed {self.name} {job} in {tries} tries',
                'stop them, or try later; finished runs are kept',
            )
        result, others = found
        rows = result if isinstance(result, list) else [result]
        self.append([job | dict(others=round(others, 3)) | row for row in rows])

    def summarize(self):
        "Write what lessons read, whole or not at all."
        if self.setting('summarize') is None:
            raise Problem(f'{self.name} has no summary', 'its runs are read as they are', key='study')
        found = self.module.summarize(self.read())
        if found is not None:
            write_results(self.path.with_name(f'{self.name}_summary.jsonl'), found)


def studies():
    "The names of all studies."
    return sorted(p.stem for p in (HERE / 'studies').glob('[!_]*.py') if 'def plan(' in p.read_text(encoding='utf-8'))


# Files of results


def taking_turns(path):
    "A lock on a file of results, held by whoever reads or writes it."
    from filelock import FileLock
    from ftbook.files import cache_dir

    locks = cache_dir() / 'locks'
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f'{crc32(str(path.resolve()).encode()):08x}-{path.name}.lock')


def append(path, runs, here, about=None):
    """Append runs, one a line, and what is not there yet about their machine and their study. Two writers take turns.
    Half a line at the end, which a killed writer left, is taken away."""
    if about is None:
        about = {}
    path.parent.mkdir(exist_ok=True)
    with taking_turns(path), open(path, 'ab') as file:
        there = read_results(mend(path))
        machines = there.get('machines', [])
        new = {k: v for k, v in about.items() if there.get(k) != v}
        if here not in machines:
            machines, new = machines + [here], new | dict(machines=[here])
        rows = [row | dict(machine=machines.index(here)) for row in runs]
        file.write(''.join(result_lines(new | dict(runs=rows))).encode())
        file.flush()
        os.fsync(file.fileno())


def mend(path):
    "Cut a file after its last whole line, where a writer was killed within one; gives the path."
    with open(path, 'r+b') as file:
        text = file.read()
        whole = text.rfind(b'\n') + 1
        if whole < len(text):
            file.truncate(whole)
    return path


def write_results(path, results):
    "Write a file of results, whole or not at all."
    from ftbook.files import write_text

    write_text(path, ''.join(result_lines(results)))


# The commands


def run(study, args):
    "Make what is missing, in this process or in one after another; a process ends before its memory grows."
    per_process = study.setting('PER_PROCESS', 1)
    failed, left = args.after, args.most

    def missing():
        return study.missing(args.only, args.share, args.this_machine)

    print(f'{study.name}: {len(missing()[:left])} runs to make, {sum(study.made(args.this_machine).values())} made')
    while jobs := (todo := missing())[failed:][:left]:
        finished = 1 if args.here or not per_process else min(per_process, len(jobs))
        try:
            if args.here or not per_process:
                one(study, jobs[0], args.tries)
            else:
                child(study, args, finished, failed)
        except Exception as problem:
            if not args.go_on:
                raise
            traceback.print_exception(problem)
            finished = len(todo) - len(missing()) + 1
            failed += 1  # what failed stays in front of what is missing
        left = left if left is None else max(0, left - finished)
    if failed > args.after:
        why = f'{failed - args.after} runs of {study.name} failed'
        raise Problem(why, 'their errors are above; finished runs are kept')


def one(study, job, tries):
    "One run, and a line about it."
    start = time.perf_counter()
    study.measure(job, tries)
    print(', '.join(map(str, job.values())), f'{time.perf_counter() - start:.1f} s', sep=': ', flush=True)


def child(study, args, most, after=0):
    "Some runs, behind those that failed, in a process of its own; one that others disturbed is made again in a new one."
    given = [f'--only={k}={v}' for k, v in args.only] + [f'--share={args.share[0]}/{args.share[1]}']
    tries = TRIES if most == 1 else 1  # new processes; a process of several runs tries again itself
    given += ['--this-machine'] * args.this_machine + [f'--tries={1 if most == 1 else TRIES}']
    threads = study.setting('THREADS')
    env = dict(os.environ, HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
    if threads:
        env |= {name: str(threads) for name in THREAD_NAMES}
    command = [sys.executable, str(HERE), 'run', study.name, '--here', f'--most={most}', f'--after={after}', *given]
    for again in range(tries):
        if again:
            time.sleep(WAIT)
        failed = watched(command, env, study.setting('RESERVE'))
        if failed != DISTURBED:
            break
    if failed:
        raise Problem(f'a run of {study.name} failed', 'its error is above; finished runs are kept')


def watched(command, env, reserve=None):
    "Run a process, and end it before it takes the last of the memory: its exit status."
    if reserve is None:
        return subprocess.run(command, env=env).returncode
    with subprocess.Popen(command, env=env) as process:
        while process.poll() is None:
            if free_memory() < reserve:
                process.kill()
                print(f'less than {reserve / 1e9:g} GB of memory were left', file=sys.stderr)
            time.sleep(0.1)
        return process.returncode


def show(names):
    "A line for each study."
    for name in names:
        study = Study(name)
        about = (study.module.__doc__ or '').strip().split('\n')[0]
        print(f'{name:20} {len(study.read()["runs"]):5} made {len(study.missing()):5} missing   {about}')


def check():
    "Read every file of results, and see that every run names a machine of its file."
    for path in sorted(RESULTS.glob('*.jsonl')):
        results = read_results(path)
        machines = len(results.get('machines', []))
        for number, row in enumerate(results.get('runs', [])):
            if row.get('machine', 0) >= max(machines, 1):
                raise Problem('its machine is not in the file', file=path, row=number)
        print(f'{path.name:30} {len(results.get("runs", [])):5} runs {machines:3} machines')


def pair(text):
    "`field=value`."
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not field=value')
    return tuple(text.split('=', 1))


def count(text):
    "A number of runs."
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of runs')
    return int(text)


def share(text):
    "`I/N`, the I-th of N shares, counted from 0."
    i, _, n = text.partition('/')
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f'{text!r} is not I/N with I below N, counted from 0')
    return int(i), int(n)


def parser():
    "What can be typed."
    whole = argparse.ArgumentParser('python -m nbs.bench', description='Measure, resume, summarise.')
    commands = whole.add_subparsers(dest='command')
    for name in ('plan', 'run', 'summary'):
        command = commands.add_parser(name)
        command.add_argument('study')
        if name != 'summary':
            command.add_argument('--only', type=pair, action='append', default=[], metavar='FIELD=VALUE')
            command.add_argument('--share', type=share, default=(0, 1), metavar='I/N')
            command.add_argument('--most', type=count)
            command.add_argument('--this-machine', action='store_true')
            command.add_argument('--here', action='store_true', help='all runs in this process')
            command.add_argument('--go-on', action='store_true', help='leave a run that fails, and make the next')
            command.add_argument('--after', type=int, default=0, help=argparse.SUPPRESS)  # so many that failed
            command.add_argument('--tries', type=int, default=TRIES, help='of a run that others disturb')
    commands.add_parser('rival').add_argument('name')
    commands.add_parser('check')
    return whole


def main(given=None):
    "The command line. Problems are one line, not a traceback."
    args = parser().parse_args(given)
    try:
        if args.command is None:
            show(studies())
        elif args.command == 'plan':
            for job in Study(args.study).missing(args.only, args.share, args.this_machine)[: args.most]:
                print(json.dumps(job))
        elif args.command == 'run':
            run(Study(args.study), args)
        elif args.command == 'summary':
            Study(args.study).summarize()
        elif args.command == 'rival':
            from rivals import build

            print(build(args.name))
        else:
            check()
    except Disturbed as problem:
        print(problem, file=sys.stderr)
        sys.exit(DISTURBED)
    except Problem as problem:
        sys.exit(f'{problem}')
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit('stopped; finished runs are kept, and the same line goes on')
