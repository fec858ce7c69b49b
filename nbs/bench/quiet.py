"Was a measurement alone on the machine? What other processes took while it ran, and runs that are made again if that was much."

import os, resource, time
from pathlib import Path


def busy():
    "Seconds of work that all cores together have done since the machine started, or None where that is not told."
    if not Path('/proc/stat').exists():
        return None
    user, nice, system, idle, wait, *more = map(int, Path('/proc/stat').read_text().split('\n')[0].split()[1:])
    return (user + nice + system) / os.sysconf('SC_CLK_TCK')


def own():
    "Seconds of work of this process and of those that it has started and waited for."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def disturbed(action):
    "Run `action`; its result, and the share of its time that other processes took."
    start, before, mine = time.perf_counter(), busy(), own()
    result = action()
    others = 0.0 if before is None else busy() - before - (own() - mine)
    return result, max(0.0, others) / (time.perf_counter() - start)


def undisturbed(action, limit=0.05, tries=4, wait=20):
    """Run `action` until nobody disturbs it: (result, share that others took), or None where the machine never was
    quiet."""
    for again in range(tries):
        if again:
            time.sleep(wait)
        result, others = disturbed(action)
        if others <= limit:
            return result, round(others, 3)
        print(f'others took {others:.0%} of the time')
