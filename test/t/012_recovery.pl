# The server itself goes away in the middle of a batch: crash, fast shutdown,
# promotion of a standby.  What was submitted is finished, each item once; what
# was not committed never was.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('recovery', streaming => 1);

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION do_item(key text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, split_part(key, ' ', 1));
    IF payload::int = 150 THEN
        PERFORM wait_for_gate(split_part(key, ' ', 1));
    END IF;
END $$;
SELECT redrive.create_handler('work', 'do_item');
});

# Submit 1000 items, of which one waits for a gate of that name, and wait until
# a worker is in it.
sub start_batch
{
	my ($name) = @_;

	set_gate($node, $name, 0);
	$node->safe_psql('postgres',
		"SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 1000) AS i),
		    ARRAY(SELECT '$name ' || i FROM generate_series(1, 1000) AS i), label => '$name')");
	ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE item_no = 150", '1'), "$name: a worker is in item 150");
	return;
}

# Open the gate, wait for the end and count.
sub finish_batch
{
	my ($on, $name) = @_;

	set_gate($on, $name, 1);
	batch_is($on, $name);
	is($on->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note = '$name'"),
		'1000|1000', "$name: nothing is lost, nothing done twice");
	verified_ok($on, $name);
	return;
}

# --- the postmaster is killed, with a batch that runs and one that is being submitted
start_batch('crash');
my ($in, $out, $err) = ('', '', '');
my $session = IPC::Run::start(
	[ 'psql', '-X', '-A', '-t', '-d', $node->connstr('postgres') ],
	'<' => \$in, '>' => \$out, '2>' => \$err);
$in .= q{BEGIN;
SELECT redrive.submit('work', ARRAY['1']::jsonb[], ARRAY['lost 1'], label => 'lost');
SELECT 'sub' || 'mitted';
};
pump_until($session, IPC::Run::timer(120), \$out, qr/submitted/);
kill_postmaster($node);
$session->finish;
$node->start;
finish_batch($node, 'crash');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.batch_progress WHERE label = 'lost'"), '0', 'a submit that was not committed left no batch');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.items WHERE key = 'lost 1'"), '0', '... no item');
is($node->safe_psql('postgres', "SELECT redrive.is_locked('work', 'lost 1')"), 'f', '... and no lock');

# --- immediate shutdown is a crash too, fast shutdown is not
foreach my $mode ('immediate', 'fast')
{
	start_batch($mode);
	$node->stop($mode);
	$node->start;
	finish_batch($node, $mode);
}

# --- fast shutdown while items are quick: workers give their chunks back
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION slow_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'given back');
    PERFORM pg_sleep(0.001); -- slow handler
END $$;
SELECT redrive.create_handler('slow', 'slow_item');
SELECT redrive.submit('slow', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 2000) AS i), label => 'given back');
});
ok(poll_until($node, "SELECT succeeded > 0 FROM redrive.batch_progress WHERE label = 'given back'"), 'a batch runs');
$node->stop('fast');
$node->start;
batch_is($node, 'given back');
is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note = 'given back'"),
	'2000|2000', 'nothing is lost, nothing done twice');
is( $node->safe_psql('postgres', "SELECT max(c.rescue_count) FROM redrive.chunks AS c JOIN redrive.batch_progress AS b ON b.batch_id = c.batch_id WHERE b.label = 'given back'"),
	'0', 'chunks were given back, none had to be rescued');

# --- an executor that is asked to end
start_batch('terminated');
my $pid = $node->safe_psql('postgres', "SELECT pid FROM redrive.workers WHERE item_no = 150");
is($node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)"), 't', 'an executor is terminated within an item');
ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE item_no = 150 AND pid <> $pid", '1'), 'another takes its chunk');
finish_batch($node, 'terminated');

# the same between items: it ends its interval and gives the rest back
$node->safe_psql('postgres', "SELECT redrive.submit('slow', ARRAY(SELECT to_jsonb(i) FROM generate_series(2001, 4000) AS i), label => 'asked')");
my $running = "SELECT pid FROM redrive.workers WHERE handler = 'slow' AND item_no IS NOT NULL LIMIT 1";
ok(poll_until($node, "SELECT pg_terminate_backend(pid) FROM ($running) AS w"), 'an executor is terminated between items');
batch_is($node, 'asked');
is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note = 'given back'"),
	'4000|4000', 'nothing is lost, nothing done twice');
is( $node->safe_psql('postgres', "SELECT max(c.rescue_count) FROM redrive.chunks AS c JOIN redrive.batch_progress AS b ON b.batch_id = c.batch_id WHERE b.label = 'asked'"),
	'0', 'the chunk was given back, it had not to be rescued');

# --- a cancelled query within an item: an error of that item, not of the executor
$node->safe_psql('postgres', q{SELECT redrive.alter_handler('work', retry_delay => '10 ms')});
start_batch('cancelled');
$pid = $node->safe_psql('postgres', "SELECT pid FROM redrive.workers WHERE item_no = 150");
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
ok(poll_until($node, "SELECT count(*) FROM redrive.failure_attempts WHERE sqlstate = '57014'", '1'), 'a cancelled item failed');
finish_batch($node, 'cancelled');
is($node->safe_psql('postgres', 'SELECT count(*), max(attempt), (SELECT count(*) FROM redrive.failures) FROM redrive.failure_attempts'),
	'1|1|0', '... and succeeded at its second attempt');

# --- switched off and on
start_batch('disabled');
$node->append_conf('postgresql.conf', 'redrive.enabled = off');
$node->reload;
set_gate($node, 'disabled', 1);
ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '0'), 'executors leave when redrive.enabled is off');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.chunks WHERE state = 'running'"), '0', '... and give back what they had');
is($node->safe_psql('postgres', "SELECT (redrive.rescue_stale()).outcome"), 'disabled', 'passes do nothing then');
$node->append_conf('postgresql.conf', 'redrive.enabled = on');
$node->reload;
finish_batch($node, 'disabled');

# --- a standby does nothing, and goes on where the primary stopped
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
start_batch('promoted');
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
is($standby->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'redrive%'"), '0', 'no workers on a standby');
is($standby->safe_psql('postgres', "SELECT state FROM redrive.batch_progress WHERE label = 'promoted'"), 'running', 'a standby shows the batch');
$node->stop('immediate');
$standby->promote;
finish_batch($standby, 'promoted');

$standby->stop;
done_testing();
