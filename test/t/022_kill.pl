# Processes are killed, cancelled and stopped at random moments of a run of many
# small batches.  Whatever it was: everything ends, each item once, and the
# handlers' own tables, the counters and the locks agree.
#
#   REDRIVE_SEEDS=200   so many moments instead of 20 (scripts/nightly)
#   REDRIVE_SEED=7      this one only: the number that a failure names
#
# Seen red: without the watermark ("done_to = $3" in the fence of
# src/flow/record.c) items are done twice; with exit code 0 of a terminated launcher
# (src/proc/launcher.c) nothing runs once the supervisor is gone as well; without the
# look for the next attempt in redrive._fold a retry is forgotten.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my @seeds = defined $ENV{REDRIVE_SEED} ? ($ENV{REDRIVE_SEED}) : (1 .. ($ENV{REDRIVE_SEEDS} || 20));
my $batches = 40;
my $node = new_node('kill', conf => "redrive.max_workers = 3\njit = off");

create_await($node);

# What an item does is told by its number n: every 17th is ignored, every 23rd
# fails for good, every 7th and 11th fails once or twice before it succeeds.
$node->safe_psql(
	'postgres', q{
CREATE TABLE orders (seed int NOT NULL, no int NOT NULL, handler text NOT NULL, items int NOT NULL);
CREATE TABLE effects (seed int NOT NULL, no int NOT NULL, n int NOT NULL);
CREATE TABLE called (what text NOT NULL, key text, batch_id bigint);
CREATE FUNCTION ending(n int) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$SELECT CASE WHEN n % 17 = 3 THEN 'ignored' WHEN n % 23 = 5 THEN 'failed' ELSE 'succeeded' END$$;
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    n int := item.payload->>'n';
BEGIN
    INSERT INTO public.effects VALUES ((item.payload->>'seed')::int, (item.payload->>'no')::int, n);
    IF n % 13 = 1 THEN
        PERFORM pg_sleep(0.001); -- slow handler
    END IF;
    IF public.ending(n) = 'ignored' THEN
        PERFORM redrive.raise_validation('not wanted');
    ELSIF public.ending(n) = 'failed' THEN
        RAISE EXCEPTION 'no good' USING ERRCODE = '22023';
    ELSIF item.attempt <= (n % 7 = 2)::int + (n % 11 = 4)::int THEN
        RAISE EXCEPTION 'not yet';
    END IF;
END $$;
CREATE FUNCTION note_unlock(key text) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.called (what, key) VALUES ('unlock', key)$$;
CREATE FUNCTION note_finish(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS
    $$INSERT INTO public.called (what, batch_id) VALUES ('finish', batch_id)$$;
SELECT redrive.create_handler('plain', 'do_item', max_retries => 20, retry_delay => '10 ms', retry_factor => 1,
    on_finish => 'note_finish');

CREATE ROLE app LOGIN;
SELECT redrive.grant_user('app');
GRANT ALL ON effects, called TO app;
SET ROLE app;
SELECT redrive.create_handler('keyed', 'do_item', max_retries => 20, retry_delay => '10 ms', retry_factor => 1,
    on_unlock => 'note_unlock', on_finish => 'note_finish');
SELECT redrive.create_handler('alone', 'do_item', max_retries => 20, retry_delay => '10 ms', retry_factor => 1,
    isolation => 'item', on_finish => 'note_finish');
RESET ROLE;

-- one transaction per batch; again after a crash, for those that were lost
CREATE PROCEDURE submit_orders(p_seed int) LANGUAGE plpgsql AS $$
DECLARE
    o record;
BEGIN
    FOR o IN SELECT *, seed || ' ' || no AS name FROM orders WHERE seed = p_seed ORDER BY no LOOP
        PERFORM redrive.submit(o.handler,
            ARRAY(SELECT jsonb_build_object('seed', o.seed, 'no', o.no, 'n', n) FROM generate_series(1, o.items) AS n),
            CASE WHEN o.handler = 'keyed' THEN ARRAY(SELECT o.name || ' ' || n FROM generate_series(1, o.items) AS n) END,
            label => o.name, idempotency_key => o.name);
        COMMIT;
    END LOOP;
END $$;

-- everything that is not as it shall be after a seed
CREATE FUNCTION problems(p_seed int) RETURNS SETOF text LANGUAGE sql AS $$
    WITH wanted AS (
        SELECT o.no, o.handler, n, ending(n) FROM orders AS o CROSS JOIN LATERAL generate_series(1, o.items) AS n WHERE o.seed = p_seed),
    batch AS (
        SELECT * FROM redrive.batch_progress WHERE label LIKE p_seed || ' %')
    SELECT format('item %s of batch %s %s', n, no, CASE WHEN done > 1 THEN 'done ' || done || ' times' WHEN done = 1 THEN 'done' ELSE 'lost' END)
    FROM (SELECT no, n, sum(wanted) AS wanted, sum(done) AS done
          FROM (SELECT no, n, 1 AS wanted, 0 AS done FROM wanted WHERE ending = 'succeeded'
                UNION ALL SELECT no, n, 0, 1 FROM effects WHERE seed = p_seed) AS u
          GROUP BY no, n) AS x
    WHERE wanted <> done
    UNION ALL
    SELECT format('batch %s: %s, %s succeeded, %s ignored, %s failed', w.no, b.state, b.succeeded, b.ignored, b.failed)
    FROM (SELECT no, count(*) AS total, count(*) FILTER (WHERE ending = 'succeeded') AS succeeded, count(*) FILTER (WHERE ending = 'ignored') AS ignored
          FROM wanted GROUP BY no) AS w
    LEFT JOIN batch AS b ON b.label = p_seed || ' ' || w.no
    WHERE (b.state::text, b.total, b.succeeded, b.ignored, b.failed)
        IS DISTINCT FROM ('finished', w.total, w.succeeded, w.ignored, w.total - w.succeeded - w.ignored)
    UNION ALL
    SELECT format('item %s of batch %s failed, reason %s: %s', f.item_no, b.label, f.reason, f.message)
    FROM redrive.failed_items AS f JOIN batch AS b USING (batch_id) WHERE f.state = 'failed' AND f.reason <> 'non_retryable'
    UNION ALL
    SELECT format('%s keys unlocked, %s distinct, %s wanted', count(c.key), count(DISTINCT c.key), (SELECT count(*) FROM wanted WHERE handler = 'keyed'))
    FROM called AS c WHERE c.what = 'unlock' AND c.key LIKE p_seed || ' %'
    HAVING (count(c.key), count(DISTINCT c.key)) IS DISTINCT FROM (SELECT (count(*), count(*)) FROM wanted WHERE handler = 'keyed')
    UNION ALL
    SELECT format('on_finish of batch %s called %s times', b.label, count(c.batch_id))
    FROM batch AS b LEFT JOIN called AS c ON c.batch_id = b.batch_id GROUP BY b.label HAVING count(c.batch_id) <> 1
    UNION ALL
    SELECT format('%s locks left', count(*)) FROM redrive.locks HAVING count(*) > 0
    UNION ALL
    SELECT format('chunk %s is %s, folded %s', chunk_id, state, folded) FROM redrive.chunks WHERE NOT folded
    UNION ALL
    SELECT format('batch %s is stale: %s', batch_id, reason) FROM redrive.stale_batches
    UNION ALL
    SELECT format('batch %s: %s expected %s, actual %s', v.batch_id, v.check_name, v.expected, v.actual)
    FROM batch AS b CROSS JOIN LATERAL redrive.verify(b.batch_id) AS v WHERE NOT v.ok
$$;
});

# What may happen, to a process of this kind or to the server.
my @faults = (
	[ 'KILL', 'executor' ],
	[ 'KILL', 'executor' ],
	[ 'KILL', 'supervisor' ],
	[ 'KILL', 'launcher' ],
	[ 'KILL', 'postmaster' ],
	[ 'cancel', 'executor' ],
	[ 'cancel', 'supervisor' ],
	[ 'terminate', 'executor' ],
	[ 'terminate', 'supervisor' ],
	[ 'terminate', 'launcher' ],
	[ 'stop', 'fast' ],
	[ 'stop', 'immediate' ]);

# Run psql without waiting for it; it may die with the server.
sub background
{
	my ($sql) = @_;
	my $ignored = '';
	return IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', $sql ],
		'<', \undef, '>', \$ignored, '2>', \$ignored);
}

