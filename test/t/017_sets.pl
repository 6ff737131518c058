# Set handlers and processes that die: of the items of a call that crashed the
# server each is run alone, and the one that does it again is set aside.  The
# others are done, each once.
#
# Seen red: with CRUMB_ITEM for every call in redrive_run_segment of
# src/flow/segment.c the last item of the call is blamed for the crash of
# another one; with CRUMB_SUSPECT for sets too in redrive_judge_crumbs of
# src/base/crumbs.c only the last one is a suspect when all was killed.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('sets', conf => "fsync = off\nredrive.max_workers = 2\n");

create_effects($node);
$node->safe_psql(
	'postgres', q{
-- The shell's parent is the server process that executes the call.
CREATE FUNCTION crash() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    COPY (SELECT 1) TO PROGRAM 'kill -SEGV $PPID';
    RAISE 'it survived';
END $$;
-- {"i": 1, "crash": 2, "wait": "gate", "error": true}: crash = at this attempt and those behind it
CREATE FUNCTION do_items(items redrive.item[]) RETURNS SETOF redrive.outcome LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) SELECT (i.payload->>'i')::int, i.key FROM unnest(items) AS i WHERE i.attempt > 1 OR NOT i.payload ? 'error';
    PERFORM wait_for_gate(i.payload->>'wait') FROM unnest(items) AS i WHERE i.payload ? 'wait';
    PERFORM crash() FROM unnest(items) AS i WHERE i.attempt >= (i.payload->>'crash')::int;
    RETURN QUERY SELECT i.item_no, 'retry'::redrive.outcome_kind, 'not yet', 'LATER', '10 ms'::interval FROM unnest(items) AS i WHERE i.attempt = 1 AND i.payload ? 'error';
END $$;
CREATE TABLE unlocked (key text NOT NULL);
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS 'INSERT INTO public.unlocked VALUES (key)';
SELECT redrive.create_handler('sets', 'do_items', 'set', on_unlock => 'note_unlock', commit_interval => '1 min');
});

# Submit items 1 to n, all of them with something, and some with something else in their payload.
sub submit
{
	my ($label, $n, $all, $special) = @_;

	$node->safe_psql(
		'postgres', qq{
SELECT redrive.submit('sets',
    ARRAY(SELECT jsonb_build_object('i', i) || '$all' || coalesce('$special'::jsonb->i::text, '{}') FROM generate_series(1, $n) AS i),
    ARRAY(SELECT '$label ' || i FROM generate_series(1, $n) AS i), label => '$label')});
	return;
}

sub restarts
{
	return scalar(() = slurp_file($node->logfile) =~ /reinitializing$/mg);
}

# All items but the given ones are done, each once; those are in quarantine.
sub outcome_is
{
	my ($label, $n, @poison) = @_;
	my $good = $n - @poison;

	batch_is($node, $label);
	is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note LIKE '$label %'"),
		"$good|$good", "$label: nothing is lost, nothing done twice");
	is( $node->safe_psql(
			'postgres',
			"SELECT f.item_no, f.state, f.reason FROM redrive.failed_items AS f
			 JOIN redrive.batch_progress AS b USING (batch_id) WHERE b.label = '$label' ORDER BY f.item_no"),
		join("\n", map { "$_|failed|quarantined" } @poison),
		"$label: the poison items are in quarantine, and no others");
	ok(poll_until($node, "SELECT count(*), count(DISTINCT key) FROM unlocked WHERE key LIKE '$label %'", "$n|$n"),
		"$label: on_unlock was called for each key");
	verified_ok($node, $label);
	return;
}

# Wait until a worker is inside a call, at the gate; return its pid and the first item of the call.
sub in_call
{
	my $at_gate = q{FROM redrive.workers AS w JOIN pg_stat_activity AS a USING (pid) WHERE w.item_no > 0 AND a.wait_event = 'PgSleep'};

	# it looks at the gate again and again, so we may see it between two naps
	foreach my $look (1 .. 100)
	{
		poll_until($node, "SELECT count(*) $at_gate", 1) or last;
		my @row = split(/\|/, $node->safe_psql('postgres', "SELECT w.pid, w.item_no $at_gate"));
		return @row if @row;
	}
	die 'no worker came to the gate';
}

# --- by executors, without anything special
submit('good', 1000, '{}', '{}');
outcome_is('good', 1000);

# --- an item that crashes the server, somewhere in a call
my $before = restarts();
submit('one', 300, '{}', '{"50": {"crash": 1}}');
outcome_is('one', 300, 50);
is(restarts() - $before, 2, 'one: 2 restarts');

# --- at its second attempt only, when retries are given as an array
$before = restarts();
submit('retry', 100, '{"error": true}', '{"50": {"crash": 2}}');
outcome_is('retry', 100, 50);
is(restarts() - $before, 2, 'retry: 2 restarts');

# --- a worker that is killed from outside in a call of several items, all of them innocent
$node->safe_psql('postgres', "INSERT INTO gates VALUES ('shut', false)");
$before = restarts();
submit('killed', 100, '{}', '{"50": {"wait": "shut"}}');
my ($pid, $first) = in_call();
kill('KILL', $pid);
wait_for_exit($pid);
poll_until($node, 'SELECT 1', 1);
$node->safe_psql('postgres', 'UPDATE gates SET open = true');
outcome_is('killed', 100);
is(restarts() - $before, 1, 'killed: 1 restart');

# --- everything is killed: each item of the call is a suspect
$node->safe_psql('postgres', "UPDATE gates SET open = false");
submit('everything', 100, '{}', '{"50": {"wait": "shut"}}');
($pid, $first) = in_call();
kill_postmaster($node, everything => 1);
$node->start;
ok( poll_until(
		$node, "SELECT min(c.item_no), bool_and(c.crash_count = 0), bool_or(c.item_no = 50) FROM redrive.crashes AS c
		 JOIN redrive.batch_progress AS b USING (batch_id) WHERE b.label = 'everything' AND c.item_no >= $first", "$first|t|t"),
	'everything: all items of the call are suspects');
$node->safe_psql('postgres', "UPDATE gates SET open = true");
outcome_is('everything', 100);

$node->stop;
done_testing();
