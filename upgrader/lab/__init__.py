# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real systemd of one's own to try things in, and the demo that runs there."""
