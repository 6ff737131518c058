# Transactions that stay open: they hold up their own pushes and no others.
#
# Seen red: without the lock time-out in turn() of proc/pusher.c, waiting for the lock instead.
use strict;
use warnings;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;
use Time::HiRes qw(time);

my $node = new_node('push_locks');
my $receiver = start_receiver();
my $pushes = 'redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id JOIN redrive.tasks AS t ON t.task_id = u.task_id';
my $others = 0;

# Other tasks are pushed, for three seconds: the answer to what was under way comes in that time.
sub others_are_pushed
{
	my ($name) = @_;
	my $end = time() + 3;

	while (time() < $end)
	{
		$others++;
		$node->safe_psql('postgres', "SELECT redrive.record_task('other $others', 'first')");
		ok(poll_until($node, "SELECT bool_and(u.state = 'delivered') FROM $pushes WHERE t.task_key = 'other $others' AND p.name <> 'poisoned'", 't', timeout => 20), $name) or last;
	}
	return;
}

platform($node, $receiver, 'slow', '/held/200/recorded', "timeout => '3 min', lease => '4 min'");
$node->safe_psql('postgres', "SELECT redrive.record_task('held', 'first')");
ok(wait_for_request($receiver, '/held/200/recorded', 1), 'a push is under way');
is($node->safe_psql('postgres', 'SELECT redrive.redrive_push()'), 0, 'it cannot be wanted again');
$node->safe_psql('postgres', "BEGIN; SELECT redrive.record_task('held', 'second'); PREPARE TRANSACTION 'record'");
release($receiver, 'recorded');
platform($node, $receiver, 'fast', '/fast');
others_are_pushed('another task is pushed while a transaction has recorded one and is open');
is($node->safe_psql('postgres', "SELECT state FROM redrive.push_status WHERE task_key = 'held' AND platform = 'slow'"), 'in_flight', 'the push of that one is still under way');
# answers that cannot be stored are recorded apart, and so is what else is to be recorded with them
#
# Seen red: without redrive_limit_lock_wait() in redrive_record_apart (flow/push_held.c).
$node->safe_psql('postgres', "CREATE INDEX poison ON redrive.push_log ((1 / (response <> 'poison')::int))");
platform($node, $receiver, 'poisoned', '/json/poison');
others_are_pushed('... also beside an answer that cannot be stored');
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.push_attempts WHERE platform = 'poisoned' AND delivered AND response IS NULL"), 'there were such answers');
$node->safe_psql('postgres', "SELECT redrive.drop_platform('poisoned'); DROP INDEX redrive.poison");
$node->safe_psql('postgres', "BEGIN; SELECT redrive.resume_platform('fast'), redrive.resume_platform('slow'); PREPARE TRANSACTION 'resume'");
others_are_pushed('another task is pushed while a transaction has changed the platform and is open');
$node->safe_psql('postgres', "COMMIT PREPARED 'record'");
ok( poll_until($node, "SELECT bool_and(u.state = 'delivered' AND u.pushed_version = t.version) AND count(*) = 1 FROM $pushes WHERE t.task_key = 'held' AND p.name = 'slow'"),
	'at its end its push is recorded, and the new status is pushed');
is(join(' ', map { $_->{sequence} } grep { $_->{body} =~ /"held"/ } received($receiver, '/held/200/recorded')), '1 2', '... each once');
$node->safe_psql('postgres', "COMMIT PREPARED 'resume'");
is($node->safe_psql('postgres', "SELECT max(u.attempt_no) FROM $pushes WHERE t.task_key <> 'held'"), 1, 'no push of the others was tried twice');

# A push that is refused while its platform is being changed asks again: nobody else would come back to it.
#
# Seen red: without check_blocked in src/flow/push_record.c it stays blocked.
$node->safe_psql('postgres', "SELECT redrive.create_platform('changing', 'http://127.0.0.1:$receiver->{port}/ok', allow_http => true)");
$node->safe_psql('postgres', "BEGIN; SELECT redrive.alter_platform('changing', allow_cidr => '{127.0.0.0/8}'); PREPARE TRANSACTION 'change'");
$node->safe_psql('postgres', "SELECT redrive.record_task('refused', 'new')");
my $changing = "FROM redrive.pushes AS u JOIN redrive.platforms AS p USING (platform_id) JOIN redrive.tasks AS t USING (task_id) WHERE p.name = 'changing' AND t.task_key = 'refused'";
my $claim = "SELECT coalesce(max(u.last_claim_id), 0) $changing";
ok(poll_until($node, "SELECT ($claim) > 0"), 'refused while the platform is changed');
my $first = $node->safe_psql('postgres', $claim);
ok(poll_until($node, "SELECT u.last_claim_id > $first AND u.state <> 'blocked' $changing"), '... asks again');
is($node->safe_psql('postgres', "SELECT u.attempt_no $changing"), 0, '... which is no attempt');
$node->safe_psql('postgres', "COMMIT PREPARED 'change'");
ok(poll_until($node, "SELECT u.state = 'delivered' $changing"), '... and is delivered');

