# pg_upgrade of a cluster with batches in each state: workers keep away from it,
# nothing is lost, and afterwards all batches end.
#
# The old server is the next older major that scripts/check finds beside this one
# (REDRIVE_UPGRADE_FROM); without one a cluster of this version is upgraded to
# another of the same, which pg_upgrade does in the same way.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

# so that the versions agree on it, whatever their default is
my @initdb = ('--data-checksums');
my $old = new_node(
	'old',
	initdb => \@initdb,
	install_path => $ENV{REDRIVE_UPGRADE_FROM},
	temp_config => $ENV{REDRIVE_UPGRADE_FROM_CONF},
	conf => "redrive.max_workers = 2\n");
my $new = new_node('new', initdb => \@initdb, install_path => $ENV{REDRIVE_UPGRADE_TO}, start => 0, conf => "redrive.max_workers = 2\n");

note('from ' . $old->pg_version . ' to ' . $new->pg_version);
create_effects($old);
$old->safe_psql(
	'postgres', q{
CREATE EXTENSION pg_cron;
SELECT * FROM redrive.schedule_passes('0 0 1 1 *');
CREATE ROLE app LOGIN;
CREATE ROLE watcher LOGIN;
ALTER ROLE app SET redrive.pass_time_budget = 10;
SELECT redrive.grant_user('app'), redrive.grant_monitor('watcher');
CREATE TABLE broken ();
CREATE TABLE ended (batch_id bigint);
GRANT SELECT, INSERT ON ended TO app;
INSERT INTO redrive.classification_rules (sqlstate_pattern, error_class, action) VALUES ('ZZ001', 'mine', 'fail');
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item, note) VALUES (item.item_no, item.payload->>'batch');
    IF item.payload->>'gate' IS NOT NULL THEN
        PERFORM public.wait_for_gate(item.payload->>'gate');
    ELSIF item.payload->>'not_yet' IS NOT NULL AND pg_catalog.to_regclass('public.broken') IS NOT NULL THEN
        PERFORM redrive.raise_user_error('not yet');
    ELSIF item.item_no % 10 = 3 THEN
        PERFORM redrive.raise_validation('not wanted');
    ELSIF item.item_no % 10 = 5 THEN
        RAISE EXCEPTION 'no good' USING ERRCODE = 'ZZ001';
    END IF;
END $$;
CREATE FUNCTION note_end(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.ended VALUES (batch_id)$$;
SET SESSION AUTHORIZATION app;
SELECT redrive.create_handler('work', 'do_item', max_retries => 1000, retry_delay => '500 ms', retry_factor => 1, on_finish => 'note_end');
});

# Return a statement that submits 100 items; more is added to the payload of the
# eighth, tail are more arguments.
sub submit
{
	my ($label, $more, $tail) = @_;

	$tail = defined $tail ? ", $tail" : '';
	return "SELECT redrive.submit('work',
	    ARRAY(SELECT CASE i WHEN 8 THEN '$more'::jsonb ELSE '{}' END || '{\"batch\": \"$label\"}' FROM generate_series(1, 100) AS i),
	    ARRAY(SELECT '$label ' || i FROM generate_series(1, 100) AS i), label => '$label'$tail)";
}

# Run statements as the owner of the handler.
sub as_app
{
	my ($node, @statements) = @_;

	$node->safe_psql('postgres', join('; ', 'SET SESSION AUTHORIZATION app', @statements));
	return;
}

# --- batches in each state
as_app($old, submit('finished', '{}', "idempotency_key => 'once'"));
batch_is($old, 'finished');
as_app($old, submit('retrying', '{"not_yet": 1}'));
batch_is($old, 'retrying', 'retrying');
as_app($old, submit('later', '{}', "run_at => now() + interval '1 day'"));
as_app($old, submit('paused', '{}', "run_at => now() + interval '1 day'"),
	"SELECT redrive.pause_batch(batch_id) FROM redrive.batch_progress WHERE label = 'paused'");
as_app($old, submit('cancelled', '{}', "run_at => now() + interval '1 day'"),
	"SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE label = 'cancelled'");
as_app($old, q{SELECT redrive.add_items(redrive.open_batch('work', label => 'open'), ARRAY['{"batch": "open"}']::jsonb[], ARRAY['open 1'])});
set_gate($old, 'upgrade', 0);
as_app($old, submit('running', '{"gate": "upgrade"}'));
ok(poll_until($old, 'SELECT item_no FROM redrive.workers WHERE item_no = 8', '8'), 'a worker is within an item');

# what is to be the same afterwards
my $effects = 'SELECT note, count(*), count(DISTINCT item) FROM effects GROUP BY note ORDER BY note';
my $batches = 'SELECT batch_id, label, state, total, succeeded, ignored, failed, cancelled FROM redrive.batch_progress ORDER BY batch_id';
my $failures = 'SELECT batch_id, item_no, key, state, reason, error_class, sqlstate, message, retry_count FROM redrive.failed_items ORDER BY 1, 2';
my $others = q{SELECT (SELECT count(*) FROM redrive.locks), (SELECT count(*) FROM ended), (SELECT count(*) FROM cron.job), (SELECT count(*) FROM redrive.classification_rules)};
$old->stop('fast');
$old->append_conf('postgresql.conf', 'redrive.enabled = off');
$old->start;
# pg_upgrade lets no worker of another role connect
$old->safe_psql('postgres', "SELECT redrive.create_handler('of a superuser', 'do_item')");
$old->safe_psql('postgres', submit('due', '{}') =~ s/'work'/'of a superuser'/r);
my @before = map { $old->safe_psql('postgres', $_) } ($effects, $batches, $failures, $others);
verified_ok($old, 'before');
like($before[1], qr/\|$_\|/, "a batch is $_") foreach qw(finished retrying ready paused cancelled open running);
$old->stop('fast');

