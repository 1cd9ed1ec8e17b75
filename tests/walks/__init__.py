# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which functions one upgrade goes through: recorded in a private systemd by sys.setprofile."""
