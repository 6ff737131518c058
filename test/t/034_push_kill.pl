# Pushes while processes are killed and stopped at random moments, a standby is promoted, and file descriptors run out.  The log of
# the receiver is the truth: nothing is lost, what comes twice has the same id, there are no more attempts than allowed, and the
# versions of a task come in order.
#
# Seen red: with the number of the attempt in the id (flow/push.c).
#
#   REDRIVE_SEEDS=200   so many moments instead of 5 (scripts/nightly)
#   REDRIVE_SEED=7      this one only: the number that a failure names
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my @seeds = defined $ENV{REDRIVE_SEED} ? ($ENV{REDRIVE_SEED}) : (1 .. ($ENV{REDRIVE_SEEDS} || 5));
my $tasks = 150;
our $retries = 3;
my $receiver = start_receiver();
my @faults = (
	[ 'KILL', 'pusher' ], [ 'KILL', 'pusher' ], [ 'KILL', 'postmaster' ], [ 'stop', 'fast' ], [ 'stop', 'immediate' ],
	[ 'terminate', 'pusher' ], [ 'cancel', 'pusher' ], [ 'KILL', 'supervisor' ]);

# Record all tasks in a version; the same again changes nothing.
sub record_tasks
{
	my ($node, $version) = @_;

	return query($node, "SELECT count(redrive.record_task('t' || n, 'version $version')) FROM generate_series(1, $tasks) AS n");
}

