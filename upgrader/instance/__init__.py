# SPDX-License-Identifier: LGPL-2.1-or-later
"""One running instance of a service, whatever its loop: declare, load, commit, serve, save."""
