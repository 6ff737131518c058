# Memory of long-lived processes: an executor that does a million items, of which
# 10 000 fail, and the supervisor over 10 000 batches.  After a warm-up their private
# memory stays as it is.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

plan skip_all => 'memory cannot be measured here' if !defined private_kb($$);

my $slack = 512;				# kB
my $node = new_node('memory', conf => "redrive.max_workers = 1\njit = off\nsynchronous_commit = off\nautovacuum = off");

# Watch the process of that kind until so many are counted by the query; return the highest memory of the first fifth,
# and of what came after.
sub peaks
{
	my ($kind, $progress, $total) = @_;
	my ($early, $late, $done, $pid) = (0, 0, 0);
	my $end = time() + 120;
	my %pids;

	while ($done < $total && time() < $end)
	{
		($pid, $done) = split /\|/, $node->safe_psql('postgres',
			"SELECT (SELECT a.pid FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive $kind' LIMIT 1), ($progress)");
		if (my $kb = $pid && private_kb($pid))
		{
			$pids{$pid} = 1;
			if ($done < $total / 5) { $early = $kb if $kb > $early }
			else { $late = $kb if $kb > $late }
		}
	}
	is($done, $total, "$kind: all is done");
	is(scalar keys %pids, 1, "$kind: one process did it");
	cmp_ok($early, '>', 0, "$kind: it was seen early");
	cmp_ok($late, '>', 0, "$kind: it was seen late");
	return ($early, $late);
}

# --- an executor
# Seen red: with 4 kB more in TopMemoryContext for each interval (run_interval).
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION do_item(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.item_no % 100 = 0 THEN
        RAISE EXCEPTION 'no good: %', item.item_no USING ERRCODE = '22023';
    END IF;
END $$;
SELECT redrive.create_handler('work', 'do_item', commit_interval => '50 ms');
SELECT redrive.submit_query('work', 'SELECT NULL::text AS key, to_jsonb(g) AS payload FROM generate_series(1, 1000000) AS g', label => 'million');
});
my ($early, $late) = peaks('executor', "SELECT succeeded + failed FROM redrive.batch_progress WHERE label = 'million'", 1_000_000);
cmp_ok($late, '<=', $early + $slack, "executor: memory stays flat ($early kB, then $late kB)");
is($node->safe_psql('postgres', "SELECT succeeded, failed FROM redrive.batch_progress WHERE label = 'million'"), '990000|10000', 'the million is done');

# --- the supervisor
# Seen red: with 1 kB more in TopMemoryContext for each turn of its loop.
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION note_finish(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('small', 'do_item', on_finish => 'note_finish');
-- never many at a time: what a turn has to do at once takes memory too
CREATE PROCEDURE send_many(n int) LANGUAGE plpgsql AS $$
DECLARE
    v_batch bigint;
    v_state redrive.batch_state;
BEGIN
    FOR i IN 1 .. n LOOP
        v_batch := redrive.submit('small', ARRAY['1', '2']::jsonb[]);
        COMMIT;
        IF i % 50 = 0 THEN
            CALL redrive.wait(v_batch, NULL, v_state);
        END IF;
    END LOOP;
END $$;
});
my $sender = $node->background_psql('postgres');
$sender->query_until(qr/sending/, "\\echo sending\nCALL send_many(10000);\n");
($early, $late) = peaks('supervisor', "SELECT count(*) FROM redrive.batches WHERE handler_id = (SELECT handler_id FROM redrive.handlers WHERE name = 'small') AND state = 'finished'", 10_000);
cmp_ok($late, '<=', $early + $slack, "supervisor: memory stays flat ($early kB, then $late kB)");
$sender->quit;

verified_ok($node, 'memory');
$node->stop;
done_testing();