# Submit the batches of a seed, do something bad in the middle, look.
sub run_seed
{
	my ($seed) = @_;

	srand($seed);
	my @sizes = map { 1 + int(rand(30)) } 1 .. $batches;
	my ($what, $whom) = @{ $faults[ rand(@faults) ] };
	my $values = join(', ', map { "($seed, $_, '" . (qw(plain keyed alone))[ rand(3) ] . "', $sizes[$_ - 1])" } 1 .. $batches);
	my $total = $node->safe_psql('postgres',
		"INSERT INTO orders VALUES $values;
		 SELECT sum(items) FILTER (WHERE ending(n) = 'succeeded') FROM (SELECT 1 AS items, n FROM orders CROSS JOIN LATERAL generate_series(1, items) AS n WHERE seed = $seed) AS x");
	my $moment = int(rand($total));

	my $submitter = background("CALL submit_orders($seed)");
	my $pid = $node->safe_psql('postgres',
		"CALL await('SELECT count(*) >= $moment FROM effects WHERE seed = $seed');
		 SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive $whom' ORDER BY pid LIMIT 1");
	if ($whom eq 'postmaster')
	{
		kill_postmaster($node);
		$node->start;
	}
	elsif ($what eq 'stop')
	{
		$node->stop($whom);
		$node->start;
	}
	elsif ($pid ne '' && $what eq 'KILL')
	{
		kill('KILL', $pid);
		wait_for_exit($pid) or die "process $pid did not exit";
	}
	elsif ($pid ne '')
	{
		query($node, "SELECT pg_${what}_backend($pid)");
	}
	eval { $submitter->finish };
	my $name = "seed $seed: $what $whom" . ($pid eq '' && $what ne 'stop' && $whom ne 'postmaster' ? ' (none there)' : '')
	  . " after $moment of $total items";

	ok(poll_until($node, 'SELECT true'), 'the server is up') or return;
	query($node, "CALL submit_orders($seed)");
	my $ended = poll_until($node,
		"SELECT count(*) FILTER (WHERE state = 'finished') || ' finished, ' || (SELECT count(*) FROM redrive.callbacks) || ' callbacks left'
		 FROM redrive.batch_progress WHERE label LIKE '$seed %'",
		"$batches finished, 0 callbacks left");
	is($node->safe_psql('postgres', "SELECT problems($seed)"), '', $name) && $ended
	  or diag("run it alone with REDRIVE_SEED=$seed");
	return;
}

run_seed($_) foreach @seeds;
verified_ok($node, 'after all seeds');

$node->stop;
done_testing();
