# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the adapter that a command line or the table of programs names."""

import importlib

from upgrader.errors import DeclarationError
from upgrader.runner.adapter import AdapterHost, ProgramAdapter


def adapter_for(host: AdapterHost) -> ProgramAdapter:
    """That of a program: `NAME` is `upgrader.programs.NAME`, and a name with a dot a module of its own;
    its class is called ADAPTER. Raises DeclarationError."""
    name = host.options.adapter
    if not name:
        return ProgramAdapter(host)
    module = name if "." in name else f"upgrader.programs.{name}"
    try:
        made = importlib.import_module(module).ADAPTER(host)
    except (ImportError, AttributeError) as error:
        raise DeclarationError(f"--adapter {name}", str(error)) from error
    if not isinstance(made, ProgramAdapter):
        raise DeclarationError(f"--adapter {name}", f"{module}.ADAPTER is no ProgramAdapter")
    return made
