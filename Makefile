# SPDX-License-Identifier: LGPL-2.1-or-later
# Every target first sets up what it needs (packaging/bootstrap says what it installs, and why).

# The systemds of the demo, one after the other: host, a Debian suite, or the path of a root tree.
SYSTEMD ?= host
# The Debian suites to build packages for.
SUITE ?= bookworm trixie
# Tests at the same time, each file in one process: most of them wait for something.
JOBS ?= 2
# How long to fuzz.
SECONDS ?= 600
# How often each server of the bench is measured.
ROUNDS ?= 3
# More arguments for `upgrader demo` or pytest.
ARGS ?=

.PHONY: help demo test matrix fuzz lint bench deb dist clean setup

help:
	@echo 'make demo    upgrade a live service ten times under a real systemd (SYSTEMD="$(SYSTEMD)")'
	@echo 'make test    all tests (ARGS="-m \"not system\"" leaves out those that need root)'
	@echo 'make matrix  the long matrices, which write the tables of docs/matrices.md'
	@echo 'make fuzz    changed inputs for every decoder (SECONDS="$(SECONDS)", ARGS is a seed)'
	@echo 'make lint    style, types and shell scripts only'
	@echo 'make bench   the figures that are measured, not tested'
	@echo 'make deb     the packages of Debian 12 and 13, in dist/ (SUITE="$(SUITE)")'
	@echo 'make dist    a wheel and an sdist, in dist/'
	@echo 'make clean   remove what the other targets made here'

setup:
	@packaging/bootstrap

demo:
	@SYSTEMD="$(SYSTEMD)" packaging/bootstrap demo
	@for systemd in $(SYSTEMD); do .venv/bin/upgrader demo --systemd "$$systemd" $(ARGS) || exit 1; done

test:
	@packaging/bootstrap test
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

matrix:
	@packaging/bootstrap matrix
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadfile -m matrix $(ARGS)

fuzz:
	@packaging/bootstrap test
	@.venv/bin/python -m tests.fuzz $(SECONDS) $(ARGS)

lint: setup
	@.venv/bin/python -m pytest -q tests/test_project.py $(ARGS)

bench:
	@packaging/bootstrap bench
	@.venv/bin/python -m pytest -q -s tests/bench/bench_*.py $(ARGS)
	@.venv/bin/python -m tests.bench.peers --rounds $(ROUNDS) --write

deb: setup
	@.venv/bin/python packaging/deb/build.py $(SUITE)

dist: setup
	@.venv/bin/python -m hatchling build -d dist

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
	find upgrader tests -name __pycache__ -type d -prune -exec rm -rf {} +
