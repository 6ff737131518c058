# Questions in the states that need workers, settings or processes: why() names
# what keeps a batch from moving, doctor() what is wrong with the server.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node(
	'why', conf => q{
redrive.max_workers = 1
redrive.worker_idle_timeout = '1 h'
wal_level = logical
});

# Wait until why() of the batch with this label says fact, detail and remedy that fit; one test.
sub says
{
	my ($label, $fact, $detail, $remedy, $name) = @_;
	my $asked = "SELECT fact, detail, remedy FROM redrive.why((SELECT batch_id FROM redrive.batch_progress WHERE label = '$label'))";

	return ok( poll_until($node, "SELECT count(*) > 0 FROM ($asked) AS w WHERE fact = '$fact' AND detail ~ '$detail' AND coalesce(remedy, '') ~ '$remedy'"),
		$name)
	  || diag('it says: ' . $node->safe_psql('postgres', $asked));
}

# Wait until doctor() says something that fits; one test.
sub finds
{
	my ($severity, $finding, $remedy, $name) = @_;

	return ok( poll_until($node, "SELECT count(*) > 0 FROM redrive.doctor() WHERE severity = '$severity' AND finding ~ '$finding' AND coalesce(remedy, '') ~ '$remedy'"),
		$name)
	  || diag('it finds: ' . $node->safe_psql('postgres', 'SELECT * FROM redrive.doctor()'));
}

# Settings, and a restart or reload.
sub configure
{
	my ($how, $conf) = @_;

	$node->append_conf('postgresql.conf', $conf);
	$node->$how;
	return;
}

sub submit
{
	my ($handler, $label, $items, $more) = @_;

	$more = $more ? ", $more" : '';
	$node->safe_psql('postgres', "SELECT redrive.submit('$handler', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $items) AS i), label => '$label'$more)");
	return;
}

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE EXTENSION pg_cron;
SELECT redrive.schedule_passes();
CREATE ROLE alice LOGIN;
CREATE ROLE bob LOGIN;
CREATE ROLE watcher LOGIN;
SELECT redrive.grant_user('alice'), redrive.grant_user('bob'), redrive.grant_monitor('watcher');
GRANT CREATE ON SCHEMA public TO alice, bob;
CREATE TABLE rows (id int PRIMARY KEY, n int NOT NULL);
INSERT INTO rows VALUES (1, 0);
GRANT SELECT, UPDATE ON rows TO alice, bob;
SET SESSION AUTHORIZATION alice;
CREATE FUNCTION update_row(payload jsonb) RETURNS void LANGUAGE sql AS 'UPDATE public.rows SET n = n + 1 WHERE id = 1';
SELECT redrive.create_handler('a', 'update_row');
SELECT redrive.create_handler('a one', 'update_row', max_workers => 1);
SET SESSION AUTHORIZATION bob;
CREATE FUNCTION note_row(payload jsonb) RETURNS void LANGUAGE sql AS 'INSERT INTO public.effects (item) VALUES (payload::int)';
SELECT redrive.create_handler('b', 'note_row');
});
$node->safe_psql('postgres', "CALL redrive.run_pass('$_')") foreach ('rescue_stale', 'retry_failed', 'purge');
finds('ok', 'Nothing is wrong', '^$', 'nothing is wrong at first');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.doctor()'), '1', '... and that is all it says');

# --- a worker waits for a lock of bob, in a query with a secret
my $session = $node->background_psql('postgres', extra_params => [ '-U', 'bob' ]);
my $locker = $session->query_safe('SELECT pg_backend_pid()');
$session->query_safe("BEGIN; UPDATE rows SET n = 0 WHERE 'secret' <> ''");
submit('a one', 'locked', 3);
says('locked', 'blocked by a lock', "in item 1 since .* It waits for pid $locker .bob, idle in transaction, .*secret", "pg_terminate_backend.$locker",
	'a worker waits for a lock: why() names who has it, and the query');
foreach my $role ('alice', 'watcher')
{
	my $said = $node->safe_psql('postgres', "SELECT detail FROM redrive.why(1) WHERE fact = 'blocked by a lock'", extra_params => [ '-U', $role ]);
	like($said, qr/It waits for pid $locker$/, "... to $role it names the process only");
}
$node->safe_psql('postgres', 'GRANT pg_read_all_stats TO watcher');
like( $node->safe_psql('postgres', "SELECT detail FROM redrive.why(1) WHERE fact = 'blocked by a lock'", extra_params => [ '-U', 'watcher' ]),
	qr/secret/, '... and the query to one who may see it in pg_stat_activity');

