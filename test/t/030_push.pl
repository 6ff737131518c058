# Pushes: what each kind of answer means, that slow ones delay nobody, and that nothing is lost when processes die.
# The log of the receiver is the truth.  Taken out, these turn it red: the fence by attempt_no and the comparison of versions in the record
# (flow/push.c), the size limits in http_transfer.c, the lease reaper, the idempotency key of a version.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my $secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwAAAA';
my $node = new_node('push', conf => "log_statement = 'none'\nlog_min_duration_statement = 0\nshared_preload_libraries = 'pg_redrive,pg_stat_statements'\n");
my $receiver = start_receiver($secret);

# Set a secret.
sub set_secret
{
	my ($platform, $kind, $value) = @_;

	return $node->psql('postgres', "SELECT redrive.set_platform_secret('$platform', '$kind', '$value')");
}

# one value for a platform
sub push_of
{
	my ($platform, $what) = @_;

	return $node->safe_psql('postgres',
		"SELECT $what FROM redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id JOIN redrive.tasks AS t ON t.task_id = u.task_id WHERE p.name = '$platform'");
}

# wait until all pushes of a platform are in a state
sub becomes
{
	my ($platform, $state, $name) = @_;

	return ok( poll_until($node,
			"SELECT count(*) > 0 AND bool_and(u.state = '$state') FROM redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id WHERE p.name = '$platform'"),
		$name)
	  || diag(push_of($platform, "u.state || ' ' || u.attempt_no || ' ' || coalesce(u.message, '')"));
}

sub drop_platforms
{
	$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
	return;
}

