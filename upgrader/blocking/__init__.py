# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blocking face: `for backend in instance.serve(inbox):`, with migrations between two turns."""

from upgrader.blocking.instance import Instance, Peer

__all__ = ["Instance", "Peer"]
