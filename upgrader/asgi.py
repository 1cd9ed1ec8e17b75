# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.asgi app:app`: uvicorn, with uvicorn's own options, upgraded in place.

It only puts uvicorn's configuration, its adapter and an instance together; the application needs
no change and notices nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import ssl
import sys
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

try:
    import click
    import uvicorn
    from uvicorn.main import main as uvicorn_command
except ModuleNotFoundError as error:
    why = f"{error.name} is not installed here: pip install 'upgrader[uvicorn]'"
    raise SystemExit(f"upgrader.asgi: {why}") from error

from upgrader.aio.instance import AsyncioInstance
from upgrader.attach import attach
from upgrader.errors import UpgradeError
from upgrader.integrations.uvicorn import UvicornAdapter

Path: TypeAlias = str | os.PathLike[str] | None

#: What its listener is called: FileDescriptorName= of a .socket unit, if there is one.
LISTENER = "http"
#: What of an application's lifespan state is declared as a function for `instance.quiesce`, and for
#: `instance.replaced`.
QUIESCE, REPLACED = "upgrader.quiesce", "upgrader.replaced"
_ONE_PROCESS = (
    "one instance is one process: use template units (web@1, web@2) on one .socket instead,"
    " which are upgraded one after the other"
)


def serve(**options: Any) -> None:
    """Serve an ASGI application, and upgrade it in place."""
    if options["reload"]:
        raise click.UsageError("--reload watches files and forks; `systemctl reload` upgrades")
    config = configuration(options)
    if config.workers > 1:  # WEB_CONCURRENCY included
        raise click.UsageError(f"--workers: {_ONE_PROCESS}")
    if config.timeout_graceful_shutdown is not None:  # the unit has the last word
        os.environ.setdefault("UPGRADER_DRAIN_TIMEOUT", f"{config.timeout_graceful_shutdown}s")
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(config, options))
    except UpgradeError as error:  # at a desk; nobody has to look into this program because of it
        raise SystemExit(f"asgi: {error}") from error


def configuration(options: dict[str, Any]) -> uvicorn.Config:
    """What uvicorn makes of its own command line."""
    if options.get("app_dir") is not None:
        sys.path.insert(0, options["app_dir"])
    known = inspect.signature(uvicorn.Config).parameters
    wanted = {name: value for name, value in options.items() if name in known}
    wanted["headers"] = [tuple(header.split(":", 1)) for header in options["headers"]]
    if wanted.get("log_config") is None:
        wanted.pop("log_config", None)  # its default is uvicorn's own, and None is no logging
    return uvicorn.Config(**wanted)


async def _serve(config: uvicorn.Config, options: dict[str, Any]) -> None:
    async with attach("asgi") as instance:
        _watch(instance, config, options["env_file"])
        instance.reload(lambda: _renew_certificate(config))
        listener = instance.listener(LISTENER, bind=_address(config))
        if config.uds:

            @instance.verify
            def open_to_all() -> None:
                if listener._bound.persistent:  # bound here, not by a .socket unit
                    os.chmod(str(config.uds), 0o666)  # as uvicorn does: a proxy is another user

        instance._parts.destination.check_addresses()
        adapter = await _start(instance, config, options)
        _declare(instance, adapter.lifespan_state)
        instance.protocols(listener, adapter, tls=config.ssl)
        try:
            await instance.serve()
        finally:
            deadline = instance._runtime.deadline
            if not instance._runtime.replaced:  # somebody may wait for the end of this process
                patience = instance._parts.report.parameters.drain_timeout
                deadline = min(deadline, time.monotonic() + patience)
            await adapter.stop(deadline)


async def _start(
    instance: AsyncioInstance, config: uvicorn.Config, options: Mapping[str, Any]
) -> UvicornAdapter:
    """Import the application and run its start-up, before anything is disturbed."""
    try:
        adapter = UvicornAdapter(config, move_websockets=options["websockets"] == "move")
        await adapter.__aenter__()
    except SystemExit as error:  # uvicorn has logged why
        raise _refused(instance, UpgradeError("the application cannot be loaded")) from error
    except Exception as error:
        raise _refused(instance, error) from error
    module = sys.modules.get(str(config.app).partition(":")[0])
    instance._parts.report.version = options["app_version"] or version_of(config.load_app(), module)
    return adapter


def _watch(instance: AsyncioInstance, config: uvicorn.Config, env_file: Path) -> None:
    """A renewed certificate is served after a reload; of the other files, a new process takes note."""
    for path in (env_file, config.log_config, config.ssl_ca_certs):
        if isinstance(path, str | os.PathLike):
            instance.watch_file(path)
    for path in (config.ssl_certfile, config.ssl_keyfile):
        if path:
            instance._parts.report.watched.add(os.fspath(path), reread=True)


def _renew_certificate(config: uvicorn.Config) -> None:
    """For the connections that are opened from now on; raises OSError, and all is as it was."""
    if config.ssl and config.ssl_certfile:
        # Tried elsewhere first: a key that does not fit would leave half of it in use.
        for context in ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config.ssl:
            context.load_cert_chain(
                config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password
            )


def _declare(instance: AsyncioInstance, state: Mapping[str, Any]) -> None:
    """Declare what an application that knows nothing of an instance has left in its lifespan's state."""
    for name, declare in (QUIESCE, instance.quiesce), (REPLACED, instance.replaced):
        if name in state:
            declare(state[name])


def version_of(application: object, module: object = None) -> str:
    """What an application says that its version is, or else `__version__` of its module; the default
    of its framework says nothing."""
    version = getattr(application, "version", "")
    own = inspect.signature(type(application)).parameters.get("version")
    if not isinstance(version, str) or (own and own.default == version):
        version = ""
    return version or str(getattr(module, "__version__", ""))


def _refused(instance: AsyncioInstance, error: Exception) -> Exception:
    instance._parts.destination.refuse(error)
    return error


def _address(config: uvicorn.Config) -> str | None:
    """Where to bind; None for --fd: PID 1 passes the listener."""
    if config.fd is not None:
        return None
    if config.uds is not None:
        return f"unix:{os.path.abspath(config.uds)}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{host}:{config.port}"


_WEBSOCKETS = click.Option(
    ["--websockets"],
    type=click.Choice(["close", "move"]),
    default="close",
    show_default=True,
    envvar="UPGRADER_WEBSOCKETS",
    help="What an upgrade does with WebSockets: close them with 1012 (service restart), or move them,"
    " so that their handlers begin anew and their clients do not notice.",
)
_VERSION = click.Option(
    ["--app-version"],
    default="",
    help="Version of the application, for `upgrader status`. Default: its attribute `version`, or"
    " `__version__` of its module.",
)
#: uvicorn's own options; those that need more than one process are refused with the reason.
assert isinstance(uvicorn_command, click.Command)
command = click.Command(
    "python -m upgrader.asgi",
    params=[*uvicorn_command.params, _VERSION, _WEBSOCKETS],
    callback=serve,
    help=serve.__doc__,
    context_settings={"auto_envvar_prefix": "UVICORN"},
)

if __name__ == "__main__":
    command()
