# Metrics: the exporter reads every query as a monitor, its numbers are those of the views, and the alerts fire when they should.
# Fails if a column that a query names goes away, or a monitor may not read it.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $metrics = "$FindBin::Bin/../../metrics";
my $exporter = '/usr/bin/prometheus-postgres-exporter';

SKIP:
{
	skip 'promtool is not installed', 2 unless -x '/usr/bin/promtool';
	my ($out, $err);
	foreach my $command ([ 'check', 'rules', "$metrics/alerts.yml" ], [ 'test', 'rules', "$metrics/alerts_test.yml" ])
	{
		my $ok = IPC::Run::run([ '/usr/bin/promtool', @$command ], '<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(60));
		ok($ok, "promtool $command->[0] $command->[1]") or diag("$out$err");
	}
}

# every metric that the alerts name is one of the queries', and is explained
my %defined;
{
	my ($query, $column);
	foreach my $line (split /\n/, slurp_file("$metrics/queries.yaml"))
	{
		$query = $1 if $line =~ /^(\w+):$/;
		$defined{"${query}_$1"} = 1 if $line =~ /^    - (\w+): \{usage: GAUGE/;
	}
}
my %used = map { $_ => 1 } slurp_file("$metrics/alerts.yml") =~ /\b(pg_redrive_\w+)/g;
is(join(', ', grep { !$defined{$_} } sort keys %used), '', 'the alerts use metrics that exist');
my $doc = slurp_file("$FindBin::Bin/../../docs/metrics.md");
is(join(', ', grep { index($doc, "`$_`") < 0 } sort keys %defined), '', 'docs/metrics.md explains each metric');
is(join(', ', grep { index($doc, "`$_`") < 0 } slurp_file("$metrics/alerts.yml") =~ /alert: (\w+)/g), '', 'docs/metrics.md explains each alert');

SKIP:
{
	skip 'prometheus-postgres-exporter is not installed', 1 unless -x $exporter;
	my $node = new_node('metrics', conf => "redrive.max_workers = 1\n");
	$node->safe_psql('postgres', <<'SQL');
CREATE ROLE watcher LOGIN;
SELECT redrive.grant_monitor('watcher');
CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF payload ->> 'n' = '3' THEN
        RAISE EXCEPTION 'no';
    END IF;
END
$$;
SELECT redrive.create_handler('approve', 'approve', retry_delay => '1 h');
SELECT redrive.submit_query('approve', 'SELECT NULL::text, jsonb_build_object(''n'', n) FROM generate_series(1, 50) AS n', label => 'first');
SELECT redrive.submit_query('approve', 'SELECT NULL::text, ''{}''::jsonb FROM generate_series(1, 7)', label => 'tomorrow', run_at => now() + interval '1 day');
SELECT redrive.rescue_stale();
-- on purpose: nobody has to be woken
SELECT redrive.create_handler('resting', 'approve', start_timeout => '1 ms');
SELECT redrive.pause_handler('resting');
SELECT redrive.submit('resting', ARRAY['{}']::jsonb[]);
BEGIN;
SELECT redrive.create_platform('crm', 'https://crm.example/');
SELECT redrive.pause_platform('crm');
COMMIT;
SELECT redrive.record_task('form ' || n, 'secret status') FROM generate_series(1, 12) AS n;
SQL
	# it ends what pushers before it have claimed
	ok(poll_until($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'redrive pusher' AND state = 'idle'"), 'the pusher has begun');
	$node->safe_psql('postgres', <<'SQL');
-- what the pusher would write: 3 under way, 4 waiting, 2 given up; 5 attempts five minutes ago, of which one was delivered
WITH u AS (SELECT push_id, row_number() OVER (ORDER BY push_id) AS n FROM redrive.pushes)
UPDATE redrive.pushes AS p SET state = CASE WHEN n <= 7 THEN 'waiting' WHEN n <= 9 THEN 'dead' ELSE 'pending' END::redrive.push_state,
    message = 'secret message',
    next_attempt_at = now() + CASE WHEN n <= 7 THEN interval '1 h' ELSE interval '-10 min' END
FROM u WHERE u.push_id = p.push_id;
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT min(platform_id), 1, false, now(), now() + interval '1 h', array_agg(push_id), array_agg(wanted_version)
FROM (SELECT push_id, platform_id, wanted_version FROM redrive.pushes ORDER BY push_id LIMIT 3) AS u;
INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe, message)
SELECT r.part, push_id, 1, platform_id, 1, now() - interval '3 min', now() - interval '2 min', push_id = min(push_id) OVER (), true, false, 'secret message'
FROM redrive.pushes CROSS JOIN redrive.rotation AS r ORDER BY push_id LIMIT 5;
UPDATE redrive.platform_states SET breaker = 'open', reason = 'it answers 503';
SQL
	ok(poll_until($node, "SELECT succeeded = 49 FROM redrive.batch_progress WHERE label = 'first'"), 'a batch has run');

	my ($reasons) = slurp_file("$metrics/queries.yaml") =~ /unnest\(ARRAY\[([^]]*)\]\) AS r \(reason\)/;
	is(join(' ', sort $reasons =~ /'(\w+)'/g), $node->safe_psql('postgres', q{SELECT string_agg(DISTINCT m[1], ' ' ORDER BY m[1]) FROM regexp_matches(pg_get_viewdef('redrive._stale'), 'SELECT ''(\w+)''::text', 'g') AS m}),
		'each reason for which a batch can be stale is asked for');

	my $port = PostgreSQL::Test::Cluster::get_free_port();
	local $ENV{DATA_SOURCE_NAME} = 'user=watcher host=' . $node->host . ' port=' . $node->port . ' dbname=postgres sslmode=disable';
	my $log = '';
	my $process = IPC::Run::start([ $exporter, "--web.listen-address=127.0.0.1:$port", "--extend.query-path=$metrics/queries.yaml", '--disable-default-metrics', '--disable-settings-metrics' ],
		'<', \undef, '>', \$log, '2>&1', IPC::Run::timeout(120));
	my $page = wait_for_page($port, '/metrics');
	$process->kill_kill;

	is_deeply([ grep { $page !~ /^$_\{/m } sort keys %defined ], [], 'every metric is there') or diag($log);
	like($page, qr/^pg_exporter_last_scrape_error 0$/m, 'no query failed') or diag($log);
	my $value = sub {
		my ($name, $labels) = @_;
		my ($v) = $page =~ /^\Q$name\E\{[^}]*\Q$labels\E[^}]*\} (\S+)$/m;
		return $v;
	};
	is($value->('pg_redrive_queue_delayed', 'handler="approve"'), 7, 'items that are not due');
	is($value->('pg_redrive_queue_waiting_retry', 'handler="approve"'), 1, 'items that wait for a retry');
	is($value->('pg_redrive_batches_live', 'state="retrying"'), 1, 'batches that are retrying');
	is($value->('pg_redrive_stale_batches', 'reason="orphaned"'), 0, 'no stale batch');
	# seen red: with all of stale_batches it is 1, and RedriveStale fires while somebody rests
	is($value->('pg_redrive_stale_batches', 'reason="never_started"'), 0, 'a batch that waits as its handler is paused is not stale to the alert');
	is($value->('pg_redrive_workers_executors', ''), 1, 'one executor');
	is($value->('pg_redrive_pass_age_seconds', 'pass="purge"'), '+Inf', 'a pass that never ran');
	cmp_ok($value->('pg_redrive_pass_age_seconds', 'pass="rescue_stale"'), '<', 600, 'a pass that did');
	is($value->('pg_redrive_platform_due', 'platform="crm"'), 3, 'pushes that are due');
	cmp_ok($value->('pg_redrive_platform_oldest_due_seconds', 'platform="crm"'), '>=', 600, 'since when');
	is($value->('pg_redrive_platform_in_flight', 'platform="crm"'), 3, 'pushes under way');
	is($value->('pg_redrive_platform_waiting', 'platform="crm"'), 4, 'pushes that wait');
	is($value->('pg_redrive_platform_dead', 'platform="crm"'), 2, 'pushes that were given up');
	is($value->('pg_redrive_platform_breaker_open', 'platform="crm"'), 1, 'the breaker');
	is($value->('pg_redrive_platform_paused', 'platform="crm"'), 1, 'the platform is paused');
	is($value->('pg_redrive_platform_recent_attempts', 'platform="crm"'), 5, 'attempts');
	is($value->('pg_redrive_platform_recent_failed', 'platform="crm"'), 4, 'failed attempts');
	is($value->('pg_redrive_pass_age_seconds', 'pass="push_tasks"'), '+Inf', 'the pass of the pushes never ran');
	unlike($page, qr/secret|form \d/, 'no statuses, messages or keys');
	$node->stop;
}

done_testing();
