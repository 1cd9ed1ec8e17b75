# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface of every instance, and the one that Varlink asks of all services, in Varlink's words."""

#: What a destination says of itself before anything is disturbed.
_OFFER = """\
  stream: int,
  streams: ?[]int,
  image: int,
  images: ?[]int,
  states: [string]int,
  sessions: ?[string]int,
  backends: []string,
  kinds: ?[]string,
  backend_kinds: ?[string]string,
  kind_versions: ?[string]int,
  withheld: ?[]string,
  tables: ?[string]int,
  tls: ?[string]string,
  speak_tls: ?[]string,
  upgrade: ?string"""

DESCRIPTION = f"""\
# One running instance of a service that is upgraded in place
interface io.upgrader.Instance

# A declared backend; transfer says whether it moves, or its connections if it is a listener; verified
# are the facts that were compared when it moved here, size is in bytes, and text is for people
type Backend (
  name: string,
  kind: string,
  fd: int,
  address: string,
  inode: int,
  addresses: []string,
  inodes: []int,
  transfer: bool,
  connections: int,
  busy: int,
  size: int,
  verified: []string,
  text: string
)

# An open connection; age in seconds, waiting is its safe point, or empty while it is busy,
# and what is what it is at then, where that is known
type Connection (
  backend: string,
  peer: string,
  fd: int,
  age: float,
  waiting: string,
  what: string
)

# The migration under way, or the last one; source and destination are generations, began is in
# seconds since the epoch, pause is how long nobody served, times how long each phase took; a
# preflight was to end before its commit; round is the one of its tables, of which that many bytes are
# copied and left
type Migration (
  phase: string,
  mode: string,
  source: int,
  destination: int,
  pid: int,
  began: float,
  seconds: float,
  pause: float,
  fds: int,
  bytes: int,
  left_behind: int,
  reason: string,
  times: [string]float,
  preflight: bool,
  round: int,
  copied: int,
  left: int
)

# The last upgrade that it had a part in. side is source or destination, decision is none, aborted
# or committed; code and reason say why it was aborted
type Last (
  id: string,
  side: string,
  decision: string,
  code: string,
  reason: string,
  mode: string,
  pause: float,
  fds: int,
  bytes: int,
  left_behind: int,
  source: int,
  destination: int
)

# How it came to be: origin is cold, restart, live, exec or insurance; source is the generation that
# it was loaded from, set_aside that of an image that was not loaded; dropped are fields of states
# that this version does not know, unsaved are states that the source could not save; datagrams_lost
# came in the pause and did not fit into the receive buffer; stayed is how many were left behind, by
# the reason
type Loaded (
  origin: string,
  source: int,
  fds: int,
  bytes: int,
  left_behind: int,
  set_aside: int,
  pause: float,
  dropped: []string,
  unsaved: []string,
  datagrams_lost: int,
  stayed: [string]int
)

# The last version that did not take over, by its own fault; since in seconds since the epoch
type Refusal (
  id: string,
  code: string,
  reason: string,
  fingerprint: string,
  since: float
)

# What systemd gave to it at its start: sockets of .socket units, names of credentials, bytes of
# memory that are its own by now, and checksums of the unit's settings, of the command line and of
# the variables that it was made from; direct: it was itself that command; cache: bytes of files that
# the kernel would give up
type Started (
  activated: []string,
  credentials: []string,
  memory: int,
  settings: string,
  command: string,
  environment: [string]string,
  direct: bool,
  cache: int
)

# A program of a runner: whether it drains, how many processes it has, the bytes that are theirs, and
# what it could do, as its adapter has found; the path of the file that it runs, if that is deleted; paths of
# sockets that its adapter has made for it alone; whether its end with status 0 is that of the unit
type RunProgram (
  pid: int,
  replaced: bool,
  processes: int,
  memory: int,
  offers: []string,
  deleted: string,
  sockets: []string,
  may_end: bool
)

# What came of saving a state only to see whether it can be done: bytes, seconds, when (at, in
# seconds since the epoch), and the problem, if there is one; why this version could not load it again,
# and what it would load as something else, or not at all
type Trial (
  name: string,
  version: int,
  bytes: int,
  seconds: float,
  at: float,
  problem: string,
  unreadable: string,
  altered: []string
)

# Handlers of WebSockets that move. Here: moved began anew and go on, refused did not, and their clients
# dial again, waiting are still to begin. suspended: of connections that have moved away, and never go
# on; lost: messages that these wanted to send since
type ReplayCounts (
  moved: int,
  refused: int,
  waiting: int,
  suspended: int,
  lost: int
)

# What runs: generation, version, process, the program on disk, what it holds, and its upgrades.
# can is what it can reach, of bus (systemd) and journal.
# upgrade is the id of the one that the next reload is. rehearsal is preflight, in the word of
# interface 1; an instance that does not say its interface has that. fingerprint names the files of
# the program as they are on disk now; reread are files that a reload reads anew. last_upgrade is
# the last migration that was done or has failed, and was no preflight. drains_until: if another
# instance has replaced it, when what is still open here is cut, in seconds since the epoch. programs
# are those of a runner, the one that serves first.
# On status.sock, which takes calls of everybody, it is partial: without peers, variables, modules,
# what was set at run time, and why a state cannot be saved. tls_memory is that in which the keys of TLS
# connections cross: secret, ordinary (which may be swapped out), or empty if none do. preflight_first:
# an upgrade begins with a preflight, unless whoever asks for it says otherwise
method Describe() -> (
  service: string,
  version: string,
  unit: string,
  pid: int,
  generation: int,
  phase: string,
  library: string,
  since: float,
  credentials: string,
  can: []string,
  changed: []string,
  reread: []string,
  late: []string,
  expected: bool,
  upgrade: string,
  preflight: bool,
  rehearsal: bool,
  states: [string]int,
  trials: []Trial,
  backends: []Backend,
  connections: int,
  held: []Connection,
  parameters: [string]string,
  overrides: [string]string,
  migration: Migration,
  started: Started,
  interface: int,
  last: Last,
  loaded: Loaded,
  refused: Refusal,
  fingerprint: string,
  last_upgrade: Migration,
  drains_until: float,
  programs: []RunProgram,
  partial: bool,
  tls_memory: string,
  preflight_first: bool,
  replays: ReplayCounts
)

# The migration under way, or the last one. With "more": now, and then once for each phase, until
# the one under way, or else the next one, has ended
method QueryMigration() -> (migration: Migration)

# For root: set parameters until the service is stopped; the next instance inherits them. An empty
# value takes back what was set. All or none: InvalidParameter names what is wrong
method SetParameters(parameters: [string]string) -> (parameters: [string]string)

# For root: call off the migration under way; answers when it is decided, and says how
method Cancel() -> (migration: Migration)

# For root: the next reload is an upgrade, even if no file of the program has changed. upgrade is
# its id, 32 lower-case hex digits, here and below
method Expect(upgrade: ?string) -> ()

# For root: nobody waits for that upgrade any more. What has not begun to migrate no longer can;
# answers when it is decided, and says how
method Withdraw(upgrade: string) -> (last: Last)

# For root: find out which states can be saved as they are now; nothing is disturbed
method TryStates() -> (trials: []Trial)

# For root, before it asks for a restart: all are served while what has begun comes to an end, for
# drain-timeout at most. Refused, with the code busy-work, if a restart would cut a turn or a handler
# in two, and with source-failed if nothing could be parked; cut are the connections of other
# libraries that it would cut
method Settle() -> (cut: []string)

# For root: become this program (empty: what ExecStart= of the unit says) in the same process. It
# answers only if that fails, and the instance serves on
method Execute(command: []string, upgrade: ?string) -> ()

# For root: the next reload is a preflight: the new version loads everything and is checked, and
# this one serves on
method Preflight(upgrade: ?string) -> ()

# The same, for tools of interface 1
method Rehearse() -> ()

# For takeover only: nothing has changed, so run what the author wants at a reload
method Reload() -> ()

# For takeover only (PID 1's control process of the unit): the process that may migrate
method Register(pid: int, upgrade: ?string) -> ()

# For takeover only: the process may no longer migrate, and may be killed; Busy while it does. code
# is why, as one word
method Revoke(pid: int, why: string, code: ?string) -> ()

# For the registered process only, with "upgrade": what Migrate would refuse is refused; else the
# sockets are lent, what the program keeps, and backends that are no sockets, while the running instance
# serves on. After the answer their FDs come, in the order of backends, of kept and of others (a name for
# each FD), and then the process may have FDs of its own kept until the upgrade is decided
method Lend(
{_OFFER}
) -> (backends: []string, kept: ?[]string, others: ?[]string)

# For the registered process only, with "upgrade": the connection becomes the migration channel, of
# the newest of the streams that both speak. stream is all that an instance of interface 1 knows.
# withheld are backends that it does not take, or whose connections it does not; sessions are the
# versions of the states that go with connections, by backend; kinds are those of sockets that it
# takes. images are the formats that it reads; backend_kinds are the kinds of its backends that are no
# sockets, and kind_versions the newest facts that it can read of each; tls has the
# listeners whose TLS connections it takes, and what decides there which certificates of clients are
# trusted, and speak_tls those where a library speaks TLS, so that no other connections are taken;
# tables are those that it takes in rounds, as STATE.FIELD, and from which version of the state on
method Migrate(
{_OFFER}
) -> (generation: int, stream: int)

error Busy(holder: string)
error Refused(why: string, code: ?string)
error ReloadFailed(why: string)
error ExecFailed(why: string)
error NothingToCancel()
error TooLate(phase: string)
"""

SERVICE_DESCRIPTION = """\
# What a varlink service says of itself
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound(interface: string)
error MethodNotFound(method: string)
error MethodNotImplemented(method: string)
error InvalidParameter(parameter: string)
error PermissionDenied()
error ExpectedMore()
"""
