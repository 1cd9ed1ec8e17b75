# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `python -m upgrader.run` is: the main process of a unit whose program knows nothing of upgrader."""
