# Promotion in the middle of many small batches, and a server with too few
# background processes.  What was replicated is done once; a shortage is said
# once, and ends by itself.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

# --- a standby is promoted; the primary was killed while it submitted and worked
my $primary = new_node('primary', streaming => 1, conf => "redrive.max_workers = 3\njit = off");

create_effects($primary);
create_await($primary);
$primary->safe_psql(
	'postgres', q{
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (item.item_no, item.batch_id);
    IF item.key = 'gated' THEN
        PERFORM wait_for_gate('promoted');
    ELSIF item.item_no % 7 = 3 AND item.attempt = 1 THEN
        RAISE EXCEPTION 'not yet';
    END IF;
END $$;
SELECT redrive.create_handler('work', 'do_item', retry_delay => '10 ms');
CREATE PROCEDURE submit_many() LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 500 LOOP
        PERFORM redrive.submit('work', ARRAY(SELECT to_jsonb(n) FROM generate_series(1, 1 + i % 20) AS n));
        COMMIT;
    END LOOP;
END $$;
SELECT redrive.record_task('form', 'done');
SELECT redrive.create_platform('crm', 'http://127.0.0.1:1/', allow_http => true, allow_cidr => '{127.0.0.0/8}');
});
$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

# one batch is certainly in the middle of an item, and on the standby
set_gate($primary, 'promoted', 0);
$primary->safe_psql('postgres', "SELECT redrive.submit('work', ARRAY['1', '2', '3']::jsonb[], ARRAY['before', 'gated', 'after'])");
ok(poll_until($primary, 'SELECT count(*) FROM redrive.workers WHERE item_no = 2', '1'), 'a worker is within an item');
my ($out, $err) = ('', '');
my $submitter = IPC::Run::start([ 'psql', '-X', '-d', $primary->connstr('postgres'), '-c', 'CALL submit_many()' ],
	'<', \undef, '>', \$out, '2>', \$err);
$primary->safe_psql('postgres', "CALL await('SELECT count(*) > 300 FROM effects')");
$primary->safe_psql('postgres', "SELECT redrive.create_handler('outside', kind => 'external');
	SELECT redrive.submit('outside', ARRAY['1', '2', '3', '4']::jsonb[]);
	CREATE TABLE kept AS SELECT * FROM redrive.claim('outside', 2)");
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));

# what writes says where to go, what reads works; fails without redrive_require_writable()
foreach my $statement (q{SELECT redrive.submit('work', ARRAY['1']::jsonb[])}, q{SELECT redrive.pause_handler('work')}, 'CALL redrive.work()',
	q{SELECT redrive.http_request('GET', 'https://10.0.0.1/')})
{
	(undef, undef, my $said) = $standby->psql('postgres', $statement);
	like($said, qr/cannot be called in a read-only transaction.*DETAIL:  This server is a standby\.\nHINT:  Connect to the primary/s, "on a standby: $statement");
}
like($standby->safe_psql('postgres', "SELECT w.fact FROM redrive.batch_progress AS b, redrive.why(b.batch_id) AS w WHERE b.state = 'running' LIMIT 1"), qr/\w/, 'on a standby: why()');
like($standby->safe_psql('postgres', "SELECT fact FROM redrive.why_push('form', 'crm')"), qr/^standby$/m, 'on a standby: why_push()');
is($standby->safe_psql('postgres', "SELECT finding FROM redrive.doctor() WHERE finding ~ 'pusher'"), '', 'on a standby: doctor() misses no pusher');

# a claim of an external worker that the standby does not get to know of
$standby->stop;
my $lost = $primary->safe_psql('postgres', "SELECT max(chunk_id) || ', ' || max(lease_token) FROM redrive.claim('outside', 2)");
kill_postmaster($primary);
eval { $submitter->finish };

$standby->start;
$standby->promote;
ok(poll_until($standby, 'SELECT count(*) FROM redrive.workers WHERE item_no = 2', '1'), 'workers start by themselves, and take what the lost one had');
set_gate($standby, 'promoted', 1);

# external workers: the claim that was replicated is still the worker's, the items of the other one are claimed by somebody else
my $done = "BEGIN; INSERT INTO effects (item, note) SELECT item_no, batch_id FROM %1\$s; SELECT redrive.complete(max(chunk_id), max(lease_token)) FROM %1\$s; COMMIT";
$standby->safe_psql('postgres', sprintf($done, 'kept'));
is($standby->safe_psql('postgres', "CREATE TABLE again AS SELECT * FROM redrive.claim('outside', 4); SELECT string_agg(item_no::text, ' ' ORDER BY item_no) FROM again"), '3 4', 'a claim that was not replicated is for another worker');
(undef, undef, my $refused) = $standby->psql('postgres', "\\set VERBOSITY sqlstate\nSELECT redrive.complete($lost)");
like($refused, qr/RD004/, '... and who had it is refused');
$standby->safe_psql('postgres', sprintf($done, 'again'));
ok(poll_until($standby, "SELECT count(*) FROM redrive.batches WHERE state <> 'finished'", '0'), 'all batches end');
cmp_ok($standby->safe_psql('postgres', 'SELECT count(*) FROM redrive.batches'), '>', 30, 'many batches were replicated');
is( $standby->safe_psql('postgres', 'SELECT coalesce(sum(total), 0) - (SELECT count(*) FROM effects), (SELECT count(*) - count(DISTINCT (note, item)) FROM effects) FROM redrive.batches'),
	'0|0', 'nothing is lost, nothing done twice');
is($standby->safe_psql('postgres', "SELECT (SELECT count(*) FROM redrive.locks), (SELECT count(*) FROM redrive.chunks WHERE NOT folded)"), '0|0', 'nothing is left over');
verified_ok($standby, 'after the promotion');
$standby->stop;

