# SPDX-License-Identifier: LGPL-2.1-or-later
"""One request about one unit: upgrade, check, status, hold, history."""
