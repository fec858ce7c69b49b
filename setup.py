"Fill pyproject.toml's dynamic fields from settings.ini, and the version from ftbook/__init__.py."

import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup


def text(name):
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def lines(value):
    return [o.strip() for o in value.split("\n") if o.strip()]


cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read_string(text("settings.ini"))
meta = cfg["metadata"]
setup(
    version=re.search(r'^__version__ = "([^"]+)"', text("ftbook/__init__.py"), re.M)[1],
    author=meta["author"],
    author_email=meta["author_email"],
    license=meta["license"],
    keywords=meta["keywords"].split(),
    long_description=text("README.md"),
    long_description_content_type="text/markdown",
    classifiers=lines(meta["classifiers"]),
    python_requires=f">={meta['min_python']}",
    install_requires=lines(meta["requirements"]),
    extras_require={k: lines(v) for k, v in cfg["extras"].items()},
    entry_points={"console_scripts": lines(meta["console_scripts"]), "nbdev": ["ftbook=ftbook._modidx:d"]},
    packages=find_packages(include=["ftbook", "ftbook.*"]),
    package_data={"ftbook": ["assets/**", "py.typed", "*.pyi"]},
    zip_safe=False,
)
