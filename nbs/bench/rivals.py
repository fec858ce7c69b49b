"""Libraries that are compared with ftbook and need an environment of their own, because their requirements and ours do not go together.

    python -m nbs.bench rival mergekit     builds the environment in the cache, once, and prints its interpreter

An environment that is there already is named by a variable, FTBOOK_MERGEKIT_PYTHON for mergekit.
"""

import os, subprocess, venv

from ftbook.files import cache_dir
from ftbook.problem import Problem

TORCH = 'torch==2.13.0'
RIVALS = dict(  # name -> what pip installs
    adapters=[TORCH, 'adapters==1.3.0'],
    fastfit=[TORCH, 'fast-fit==1.2.1', 'transformers<4.50', 'datasets<3', 'accelerate<1.3'],
    mergekit=[TORCH, 'mergekit==0.1.5'],
    setfit=[TORCH, 'setfit==1.2.0'],
)


def variable(name):
    "The environment variable that names a rival's interpreter."
    return f'FTBOOK_{name.upper()}_PYTHON'


def place(name):
    "The interpreter of the environment in the cache, built or not."
    return cache_dir() / 'rivals' / name / 'bin' / 'python'


def python_of(name):
    "The rival's interpreter; Problem where there is none yet."
    found = os.environ.get(variable(name)) or place(name)
    if not os.path.exists(found):
        raise Problem(f'{name} has no environment', f'python -m nbs.bench rival {name}', key=variable(name))
    return str(found)


def build(name):
    "Build the rival's environment unless it is there, and give its interpreter."
    if name not in RIVALS:
        raise Problem(f'there is no rival {name!r}', f"one of {', '.join(RIVALS)}", key='rival')
    folder = place(name).parent.parent
    built = folder / 'built'
    if not built.exists():
        venv.create(folder, with_pip=True, clear=True)
        for what in (RIVALS[name][:1], RIVALS[name]):  # torch first, so that nothing brings another build of it
            subprocess.run([str(place(name)), '-m', 'pip', 'install', '-q', *what], check=True)
        built.touch()
    return str(place(name))


def ask(name, code, *arguments, threads=None, given=None):
    """Run a program in the rival's environment, with the text `given` at its standard input; what it prints. Its error
    is raised with its last lines."""
    env = dict(os.environ) if threads is None else dict(os.environ, OMP_NUM_THREADS=str(threads))
    command = [python_of(name), *(['-c', code] if '\n' in code else [code]), *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f'{name}: {done.stderr[-2000:]}')
    return done.stdout
