# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs of the distribution are made of in tests: each answers `/` with its PID and a version, and
`/stream` slowly. `@NAME@` is filled in."""

from dataclasses import dataclass

from tests.pages import ROOT, blocks

#: Bytes of what is sent slowly, and how many of them in a second.
STREAM = 120_000
RATE = 40_000
_PIECE = 4_000  # bytes at a time

_NGINX = """\
worker_processes 2;
pid /run/@NAME@/nginx.pid;
error_log stderr;
daemon off;
events { worker_connections 512; }
http {
  access_log off;
  server {
    listen 127.0.0.1:@PORT@;
    listen unix:/run/@NAME@/socket;
    location = / { return 200 "$pid @VERSION@\\n"; }
    location = /stream { limit_rate @RATE@; alias /run/@NAME@/stream; }
  }
}
"""
_GUNICORN = """\
import os, time
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/stream":
        return stream()
    return [b"%d @VERSION@\\n" % os.getpid()]
def stream():
    for _ in range(@STREAM@ // @PIECE@):
        yield b"x" * @PIECE@
        time.sleep(@PIECE@ / @RATE@)
"""
_HAPROXY = """\
global
  master-worker
defaults
  mode http
  timeout connect 5s
  timeout client 5s
  timeout server 5s
frontend http
  bind 127.0.0.1:@PORT@
  http-request return status 200 content-type text/plain lf-string "%pid @VERSION@" unless { path /stream }
  default_backend slow
backend slow
  server slow unix@/srv/@NAME@/slow
"""
#: What HAProxy has behind it.
SLOW = """\
import socketserver, sys, time
class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
        for _ in range(@STREAM@ // @PIECE@):
            self.wfile.write(b"x" * @PIECE@)
            time.sleep(@PIECE@ / @RATE@)
socketserver.ThreadingUnixStreamServer(sys.argv[1], Answer).serve_forever()
"""
_NODE = """\
let ends = false;
const answer = (request, response) => {
  if (ends) response.setHeader("Connection", "close");
  if (request.url !== "/stream") return response.end(`${process.pid} @VERSION@\\n`);
  let left = @STREAM@;
  const more = setInterval(() => {
    response.write("x".repeat(@PIECE@));
    if ((left -= @PIECE@) > 0) return;
    clearInterval(more);
    response.end();
  }, 1000 * @PIECE@ / @RATE@);
};
const servers = Array.from({ length: process.env.LISTEN_FDS }, (_, number) =>
  require("http").createServer(answer).listen({ fd: 3 + number }));
process.on("SIGTERM", () => {
  ends = true;
  for (const server of servers) { server.close(); server.closeIdleConnections(); }
});
"""
_GO = """\
package main

import ("context"; "fmt"; "net"; "net/http"; "os"; "os/signal"; "strconv"; "strings"; "syscall"; "time")

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d @VERSION@", os.Getpid())
	})
	http.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for left := @STREAM@; left > 0; left -= @PIECE@ {
			fmt.Fprint(w, strings.Repeat("x", @PIECE@))
			w.(http.Flusher).Flush()
			time.Sleep(time.Second * @PIECE@ / @RATE@)
		}
	})
	server := &http.Server{}
	count, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	for fd := 3; fd < 3+count; fd++ {
		listener, _ := net.FileListener(os.NewFile(uintptr(fd), "listener"))
		go server.Serve(listener)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	server.Shutdown(context.Background())
}
"""
_PHP = """\
<?php
if ($_SERVER["QUERY_STRING"] !== "stream") exit(getmypid() . " @VERSION@");
for ($left = @STREAM@; $left > 0; $left -= @PIECE@) {
  echo str_repeat("x", @PIECE@);
  flush();
  usleep(1000000 * @PIECE@ / @RATE@);
}
"""
PHP_FPM = """\
[global]
error_log = /srv/@NAME@/log
[tcp]
listen = 127.0.0.1:@PORT@
user = nobody
group = nogroup
pm = static
pm.max_children = 8
[unix]
listen = /run/@NAME@/socket
listen.mode = 0666
user = nobody
group = nogroup
pm = static
pm.max_children = 4
"""
_PUMA = """\
class Slowly
  def each
    (@STREAM@ / @PIECE@).times { yield "x" * @PIECE@; sleep(@PIECE@.0 / @RATE@) }
  end
