#!/usr/bin/env python3
"""Renders the mixin to the files below deploy/, or says with --check which of them are out of date.

Needs the module _jsonnet (PyPI: jsonnet), which `cargo xtask setup --tests` unpacks below target/tools.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "target/tools/jsonnet"))

import _jsonnet  # noqa: E402

rendered = json.loads(_jsonnet.evaluate_file(str(HERE / "render.jsonnet")))
stale = []
for name, content in rendered.items():
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    path = HERE.parent / name
    if "--check" in sys.argv:
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
if stale:
    sys.exit(f"out of date: {', '.join(stale)}: run `cargo xtask mixin`")
