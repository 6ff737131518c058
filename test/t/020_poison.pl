# Items that crash the server: each is found, is run alone the second time, and is
# set aside then, after two restarts of the server and not one more.  Everything
# else is done, each item once, and nobody else is blamed.
#
# Seen red: without the stamp in stamp_and_quit of src/base/crumbs.c the innocent
# item of the other batch is blamed, and so is the item that an immediate shutdown
# interrupts; without note_end there the item is not found when
# restart_after_crash is off, and with "witnessed" always true it is blamed when
# everything was killed; without "excused" in _give_back of
# sql/33_record.sql the batch of six is paused; with redrive_next_suspect of
# src/flow/suspect.c returning the end of the page, each item crashes the server
# until its batch is paused; without "greatest" in _blame of sql/32_crash.sql
# there is a third restart when the file is gone, and so there is without the look at
# batches just sent; without the callback's part of
# _blame there is no end of restarts.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

# commits that do not wait for the disk are lost in a crash, for sure
my $node = new_node('poison', conf => "fsync = off\nwal_writer_delay = 10s\nredrive.max_workers = 2\n");

create_effects($node);
$node->safe_psql(
	'postgres', q{
-- The shell's parent is the server process that executes the item.
CREATE FUNCTION crash(command text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('COPY (SELECT 1) TO PROGRAM %L', command);
    RAISE 'it survived';
END $$;
-- {"i": 1, "wait": "gate", "shell": "command", "error": true}
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES ((item.payload->>'i')::int, item.key);
    PERFORM wait_for_gate(item.payload->>'wait');
    IF item.attempt = 1 AND item.payload ? 'error' THEN
        RAISE 'not yet';
    ELSIF item.payload ? 'shell' AND NOT coalesce((SELECT open FROM gates WHERE gate = 'cured'), false) THEN
        PERFORM crash(item.payload->>'shell');
    END IF;
END $$;
CREATE TABLE unlocked (key text NOT NULL);
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS 'INSERT INTO public.unlocked VALUES (key)';
SELECT redrive.create_handler('work', 'do_item', on_unlock => 'note_unlock', retry_delay => '10 ms');
});

my $segv = 'kill -SEGV $PPID';

# Submit items 1 to n, some of them with something else in their payload.
sub submit
{
	my ($label, $n, $special, $handler) = @_;

	$handler //= 'work';
	$node->safe_psql(
		'postgres', qq{
SELECT redrive.submit('$handler',
    ARRAY(SELECT jsonb_build_object('i', i) || coalesce('$special'::jsonb->i::text, '{}') FROM generate_series(1, $n) AS i),
    ARRAY(SELECT '$label ' || i FROM generate_series(1, $n) AS i), label => '$label')});
	return;
}

# How often the server was restarted after a crash.
sub restarts
{
	return scalar(() = slurp_file($node->logfile) =~ /reinitializing$/mg);
}

# All items but the given number are done, each once; the others failed in quarantine.
sub outcome_is
{
	my ($label, $n, @poison) = @_;
	my $good = $n - @poison;

	batch_is($node, $label);
	is( $node->safe_psql('postgres', "SELECT total, succeeded, failed FROM redrive.batch_progress WHERE label = '$label'"),
		"$n|$good|" . @poison, "$label: all items are accounted for");
	is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note LIKE '$label %'"),
		"$good|$good", "$label: nothing is lost, nothing done twice");
	is( $node->safe_psql(
			'postgres',
			"SELECT f.item_no, f.state, f.reason, f.error_class, f.sqlstate, f.message FROM redrive.failed_items AS f
			 JOIN redrive.batch_progress AS b USING (batch_id) WHERE b.label = '$label' ORDER BY f.item_no"),
		join("\n", map { "$_|failed|quarantined|crash|57P02|the item crashed the server 2 times" } @poison),
		"$label: the poison items are in quarantine");
	is(crashes($label), join(' ', map { "$_:2" } @poison), "$label: nobody else is blamed");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.locks'), '0', "$label: all keys are unlocked");
	verified_ok($node, $label);
	return;
}

# The application has been told of each key, once; the last ones by a callback.
sub unlocks_are
{
	my ($label, $n) = @_;

	return ok(
		poll_until($node, "SELECT count(*), count(DISTINCT key) FROM unlocked WHERE key LIKE '$label %'", "$n|$n"),
		"$label: on_unlock was called for each key");
}

# Which items of a batch crashed the server how often.
sub crashes
{
	my ($label) = @_;

	return $node->safe_psql('postgres',
		"SELECT string_agg(c.item_no || ':' || c.crash_count, ' ' ORDER BY c.item_no) FROM redrive.crashed_items AS c
		 JOIN redrive.batch_progress AS b USING (batch_id) WHERE b.label = '$label'");
}

# Run what follows and check how many restarts it takes.
sub restarts_are
{
	my ($name, $expected, $code) = @_;
	my $before = restarts();

	$code->();
	return is(restarts() - $before, $expected, "$name: $expected restarts");
}

# --- one item
restarts_are('one', 2, sub {
	submit('one', 300, qq({"150": {"shell": "$segv"}}));
	outcome_is('one', 300, 150);
	unlocks_are('one', 300);
});

# --- several in one chunk: more crashes than a chunk may lose workers
$node->safe_psql('postgres', "SELECT redrive.create_handler('single', 'do_item', on_unlock => 'note_unlock', max_workers => 1)");
restarts_are('six', 12, sub {
	submit('six', 40, qq({"1": {"shell": "$segv"}, "2": {"shell": "kill -ABRT \$PPID"}, "3": {"shell": "kill -KILL \$PPID"},
		"7": {"shell": "kill -BUS \$PPID"}, "8": {"shell": "kill -QUIT \$PPID"}, "10": {"shell": "$segv"}}), 'single');
	outcome_is('six', 40, 1, 2, 3, 7, 8, 10);
	unlocks_are('six', 40);
});

# --- on a retry
restarts_are('retry', 2, sub {
	submit('retry', 20, qq({"3": {"error": true}, "7": {"error": true, "shell": "$segv"}, "9": {"error": true}}));
	batch_is($node, 'retry');
	is($node->safe_psql('postgres', "SELECT a.attempt, a.message FROM redrive.failure_attempts AS a JOIN redrive.batch_progress AS b USING (batch_id) WHERE b.label = 'retry' AND a.item_no = 7 ORDER BY a.attempt"),
		"1|not yet\n2|the item crashed the server 2 times", 'retry: its attempts are known');
	outcome_is('retry', 20, 7);
	unlocks_are('retry', 20);
});

# --- two batches at once: the other one has an item that waits
restarts_are('two batches', 2, sub {
	set_gate($node, 'innocent', 0);
	set_gate($node, 'both', 0);
	submit('innocent', 50, '{"25": {"wait": "innocent"}}');
	ok(poll_until($node, 'SELECT count(*) FROM redrive.workers WHERE item_no = 25', '1'), 'an executor is in the innocent item');
	submit('guilty', 50, qq({"30": {"wait": "both", "shell": "$segv"}}));
	ok(poll_until($node, 'SELECT count(*) FROM redrive.workers WHERE item_no = 30', '1'), 'another one is in the guilty item');
	set_gate($node, 'both', 1);
	ok(poll_until($node, "SELECT state FROM redrive.batch_progress WHERE label = 'guilty'", 'finished'), 'the guilty batch finishes');
	is(crashes('innocent'), '', 'the innocent item is not blamed');
	set_gate($node, 'innocent', 1);
	outcome_is('guilty', 50, 30);
	outcome_is('innocent', 50);
});

# --- an immediate shutdown, a postmaster that is killed, and one that is killed with
# all its children, blame nobody
set_gate($node, 'shutdown', 0);
submit('shutdown', 50, '{"25": {"wait": "shutdown"}}');
foreach my $how ('immediate shutdown', 'kill of the postmaster', 'kill of everything')
{
	ok(poll_until($node, 'SELECT count(*) FROM redrive.workers WHERE item_no = 25', '1'), "$how: an executor is in the item");
	if ($how eq 'immediate shutdown') { $node->stop('immediate'); }
	else { kill_postmaster($node, everything => $how eq 'kill of everything'); }
	$node->start;
	ok(poll_until($node, 'SELECT count(*) FROM redrive.workers WHERE item_no = 25', '1'), "$how: it runs again");
	is(crashes('shutdown'), '', "$how: nobody is blamed");
}
set_gate($node, 'shutdown', 1);
outcome_is('shutdown', 50);

# --- the file is gone, or garbage, when the server restarts
my $file = 'pg_stat_tmp/pg_redrive.crumbs';
foreach my $case ([ 'missing', "rm $file" ], [ 'torn', "echo torn > $file" ], [ 'garbage', "yes | head -c \$(stat -c %s $file) > x; mv x $file" ])
{
	my ($label, $command) = @$case;
	restarts_are($label, 2, sub {
		# more items than a claim that does not wait for the disk may have
		submit($label, 120, qq({"25": {"shell": "test -e $label || { touch $label; $command; }; $segv"}}));
		outcome_is($label, 120, 25);
	});
}

# --- one that is sent to an idle executor: its claim is lost with the server
restarts_are('sent', 2, sub {
	submit('warm up', 1, '{}');
	batch_is($node, 'warm up');
	submit('sent', 1, qq({"1": {"shell": "$segv"}}));
	outcome_is('sent', 1, 1);
});

# --- in a session instead of an executor
$node->append_conf('postgresql.conf', 'redrive.max_workers = 0');
$node->reload;
restarts_are('session', 2, sub {
	submit('session', 50, qq({"25": {"shell": "$segv"}}));
	foreach my $crash (1, 2)
	{
		ok(!defined((query($node, 'CALL redrive.work()'))[0]), "the session is lost, $crash");
		ok(poll_until($node, "SELECT count(*) FROM redrive.chunks WHERE state = 'running'", '0'), 'its chunk is rescued');
	}
	$node->safe_psql('postgres', 'CALL redrive.work()');
	outcome_is('session', 50, 25);
});
$node->append_conf('postgresql.conf', 'redrive.max_workers = 2');
$node->reload;

# --- the crash comes after the items, in a deferred trigger
$node->safe_psql(
	'postgres', q{
CREATE TABLE late (item int);
CREATE FUNCTION crash_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.item = 13 THEN
        PERFORM crash('kill -SEGV $PPID');
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION crash_late();
CREATE FUNCTION do_late(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (item.item_no, item.key);
    INSERT INTO late VALUES (item.item_no);
END $$;
SELECT redrive.create_handler('late', 'do_late');
});
restarts_are('late', 2, sub {
	submit('late', 30, '{}', 'late');
	outcome_is('late', 30, 13);
});

# --- callbacks: on_unlock where items are recorded, and on_finish
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION crash_in_unlock(key text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO unlocked VALUES (key);
    IF key = 'unlock 12' THEN
        PERFORM crash('kill -SEGV $PPID');
    END IF;
END $$;
CREATE FUNCTION crash_at_end(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS $$ SELECT public.crash('kill -SEGV $PPID') $$;
SELECT redrive.create_handler('unlock', 'do_item', on_unlock => 'crash_in_unlock');
SELECT redrive.create_handler('finish', 'do_item', on_finish => 'crash_at_end');
});
my $stopped = q{SELECT count(*) FROM redrive.callbacks WHERE crash_count = 2 AND next_attempt_at IS NULL};
restarts_are('unlock', 2, sub {
	submit('unlock', 20, '{}', 'unlock');
	ok(poll_until($node, $stopped, '1'), 'on_unlock of the item is not tried a third time');
	is(crashes('unlock'), '12:1', 'unlock: the item is known');
	batch_is($node, 'unlock');
	unlocks_are('unlock', 19);
	is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note LIKE 'unlock %'"), '20|20', 'all items are done');
	verified_ok($node, 'unlock');
});
restarts_are('finish', 2, sub {
	submit('finish', 20, '{}', 'finish');
	ok(poll_until($node, $stopped, '2'), 'on_finish is not tried a third time');
	outcome_is('finish', 20);
});

# --- a fresh chance, when the cause is mended
set_gate($node, 'cured', 1);
$node->safe_psql('postgres', "SELECT redrive.redrive(batch_id) FROM redrive.batch_progress WHERE label = 'six'");
batch_is($node, 'six');
is($node->safe_psql('postgres', "SELECT succeeded, failed FROM redrive.batch_progress WHERE label = 'six'"), '40|0', 'redriven items are run again');
is(crashes('six'), '', 'their crashes are forgotten');
set_gate($node, 'cured', 0);

# --- no restart after a crash: whoever starts the server again goes on where it was
$node->append_conf('postgresql.conf', "restart_after_crash = off\nredrive.max_workers = 0");
$node->reload;
submit('manual', 50, qq({"25": {"shell": "$segv"}}));
foreach my $crash (1, 2)
{
	my ($postmaster) = split /\n/, slurp_file($node->data_dir . '/postmaster.pid');

	$node->append_conf('postgresql.conf', 'redrive.max_workers = 2');
	$node->reload;
	ok(wait_for_exit($postmaster), "the server ends, $crash");
	$node->stop('immediate', fail_ok => 1);
	# pg_ctl shall see it run before it ends again
	$node->append_conf('postgresql.conf', 'redrive.max_workers = 0');
	$node->start;
}
$node->append_conf('postgresql.conf', 'redrive.max_workers = 2');
$node->reload;
outcome_is('manual', 50, 25);

# --- without preload nobody can tell, and nobody tries again by himself
$node->append_conf('postgresql.conf', "restart_after_crash = on\nshared_preload_libraries = ''");
$node->restart;
restarts_are('not preloaded', 1, sub {
	submit('not preloaded', 50, qq({"25": {"shell": "$segv"}}));
	ok(!defined((query($node, 'CALL redrive.work()'))[0]), 'the session is lost');
	ok(poll_until($node, q{SELECT count(*) FROM redrive.stale_batches WHERE reason = 'orphaned'}, '1'), 'its chunk waits for the next call');
	is(crashes('not preloaded'), '', 'nobody is blamed');
	$node->safe_psql('postgres', q{SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE label = 'not preloaded'});
	$node->safe_psql('postgres', 'CALL redrive.work()');
	is($node->safe_psql('postgres', "SELECT state, succeeded + cancelled, failed FROM redrive.batch_progress WHERE label = 'not preloaded'"), 'cancelled|50|0', 'it can be cancelled');
	verified_ok($node, 'not preloaded');
});

$node->stop;
done_testing();
