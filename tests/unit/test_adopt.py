# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an ordinary unit would get a runner, from values as Debian 13's own units have them."""

import re
import shlex
import signal
import socket
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.debian_units import facts, listening
from upgrader.protocol.programs import Passing, Readiness
from upgrader.runner.options import RunnerOptions
from upgrader.systemd.unit import ExecCommand
from upgrader.tool.adopt import Adoption, adoption
from upgrader.tool.adopt_command import NotRewritten, find, quoted, rewritten
from upgrader.tool.adopt_trial import service_lines
from upgrader.tool.unit_sockets import OpenSocket


def options(found: Adoption) -> RunnerOptions:
    """What the runner would be told."""
    assert [] == [*found.refusals]
    (line,) = re.findall(r"^ExecStart=(/(?:.*\\\n)*.*)", found.text, re.MULTILINE)
    return parsed(line)


def parsed(line: str) -> RunnerOptions:
    words = shlex.split(line.replace("\\\n", ""))
    assert ["/usr/bin/python3", "-P", "-m", "upgrader.run"] == words[:4]
    return RunnerOptions.parse(words[4:], {})


def test_nginx() -> None:
    """In the foreground, on both families, drained by SIGQUIT; its PID file is put back."""
    found = adoption(facts("nginx.service"))
    told = options(found)

    assert ("/usr/sbin/nginx", "-g", "daemon off; master_process on;") == told.program
    assert [("http", ":80")] == [(each.name, each.address) for each in told.listen]
    assert (Passing.NGINX, signal.SIGQUIT) == (told.passing, told.drain)
    assert "/run/nginx.pid" == told.pid_file
    assert {"PIDFile=", "ExecStop=", "KillMode=process", "Type=notify"} <= {*found.lines}


def test_a_unit_that_a_socket_unit_starts() -> None:
    """Its listener is named, and not bound; in a trial it is, where its user may."""
    found = adoption(facts("gunicorn.service"))

    assert [("gunicorn.socket", None)] == [(e.name, e.address) for e in options(found).listen]
    trial = "/run/upgrader-trial-gunicorn.service"
    assert f"--listen gunicorn.socket=unix:{trial}/gunicorn.socket " in found.start
    assert any("PrivateTmp=" in cost for cost in found.costs)


def test_sockets_that_a_program_renames_into_place() -> None:
    """They are its own."""
    found = adoption(facts("haproxy.service"))

    assert {"port-8000", "port-8001"} == {each.name for each in options(found).listen}
    assert 3 == len(found.left_alone)
    assert "$CONFIG" in found.text  # PID 1 expands it


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("apache2.service", ["binds"]),
        ("mariadb.service", ["exclusive"]),
        ("postgresql@17-main.service", ["exclusive"]),
        ("redis-server.service", ["exclusive"]),
        ("varnish.service", ["exclusive"]),
    ],
)
def test_programs_that_cannot_be_adopted(name: str, kinds: list[str]) -> None:
    """Refused by a word, and with no drop-in."""
    found = adoption(facts(name))

    assert kinds == [each.kind for each in found.refusals]
    assert () == found.lines


@pytest.mark.parametrize(
    ("kind", "sockets", "properties"),
    [
        ("no-listener", [], {}),
        ("datagrams", listening("[::]:443", kind=socket.SOCK_DGRAM) + listening(":443"), {}),
        ("unit-type", None, {"Type": "oneshot"}),
        ("unit-type", None, {"Type": "dbus"}),
        ("unit-type", None, {"MainPID": 0}),
        ("private-pids", None, {"PrivatePIDs": "yes"}),
    ],
)
def test_units_that_cannot_be_adopted(
    kind: str, sockets: list[OpenSocket] | None, properties: dict[str, Any]
) -> None:
    """Whatever their program."""
    found = adoption(facts("nginx.service", sockets, **properties))

    assert [kind] == [each.kind for each in found.refusals]


def test_what_is_set_only_if_need_be() -> None:
    """Signals, a start limit of nobody's business, capabilities, time; nothing that is there already."""
    before = adoption(facts("nginx.service")).lines
    found = adoption(
        facts(
            "nginx.service", KillSignal=signal.SIGQUIT, CapabilityBoundingSet=1, Restart="always",
            TimeoutStopUSec=90_000_000, RuntimeDirectory=["nginx"], FileDescriptorStoreMax=64,
            RuntimeDirectoryPreserve="restart", OOMPolicy="continue",
        )
    ).lines  # fmt: skip

    new = {
        "KillSignal=SIGTERM",
        "RestartKillSignal=SIGTERM",
        "CapabilityBoundingSet=CAP_SYS_PTRACE",
    }
    assert new <= {*found} - {*before}
    assert "FileDescriptorStoreMax=64" in found
    gone = {"Restart=always", "TimeoutStopSec=30", "RuntimeDirectory=upgrader-nginx"}
    assert gone <= {*before} - {*found}


def test_names_of_listeners() -> None:
    """By port or path, each once; both families of a port are one, unless one is elsewhere."""
    sockets = listening(
        "0.0.0.0:443", "[::]:443", "127.0.0.1:80", "[::1]:80", ":8080",
        "unix:/run/php/php8.4-fpm.sock", "unix:@x",
    )  # fmt: skip
    named = {each.name: each.address for each in adoption(facts("nginx.service", sockets)).listens}

    assert {
        "https": ":443",
        "http": "127.0.0.1:80",
        "http-2": "[::1]:80",
        "port-8080": ":8080",
        "php8-4-fpm": "unix:/run/php/php8.4-fpm.sock",
        "x": "unix:@x",
    } == named