# --- the upgrade, with workers allowed
#
# Seen red: without IsBinaryUpgrade in redrive_register_launcher workers run batch
# "due" meanwhile.
$old->adjust_conf('postgresql.conf', 'redrive.enabled', 'on');
my $bin = sub { my ($node) = @_; return $node->config_data('--bindir') };
chdir $PostgreSQL::Test::Utils::tmp_check or die "could not change directory: $!";
my @upgrade = (
	$bin->($new) . '/pg_upgrade', '--no-sync', '--retain', '--socketdir' => $new->host,
	'--old-datadir' => $old->data_dir, '--new-datadir' => $new->data_dir,
	'--old-bindir' => $bin->($old), '--new-bindir' => $bin->($new),
	'--old-port' => $old->port, '--new-port' => $new->port);
command_ok([ @upgrade, '--check' ], 'pg_upgrade --check');
command_ok(\@upgrade, 'pg_upgrade');
my @logs = glob($new->data_dir . '/pg_upgrade_output.d/*/log/pg_upgrade_server.log');
cmp_ok(scalar(@logs), '>', 0, '... has left the log of its servers');
is(scalar(grep { /background worker "redrive/ } map { split /\n/, slurp_file($_) } @logs), 0, '... with none of our processes');

# --- the same as before, and nobody worked
$new->append_conf('postgresql.conf', 'redrive.enabled = off');
$new->start;
is($new->safe_psql('postgres', $effects), $before[0], 'no item ran during the upgrade');
is($new->safe_psql('postgres', $batches), $before[1], 'batches are as they were');
is($new->safe_psql('postgres', $failures), $before[2], 'failures too');
is($new->safe_psql('postgres', $others), $before[3], 'locks, callbacks, jobs and rules too');
verified_ok($new, 'after the upgrade');

# --- and goes on
$new->safe_psql('postgres', 'UPDATE gates SET open = true; DROP TABLE broken');
$new->adjust_conf('postgresql.conf', 'redrive.enabled', 'on');
$new->reload;
batch_is($new, $_) foreach ('due', 'running', 'retrying');
as_app($new,
	"SELECT redrive.resume_batch(batch_id) FROM redrive.batch_progress WHERE label = 'paused'",
	"SELECT redrive.seal_batch(batch_id) FROM redrive.batch_progress WHERE label = 'open'");
batch_is($new, 'open');
is($new->safe_psql('postgres', "SELECT label, state FROM redrive.batch_progress WHERE label IN ('paused', 'later') ORDER BY 1"), "later|ready\npaused|ready", 'what is not due waits');
is($new->safe_psql('postgres', $effects), "due|80|80\nfinished|80|80\nopen|1|1\nretrying|80|80\nrunning|80|80", 'each item was done, once');
is($new->safe_psql('postgres', "SELECT string_agg(DISTINCT format('%s %s %s', succeeded, ignored, failed), ', ') FROM redrive.batch_progress WHERE state = 'finished' AND label <> 'open'"),
	'80 10 10', '... with all outcomes');
ok(poll_until($new, 'SELECT count(*), count(DISTINCT batch_id) FROM ended', '4|4'), '... and on_finish was called for each batch');
is($new->safe_psql('postgres', "SELECT string_agg(redrive.is_locked('work', k || ' 1')::text, ' ' ORDER BY k) FROM unnest(ARRAY['finished', 'later', 'paused', 'running']) AS k"),
	'false true true false', 'keys are locked as long as their items live');
is( $new->safe_psql('postgres',
		"SET SESSION AUTHORIZATION app;
		 SELECT redrive.submit('work', ARRAY['{}']::jsonb[], idempotency_key => 'once') = batch_id FROM redrive.batch_progress WHERE label = 'finished'"),
	't', 'idempotency keys are known');
as_app($new, submit('fresh', '{}'), "SELECT redrive.redrive(batch_id) FROM redrive.batch_progress WHERE label = 'finished'");
batch_is($new, 'fresh');
ok(poll_until($new, "SELECT state, run_no FROM redrive.batch_progress WHERE label = 'finished'", 'finished|2'), 'an old batch is redriven');
is($new->safe_psql('postgres', "SET SESSION AUTHORIZATION watcher; SELECT count(*) FROM redrive.batch_progress"), '9', 'a monitor still sees');
$new->safe_psql('postgres', "ALTER EXTENSION pg_cron UPDATE; SELECT * FROM redrive.schedule_passes(); CALL redrive.run_pass('purge')");
is($new->safe_psql('postgres', "SELECT count(*) FROM redrive.doctor() WHERE severity = 'error'"), '0', 'doctor() finds no error');
verified_ok($new, 'at the end');
$new->stop;

done_testing();