# Everything about the requests to these paths that is not as it shall be.
sub problems
{
	my ($latest, @paths) = @_;
	my @problems;

	foreach my $path (@paths)
	{
		my (%ids, %times, %last);

		foreach my $r (received($receiver, $path))
		{
			my ($task) = $r->{body} =~ /"task_key" : "(\w+)"/;
			my $version = $r->{sequence};

			$ids{"$task $version"}{ $r->{id} } = 1;
			$times{"$task $version"}++;
			push @problems, "$path: version $version of $task after $last{$task}" if $version < ($last{$task} // 0);
			$last{$task} = $version;
		}
		push @problems, map { "$path: $_ under several ids" } grep { keys %{ $ids{$_} } > 1 } sort keys %ids;
		push @problems, map { "$path: $_ came $times{$_} times" } grep { $times{$_} > $retries + 1 } sort keys %times;
		push @problems, map { "$path: t$_ has not arrived" } grep { ($last{"t$_"} // 0) != $latest } 1 .. $tasks;
	}
	return join("\n", @problems);
}

# Are all pushes delivered, in the last version?
sub all_delivered
{
	my ($node, $name) = @_;

	return ok( poll_until($node,
			"SELECT count(*) FILTER (WHERE u.state <> 'delivered' OR u.pushed_version <> t.version) || ' of ' || (count(*) > 0) FROM redrive.pushes AS u JOIN redrive.tasks AS t ON t.task_id = u.task_id",
			'0 of true'),
		"$name: everything is delivered")
	  || diag($node->safe_psql('postgres', "SELECT state, error_class, message, count(*) FROM redrive.pushes GROUP BY 1, 2, 3"));
}

my $node = new_node('push_kill', streaming => 1);

# Push two versions of all tasks, do something bad in the middle, look.
sub run_seed
{
	my ($seed) = @_;

	srand($seed);
	my ($what, $whom) = @{ $faults[ rand(@faults) ] };
	my $moment = 1 + int(rand(2 * $tasks));
	my $name = "seed $seed: $what $whom after $moment requests";
	my @paths = ("/ok/$seed", "/delay/0.01/$seed");

	$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
	platform($node, $receiver, $_, $_, "retry_interval => '10 ms', max_retries => $retries") foreach @paths;
	record_tasks($node, 1);
	ok(wait_for_request($receiver, qr{/$seed$}, $moment), "$moment requests");
	my ($pid) = query($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive $whom'");
	record_tasks($node, 2) if $seed % 2;
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
	elsif ($what eq 'KILL' && $pid)
	{
		kill('KILL', $pid);
		wait_for_exit($pid) or die "process $pid did not exit";
	}
	elsif ($pid)
	{
		query($node, "SELECT pg_${what}_backend($pid)");
	}
	ok(poll_until($node, 'SELECT true'), 'the server is up') or return;
	record_tasks($node, 2);
	my $ended = all_delivered($node, $name);
	is(problems(2, @paths), '', $name) && $ended or diag("run it alone with REDRIVE_SEED=$seed");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM (SELECT u.attempt_no - count(l.push_id) FROM redrive.pushes AS u LEFT JOIN redrive.push_log AS l ON l.push_id = u.push_id AND l.attempt_no <= u.attempt_no GROUP BY u.push_id, u.attempt_no HAVING count(l.push_id) > u.attempt_no) AS x'),
		0, "$name: no attempt is in the log twice");
	return;
}

run_seed($_) foreach @seeds;

# Whatever a platform does, when it is well again it gets the latest status of each task.
$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
append_to_file("$receiver->{dir}/chaos", '');
my @chaos = map { "/chaos/$_" } @seeds;
platform($node, $receiver, $_, $_, "retry_interval => '1 ms', max_retries => 1000, timeout => '300 ms', connect_timeout => '300 ms'") foreach @chaos;
my $version = 0;
foreach my $round (1 .. 8)
{
	record_tasks($node, ++$version);
	$node->safe_psql('postgres', 'SELECT redrive.resume_platform(name) FROM redrive.platforms');    # does not wait for its breaker
	ok(wait_for_request($receiver, qr{/chaos/}, 5 * @seeds * $round), "a platform goes mad, version $version");
}
unlink("$receiver->{dir}/chaos");
ok( poll_until($node,
		"SELECT count(redrive.resume_platform(p.name)) FILTER (WHERE s.breaker <> 'closed') * 0 + (SELECT count(*) FROM redrive.pushes AS u JOIN redrive.tasks AS t USING (task_id) WHERE u.state <> 'delivered' OR u.pushed_version <> t.version)
		 FROM redrive.platforms AS p JOIN redrive.platform_states AS s USING (platform_id)", '0'),
	'it is well again, and everything is delivered');
{
	local $retries = 1000;

	is(problems($version, @chaos), '', '... as it shall be');
}

# A standby is promoted while pushes are under way; the primary was killed.
$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('push_standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
my @paths = ('/ok/standby', '/delay/0.02/standby');
platform($node, $receiver, $_, $_, "retry_interval => '10 ms', max_retries => $retries") foreach @paths;
record_tasks($node, 1);
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
ok(wait_for_request($receiver, $paths[1], 20), 'pushes are under way');
kill_postmaster($node, everything => 1);
$standby->promote;
record_tasks($standby, 2);
all_delivered($standby, 'promotion');
is(problems(2, @paths), '', 'promotion');
$standby->stop;

# What was claimed is on disk before it is sent, also where commits do not wait for it.
#
# Seen red: with redrive_worker_end() alone in turn() (proc/pusher.c) the request that was under way is forgotten.
my $lazy = new_node('push_lazy', conf => "synchronous_commit = off\nwal_writer_delay = 10s\n");
platform($lazy, $receiver, 'lazy', '/delay/5/lazy', "retry_interval => '10 ms'");
$lazy->safe_psql('postgres', "SET synchronous_commit = on; SELECT redrive.record_task('t1', 'version 1')");
ok(wait_for_request($receiver, '/delay/5/lazy', 1), 'a push is under way');
kill_postmaster($lazy, everything => 1);
$lazy->start;
all_delivered($lazy, 'commits that do not wait');
is($lazy->safe_psql('postgres', 'SELECT count(*) FROM redrive.push_attempts'), scalar(received($receiver, '/delay/5/lazy')), '... and all attempts are in the log');
$lazy->stop;

# More pushes than file descriptors: our fault, so no retries are spent.
my $small = new_node('push_fds', conf => "max_files_per_process = 64\n");
@paths = map { "/delay/0.3/fds$_" } 1 .. 8;
platform($small, $receiver, $_, $_, 'max_retries => 0') foreach @paths;
$small->safe_psql('postgres', "SELECT redrive.record_task('t' || n, 'version 1') FROM generate_series(1, 12) AS n");
all_delivered($small, 'file descriptors');
cmp_ok($small->safe_psql('postgres', "SELECT count(*) FROM redrive.push_log WHERE error_class = 'ours' AND message ~ 'file descriptors'"), '>', 0, '... although they ran out');
is($small->safe_psql('postgres', "SELECT count(*) FROM redrive.push_log WHERE charged AND NOT delivered"), 0, '... which cost no retry');
is($small->safe_psql('postgres', "SELECT count(*) FROM redrive.platform_states WHERE breaker <> 'closed'"), 0, '... and opened no breaker');
$small->stop;
stop_receiver($receiver);
done_testing();