# A delivery: headers, signature, body.
platform($node, $receiver, 'good', '/ok', "headers => '{\"X-Tenant\": \"a\"}'");
$node->safe_psql('postgres', 'CREATE EXTENSION pg_stat_statements');
set_secret('good', 'signing', $secret);
set_secret('good', 'bearer', 'a-very-secret-token');
$node->safe_psql('postgres', "SELECT redrive.record_task('form 1', 'submitted', '{\"who\": \"\\u00e4\"}', 'approval')");
becomes('good', 'delivered', 'a task is pushed');
my ($request) = received($receiver, '/ok');
is($request->{signed}, JSON::PP::true(), 'its signature is right');
is($request->{headers}{'x-tenant'}, 'a', 'a header of the platform');
is($request->{headers}{authorization}, 'Bearer a-very-secret-token', 'the token');
is($request->{headers}{'content-type'}, 'application/json', 'the type');
like($request->{body}, qr/"task_key" : "form 1".*"status" : "submitted".*"version" : 1.*"process" : "approval".*"who"/, 'the body');
is($request->{sequence}, 1, 'the sequence');
# the keys are rotated: two signatures
set_secret('good', 'signing', 'another key of thirty-two bytes!');
$node->safe_psql('postgres', "SELECT redrive.record_task('form 1', 'approved')");
becomes('good', 'delivered', 'a new status is pushed');
($request) = grep { $_->{sequence} == 2 } received($receiver, '/ok');
is($request->{signed}, JSON::PP::true(), 'the old key still signs');
is(scalar(split / /, $request->{headers}{'webhook-signature'}), 2, 'and so does the new one');
is(push_of('good', 'u.pushed_status'), 'approved', 'the status that was pushed');
is(push_of('good', 'u.pushed_version'), 2, 'and its version');
# The other kind of credentials, and a type of one's own.
$node->safe_psql('postgres',
	"BEGIN; SELECT redrive.create_platform('basic', 'http://127.0.0.1:$receiver->{port}/basic', allow_http => true, allow_cidr => '{127.0.0.0/8}', headers => '{\"content-type\": \"application/cloudevents+json\"}');
	 SELECT redrive.set_platform_secret('basic', 'basic', 'user:another-secret'); COMMIT");
becomes('basic', 'delivered', 'a platform that is new gets the tasks that are there');
($request) = received($receiver, '/basic');
is($request->{headers}{authorization}, 'Basic dXNlcjphbm90aGVyLXNlY3JldA==', 'user and password');
is($request->{headers}{'content-type'}, 'application/cloudevents+json', 'the type');

# not in a place where others could look
my $dump = $node->run_log([ 'pg_dump', '-f', "$receiver->{dir}/dump.sql", $node->connstr('postgres') ]) ? slurp_file("$receiver->{dir}/dump.sql") : '';
unlike($dump, qr/a-very-secret|another key|another-secret|MfKQ9r8/, 'a dump has no secrets');
like($dump, qr/form 1/, 'but the tasks');
unlike($node->safe_psql('postgres', "SELECT query FROM pg_stat_activity"), qr/a-very-secret/, 'nor has pg_stat_activity');
is($node->safe_psql('postgres', "SELECT query FROM pg_stat_activity WHERE backend_type = 'redrive pusher'"), 'redrive: push', 'which shows what the pusher does');
my $shown = $node->safe_psql('postgres', q{
SELECT c.oid::regclass, query_to_xml('SELECT * FROM ' || c.oid::regclass, true, false, '')
FROM pg_class AS c
WHERE (c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND c.relname <> 'platform_secrets') OR c.oid = 'pg_stat_statements'::regclass
ORDER BY c.relname LIKE 'task%', c.relname});
like($shown, qr/<platform>basic<.*form 1/s, 'views and tables show platforms and tasks');
like($shown, qr/set_platform_secret/, 'and pg_stat_statements what was called');
unlike($shown, qr/a-very-secret|another key|another-secret|MfKQ9r8|dXNlcjphbm90/, 'but no secrets');
my (undef, undef, $error) = set_secret('nowhere', 'bearer', 'a-very-secret-token');
like($error, qr/platform "nowhere" does not exist/, 'an error about a secret');
unlike($error, qr/a-very-secret/, 'does not show it');
# nor has the log, whatever is written there, and if the function is not even called
#
# Seen red: without redrive_install_log_hook() in _PG_init() (src/pg_redrive.c).
my $set = "redrive.set_platform_secret('basic', 'bearer', 'a-very-secret-token'";
$node->psql('postgres', $_)
  foreach (
	"SELECT $set, 1)", "DO \$\$ BEGIN PERFORM $set, 1); END \$\$", "CREATE ROLE nobody; SET ROLE nobody; SELECT $set)", "SELECT nothing, $set)",
	"PREPARE p AS SELECT redrive.set_platform_secret('none', 'bearer', \$1); EXECUTE p('a-very-secret-token')",
	"SET log_statement = 'all'; LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on; DO \$\$ BEGIN PERFORM $set); END \$\$");
my $log = slurp_file($node->logfile);
like($log, qr/permission denied for schema redrive/, 'the log has errors');
like($log, qr/a statement that sets a secret of a platform is left out/, '... and says what it has not');
like($log, qr/duration: .*record_task/, 'the log has statements');
unlike($log, qr/a-very-secret|another key|another-secret|MfKQ9r8|dXNlcjphbm90/, 'but no secrets either');
# later polls need not be there
$node->safe_psql('postgres', 'ALTER SYSTEM SET log_min_duration_statement = -1; SELECT pg_reload_conf()');
drop_platforms();

# What each answer means: state in the end, class, attempts that arrived, and whether they cost retries.
my @table = (
	[ '/status/204', 'delivered', '', 1 ],
	[ '/status/500', 'dead', 'transient', 2 ],
	[ '/status/404', 'dead', 'client_error', 2 ],
	[ '/status/408', 'dead', 'transient', 2 ],
	[ '/redirect', 'dead', 'redirect', 2 ],
	[ '/first/1', 'delivered', '', 2 ],
	[ '/json/%7B%22code%22%3A0%7D', 'delivered', '', 1, "success_when => '\$.code == 0'" ],
	[ '/json/%7B%22code%22%3A500%7D', 'dead', 'rejected', 2, "success_when => '\$.code == 0'" ],
	[ '/json/nonsense', 'dead', 'rejected', 2, "success_when => '\$.code == 0'" ],
	[ '/json/%7B%22code%22%3A1e999999%7D', 'dead', 'rejected', 2, "success_when => '\$.code == 0'" ],
	[ '/json/%22%5Cu0000%22', 'dead', 'rejected', 2, "success_when => '\$.code == 0'" ],
	[ '/status/422', 'dead', 'client_error', 1, "permanent_status => '{422}'" ],
	[ '/bytes', 'delivered', '', 1 ],
	[ '/huge', 'delivered', '', 1 ],
	[ '/headers', 'dead', 'ambiguous', 2 ],
	[ '/header', 'dead', 'ambiguous', 2 ],
	[ '/close', 'dead', 'ambiguous', 2 ],
	[ '/reset', 'dead', 'ambiguous', 2 ],
	[ '/drip', 'dead', 'timeout', 2, "timeout => '300 ms', connect_timeout => '300 ms'" ],
	[ '/delay/30', 'dead', 'timeout', 2, "timeout => '300 ms', connect_timeout => '300 ms'" ],
	[ '/status/429', 'waiting', 'throttled', 1, "retry_interval => '10 min'" ],
	[ '/retry-after/503/120', 'waiting', 'throttled', 1 ],
	[ '/status/401', 'waiting', 'credential', 1 ],
	[ '/status/410', 'waiting', 'gone', 1 ],
	[ '/status/1', 'dead', 'ambiguous', 2 ],
);
foreach my $row (@table)
{
	my $more = join(', ', 'max_retries => 1', $row->[4] // ());

	$more .= ", retry_interval => '10 ms'" unless $more =~ /retry_interval/;
	platform($node, $receiver, $row->[0], $row->[0], $more);
}
# addresses that are refused: nothing is sent, in any spelling
my %refused = (
	'loopback' => 'https://127.0.0.1/', 'decimal' => 'https://2130706433/', 'octal' => 'https://0177.0.0.1/', 'hex' => 'https://0x7f000001/', 'short' => 'https://127.1/',
	'mapped' => 'https://[::ffff:127.0.0.1]/', 'nat64' => 'https://[64:ff9b::7f00:1]/', '6to4' => 'https://[2002:7f00:1::]/', 'v6' => 'https://[::1]/', 'name' => 'https://localhost/',
	'private' => 'https://10.0.0.1/', 'metadata' => 'https://169.254.169.254/latest/meta-data/', 'any' => 'https://0.0.0.0/');
$node->safe_psql('postgres', "SELECT redrive.create_platform('$_', '$refused{$_}')") foreach sort keys %refused;
$node->safe_psql('postgres', "SELECT redrive.create_platform('opened metadata', 'https://169.254.169.254/', allow_cidr => '{0.0.0.0/0}')");
# nobody listens there
$node->safe_psql('postgres', "SELECT redrive.create_platform('nobody', 'http://127.0.0.1:1/', allow_http => true, allow_cidr => '{127.0.0.0/8}', max_retries => 1, retry_interval => '10 ms')");
# no TLS there
$node->safe_psql('postgres', "SELECT redrive.create_platform('no tls', 'https://127.0.0.1:$receiver->{port}/tls', allow_cidr => '{127.0.0.0/8}')");

$node->safe_psql('postgres', "SELECT redrive.record_task('task', 'done')");
becomes($_->[0], $_->[1], "$_->[0]: $_->[1]") foreach @table;
# before the breakers that have opened let a probe pass
my %arrived = map { $_->[0] => [ received($receiver, $_->[0]) ] } @table;
foreach my $row (@table)
{
	my ($path, $state, $class, $attempts) = @$row;
	my @arrived = @{ $arrived{$path} };

	is(push_of($path, "coalesce(u.error_class, '')"), $class, "$path: class") unless $state eq 'delivered';
	is(scalar @arrived, $attempts, "$path: requests that arrived");
	is(scalar(keys %{ { map { $_->{id} => 1 } @arrived } }), 1, "$path: under one id");
	is(push_of($path, 'u.retry_count'), $state eq 'waiting' ? 0 : $attempts - 1, "$path: retries") unless $state eq 'delivered' && $attempts == 1;
}
foreach my $name (sort(keys %refused), 'opened metadata')
{
	becomes($name, 'blocked', "$name: blocked");
	is(push_of($name, "u.error_class || u.retry_count"), 'policy0', "$name: by policy, for free");
}
becomes('nobody', 'dead', 'nobody listens: dead');
is(push_of('nobody', 'u.error_class'), 'not_sent', 'nobody listens: not sent');
becomes('no tls', 'waiting', 'no TLS: waits');
is(push_of('no tls', "u.error_class || u.retry_count"), 'tls0', 'no TLS: for free');
is( $node->safe_psql('postgres', "SELECT string_agg(p.name, ', ' ORDER BY p.name) FROM redrive.platform_states AS s JOIN redrive.platforms AS p ON p.platform_id = s.platform_id WHERE s.breaker <> 'closed'"),
	'/delay/30, /drip, /retry-after/503/120, /status/401, /status/429, no tls, nobody', 'breakers that are open');
is($node->safe_psql('postgres', "SELECT string_agg(name, ', ') FROM redrive.platforms WHERE paused"), '/status/410', 'who is gone is paused');
like(push_of('/bytes', "(SELECT l.response FROM redrive.push_log AS l WHERE l.push_id = u.push_id)"), qr/^a$/, 'bytes after NUL are not stored');
is(push_of('/huge', "(SELECT length(l.response) FROM redrive.push_log AS l WHERE l.push_id = u.push_id)"), 4096, 'of a huge answer the begin is');
is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.push_log AS l JOIN redrive.pushes AS u ON u.push_id = l.push_id GROUP BY u.push_id, u.attempt_no HAVING count(*) <> u.attempt_no"), '', 'a row of the log per attempt');
drop_platforms();

# A platform gets no more at a time than it may, and is left alone as long as it asks for.  The time is what is tested here: at 20 a
# second, of which two may come at once, 12 take half a second at least, however slow the machine is.
#
# Seen red: without rate_limit in redrive_room_of(), and without wait_of() for 5xx (src/flow/push_result.c); when
# all requests count in send_push() (src/flow/push_send.c).
platform($node, $receiver, 'limited', '/limited', 'rate_limit => 20');
platform($node, $receiver, 'later', '/retry-after/500/120', "retry_interval => '10 ms'");
$node->safe_psql('postgres', "SELECT count(redrive.record_task('limit ' || n, 'done')) FROM generate_series(1, 12) AS n");
becomes('limited', 'delivered', 'pushes to a platform with a limit of its rate');
my @at = sort { $a <=> $b } map { $_->{at} } received($receiver, '/limited');
is(scalar @at, 12, '... are sent once each');
cmp_ok($at[-1] - $at[0], '>', 0.25, '... and not all at once');
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.pushes AS u JOIN redrive.platforms AS p USING (platform_id) WHERE p.name = 'later' AND u.failed_at IS NOT NULL"), 'a platform that answers 500 and asks to wait');
is($node->safe_psql('postgres', "SELECT bool_and(u.state = 'waiting' AND u.retry_count = 1 AND u.next_attempt_at > u.failed_at + interval '100 s')
	FROM redrive.pushes AS u JOIN redrive.platforms AS p USING (platform_id) WHERE p.name = 'later' AND u.failed_at IS NOT NULL"), 't', '... is waited for');
$node->safe_psql('postgres', "SELECT redrive.alter_platform('limited', unset => '{rate_limit}'); SELECT count(redrive.record_task('limit ' || n, 'again')) FROM generate_series(1, 600) AS n");
becomes('limited', 'delivered', 'pushes to it without the limit');
$node->safe_psql('postgres', "SELECT redrive.alter_platform('limited', rate_limit => 20); SELECT redrive.record_task('limit 1', 'last')");
my $limited_at = time();
becomes('limited', 'delivered', '... with it again');
cmp_ok(time() - $limited_at, '<', 10, '... do not have to make up for those without');
drop_platforms();

# A platform with a single task cannot be reached: its breaker opens before the retries are used up.
#
# Seen red: with MOST_IN_ROW for all in most_failures() (src/flow/push_result.c) the push is dead.
$node->safe_psql('postgres', "SELECT redrive.create_platform('unreachable', 'http://127.0.0.1:1/', allow_http => true, allow_cidr => '{127.0.0.0/8}', max_retries => 2, retry_interval => '10 ms')");
$node->safe_psql('postgres', "SELECT redrive.record_task('only one', 'done')");
ok(poll_until($node, "SELECT breaker = 'open' OR dead > 0 FROM redrive.platform_health WHERE platform = 'unreachable'"), 'a platform that cannot be reached');
is(push_of('unreachable', "u.state || ' ' || u.retry_count"), 'waiting 2', '... uses up no push');
$node->safe_psql('postgres', "SELECT redrive.alter_platform('unreachable', url => 'http://127.0.0.1:$receiver->{port}/reached')");
becomes('unreachable', 'delivered', '... which is delivered when it can be reached');
drop_platforms();

# What a turn records may be due again at once, or soon.  Nothing else is pushed, and the bounds are shorter than the time after which the pusher
# looks at everything, twice.
#
# Seen red: without "recorded" in under_way() (src/flow/push.c) each of these waits up to 30 s.
platform($node, $receiver, 'again', '/first/3', "retry_interval => '100 ms'");
$node->safe_psql('postgres', "SELECT redrive.record_task('again', 'first')");
ok(poll_until($node, "SELECT bool_and(state = 'delivered' AND attempt_no = 4) FROM redrive.pushes", 't', timeout => 25), 'retries come when they are due');
drop_platforms();
platform($node, $receiver, 'changing', '/delay/0.3');
for my $version (1 .. 4)
{
	$node->safe_psql('postgres', "SELECT redrive.record_task('changing', 'status $version')");
	wait_for_request($receiver, '/delay/0.3', $version);
}
ok(poll_until($node, "SELECT bool_and(state = 'delivered' AND attempt_no = 4) FROM redrive.pushes", 't', timeout => 25), 'changes of what is under way come after it');
is($node->safe_psql('postgres', "SELECT max(started_at) - min(started_at) < interval '25 s' FROM redrive.push_attempts WHERE platform = 'changing'"), 't', '... at once');
drop_platforms();

# A platform that moves hears nothing of what is answered at its old place.
#
# Seen red: without config_version in redrive_teach_platform() (src/flow/push_result.c) it is paused.
platform($node, $receiver, 'moving', '/held/410/moved', "retry_interval => '10 ms'");
$node->safe_psql('postgres', "SELECT redrive.record_task('moving', 'first')");
wait_for_request($receiver, '/held/410/moved', 1);
$node->safe_psql('postgres', "SELECT redrive.alter_platform('moving', url => 'http://127.0.0.1:$receiver->{port}/moved'), redrive.record_task('after it', 'first')");
ok(wait_for_request($receiver, '/moved', 1), 'the pusher knows its new place');
release($receiver, 'moved');
becomes('moving', 'delivered', 'a platform moves while something is sent to its old place');
is($node->safe_psql('postgres', "SELECT paused FROM redrive.platforms WHERE name = 'moving'"), 'f', '... and is not paused');
drop_platforms();

# A task that becomes a test while it is pushed.
#
# Seen red: without "dead" and "blocked" in record_delivered (src/flow/push_record.c) the status of the test is sent.
platform($node, $receiver, 'tested', '/held/200/tested');
$node->safe_psql('postgres', "SELECT redrive.record_task('tested', 'first')");
wait_for_request($receiver, '/held/200/tested', 1);
$node->safe_psql('postgres', "BEGIN; SELECT redrive.record_task('tested', 'second'); SELECT redrive.record_task('tested', 'of a test', is_test => true); COMMIT");
release($receiver, 'tested');
ok(poll_until($node, "SELECT count(*) = 1 FROM redrive.push_attempts WHERE platform = 'tested' AND delivered"), 'it is delivered while it becomes a test');
is($node->safe_psql('postgres', "SELECT state, error_class, pushed_version, wanted_version FROM redrive.push_status WHERE platform = 'tested'"), 'blocked|test|1|2', '... and waits for nothing else');
platform($node, $receiver, 'after', '/after');
$node->safe_psql('postgres', "SELECT redrive.record_task('after', 'first')");
becomes('after', 'delivered', 'another one goes on');
is(join(' ', map { $_->{body} =~ /"tested".*"version" : (\d)/ } received($receiver, '/held/200/tested')), '1', '... and nothing of the test was sent');
drop_platforms();

# A slow platform delays nobody, a change while a push is under way is pushed after it, and an outage costs no retries.
platform($node, $receiver, 'slow', '/delay/1', "max_in_flight => 50");
platform($node, $receiver, 'fast', '/fast');
$node->safe_psql('postgres', "SELECT redrive.record_task('t' || n, 'first') FROM generate_series(1, 50) AS n");
becomes('fast', 'delivered', 'the fast platform has all');
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.push_status WHERE platform = 'slow' AND state = 'in_flight'"), 'some are under way');
$node->safe_psql('postgres', "SELECT redrive.record_task('t' || n, 'second') FROM generate_series(1, 50) AS n");
becomes('slow', 'delivered', 'the slow platform has all in the end');
is($node->safe_psql('postgres', "SELECT (SELECT max(a.finished_at) FROM redrive.push_attempts AS a WHERE a.platform = 'fast' AND a.version = 1) < (SELECT min(a.finished_at) FROM redrive.push_attempts AS a WHERE a.platform = 'slow')"),
	't', '... and had none before the fast one had the first status of each');
my %last;
my $disorder = 0;
foreach my $r (received($receiver, '/delay/1'))
{
	my ($key) = $r->{body} =~ /"task_key" : "(\w+)"/;
	$disorder++ if ($last{$key} // 0) > $r->{sequence};
	$last{$key} = $r->{sequence};
}
is($disorder, 0, 'in order');
is(join(',', keys %{ { map { $_ => 1 } values %last } }), '2', 'the latest status of each');
drop_platforms();
append_to_file("$receiver->{dir}/down", '');
platform($node, $receiver, 'outage', '/outage', "retry_interval => '1 ms'");
$node->safe_psql('postgres', "SELECT redrive.record_task('t' || n, 'first') FROM generate_series(1, 100) AS n");
ok(poll_until($node, "SELECT s.breaker = 'open' FROM redrive.platform_states AS s"), 'the breaker opens');
unlink("$receiver->{dir}/down");
$node->safe_psql('postgres', "SELECT redrive.resume_platform('outage')");
becomes('outage', 'delivered', 'after the outage everything is delivered');
drop_platforms();

# Processes die at bad moments.
platform($node, $receiver, 'crash', '/delay/0.01', "retry_interval => '10 ms', max_retries => 20, max_in_flight => 20");
my $n = 300;
foreach my $round (1 .. 3)
{
	$node->safe_psql('postgres', "SELECT redrive.record_task('c' || n, 'round $round') FROM generate_series(1, $n) AS n");
	poll_until($node, "SELECT count(*) > 20 FROM redrive.pushes AS u JOIN redrive.tasks AS t ON t.task_id = u.task_id WHERE u.pushed_version = $round");
	if ($round == 1)
	{
		kill_and_wait($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive pusher'");
	}
	elsif ($round == 2)
	{
		$node->stop('fast');
		$node->start;
	}
	else
	{
		$node->stop('immediate');
		$node->start;
	}
	ok(poll_until($node, "SELECT bool_and(u.state = 'delivered' AND u.pushed_status = 'round $round') FROM redrive.pushes AS u"), "everything is delivered, round $round")
	  or diag($node->safe_psql('postgres', "SELECT state, error_class, message, count(*) FROM redrive.pushes GROUP BY 1, 2, 3"));
}
my (%ids, %latest);
foreach my $r (received($receiver, '/delay/0.01'))
{
	next unless $r->{body} =~ /"task_key" : "(c\d+)".*"version" : (\d+)/;
	$ids{"$1 $2"}{ $r->{id} } = 1;
	$latest{$1} = $2 if $2 > ($latest{$1} // 0);
}
is(scalar(grep { keys %$_ > 1 } values %ids), 0, 'a version has one id, however often it came');
is(scalar(grep { $_ == 3 } values %latest), $n, 'each task has arrived in its last version');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.push_claims'), 0, 'no lease is left');

# An answer that cannot be stored is left out, and none of those that are recorded with it.
#
# Seen red: with n == 1 for without_answers in redrive_record_apart (flow/push_held.c).
drop_platforms();
$node->safe_psql('postgres', "CREATE INDEX poison ON redrive.push_log ((1 / (response <> 'poison')::int))");
platform($node, $receiver, 'sound', '/json/sound');
platform($node, $receiver, 'poisoned', '/json/poison');
$node->safe_psql('postgres', "SELECT count(redrive.record_task('poison ' || n, 'new')) FROM generate_series(1, 30) AS n");
becomes('sound', 'delivered', 'beside answers that cannot be stored: delivered');
becomes('poisoned', 'delivered', '... and what was answered so, too');
is($node->safe_psql('postgres', "SELECT platform, coalesce(response, 'none'), count(*) FROM redrive.push_attempts WHERE platform IN ('sound', 'poisoned') GROUP BY 1, 2 ORDER BY 1"),
	"poisoned|none|30\nsound|sound|30", '... at once, and without these answers only');
$node->safe_psql('postgres', 'DROP INDEX redrive.poison');

# A push is recorded by its number, whatever plan was made before there was any.
#
drop_platforms();
$node->safe_psql('postgres', 'VACUUM ANALYZE redrive.pushes');
platform($node, $receiver, 'many', '/many', 'max_in_flight => 64');
my $keys = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelid = 'redrive.pushes_pkey'::regclass";
my $keys_before = $node->safe_psql('postgres', $keys);
$node->safe_psql('postgres', "SELECT count(redrive.record_task('many ' || i, 'done')) FROM generate_series(1, 600) AS i");
becomes('many', 'delivered', 'many pushes');
ok(poll_until($node, "SELECT ($keys) >= $keys_before + 600"), '... each was looked up');

# Leave.
platform($node, $receiver, 'hanging', '/delay/60', "timeout => '1 min', lease => '2 min'");
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.push_status WHERE platform = 'hanging' AND state = 'in_flight'"), 'a push hangs');
# Seen red: without p->changed for a new platform in redrive_load_platforms() (src/flow/push_platform.c) nothing is known of the limit.
my $due = "SELECT task_key FROM redrive.push_status WHERE platform = 'hanging' AND state = 'pending' LIMIT 1";
ok(poll_until($node, "SELECT count(*) FROM redrive.why_push(($due), 'hanging') WHERE fact = 'limit of the platform reached'", 1), '... and why_push() tells why others wait');
$node->safe_psql('postgres', 'DROP EXTENSION pg_redrive');
pass('the extension can be dropped meanwhile');
ok(poll_until($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type IN ('redrive pusher', 'redrive supervisor')"), 'and no process is left');
$node->stop;
stop_receiver($receiver);
done_testing();