# --- what that holds up
submit('b', 'no slot', 1);
says('no slot', 'no free executor', '^1 executors are all that redrive.max_workers allows; 0 of them work for role bob', 'max_workers = 2', 'a role has no executor, and all places are taken');
submit('a one', 'limit', 1);
says('limit', 'max_workers of the handler reached', '^1 workers, as many as handler "a one" may have, are in batches 1\.', 'max_workers => 2', 'the handler has as many workers as it may have');
submit('a', 'low', 1);
submit('a', 'high', 1, 'priority => 7');
says('low', 'other batches come first', '^2 other batches of role alice', 'wait', 'other batches have a higher priority or were first');
says('high', 'no free executor', '1 of them work for role alice', 'max_workers = 2', '... and this one has none but no place');
$session->query_safe('ROLLBACK');
$session->quit;
batch_is($node, $_) foreach ('locked', 'no slot', 'limit', 'low', 'high');

# --- somebody changes the batch, and does not end his transaction
$node->safe_psql('postgres', "SELECT redrive.pause_handler('a')");
submit('a', 'changed', 1);
$session = $node->background_psql('postgres');
$locker = $session->query_safe('SELECT pg_backend_pid()');
my $batch = $node->safe_psql('postgres', "SELECT batch_id FROM redrive.batch_progress WHERE label = 'changed'");
$session->query_safe("BEGIN; SELECT redrive.pause_batch($batch)");
$node->safe_psql('postgres', "SELECT redrive.resume_handler('a')");
says('changed', 'blocked by a lock', "The batch is being changed by pid $locker .*pause_batch", "pg_terminate_backend.$locker", 'somebody changes the batch');
$session->query_safe("PREPARE TRANSACTION 'pause'");
says('changed', 'blocked by a lock', 'The batch is being changed by a prepared transaction', 'ROLLBACK PREPARED', '... as a prepared transaction');
$node->safe_psql('postgres', "ROLLBACK PREPARED 'pause'; CALL redrive.run_pass('rescue_stale')");
$node->safe_psql('postgres', "SELECT redrive.alter_handler('a')");
batch_is($node, 'changed');

# --- somebody changes the handler: its workers cannot be counted
$session->query_safe("BEGIN; SELECT redrive.alter_handler('a one', max_retries => 1)");
submit('a one', 'no claim', 1);
says('no claim', 'blocked by a lock', "^The workers of handler .a one. cannot be counted if it is being changed by pid $locker .*alter_handler", "pg_terminate_backend.$locker", 'somebody changes a handler with max_workers');
$session->query_safe('ROLLBACK');
batch_is($node, 'no claim');

# --- nothing is in the way: the supervisor, which would start an executor, is held
my $supervisor = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive supervisor' AND datname = 'postgres'");
kill('STOP', $supervisor);
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'redrive executor'");
ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '0'), 'no executor is left');
submit('a', 'due', 1);
says('due', 'due', 'Nothing is in its way', 'rescue_stale', 'nothing is in its way');
kill('CONT', $supervisor);
batch_is($node, 'due');

# --- switched off
configure('reload', 'redrive.enabled = off');
ok(poll_until($node, 'SHOW redrive.enabled', 'off'), 'switched off');
submit('a', 'off', 1);
says('off', 'redrive.enabled is off', 'No batch', 'ALTER SYSTEM SET redrive.enabled = on', 'switched off: why() says so');
finds('error', 'redrive.enabled is off', 'ALTER SYSTEM SET redrive.enabled = on', 'switched off: doctor() says so');
configure('reload', "redrive.enabled = on\nautovacuum = off\ntrack_counts = off\nlock_timeout = '90s'");
batch_is($node, 'off');
finds('warning', '^autovacuum is off', 'SET autovacuum = on', 'autovacuum is off');
finds('warning', '^track_counts is off', 'SET track_counts = on', 'track_counts is off');
finds('warning', '^lock_timeout is 90s for workers of role alice', 'ALTER ROLE alice', 'a setting of the server that ends workers');
configure('reload', "autovacuum = on\ntrack_counts = on\nlock_timeout = 0");

# --- a slot that nobody uses
$node->safe_psql('postgres', "SELECT pg_create_logical_replication_slot('unused', 'pgoutput')");
finds('warning', 'Replication slot .unused. is not in use', 'pg_drop_replication_slot', 'a slot holds vacuum back');
$node->safe_psql('postgres', "SELECT pg_drop_replication_slot('unused')");

# --- executors that end at once: they cannot keep books
$node->safe_psql('postgres', q{
CREATE FUNCTION break_books() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no books today'; END $$;
CREATE TRIGGER break_books BEFORE INSERT ON redrive.chunks FOR EACH ROW EXECUTE FUNCTION break_books()});
submit('a', 'broken', 1);
says('broken', 'executors end at once', 'of role alice', 'server log', 'executors end at once: why() says so');
finds('error', 'Executors of role alice end', 'server log', 'executors end at once: doctor() says so');
$node->safe_psql('postgres', 'DROP FUNCTION break_books() CASCADE');
batch_is($node, 'broken');

