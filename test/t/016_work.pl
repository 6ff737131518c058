# A server that does not preload the library: everything but workers is there,
# work is done by CALL redrive.work(), and what needs workers says so.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('work', conf => "shared_preload_libraries = ''");
my ($out, $err);

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item) VALUES (payload::int);
    PERFORM wait_for_gate('item ' || payload::text);
    IF payload::int % 10 = 0 THEN
        PERFORM redrive.raise_validation('ten');
    END IF;
END $$;
SELECT redrive.create_handler('work', 'do_item', commit_interval => '1 hour');
});

# --- submit tells that nobody will run it, wait refuses
$node->psql('postgres',
	"SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 500) AS i), ARRAY(SELECT i::text FROM generate_series(1, 500) AS i), label => 'first')",
	stderr => \$err);
like($err, qr/NOTICE:  no workers will run this batch/, 'submit says that there are no workers');
like($err, qr/HINT:.*CALL redrive\.work\(\)/, '... and what to do');
$node->psql('postgres', "\\set VERBOSITY verbose\nSELECT batch_id FROM redrive.batch_progress \\gset\nCALL redrive.wait(:batch_id, '1 min');", stderr => \$err);
like($err, qr/ERROR:  55000: no workers can run batch/, 'wait() does not wait for ever');
like($err, qr/HINT:.*CALL redrive\.work\(\)/, '... and says what to do');

# --- work() does it
$node->safe_psql('postgres', 'CALL redrive.work()');
is($node->safe_psql('postgres', 'SELECT state, total, succeeded, ignored FROM redrive.batch_progress'), 'finished|500|450|50', 'work() runs the batch');
is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects'), '450|450', 'each item once');
is($node->safe_psql('postgres', "SELECT batch_id FROM redrive.batch_progress \\gset\nCALL redrive.wait(:batch_id);"), 'finished', 'wait() tells the state of an ended batch');
verified_ok($node, 'first');

# --- a handler with max_workers is being changed: work() waits for that, its work is due
#
# Seen red: with a work() that ends when it finds nothing but a locked handler.
my $changer = $node->background_psql('postgres');
$node->safe_psql('postgres', "SELECT redrive.alter_handler('work', max_workers => 1)");
$changer->query_safe("BEGIN; SELECT redrive.alter_handler('work', max_workers => 2)");
$node->psql('postgres', "SELECT redrive.submit('work', ARRAY['1', '2']::jsonb[], label => 'locked')");
my $waiter = IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', 'CALL redrive.work()' ], '<' => \undef, '>' => \$out, '2>' => \$err);
ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE query = 'CALL redrive.work()' AND wait_event IN ('RedriveWork', 'Extension')", '1'), 'work() waits for who changes the handler');
$changer->query_safe('ROLLBACK');
$waiter->finish;
$changer->quit;
is($node->safe_psql('postgres', "SELECT state FROM redrive.batch_progress WHERE label = 'locked'"), 'finished', '... and does its work');
$node->safe_psql('postgres', "SELECT redrive.alter_handler('work', unset => ARRAY['max_workers'])");

# --- the session that works is killed: the next one takes over
set_gate($node, 'item 50', 0);
$node->safe_psql('postgres', 'DELETE FROM effects');
$node->safe_psql('postgres', "SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 99) AS i), label => 'second')");
my $session = IPC::Run::start(
	[ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', 'CALL redrive.work()' ],
	'<' => \undef, '>' => \$out, '2>' => \$err);
ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '1'), 'a view shows the session that works');
ok(poll_until($node, "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"), 'it is within an item');
kill_and_wait($node, 'SELECT pid FROM redrive.workers');
$session->finish;
set_gate($node, 'item 50', 1) if poll_until($node, 'SELECT true');
$node->safe_psql('postgres', 'CALL redrive.work()');
is($node->safe_psql('postgres', "SELECT state, succeeded, ignored FROM redrive.batch_progress WHERE label = 'second'"), 'finished|90|9', 'the next session finishes the batch');
is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT item) FROM effects'), '90|90', 'nothing is lost, nothing done twice');

# --- passes and their schedule; the setting of pg_cron is there without its library
is($node->safe_psql('postgres', 'SELECT (redrive.rescue_stale()).outcome, (redrive.retry_failed()).outcome, (redrive.purge()).outcome'),
	'done|done|done', 'passes run');
$node->psql('postgres', 'SELECT redrive.schedule_passes()', stderr => \$err);
like($err, qr/ERROR:  pg_cron is not loaded/, 'pg_cron is missing');
like($err, qr/HINT:.*shared_preload_libraries/, '... and the hint says what to do');
verified_ok($node, 'second');

$node->stop;
done_testing();
