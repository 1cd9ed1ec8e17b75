# SPDX-License-Identifier: LGPL-2.1-or-later
# Sequence add-on of debhelper: dh $@ --with upgrader

use warnings;
use strict;
use Debian::Debhelper::Dh_Lib;

insert_after('dh_installsystemd', 'dh_upgrader');
# Else the old instance would be restarted by the one and upgraded by the other; dh_upgrader
# checks what came of it, also where debian/rules calls dh_installsystemd by itself.
add_command_options('dh_installsystemd', '--no-stop-on-upgrade');

1