def test_who_may_connect_to_a_path() -> None:
    """It is said to the runner, if it would make another file."""
    sockets = listening("unix:/run/app.sock", "unix:/run/other.sock")
    known = replace(
        facts("nginx.service", sockets), modes={"unix:/run/app.sock": "0660:root:www-data"}
    )

    (mode,) = options(adoption(known)).socket_modes
    assert ("app", 0o660, "root", "www-data") == (mode.name, mode.mode, mode.user, mode.group)


def test_a_listener_of_one_interface() -> None:
    """A runner would listen on all of them."""
    (sock,) = listening("0.0.0.0:80")
    found = adoption(facts("nginx.service", [replace(sock, interface="eth0")]))

    assert ["interface"] == [each.kind for each in found.refusals]


def test_options_of_the_admin_come_last() -> None:
    """They are the runner's."""
    found = adoption(facts("nginx.service"), ["--check", "curl -f x", "--drain-limit=5s"])

    assert (("curl", "-f", "x"), 5.0) == (options(found).check, options(found).drain_limit)


def test_a_program_of_which_nothing_is_known() -> None:
    """As of .socket units; ready as its unit says, or by its listeners. That is said."""
    line = [["/srv/shop", ["/srv/shop", "--port=80"], []]]
    for kind, ready in ("simple", Readiness.LISTENING), ("notify", Readiness.NOTIFY):
        changed = facts("nginx.service", ExecStartEx=line, Type=kind)
        found = adoption(replace(changed, executable="/srv/shop"))
        told = parsed(found.start.removeprefix("ExecStart="))

        assert (Passing.LISTEN_FDS, ready) == (told.passing, told.ready)
        assert "nothing is known of shop" in found.costs[-1]


@pytest.mark.parametrize(
    ("words", "executable", "name", "made"),
    [
        (["/opt/v/bin/gunicorn", "-D", "app:app"], "/usr/bin/python3.13", "gunicorn",
         ["/opt/v/bin/gunicorn", "app:app"]),
        (["/usr/bin/python3", "-m", "uvicorn", "--host", "::", "--port=80", "app:app"],
         "/usr/bin/python3.13", "uvicorn",
         ["/usr/bin/python3", "-m", "uvicorn", "--fd", "{fd:http}", "app:app"]),
        (["/usr/sbin/haproxy", "-D", "-f", "x"], "/usr/sbin/haproxy", "haproxy",
         ["/usr/sbin/haproxy", "-Ws", "-f", "x"]),
        (["/usr/sbin/nginx"], "/usr/sbin/nginx", "nginx",
         ["/usr/sbin/nginx", "-g", "daemon off;"]),
        (["/usr/sbin/nginx", "-g", "pid /x;"], "/usr/sbin/nginx", "nginx",
         ["/usr/sbin/nginx", "-g", "daemon off; pid /x;"]),
        (["/srv/start", "-D"], "/usr/sbin/nginx", "nginx", ["/srv/start", "-D"]),
        (["/usr/bin/node", "--x", "app.js"], "/usr/bin/node", "node",
         ["/usr/bin/node", "--x", "app.js"]),
        (["/usr/bin/ruby", "-W0", "/srv/shop"], "/usr/bin/ruby3.3", "shop",
         ["/usr/bin/ruby", "-W0", "/srv/shop"]),
    ],
)  # fmt: skip
def test_command_lines(words: list[str], executable: str, name: str, made: list[str]) -> None:
    """In the foreground, and with the FD in place of an address that it would bind."""
    line = ExecCommand(words[0], tuple(words), ())
    found = find(line, executable)

    assert name == found.name
    assert made == rewritten(found, line, ["http"], forking=True)


def test_a_program_in_the_foreground_stays_as_it_is() -> None:
    """Its configuration may say so, and nginx takes that only once."""
    line = ExecCommand("/usr/sbin/nginx", ("/usr/sbin/nginx",), ())

    assert ["/usr/sbin/nginx"] == rewritten(find(line, ""), line, ["http"], forking=False)


@pytest.mark.parametrize(("more", "names"), [(["--reload"], ["a"]), ([], ["a", "b"])])
def test_a_command_line_that_cannot_be(more: list[str], names: list[str]) -> None:
    """uvicorn takes one FD, and starts itself anew for developers."""
    line = ExecCommand("/bin/uvicorn", ("uvicorn", "app:app", *more), ())
    with pytest.raises(NotRewritten):
        rewritten(find(line, ""), line, names, forking=False)


def test_prefixes_of_a_command_line_are_kept() -> None:
    """For takeover too, as far as they are about privileges."""
    line = [["/usr/sbin/nginx", ["nginx"], ["no-env-expand", "privileged", "ignore-failure"]]]
    found = adoption(facts("nginx.service", ExecStartEx=line)).text

    assert "\nExecStart=:+/usr/bin/python3 " in found
    assert "\nExecReload=+/usr/bin/python3 " in found


def test_words_as_a_unit_file_has_them() -> None:
    """Quoted where need be; specifiers are done, and variables are not."""
    assert '/x $A "a b" "" 100%% "a\\"b\\\\c" "a;"' == quoted(
        ["/x", "$A", "a b", "", "100%", 'a"b\\c', "a;"]
    )


def test_a_section_of_a_unit_file() -> None:
    """Without the others; a line that is continued is no section."""
    text = "[Unit]\nA=1\n[Service]\nB=1\\\n# no end\n[x]\n# c\nC=2\n[Install]\nD=1\n [Service]\nE=1"

    assert ["B=1\\", "# no end", "[x]", "# c", "C=2", "E=1"] == [*service_lines(text)]
