#!/usr/bin/python
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ansible module: upgrades systemd services in place by the command `upgrader` of the host."""

DOCUMENTATION = r"""
module: unit
short_description: Upgrade systemd services in place
version_added: 0.1.0
author:
  - the upgrader authors (@upgrader)
description:
  - Upgrades services that use upgrader to the version that is on disk now. Open connections and state
    move to the new version, and a version that fails leaves the old one serving.
  - Does nothing where nothing has changed since the service was started. A service that has failed is
    started, with what systemd holds for it.
  - Fails at the first unit that is not upgraded; those after it are not touched.
requirements:
  - The package upgrader on the host.
options:
  name:
    description:
      - The units. The ending C(.service) may be left out, and a pattern such as V(web@*) stands for those
        that serve.
    type: list
    elements: str
  all:
    description: All units that use upgrader and serve, instead of O(name).
    type: bool
    default: false
  state:
    description:
      - With V(upgraded), the units are upgraded.
      - With V(serving), nothing is changed; it is a failure if one of them does not serve, is on hold, or,
        with O(instances), is not the instance named there.
    type: str
    choices: [upgraded, serving]
    default: upgraded
  instances:
    description:
      - With O(state=serving), the main process of each unit, as the RV(instances) of an earlier task. Another
        one means that the service has crashed, or was restarted, in between.
    type: dict
  mode:
    description:
      - V(live) starts the new version beside the old one, V(restart) stops the old one first.
      - If it is not given, it is live, or a restart where something forbids live.
    type: str
    choices: [live, restart]
  preflight:
    description: Before a live upgrade, see whether the version on disk would take over.
    type: bool
    default: false
  force:
    description: Upgrade even if nothing has changed.
    type: bool
    default: false
  timeout:
    description: How long to wait for a new instance, as a time span of systemd, such as V(1min 30s).
    type: str
  executable:
    description: The command, where it is not in the search path.
    type: str
    default: upgrader
attributes:
  check_mode:
    description: Says what would be changed, and changes nothing.
    support: full
  diff_mode:
    description: Is there anything to show.
    support: none
  platform:
    description: Where it works.
    support: full
    platforms: linux
"""

EXAMPLES = r"""
- name: Upgrade one service, if there is a new version of it
  upgrader.upgrader.unit:
    name: web.service

- name: Upgrade all instances of a template, each after a trial
  upgrader.upgrader.unit:
    name: web@*
    preflight: true

- name: Upgrade whatever uses upgrader and has changed
  upgrader.upgrader.unit:
    all: true
  register: upgraded

- name: See that nothing has crashed since
  upgrader.upgrader.unit:
    all: true
    state: serving
    instances: "{{ upgraded.instances }}"
"""

RETURN = r"""
units:
  description: What became of each unit, as C(upgrader upgrade --json) says it; with O(state=serving), as C(upgrader status --json) does.
  returned: always
  type: list
  elements: dict
  sample:
    - unit: web.service
      result: done
      changed: true
      line: "web.service: upgraded in 142ms: generation 2, loaded by live from generation 1"
      mode: live
      pause_seconds: 0.0042
      exit_code: 0
instances:
  description: The main process of each unit that serves.
  returned: success
  type: dict
  sample: {"web.service": 4711}
rc:
  description: The exit code of the command that counts.
  returned: always
  type: int
  sample: 0
