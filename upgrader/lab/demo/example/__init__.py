# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example service in two versions, as a package would install it: one of `web1`, `web2` becomes `web/__main__.py`."""