# --- an owner that has no right to connect
$node->safe_psql('postgres', q{REVOKE CONNECT ON DATABASE postgres FROM PUBLIC; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'redrive executor'});
submit('a', 'refused', 1);
says('refused', 'owner cannot connect', 'Role alice', 'GRANT CONNECT', 'the owner has no right to connect: why() says so');
finds('error', 'Role alice, .* has no right to connect', 'GRANT CONNECT', 'the owner has no right to connect: doctor() says so');

# --- a process is gone, and the postmaster, held, cannot start it again
my $postmaster = (split /\n/, slurp_file($node->data_dir . '/postmaster.pid'))[0];
foreach my $gone ('redrive supervisor', 'redrive launcher', 'pg_cron launcher')
{
	my $pid = $session->query_safe("SELECT pid FROM pg_stat_activity WHERE backend_type = '$gone'");
	my ($found, $why) = ('', '');
	kill('STOP', $postmaster);
	$session->query_safe("SELECT pg_terminate_backend($pid)");
	if (wait_for_exit($pid))
	{
		$found = $session->query_safe("SELECT string_agg(severity || ' ' || finding, ' ') FROM redrive.doctor()");
		$why = $session->query_safe("SELECT string_agg(fact || ' ' || detail, ' ') FROM redrive.why((SELECT batch_id FROM redrive.batch_progress WHERE label = 'refused'))");
	}
	kill('CONT', $postmaster);
	like($found, qr/error The process "$gone"/, "doctor() misses the $gone");
	like($why, qr/workers not running The process "$gone"/, "... and so does why()") if $gone =~ /^redrive/;
	# Seen red for the launcher: with exit code 0 the postmaster does not start it again.
	# That of pg_cron stays away until the server is restarted.
	ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = '$gone'", '1'), "... and then it is started again")
	  if $gone =~ /^redrive/;
}
$session->quit;
$node->safe_psql('postgres', "SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE label = 'refused'");
$node->safe_psql('postgres', 'GRANT CONNECT ON DATABASE postgres TO PUBLIC');

# --- no worker processes: pg_cron, replication, launcher and supervisor take all of them, then one more
$node->safe_psql('postgres', "SELECT redrive.pause_handler('a')");
submit('a', 'waits', 1);
$node->safe_psql('postgres', "SELECT redrive.resume_handler('a'), redrive.pause_batch(batch_id) FROM redrive.batch_progress WHERE label = 'waits'");
configure('restart', 'max_worker_processes = 4');
$node->safe_psql('postgres', "SELECT redrive.resume_batch(batch_id) FROM redrive.batch_progress WHERE label = 'waits'");
says('waits', 'no free worker process', 'No executor can be started since .* max_worker_processes, 4,', 'max_worker_processes', 'no process for an executor: why() says so');
finds('error', 'A worker is wanted and cannot be started since', 'max_worker_processes', 'no process for an executor: doctor() says so');
finds('warning', '^max_worker_processes is 4, and 11 may be wanted', 'max_worker_processes = 16', 'max_worker_processes is low');
configure('restart', 'max_worker_processes = 3');
says('waits', 'workers not running', 'The supervisor of this database cannot be started since', 'max_worker_processes', 'no process for the supervisor: why() says so');
finds('error', 'A worker is wanted and cannot be started since', 'max_worker_processes', 'no process for the supervisor: doctor() says so');

# --- not preloaded
configure('restart', "max_worker_processes = 16\nshared_preload_libraries = ''");
says('waits', 'not preloaded', 'not in shared_preload_libraries', 'CALL redrive.work', 'not preloaded: why() says so');
finds('error', 'not preloaded', 'shared_preload_libraries', 'not preloaded: doctor() says so');
finds('warning', 'Nobody runs the pass purge.*pg_cron is not loaded', 'another scheduler', 'without pg_cron it goes by the passes that ran')
  if $node->safe_psql('postgres', "UPDATE redrive.pass_log SET started_at = started_at - interval '2 days'") || 1;

# --- a standby
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'pg_cron,pg_redrive'");
$node->stop;
$node->append_conf('standby.signal', '');
$node->start;
says('waits', 'standby', 'This server is a standby', 'primary', 'a standby says that it is one');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.doctor() WHERE finding ~ 'redrive (launcher|supervisor)'"),
	'0', 'doctor() misses no worker on a standby');
$node->promote;
batch_is($node, 'waits');
verified_ok($node, 'at the end');

$node->stop;
done_testing();
