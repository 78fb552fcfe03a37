"""Templates of pages and pictures, and what they need of the files beside them."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

import jinja2

from gradstore.stages.report.formatting import clean_text, percent, signed


def make_environment(*packages: str) -> jinja2.Environment:
    """Return the templates of some packages, which escape whatever they are given, then those of the report."""

    def load(name: str) -> str | None:
        for package in (*packages, __package__):
            file = resources.files(package).joinpath(name)
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "clean": clean_text}
    return environment


def policy_hash(content: str) -> str:
    """Return what a content security policy names a script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
