# Rescue: processes are killed in the middle of an interval.  Nothing is lost,
# nothing is done twice: the handler's own table is the witness.
#
# Seen red: without the watermark ("done_to = $3" in the fence of
# src/flow/record.c) items that were committed before the kill are done twice.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('rescue');
my $items = 3000;

create_effects($node);
$node->safe_psql(
	'postgres', q{
-- stops in one item; the items before it in the interval are not committed
CREATE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item) VALUES (payload::int);
    IF payload::int % 1000 = 140 THEN
        PERFORM wait_for_gate('item ' || payload::text);
    ELSIF payload::int % 100 = 7 THEN
        PERFORM redrive.raise_validation('seven');
    END IF;
END $$;
SELECT redrive.create_handler('work', 'do_item', commit_interval => '1 hour');
});

# the same with a commit after each item, for the watermark
$node->safe_psql('postgres', "SELECT redrive.create_handler('each', 'do_item', isolation => 'item')");
set_gate($node, "item $_", 0) foreach (140, 1140, 2140);
$node->safe_psql('postgres',
	"SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $items) AS i),
	    ARRAY(SELECT 'key ' || i FROM generate_series(1, $items) AS i), label => 'work')");

# Return the query for the process that is in this item.
sub worker_in
{
	my ($item) = @_;
	return "SELECT pid FROM redrive.workers WHERE item_no = $item";
}

# --- an executor
ok(poll_until($node, "SELECT count(*) FROM (" . worker_in(140) . ") AS w", '1'), 'an executor is in item 140');
is($node->safe_psql('postgres', 'SELECT count(*) FROM effects WHERE item = 140'), '0', 'its interval is open');
my $pid = kill_and_wait($node, worker_in(140));
ok( poll_until(
		$node, "SELECT count(*) FROM redrive.workers WHERE item_no = 140 AND pid <> $pid", '1'),
	'the server restarts, and another executor is in that item');
cmp_ok($node->safe_psql('postgres', 'SELECT max(rescue_count) FROM redrive.chunks'), '>=', 1, 'its chunk was rescued');
verified_ok($node, 'after the kill of an executor');

# --- a supervisor, and the launcher
kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive supervisor'");
ok(poll_until($node, "SELECT count(*) FROM (" . worker_in(140) . ") AS w", '1'), 'it runs again after the kill of the supervisor');
kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive launcher'");
ok(poll_until($node, "SELECT count(*) FROM (" . worker_in(140) . ") AS w", '1'), 'it runs again after the kill of the launcher');
set_gate($node, 'item 140', 1);

# --- a client that works in the foreground
ok(poll_until($node, "SELECT count(*) FROM (" . worker_in(1140) . ") AS w", '1'), 'an executor is in item 1140');
$node->append_conf('postgresql.conf', 'redrive.max_workers = 0');
$node->reload;
# not the one in the item: that would be the first of two crashes it may have
kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive supervisor'");
ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '0'), 'no executors any more');
ok(poll_until($node, "SELECT count(*) FROM redrive.chunks WHERE state = 'running'", '0'), 'its chunk was rescued');
my ($out, $err);
my $session = IPC::Run::start(
	[ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', 'CALL redrive.work()' ],
	'<' => \undef, '>' => \$out, '2>' => \$err);
ok(poll_until($node, "SELECT kind FROM redrive.workers WHERE item_no = 1140", 'foreground'), 'a session is in item 1140');
kill_and_wait($node, worker_in(1140));
$session->finish;
$node->append_conf('postgresql.conf', 'redrive.max_workers = 3');
ok(poll_until($node, 'SELECT true'), 'the server is up again');
$node->reload;
ok(poll_until($node, "SELECT kind FROM redrive.workers WHERE item_no = 1140", 'executor'), 'an executor takes over from a lost session');
set_gate($node, 'item 1140', 1);
set_gate($node, 'item 2140', 1);

# --- the same with items committed before the one in which the executor is killed
set_gate($node, 'item 9140', 0);
$node->safe_psql('postgres', "SELECT redrive.submit('each', ARRAY(SELECT to_jsonb(i) FROM generate_series(9001, 9200) AS i), label => 'each')");
ok(poll_until($node, "SELECT count(*) FROM (" . worker_in(140) . ") AS w", '1'), 'an executor is in item 140');
isnt($node->safe_psql('postgres', 'SELECT count(*) FROM effects WHERE item BETWEEN 9101 AND 9139'), '0', 'items before it in its chunk are committed');
kill_and_wait($node, worker_in(140));
set_gate($node, 'item 9140', 1) if poll_until($node, 'SELECT true');
batch_is($node, 'each');
is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects WHERE item > 9000'), '198|198', 'nothing is lost, nothing done twice');

# --- the end
batch_is($node, 'work');
is( $node->safe_psql('postgres', "SELECT total, succeeded, ignored, failed FROM redrive.batch_progress WHERE label = 'work'"),
	"$items|" . ($items - $items / 100) . '|' . ($items / 100) . '|0', 'all items are accounted for');
is( $node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects WHERE item <= 9000'),
	($items - $items / 100) . '|' . ($items - $items / 100), 'nothing is lost, nothing done twice');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.locks'), '0', 'all keys are unlocked');
verified_ok($node, 'at the end');

$node->stop;
done_testing();
