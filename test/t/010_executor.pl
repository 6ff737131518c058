# Executors: they find work at once, connect as the handler's owner, keep to
# their limits, retry by themselves, and show each tenant its own things only.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('executor', conf => 'redrive.max_workers = 3');

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE ROLE alice LOGIN;
CREATE ROLE bob LOGIN;
SELECT redrive.grant_user('alice'), redrive.grant_user('bob');
GRANT CREATE ON SCHEMA public TO alice, bob;
CREATE SEQUENCE attempts;
CREATE TABLE called (function text, key text, batch_id bigint, run_no int);
GRANT ALL ON SEQUENCE attempts TO alice, bob;
GRANT SELECT, INSERT ON called TO alice, bob;
});

# Run SQL as one of the roles.
sub as_role
{
	my ($role, $sql) = @_;
	return $node->safe_psql('postgres', $sql, extra_params => [ '-U', $role ]);
}

as_role(
	'alice', q{
CREATE FUNCTION note_item(payload jsonb) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.effects (item) VALUES (payload::int)$$;
SELECT redrive.create_handler('alice quick', 'note_item');
});
as_role(
	'bob', q{
CREATE FUNCTION gated_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item) VALUES (payload::int);
    PERFORM public.wait_for_gate('bob');
END $$;
SELECT redrive.create_handler('bob gated', 'gated_item', isolation => 'item', max_workers => 2);
});

# --- a submit is picked up at once
# One after the other, so many that they could not be done within the bound if
# each had to wait for the next look of somebody who looks once a second.
#
# Seen red: without redrive_wake_at_commit in src/flow/submit.c.
sub in_turn
{
	my ($name, $rounds) = @_;
	my ($out, $timed_out);

	$node->psql('postgres',
		"SELECT redrive.send('alice quick', '1') AS batch_id \\gset\nCALL redrive.wait(:batch_id);\n" x $rounds,
		stdout => \$out, timeout => 120, timed_out => \$timed_out, extra_params => [ '-U', 'alice' ]);
	is(scalar(() = ($out // '') =~ /^finished$/mg), $rounds, $name);
	return;
}
in_turn('batches one after the other, each picked up at once by an idle executor', 300);

# --- an idle executor sleeps: it looks for work once a second, and not all the time
#
# Seen red: with a time-out in redrive_arm_stop that is due at once.
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION turns_in_a_second() RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    seen timestamptz[] := '{}';
    bound timestamptz := clock_timestamp() + interval '1 s';
BEGIN
    WHILE clock_timestamp() < bound LOOP
        PERFORM pg_stat_clear_snapshot();
        seen := ARRAY(SELECT unnest(seen) UNION SELECT state_change FROM pg_stat_activity WHERE backend_type = 'redrive executor');
    END LOOP;
    RETURN cardinality(seen);
END $$;
});
my $turns = $node->safe_psql('postgres', 'SELECT turns_in_a_second()');
cmp_ok($turns, '>', 0, 'there is an idle executor');
cmp_ok($turns, '<', 30, '... which sleeps');
# what each did last and waits for; since 17 what it waits for has a name
my %idle = ('launcher' => 'look for databases|RedriveLauncherMain', 'supervisor' => 'start workers|RedriveSupervisorMain', 'executor' => 'look for work|RedriveExecutorIdle');
foreach my $kind (sort keys %idle)
{
	my $shown = "idle|redrive: $idle{$kind}";
	$shown =~ s/Redrive\w+$/Extension/ if $node->pg_version < 17;
	ok(poll_until($node, "SELECT concat_ws('|', state, query, wait_event) FROM pg_stat_activity WHERE backend_type = 'redrive $kind' AND datname IS NOT DISTINCT FROM "
				. ($kind eq 'launcher' ? 'NULL' : "'postgres'") . ' LIMIT 1', $shown), "pg_stat_activity shows the $kind")
	  or diag($node->safe_psql('postgres', "SELECT state, query, wait_event FROM pg_stat_activity WHERE backend_type LIKE 'redrive%'"));
}

# --- batches again, but each needs a new executor, which the supervisor has to start
$node->append_conf('postgresql.conf', 'redrive.worker_idle_timeout = 0');
$node->reload;
in_turn('batches one after the other, each picked up at once by a new executor', 150);
# A worker that leaves items to others calls another one at once.  With a look
# each 30 s these rounds would not be done within the bound.
#
# Seen red: with redrive_wake_now before show_chunk in redrive_execute_next the
# worker found its own slot idle and woke itself.
my $running = "SELECT count(*) FROM redrive.workers WHERE handler = 'bob gated' AND item_no IS NOT NULL";
my $rounds = 0;
my $end = time() + 120;
while ($rounds < 8 && time() < $end)
{
	set_gate($node, 'bob', 0);
	as_role('bob', "SELECT redrive.submit('bob gated', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 20) AS i), label => 'pair $rounds')");
	last if !poll_until($node, $running, '2');
	is($node->safe_psql('postgres', q{
		SELECT count(*) FROM redrive.workers AS w JOIN pg_stat_activity AS a USING (pid)
		WHERE a.state = 'active' AND a.query = format('redrive: handler bob gated, batch %s, chunk %s', w.batch_id, w.chunk_id)}), '2', 'pg_stat_activity shows their chunks')
	  if $rounds == 0;
	set_gate($node, 'bob', 1);
	last if !poll_until($node, "SELECT state FROM redrive.batch_progress WHERE label = 'pair $rounds'", 'finished');
	$rounds++;
}
is($rounds, 8, 'batches one after the other, each on two executors at once');

# from here on nobody leaves for having nothing to do
$node->append_conf('postgresql.conf', "redrive.worker_idle_timeout = '1 h'");
$node->reload;

is( $node->safe_psql('postgres', "SELECT DISTINCT login, role FROM effects ORDER BY 1"),
	"alice|alice\nbob|bob",
	'executors are connected as the owner of the handler');

# --- a gated batch of bob: it runs on two executors and no more
set_gate($node, 'bob', 0);
as_role('bob',
	"SELECT redrive.submit('bob gated', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 40) AS i),
	    ARRAY(SELECT 'secret ' || i FROM generate_series(1, 40) AS i), label => 'gated')");
ok(poll_until($node, $running, '2'), 'two executors run the batch');

# another batch is dispatched meanwhile: the limit held in that round too
as_role('alice', "SELECT redrive.submit('alice quick', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 500) AS i), label => 'quick')");
batch_is($node, 'quick');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.workers WHERE handler = 'bob gated'"),
	'2', 'no more than max_workers of the handler');

