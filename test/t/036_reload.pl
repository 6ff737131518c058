# A reload while a worker starts: the server sets the signal to be ignored then, which drops one that is pending.
#
# Seen red: without ConfigReloadPending = true in redrive_take_signals() (src/base/guc.c).
use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $library = PostgreSQL::Test::Utils::tempdir . '/slow_start.so';
plan skip_all => 'no compiler, for a library that makes the moment long' if system("cc -shared -fPIC -o $library $FindBin::Bin/../slow_start.c -ldl 2>&1") != 0;

my $node = new_node('reload', conf => 'redrive.max_workers = 0');
$node->safe_psql('postgres', q{
CREATE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('work', 'do_item');
SELECT redrive.submit('work', ARRAY['1']::jsonb[], label => 'work')});
$node->stop;
{
	local $ENV{LD_PRELOAD} = join ' ', grep { length } $ENV{LD_PRELOAD} // '', $library;
	$node->start;
}
$node->append_conf('postgresql.conf', 'redrive.max_workers = 2');

# before it would be seen in pg_stat_activity
ok(wait_for_title(qr/reload: redrive supervisor/), 'a supervisor starts');
$node->reload;
ok(poll_until($node, "SELECT state FROM redrive.batch_progress WHERE label = 'work'", 'finished', timeout => 60), 'a reload at that moment is not lost');

$node->stop;
done_testing();
