# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways to replace a running server, ours and others', under one load and in one run."""
