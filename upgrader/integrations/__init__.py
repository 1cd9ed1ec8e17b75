# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adapters for libraries that own their sockets, one module each; loaded only by those who use them."""
