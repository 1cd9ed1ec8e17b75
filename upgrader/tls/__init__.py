# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS 1.3 connections of a server that move: OpenSSL makes the handshake, and goes on with what it has
begun; a connection that has moved goes on in a record layer of our own, with the AEADs of `cryptography`.
Loaded only where `UPGRADER_TLS=move` is set."""
