# pg_cron runs the passes for real.  Takes up to a minute or two of waiting and
# hardly any work, so it has a file of its own, to run beside others.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('cron');
my $err;

# --- what schedule_passes says when it cannot work
$node->psql('postgres', 'SELECT redrive.schedule_passes()', stderr => \$err);
like($err, qr/extension "pg_cron" does not exist/, 'pg_cron is not created yet');
like($err, qr/HINT:.*CREATE EXTENSION pg_cron/, '... the hint tells what to do');

$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION pg_redrive');
$node->psql('other', 'SELECT redrive.schedule_passes()', stderr => \$err);
like($err, qr/pg_cron is in another database/, 'pg_cron is in another database');
my ($statements) = $err =~ /HINT:[^\n]*and run:\n(.*;)/s;
like($statements // '', qr/cron\.schedule_in_database/, '... the hint has the statements to run there');

# --- failed items that wait for the pass
$node->safe_psql(
	'postgres', q{
CREATE EXTENSION pg_cron;
CREATE FUNCTION second_time(item redrive.item) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF item.attempt = 1 THEN
        RAISE EXCEPTION 'not yet';
    END IF;
END $$;
SELECT redrive.create_handler('work', 'second_time', retry_delay => NULL);
SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 10) AS i), label => 'work');
});
batch_is($node, 'work', 'retrying');
is($node->safe_psql('postgres', 'SELECT reason FROM redrive.stale_batches'), 'failed_recently', 'the batch waits for the pass');

# --- both databases are scheduled, the other one by the statements of the hint
is( $node->safe_psql('postgres', 'SELECT job_name, schedule FROM redrive.schedule_passes() ORDER BY 1'),
	"pg_redrive purge|7 * * * *\npg_redrive push_tasks|* * * * *\npg_redrive rescue_stale|* * * * *\npg_redrive retry_failed|* * * * *",
	'the passes are scheduled');
$node->safe_psql('postgres', 'SELECT redrive.schedule_passes()');
is($node->safe_psql('postgres', 'SELECT count(*) FROM cron.job'), '4', 'twice is once');
$node->safe_psql('postgres', $statements // '');
is($node->safe_psql('postgres', "SELECT count(*) FROM cron.job WHERE database = 'other'"), '4', 'the passes of the other database are scheduled');

# --- the next full minute
ok( poll_until(
		$node, q{SELECT count(DISTINCT j.jobid) FROM cron.job AS j JOIN cron.job_run_details AS d ON d.jobid = j.jobid
		    WHERE d.status = 'succeeded' AND j.jobname LIKE '%retry_failed%'},
		'2', timeout => 200),
	'pg_cron ran the pass in both databases');
is($node->safe_psql('postgres', "SELECT DISTINCT status FROM cron.job_run_details WHERE status NOT IN ('running', 'starting', 'succeeded', 'sending', 'connecting')"),
	'', 'no run failed');
batch_is($node, 'work');
is($node->safe_psql('postgres', 'SELECT run_no, succeeded FROM redrive.batch_progress'), '2|10', 'the pass started a second run');
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.pass_history WHERE pass = 'rescue_stale'", 't', dbname => 'other'),
	'the history of the other database shows its passes');
is( $node->safe_psql('postgres', "SELECT DISTINCT pass FROM redrive.pass_history WHERE acted > 0"),
	'retry_failed', 'the history shows the pass that acted');
verified_ok($node, 'after the passes');

# --- and off again
$node->safe_psql('postgres', 'SELECT redrive.unschedule_passes()');
is($node->safe_psql('postgres', "SELECT count(*), min(database) FROM cron.job"), '4|other', 'unscheduled here, not in the other database');
$node->psql('other', 'SELECT redrive.unschedule_passes()', stderr => \$err);
($statements) = $err =~ /HINT:[^\n]*and run:\n(.*;)/s;
$node->safe_psql('postgres', $statements // '');
is($node->safe_psql('postgres', "SELECT count(*) FROM cron.job"), '0', 'unscheduled there by the statements of the hint');

$node->stop;
done_testing();
