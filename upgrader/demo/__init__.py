# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demonstration: a real service under a real systemd is upgraded under load, and what its clients noticed is counted."""
