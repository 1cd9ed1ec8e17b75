# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves: one module a kind of backend. Identities and the state of a connection are `protocol`'s.

An FD is recognised by what it is (`Identity`), never by its number or its place in a list.
"""