# --- two tenants see nothing of each other, with a batch of each in the tables
as_role(
	'bob', q{
CREATE FUNCTION failing_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS
    $$BEGIN RAISE EXCEPTION 'bob said %', payload USING ERRCODE = '22023'; END$$;
SELECT redrive.create_handler('bob failing', 'failing_item');
SELECT redrive.submit('bob failing', ARRAY['"private"']::jsonb[], label => 'failing');
});
# bob has two executors, both held up; the third place is taken by an idle one of alice
batch_is($node, 'failing');
# and what is pushed: to an address that is refused
$node->safe_psql('postgres', 'GRANT EXECUTE ON FUNCTION redrive.http_request TO bob');
as_role('bob', "SELECT redrive.create_platform('bob platform', 'https://127.0.0.1/'), redrive.record_task('bob task', 'secret'), redrive.http_request('GET', 'https://127.0.0.1/')");
ok(poll_until($node, "SELECT count(*) = 1 FROM redrive.push_attempts WHERE platform = 'bob platform'"), 'something was pushed');
my $views = $node->safe_psql('postgres',
	q{SELECT string_agg(format('%I', viewname), ' ' ORDER BY viewname) FROM pg_views
	  WHERE schemaname = 'redrive' AND viewname NOT LIKE '\_%' AND viewname NOT IN ('pass_history', 'crashed_items')});
cmp_ok(scalar(split(/ /, $views)), '>', 8, "views to look at: $views");
foreach my $view (split / /, $views)
{
	unlike(as_role('alice', "SELECT v::text FROM redrive.$view AS v"),
		qr/bob|secret|private/, "alice sees nothing of bob in $view");
	isnt(as_role('bob', "SELECT count(*) FROM redrive.$view"), '0', "bob sees his own rows in $view")
	  unless $view eq 'stale_batches' or $view eq 'crashed_items';
}
my $err;
foreach my $call ('cancel_batch', 'pause_batch', 'redrive')
{
	$node->psql('postgres',
		"SELECT redrive.$call(batch_id) FROM (SELECT 1 AS batch_id) AS b",
		stderr => \$err, extra_params => [ '-U', 'bob', '-v', 'VERBOSITY=sqlstate' ]);
	like($err, qr/42501/, "bob may not $call a batch of alice");
}
$node->psql('postgres', "SELECT redrive.send('bob gated', '1')",
	stderr => \$err, extra_params => [ '-U', 'alice', '-v', 'VERBOSITY=sqlstate' ]);
