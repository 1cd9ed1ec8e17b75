# SPDX-License-Identifier: LGPL-2.1-or-later
"""The servers that are compared: a unit each, what is written for a version, and what upgrades it, as
its own documentation says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = Path(__file__).parent / "programs"

RESTART = ("systemctl", "restart", "bench.service")
RELOAD = ("systemctl", "reload", "bench.service")

#: What is where: {python}, {bin} (of its environment), {dir} (with the programs), {port}, @VERSION@.
_SERVED = "{python} {dir}/served.py"
_OURS = [
    "Type=notify",
    "NotifyAccess=exec",
    "ExecReload={python} -m upgrader.takeover",
    "FileDescriptorStoreMax=16",
    "FileDescriptorStorePreserve=yes",
    "OOMPolicy=continue",
    "RuntimeDirectory=bench",
    "RuntimeDirectoryPreserve=restart",
]
_NONSENSE = '"; nonsense'  # ends the text that it is in
_ASGI = "--lifespan off --no-access-log web:asgi"
_HAPROXY = "haproxy -D -f {dir}/haproxy.cfg -p /run/bench-haproxy.pid"

NGINX = """\
worker_processes 2;
pid /run/bench-nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
  access_log off;
  server {
    listen 127.0.0.1:8090 backlog=2048;
    location / { return 200 "@VERSION@\\n"; }
    location /stream { proxy_pass http://127.0.0.1:9099; proxy_http_version 1.1; proxy_buffering off; }
  }
}
"""
#: nginx.org/en/docs/control.html, "Upgrading Executable on the Fly".
NGINX_RELOAD = """\
#!/bin/sh
set -eu
old=$(cat /run/bench-nginx.pid)
kill -USR2 "$old"
for _ in $(seq 100); do
    new=$(cat /run/bench-nginx.pid 2>/dev/null || true)
    [ -n "$new" ] && [ "$new" != "$old" ] && exec kill -QUIT "$old"
    sleep 0.02
done
exit 1
"""
HAPROXY = """\
global
  stats socket /run/bench-haproxy.sock mode 600 expose-fd listeners level admin
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend http
  bind 127.0.0.1:8090 backlog 2048
  use_backend streams if { path /stream }
  http-request return status 200 content-type text/plain string "@VERSION@\\n" if !{ path /stream }
backend streams
  server one 127.0.0.1:9099
"""
#: docs.gunicorn.org/en/stable/signals.html, "Upgrading to a new binary on the fly".
GUNICORN_RELOAD = """\
#!/bin/sh
set -eu
old=$(cat /run/bench-gunicorn.pid)
kill -USR2 "$old"
for _ in $(seq 100); do
    [ -s /run/bench-gunicorn.pid.2 ] && sleep 1 && exec kill -TERM "$old"
    sleep 0.02