end
run lambda { |env|
  body = env["PATH_INFO"] == "/stream" ? Slowly.new : ["#{Process.pid} @VERSION@\\n"]
  [200, { "Content-Type" => "text/plain" }, body]
}
"""
_UVICORN = """\
import asyncio, os
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        for _ in range(@STREAM@ // @PIECE@):
            await send({"type": "http.response.body", "body": b"x" * @PIECE@, "more_body": True})
            await asyncio.sleep(@PIECE@ / @RATE@)
    body = b"" if scope["path"] == "/stream" else b"%d @VERSION@" % os.getpid()
    await send({"type": "http.response.body", "body": body})
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """One program: the file that has its version, the command line, and options of its runner.

    `listeners`: those that it can have; `keeps`: whether it keeps connections for further requests;
    `settings`: another file that it finds, and what is in it.
    """

    file: str
    text: str
    command: str
    options: tuple[str, ...] = ()
    listeners: tuple[str, ...] = ("tcp", "unix")
    keeps: bool = True
    settings: tuple[str, str] = ("", "")


_UVICORN_COMMAND = "@BIN@/uvicorn --workers 2 --lifespan off --no-access-log --app-dir /srv/@NAME@ --fd {fd:@LISTENER@} app:app"
_UVICORN_SET_COMMAND = f"{_UVICORN_COMMAND} --http waiting:Waiting"
_PUMA_COMMAND = (
    "puma --quiet --threads 16:16 -b tcp://127.0.0.1:@PORT@ -b unix:///run/@NAME@/socket"
)
_PUMA_SET_COMMAND = f"{_PUMA_COMMAND} -C /srv/@NAME@/puma.rb /srv/@NAME@/config.ru"
#: Settings with which they answer everybody whom they have accepted.
_UNQUEUED = "puma.rb", "queue_requests false\n"
_PUMA_WAITING = "puma.rb", blocks(ROOT / "docs" / "programs.md", "ruby")[0]
_UVICORN_WAITING = "waiting.py", blocks(ROOT / "docs" / "programs.md", "python")[0]
#: Each by the name of its binary, and what is special.
KINDS = {
    "nginx": Kind("/etc/@NAME@.conf", _NGINX, "nginx -c /etc/@NAME@.conf", ("--pid-file", "/run/@NAME@/nginx.pid")),
    "gunicorn": Kind(
        "app.py", _GUNICORN, "gunicorn --preload --workers 2 --threads 8 --chdir /srv/@NAME@ app:app"
    ),
    # It renames the paths of UNIX listeners into place by itself.
    "haproxy": Kind("haproxy.cfg", _HAPROXY, "haproxy -Ws -f /srv/@NAME@/haproxy.cfg", listeners=("tcp",)),
    "node": Kind("app.js", _NODE, "node /srv/@NAME@/app.js"),
    "go": Kind("main.go", _GO, "/srv/@NAME@/main", ("--ready", "listening")),
    "php-fpm": Kind(
        "index.php", _PHP, "php-fpm --nodaemonize --fpm-config /srv/@NAME@/fpm.conf", keeps=False
    ),
    "puma": Kind("config.ru", _PUMA, f"{_PUMA_COMMAND} /srv/@NAME@/config.ru"),
    "puma-unqueued": Kind("config.ru", _PUMA, _PUMA_SET_COMMAND, settings=_UNQUEUED),
    "puma-waiting": Kind("config.ru", _PUMA, _PUMA_SET_COMMAND, settings=_PUMA_WAITING),
    "uvicorn": Kind("app.py", _UVICORN, _UVICORN_COMMAND, listeners=("tcp",)),
    "uvicorn-unix": Kind("app.py", _UVICORN, _UVICORN_COMMAND, listeners=("unix",)),
    "uvicorn-waiting": Kind(
        "app.py", _UVICORN, _UVICORN_SET_COMMAND, listeners=("tcp",), settings=_UVICORN_WAITING
    ),
    "uvicorn-waiting-unix": Kind(
        "app.py", _UVICORN, _UVICORN_SET_COMMAND, listeners=("unix",), settings=_UVICORN_WAITING
    ),
}  # fmt: skip


def filled(text: str, **values: object) -> str:
    """A text with its places filled in; sizes are known."""
    for name, value in {**values, "STREAM": STREAM, "RATE": RATE, "PIECE": _PIECE}.items():
        text = text.replace(f"@{name}@", str(value))
    return text