like($err, qr/42501/, 'alice may not submit to a handler of bob');

set_gate($node, 'bob', 1);
batch_is($node, 'gated');

# --- retries fire by themselves, up to the budget, and then all is settled once
as_role(
	'alice', q{
CREATE FUNCTION sometimes(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('public.attempts');
    IF item.key = 'never' OR item.attempt < 3 THEN
        RAISE EXCEPTION 'not yet';
    END IF;
    INSERT INTO public.effects (item, note) VALUES (item.item_no, 'attempt ' || item.attempt);
END $$;
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.called (function, key) VALUES ('on_unlock', key)$$;
CREATE FUNCTION note_finish(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.called (function, batch_id, run_no) VALUES ('on_finish', batch_id, run_no)$$;
SELECT redrive.create_handler('alice retry', 'sometimes', max_retries => 3, retry_delay => '50 ms', isolation => 'item',
    on_unlock => 'note_unlock', on_finish => 'note_finish');
SELECT redrive.submit('alice retry', ARRAY['1', '2']::jsonb[], ARRAY['never', 'third time'], label => 'retry');
});
batch_is($node, 'retry');
is( as_role('alice', "SELECT key, state, reason, retry_count, attempts FROM redrive.failed_items WHERE handler = 'alice retry'"),
	'never|failed|exhausted|3|4',
	'max_retries 3 means four attempts');
is($node->safe_psql('postgres', "SELECT last_value FROM attempts"), '7', 'attempts were made four and three times');
is($node->safe_psql('postgres', "SELECT note FROM effects WHERE note IS NOT NULL"), 'attempt 3', 'the other item succeeded at the third');
is(as_role('alice', "SELECT redrive.is_locked('alice retry', k) FROM unnest(ARRAY['never', 'third time']) AS k"),
	"f\nf", 'both keys are unlocked');
ok(poll_until($node, "SELECT count(*) FROM called WHERE function = 'on_finish'", '1'), 'on_finish was called once');
is( $node->safe_psql('postgres', "SELECT key FROM called WHERE function = 'on_unlock' ORDER BY key"),
	"never\nthird time",
	'on_unlock was called once for each key');
verified_ok($node, 'after all of this');

# --- shortage: one place, two owners; neither is starved, whatever the priority of the other
# Seen red: without array_position() in list_owners (src/proc/supervisor.c) alice, who leaves for bob, gets the place again.
$node->append_conf('postgresql.conf', "redrive.max_workers = 1\nredrive.worker_idle_timeout = 0");
$node->reload;
ok(poll_until($node, 'SELECT count(*) FROM redrive.workers', '0'), 'idle executors leave');
$node->append_conf('postgresql.conf', "redrive.worker_idle_timeout = '60 s'");
$node->reload;
as_role(
	'alice', q{
CREATE FUNCTION slow_item(payload jsonb) RETURNS void LANGUAGE sql AS
    $$SELECT pg_sleep(0.02)$$; -- slow handler
SELECT redrive.create_handler('alice slow', 'slow_item');
SELECT redrive.submit('alice slow', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 100000) AS i), label => 'slow', priority => 2147483647);
});
my $progress = "SELECT succeeded FROM redrive.batch_progress WHERE label = 'slow'";
ok(poll_until($node, "SELECT ($progress) > 0"), 'alice has the only executor');
as_role('bob', "SELECT redrive.submit('bob gated', ARRAY['1', '2', '3']::jsonb[], label => 'short')");
batch_is($node, 'short');
is($node->safe_psql('postgres', "SELECT state FROM redrive.batch_progress WHERE label = 'slow'"),
	'running', 'bob was served while the batch of alice was running');
my $seen = $node->safe_psql('postgres', $progress);
ok(poll_until($node, "SELECT ($progress) > $seen"), 'alice goes on afterwards');
$node->safe_psql('postgres', "SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE label = 'slow'");
ok(poll_until($node, "SELECT running FROM redrive.batch_progress WHERE label = 'slow'", '0'), 'a cancelled batch is let go');
verified_ok($node, 'after the shortage');

$node->stop;
done_testing();
