# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 offers a service, each a thin adapter."""
