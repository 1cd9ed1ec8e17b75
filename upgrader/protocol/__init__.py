# SPDX-License-Identifier: LGPL-2.1-or-later
"""What two processes agree on: values, records and tables."""