"""

import fnmatch
import json

from ansible.module_utils.basic import AnsibleModule


class Failed(Exception):
    """A command that did not do what it was asked for, with what it printed."""

    def __init__(self, message, rc, units):
        super().__init__(message)
        self.message = message
        self.rc = rc
        self.units = units


def run(module, *arguments):
    """Run upgrader with --json; returns the exit code, the objects that it printed, and its errors."""
    command = [module.params["executable"], *arguments, "--json"]
    rc, output, errors = module.run_command(command)
    try:
        told = json.loads(output)
    except ValueError:
        told = []
    return rc, told if isinstance(told, list) else [told], errors


def named(module):
    """The arguments that name the units."""
    return ["--all"] if module.params["all"] else module.params["name"]


def upgrade(module):
    """Upgrade; returns the outcomes. Raises Failed."""
    options = ["--quiet"]
    if not module.params["force"]:
        options.append("--if-changed")
    if module.check_mode:
        options.append("--dry-run")
    if module.params["preflight"]:
        options.append("--preflight")
    for name in ("mode", "timeout"):
        if module.params[name]:
            options += [f"--{name}", module.params[name]]
    rc, units, errors = run(module, "upgrade", *options, *named(module))
    if rc != 0:
        bad = units[-1] if units else {}
        lines = [bad.get("line", ""), bad.get("remedy", "")] if bad else [errors]
        raise Failed("\n".join(line for line in lines if line).strip(), rc, units)
    return units


def look(module, names):
    """What runs of these units; returns the overviews. Raises Failed."""
    rc, known, errors = run(module, "list")
    if rc != 0:
        raise Failed(errors.strip() or "the units are not known", rc, known)
    if module.params["all"]:
        return known
    found = []
    for name in names:
        pattern = name if name.endswith(".service") else f"{name}.service"
        matching = [each for each in known if fnmatch.fnmatchcase(each["unit"], pattern)]
        if not matching:  # an alias, or a unit that does not use upgrader now
            rc, matching, errors = run(module, "status", name)
            if rc != 0:
                line = matching[0].get("line", "") if matching else errors.strip()
                raise Failed(line or f"{name}: its status is not known", rc, found)
        found += matching
    return found


def still(units, serving):
    """Raise Failed if an instance that has just taken over is not the one that serves by now."""
    now = {each["unit"]: each.get("status") for each in serving}
    for each in units:
        took_over, serves = each.get("after"), now.get(each["unit"])
        if not (each.get("changed") and took_over and serves):
            continue
        # After a crash, the same generation may have been loaded again, from what was parked.
        if any(took_over[name] != serves[name] for name in ("generation", "origin")):
            generation = took_over["generation"]
            raise Failed(
                f"{each['unit']}: generation {generation} took over, and has ended at once",
                1,
                units,
            )


def see(module):
    """See that all units serve, by the instances that are wanted; returns the overviews. Raises Failed."""
    found = look(module, module.params["name"])
    wanted = module.params["instances"] or {}
    for each in found:
        unit, pid = each["unit"], each["pid"]
        if not each["serves"]:
            raise Failed(f"{unit}: does not serve, it is {each['active']}", 3, found)
        if each.get("hold"):
            raise Failed(f"{unit}: is on hold: {each['hold'].get('cause')}", 1, found)
        if int(wanted.get(unit, pid)) != pid:
            why = f"{unit}: process {wanted[unit]} has ended, and {pid} serves now"
            raise Failed(why, 1, found)
    return found


def main():
    """Run as Ansible does it."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str"},
            "all": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["upgraded", "serving"], "default": "upgraded"},
            "instances": {"type": "dict"},
            "mode": {"type": "str", "choices": ["live", "restart"]},
            "preflight": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
            "timeout": {"type": "str"},
            "executable": {"type": "str", "default": "upgrader"},
        },
        mutually_exclusive=[("name", "all")],
        required_one_of=[("name", "all")],
        supports_check_mode=True,
    )
    # upgrader says everything in English; only the locale of its numbers could differ.
    module.run_command_environ_update = {"LC_ALL": "C.UTF-8"}
    try:
        if module.params["state"] == "serving":
            units = serving = see(module)
        else:
            units = upgrade(module)
            serving = look(module, [each["unit"] for each in units])
            if not module.check_mode:
                still(units, serving)
    except Failed as failed:
        module.fail_json(msg=failed.message, rc=failed.rc, units=failed.units)
    module.exit_json(
        changed=any(each.get("changed", False) for each in units)
        and module.params["state"] == "upgraded",
        rc=0,
        units=units,
        instances={each["unit"]: each["pid"] for each in serving if each["serves"]},
    )


if __name__ == "__main__":
    main()