# The pusher ends while transactions have locked pushes that are under way: the next one does not send them again before it has ended
# the attempts of the last one, as soon as the locks are gone, and each attempt is in the log.
#
# Seen red: without unreaped in src/flow/push.c they are sent at once, and the first attempts are forgotten.
$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
platform($node, $receiver, 'lost', '/delay/5/lost', "retry_interval => '10 ms'");
$node->safe_psql('postgres', "SELECT redrive.record_task('same', 'first'), redrive.record_task('newer', 'first')");
ok(wait_for_request($receiver, '/delay/5/lost', 2), 'two pushes are under way');
$node->safe_psql('postgres', "BEGIN; SELECT redrive.record_task('$_', 'second'); PREPARE TRANSACTION '$_'") foreach qw(same newer);
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'redrive pusher'");
$node->safe_psql('postgres', "SELECT redrive.record_task('after', 'first')");
ok(poll_until($node, "SELECT state = 'delivered' FROM redrive.push_status WHERE task_key = 'after'"), 'the pusher ends, and another pushes');
is($node->safe_psql('postgres', "SELECT string_agg(task_key || ' ' || state, ', ' ORDER BY task_key) FROM redrive.push_status WHERE task_key IN ('same', 'newer')"),
	'newer in_flight, same in_flight', '... but not what is locked');
is(scalar(received($receiver, '/delay/5/lost')), 3, '... nor are they sent');
$node->safe_psql('postgres', "ROLLBACK PREPARED 'same'");
$node->safe_psql('postgres', "COMMIT PREPARED 'newer'");
ok(poll_until($node, "SELECT bool_and(state = 'delivered') FROM redrive.push_status WHERE task_key IN ('same', 'newer')", 't', timeout => 20), 'when the locks are gone they are');
is($node->safe_psql('postgres',
		"SELECT string_agg(concat_ws(' ', task_key, attempt_no, version, error_class, CASE WHEN charged THEN 'charged' END), ', ' ORDER BY task_key, attempt_no) FROM redrive.push_attempts WHERE task_key IN ('same', 'newer')"),
	'newer 1 1 unknown charged, newer 2 2, same 1 1 unknown charged, same 2 1', '... and the attempts of before are ended');
is($node->safe_psql('postgres', "SELECT string_agg(task_key || ' ' || retry_count, ', ' ORDER BY task_key) FROM redrive.push_status WHERE task_key IN ('same', 'newer')"),
	'newer 0, same 1', '... and charged, unless there is a new status');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.push_claims'), 0, '... and no claim is left');

# Tasks are recorded all the time, by transactions that overlap: a platform can be given a build function, and dropped.
#
# Seen red: without _stop_planning() in redrive._lock_platform (sql/45_platforms.sql).
$node->safe_psql('postgres', "SELECT redrive.pause_platform('lost'); CREATE FUNCTION body(task redrive.task) RETURNS jsonb LANGUAGE sql RETURN '{}'::jsonb");
my $script = PostgreSQL::Test::Utils::tempdir . '/record.sql';
append_to_file($script, "\\set ms random(20, 150)\nBEGIN;\nSELECT redrive.record_task('client ' || :client_id, random()::text);\n\\sleep :ms ms\nCOMMIT;\n");
my $recorders = IPC::Run::start([ 'pgbench', '-n', '-c', '8', '-j', '8', '-T', '300', '-f', $script, $node->connstr('postgres') ], '<', \undef, '>', \my $bench, '2>&1');
ok(poll_until($node, "SELECT count(*) = 8 FROM redrive.tasks WHERE task_key ~ '^client '"), 'tasks are recorded without a pause');
foreach my $statement ("alter_platform('lost', build => 'body')", "drop_platform('lost')")
{
	is($node->psql('postgres', "SET statement_timeout = '20 s'; SELECT redrive.$statement"), 0, $statement);
}
my $recorded = $node->safe_psql('postgres', 'SELECT max(changed_at) FROM redrive.tasks');
ok(poll_until($node, "SELECT max(changed_at) > '$recorded' FROM redrive.tasks"), '... and they still are');
$recorders->kill_kill;

# A transaction that has recorded a task and stays open holds up the drop, and no other transaction.
platform($node, $receiver, 'later', '/ok');
$node->safe_psql('postgres', "BEGIN; SELECT redrive.record_task('open', 'first'); PREPARE TRANSACTION 'open'");
is($node->psql('postgres', "SET lock_timeout = '500 ms'; SELECT redrive.drop_platform('later')"), 3, 'lock_timeout ends the wait for a transaction that stays open');
my $drop = IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', "SELECT redrive.drop_platform('later')" ], '<', \undef, '>', \my $dropped, '2>&1');
ok(poll_until($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE query ~ 'drop_platform' AND wait_event_type = 'Lock' AND pid <> pg_backend_pid()"), 'the drop waits for it');
is($node->psql('postgres', "SET lock_timeout = '10 ms'; SELECT redrive.record_task('another', 'first')"), 0, '... and nobody waits for the drop');
$node->safe_psql('postgres', "COMMIT PREPARED 'open'");
ok($drop->finish, '... until it ends');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.platforms'), 0, '... and the platform is gone');

$node->stop;
stop_receiver($receiver);
done_testing();