# --- too few background processes: those of pg_cron and the launcher, and two
# more, the supervisors of databases one and two
my $node = new_node('shortage', extension => 0, conf => "max_logical_replication_workers = 0\nmax_worker_processes = 4");
my $no_executor = 'LOG:  pg_redrive has work of a role but no free executor for it';
my $no_supervisor = 'WARNING:  could not start a pg_redrive supervisor';

# Return how often the log has this text, so far or since an offset.
sub lines
{
	my ($text, $offset) = @_;
	return scalar(() = slurp_file($node->logfile, $offset // 0) =~ /\Q$text\E/g);
}

# Return the query that counts our processes of a kind in a database.
sub processes
{
	my ($kind, $dbname) = @_;
	return "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'redrive $kind' AND datname = '$dbname'";
}

# Create the extension and a handler.
sub populate
{
	my ($dbname) = @_;
	$node->safe_psql($dbname,
		q{CREATE EXTENSION pg_redrive;
		  CREATE TABLE IF NOT EXISTS effects (item int);
		  CREATE OR REPLACE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE sql AS $$INSERT INTO effects VALUES (payload::int)$$;
		  SELECT redrive.create_handler('work', 'do_item')});
	return;
}

foreach my $dbname ('one', 'two', 'three')
{
	$node->safe_psql('postgres', "CREATE DATABASE $dbname");
	next if $dbname eq 'three';
	populate($dbname);
	ok(poll_until($node, processes('supervisor', $dbname), '1'), "database $dbname has a supervisor");
}

# Each submit makes the supervisor try to start an executor.
#
# Seen red: without starved_at in src/proc/supervisor.c.
$node->safe_psql('one', "SELECT redrive.send('work', to_jsonb($_))") foreach (1 .. 20);
ok(poll_until($node, "SELECT remedy ~ 'max_worker_processes' FROM redrive.why(1) WHERE fact = 'no free worker process'", 't', dbname => 'one'),
	'why() names the setting');
is(lines($no_executor), 1, 'no process for an executor: said once');
$node->safe_psql('postgres', 'DROP DATABASE two');
ok(poll_until($node, "SELECT count(*) FROM redrive.batches WHERE state = 'finished'", '20', dbname => 'one'), 'work goes on by itself when a process is free');
is($node->safe_psql('one', 'SELECT count(*), count(DISTINCT item) FROM effects'), '20|20', '... each item once');
is(lines($no_executor), 1, '... and nothing more is said');

# Each CREATE EXTENSION makes the launcher try to start a supervisor.
#
# Seen red: with a message for each time the launcher has tried.
ok(poll_until($node, processes('executor', 'one'), '1'), 'an idle executor has the last process');
foreach (1 .. 5)
{
	$node->safe_psql('three', 'DROP EXTENSION IF EXISTS pg_redrive CASCADE');
	populate('three');
}
$node->safe_psql('three', "SELECT redrive.send('work', '1')");
ok(poll_until($node, "SELECT remedy ~ 'max_worker_processes' FROM redrive.why(1) WHERE fact = 'workers not running'", 't', dbname => 'three'),
	'why() names the setting');
is(lines($no_supervisor), 1, 'no process for a supervisor: said once');
$node->safe_psql('one', 'DROP EXTENSION pg_redrive CASCADE');
ok(poll_until($node, "SELECT count(*) FROM redrive.batches WHERE state = 'finished'", '1', dbname => 'three'), 'work goes on by itself');
is(lines($no_supervisor), 1, '... and nothing more is said');

# --- too few from the start
my $offset = -s $node->logfile;
$node->append_conf('postgresql.conf', 'max_worker_processes = 2');
$node->restart;
ok(poll_until($node, "SELECT count(*) FROM redrive.why(1) WHERE fact = 'finished'", '1', dbname => 'three'), 'the server runs without workers');
is(lines($no_supervisor, $offset), 1, 'no process for a supervisor from the start: said once');
$node->append_conf('postgresql.conf', 'max_worker_processes = 1');
$node->restart;
$node->safe_psql('three', "SELECT redrive.send('work', '2')");
is($node->safe_psql('three', "SELECT detail, remedy FROM redrive.why(2) WHERE fact = 'workers not running'"),
	'The process "redrive launcher" is not there.|look in the server log; if it says "too many background workers", increase max_worker_processes and restart the server',
	'no process for the launcher: why() tells what to do');
is(lines('LOG:  too many background workers', $offset), 1, 'the server says so once');
$node->append_conf('postgresql.conf', 'max_worker_processes = 8');
$node->restart;
ok(poll_until($node, "SELECT count(*) FROM redrive.batches WHERE state = 'finished'", '2', dbname => 'three'), 'with enough of them work goes on');

# --- more databases than redrive.max_databases: all have their turn, none has two
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf', "redrive.max_databases = 2\nlog_min_messages = debug1");
$node->safe_psql('postgres', "CREATE DATABASE more$_") foreach (1 .. 6);
$node->restart;
$node->safe_psql('three', "SELECT redrive.send('work', '3')");
ok(poll_until($node, "SELECT count(*) FROM redrive.batches WHERE state = 'finished'", '3', dbname => 'three'), 'the database that has the extension is found');
populate('more6');
$node->safe_psql('more6', "SELECT redrive.send('work', '1')");
ok(poll_until($node, "SELECT count(*) FROM redrive.batches WHERE state = 'finished'", '1', dbname => 'more6'), 'another one gets it and is found');
cmp_ok(lines('starting background worker process "redrive supervisor"', $offset), '<', 30, 'no database is looked at again and again');

$node->stop;
done_testing();