done
exit 1
"""
TABLEFLIP = """\
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	data, _ := os.ReadFile("/srv/bench/version")
	version := strings.TrimSpace(string(data))
	if version == "broken" {
		os.Exit(1)
	}
	if version == "hanging" {
		time.Sleep(time.Hour)
	}
	upgrader, err := tableflip.New(tableflip.Options{PIDFile: "/run/bench-tableflip.pid", UpgradeTimeout: 4 * time.Second})
	if err != nil {
		panic(err)
	}
	go func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGHUP)
		for range signals {
			upgrader.Upgrade()
		}
	}()
	listener, err := upgrader.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		panic(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, version) })
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := fmt.Fprintln(w, version); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	server := http.Server{Handler: mux}
	go server.Serve(listener)
	upgrader.Ready()
	<-upgrader.Exit()
	server.Shutdown(context.Background())
}
"""


SERVED, LIBRARY, WEB = (
    {name: (_PROGRAMS / name).read_text()} for name in ("served.py", "library.py", "web.py")
)


@dataclass(frozen=True, slots=True)
class Server:
    """One way to replace a server.

    `unit`: lines of [Service]; `socket`: it has a `.socket` unit; `files`: in {dir}, with @VERSION@
    in them; `bad`: which bad versions it can be given; `broken`: what stands for @VERSION@ in one that
    cannot start; `needs`: programs of the distribution.
    """

    title: str
    unit: tuple[str, ...]
    files: Mapping[str, str]
    upgrade: tuple[str, ...] = RELOAD
    socket: bool = False
    bad: tuple[str, ...] = ("broken", "hanging")
    broken: str = "broken"
    needs: tuple[str, ...] = ()
    ours: bool = False


SERVERS: Mapping[str, Server] = {
    "live": Server(
        "upgrader, library, live",
        (*_OURS, "ExecStart={python} {dir}/library.py"),
        LIBRARY,
        ours=True,
    ),
    "restart": Server(
        "upgrader, library, restart",
        (*_OURS, "ExecStart={python} {dir}/library.py"),
        LIBRARY,
        RESTART,
        ours=True,
    ),
    "asgi": Server(
        "upgrader, ASGI (uvicorn), live",
        (*_OURS, "ExecStart={python} -m upgrader.asgi --app-dir {dir} --port {port} " + _ASGI),
        WEB,
        ours=True,
    ),
    "runner": Server(
        "upgrader, runner, live",
        (
            *_OURS,
            "ExecStart={python} -m upgrader.run --listen http=127.0.0.1:{port} --ready notify -- "
            + _SERVED,
            "ExecStopPost={python} -m upgrader.run --after-stop",
            "KillMode=process",
        ),
        SERVED,
        ours=True,
    ),
    "nginx": Server(
        "nginx, USR2",
        (
            "Type=forking",
            "PIDFile=/run/bench-nginx.pid",
            "ExecStart=/usr/sbin/nginx -c {dir}/nginx.conf",
            "ExecReload={dir}/reload",
        ),
        {"nginx.conf": NGINX, "reload": NGINX_RELOAD},
        bad=("broken",),
        broken=_NONSENSE,
        needs=("nginx",),
    ),
    "haproxy": Server(
        "HAProxy, -sf -x",
        (
            "Type=forking",
            "PIDFile=/run/bench-haproxy.pid",
            "ExecStart=/usr/sbin/" + _HAPROXY,
            "ExecReload=/usr/sbin/" + _HAPROXY + " -x /run/bench-haproxy.sock -sf $MAINPID",
        ),
        {"haproxy.cfg": HAPROXY},
        bad=("broken",),
        broken=_NONSENSE,
        needs=("haproxy",),
    ),
    "gunicorn": Server(
        "gunicorn, USR2",
        (
            "Type=forking",
            "PIDFile=/run/bench-gunicorn.pid",
            (
                "ExecStart=/usr/bin/gunicorn -D -p /run/bench-gunicorn.pid --chdir {dir}"
                " -b 127.0.0.1:{port} -k gthread --threads 24 web:wsgi"
            ),
            "ExecReload={dir}/reload",
        ),
        {**WEB, "reload": GUNICORN_RELOAD},
        needs=("gunicorn",),
    ),
    "uvicorn": Server(
        "uvicorn, HUP, 2 workers",
        (
            "Type=exec",
            "ExecStart={bin}/uvicorn --app-dir {dir} --port {port} --workers 2 " + _ASGI,
            "ExecReload=kill -HUP $MAINPID",
        ),
        WEB,
    ),
    "starter": Server(
        "Server::Starter, HUP",
        (
            "Type=exec",
            "ExecStart=/usr/bin/start_server --port=127.0.0.1:{port} -- " + _SERVED,
            "ExecReload=kill -HUP $MAINPID",
        ),
        SERVED,
        needs=("start_server",),
    ),
    "tableflip": Server(
        "tableflip, HUP",
        (
            "Type=forking",
            "PIDFile=/run/bench-tableflip.pid",
            'ExecStart=/bin/sh -c "{dir}/tableflip & while [ ! -s /run/bench-tableflip.pid ]; do sleep 0.02; done"',
            "ExecReload=kill -HUP $MAINPID",
        ),
        {"version": "@VERSION@\n"},
        needs=("go",),
    ),
    "socket": Server(
        ".socket and systemctl restart",
        ("Type=notify", "ExecStart=" + _SERVED),
        SERVED,
        RESTART,
        socket=True,
    ),
    "store": Server(
        "FD store and systemctl restart",
        ("Type=notify", "ExecStart=" + _SERVED + " --store", "FileDescriptorStoreMax=4"),
        SERVED,
        RESTART,
    ),
    "plain": Server("systemctl restart", ("Type=notify", "ExecStart=" + _SERVED), SERVED, RESTART),
}
