# What one task, one answer or one platform does wrong costs no other push anything, and the pusher lives on.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my $secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwAAAA';
my $node = new_node('push_trouble');
my $receiver = start_receiver($secret);
my $pusher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive pusher'";

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub status { return "FROM redrive.push_status WHERE platform = '$_[0]'"; }

sub becomes
{
	my ($platform, $state, $name) = @_;

	return ok(poll_until($node, "SELECT count(*) > 0 AND bool_and(state = '$state') " . status($platform)), $name)
	  || diag(sql('SELECT state, attempts, error_class, message, count(*) ' . status($platform) . ' GROUP BY 1, 2, 3, 4'));
}

sub start_over
{
	sql('SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
	return;
}

# Have the pusher take a breaker for open, and its time for over.
sub half_open
{
	my ($platform) = @_;

	sql("UPDATE redrive.platform_states SET breaker = 'open', opened_at = now() - interval '1 min', blocked_until = now() WHERE platform_id = (SELECT platform_id FROM redrive.platforms WHERE name = '$platform');
		UPDATE redrive.platforms SET config_version = config_version + 1 WHERE name = '$platform'");
	return;
}

# Return a session with a change that is not committed, and a lock of what the pusher needs for a claim, after its look at the platforms.
sub changes
{
	my ($change, $lock) = @_;
	my $session = $node->background_psql('postgres');

	$session->query_safe('BEGIN');
	$session->query_safe("SELECT $change; LOCK TABLE redrive.$lock MODE");
	return $session;
}

# Have it committed when the claim waits for it.
sub commit_while_claiming
{
	my ($session) = @_;

	$session->query_safe(
		'DO $$ BEGIN FOR i IN 1 .. 1000000 LOOP EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation IS NOT NULL); END LOOP; END $$; COMMIT');
	$session->quit;
	return;
}

sub changes_while_claiming
{
	my ($task, $change) = @_;
	my $session = changes($change, 'push_claims IN EXCLUSIVE');

	sql("SELECT redrive.record_task('$task', 'new')");
	commit_while_claiming($session);
	return;
}

# What is recorded together with a change of its platform is sent as the platform is then.
#
# Seen red: without "outdated" in turn() (src/proc/pusher.c).
platform($node, $receiver, 'changing', '/changing');
changes_while_claiming('before the change', "redrive.set_platform_secret('changing', 'signing', '$secret'), redrive.record_task('with the change', 'new')");
becomes('changing', 'delivered', 'pushes to a platform that was being changed');
is(join(' ', map { $_->{signed} ? 'signed' : 'not signed' } received($receiver, '/changing')), 'signed signed', '... are signed with its new secret');
start_over();

# Seen red: without "NOT p.paused" in claim_pushes (src/flow/push.c).
platform($node, $receiver, 'pausing', '/pausing');
changes_while_claiming('before the pause', "redrive.pause_platform('pausing')");
ok(poll_until($node, "SELECT state = 'idle' FROM pg_stat_activity WHERE pid = ($pusher)"), 'a claim for a platform that was being paused');
is(sql('SELECT (SELECT count(*) FROM redrive.push_claims), state, attempts ' . status('pausing')), '0|pending|0', '... takes nothing');
sql("SELECT redrive.resume_platform('pausing')");
becomes('pausing', 'delivered', '... until the platform is resumed');
is(scalar(received($receiver, '/pausing')), 1, '... once');
start_over();

# A platform is not paused by what it answered at the place from where it is moved.
#
# Seen red: without config_version in pause_platform (src/flow/push_platform.c).
platform($node, $receiver, 'moving', '/held/410/gone');
platform($node, $receiver, 'beside', '/beside');
sql("SELECT redrive.record_task('moving', 'new')");
becomes('beside', 'delivered', 'a pusher that has nothing else to do');
ok(wait_for_request($receiver, '/held/410/gone', 1), '... waits for an answer');
my $mover = changes("redrive.alter_platform('moving', url => 'http://127.0.0.1:$receiver->{port}/moved')", 'tasks IN ACCESS EXCLUSIVE');
release($receiver, 'gone');
ok(poll_until($node, 'SELECT count(*) = 1 FROM redrive.push_log WHERE http_status = 410'), '... which comes while the platform is moved');
sql('SELECT redrive._wake_pusher()');
commit_while_claiming($mover);
becomes('moving', 'delivered', '... and its pushes go on at the new place');
start_over();

# What is stored out of line is read in each turn of the pusher: headers, payloads, and bodies that were built.
#
# Seen red: without PushActiveSnapshot() in both redrive_claim_pushes() and redrive_load_platforms() (src/flow/push.c, push_platform.c):
# "cannot fetch toast data without an active snapshot".
sql('CREATE FUNCTION bulk(n int, seed text) RETURNS text LANGUAGE sql AS $$SELECT string_agg(md5(i || seed), \'\') FROM generate_series(1, n) AS i$$;
	CREATE FUNCTION bulky(task redrive.task) RETURNS jsonb LANGUAGE sql AS $$SELECT to_jsonb(bulk(1000, task.status))$$');
platform($node, $receiver, 'bulky', '/bulky');
platform($node, $receiver, 'built', '/built', "build => 'bulky'");
foreach my $turn (1 .. 3)
{
	sql("SELECT redrive.alter_platform(name, headers => jsonb_build_object('x-bulk', bulk(100, '$turn'))) FROM unnest(ARRAY['bulky', 'built']) AS name;
		SELECT redrive.record_task('bulky', 'turn $turn', to_jsonb(bulk(1000, '$turn')))");
	ok(poll_until($node, "SELECT count(*) = 2 AND bool_and(state = 'delivered' AND pushed_status = 'turn $turn') FROM redrive.push_status"), "turn $turn with much to read")
	  || diag(sql('SELECT platform, state, error_class, message FROM redrive.push_status'));
}
start_over();

platform($node, $receiver, 'good', '/ok', "method => 'GET'");
sql("SELECT redrive.set_platform_secret('good', 'signing', '$secret'), redrive.record_task('first', 'new')");
becomes('good', 'delivered', 'a push');
my ($request) = received($receiver, '/ok');
is($request->{signed}, JSON::PP::true(), 'a request without a body is signed as such');
my $pid = sql($pusher);

# A platform that repeats what it was sent, at a place where the answer is cut.
#
# Seen red: with the answer cut first in kept_answer() (flow/push_result.c), or nothing blotted out.
foreach my $before (0, 4085)
{
	sql("BEGIN; SELECT redrive.create_platform('echo', 'http://127.0.0.1:$receiver->{port}/echo/$before', allow_http => true, allow_cidr => '{127.0.0.0/8}');
		SELECT redrive.set_platform_secret('echo', 'basic', 'user:password'); COMMIT");
	becomes('echo', 'delivered', 'an answer with a secret');
	is(sql("SELECT response FROM redrive.push_attempts WHERE platform = 'echo'"), substr('x' x $before . 'Basic ' . '*' x 20, 0, 4096), '... is kept without it');
	sql("SELECT redrive.drop_platform('echo')");
}

# A rate that is next to none.  Seen red: without MAX_WAIT_S in redrive_platform_ready_at() (flow/push_result.c) the pusher never sleeps.
platform($node, $receiver, 'rare', '/rare', 'rate_limit => 1e-15');
sql("SELECT redrive.record_task('rare ' || n, 'new') FROM generate_series(1, 2) AS n");
ok(poll_until($node, "SELECT count(*) = 1 FROM redrive.push_attempts WHERE platform = 'rare' AND delivered"), 'one push of a platform with a rate of next to none');
ok(poll_until($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'redrive pusher' AND datname = current_database() AND state_change < clock_timestamp() - interval '1 s'"),
	'... and the pusher sleeps');
sql("SELECT redrive.drop_platform('rare')");

# The same in JSON, with slashes escaped, and then all characters.  Seen red: with strncmp() alone in secret_length() (flow/push_result.c).
foreach my $how (['escaped', 9], ['unicode', 42])
{
	my ($path, $length) = @$how;
	sql("BEGIN; SELECT redrive.create_platform('$path', 'http://127.0.0.1:$receiver->{port}/$path', allow_http => true, allow_cidr => '{127.0.0.0/8}');
		SELECT redrive.set_platform_secret('$path', 'bearer', 'a/b+c/d'); COMMIT");
	becomes($path, 'delivered', "an answer with an escaped secret ($path)");
	is(sql("SELECT DISTINCT response::jsonb #>> '{}' FROM redrive.push_attempts WHERE platform = '$path'"), 'Bearer ' . '*' x $length, '... is kept without it');
	sql("SELECT redrive.drop_platform('$path')");
}

# Answers that success_when cannot judge, each for another reason.
#
# Seen red: without PG_TRY in is_json() (flow/push_result.c) the first ends the pusher.  The others need PG_TRY in ask()
# (flow/push_judge.c).
my %answers = (
	deep => [ '/deep/30000', '$.code == 0' ],
	zone => [ '/json/%7B%22at%22%3A%222024-01-01%22%7D', '$.at.datetime() < "2024-01-01T00:00:00+00".datetime()' ],
	long => [ '/deep/400', '$.**.**.**.**.x == 0' ]);
foreach my $name (sort keys %answers)
{
	my ($path, $success) = @{ $answers{$name} };

	platform($node, $receiver, $name, $path, "max_retries => 0, success_when => '$success'");
	sql("SELECT redrive.record_task('$name', 'new')");
	becomes($name, 'dead', "$name: the push is given up");
	is(sql("SELECT DISTINCT error_class || ' ' || attempts " . status($name)), 'rejected 1', '... as rejected, after an attempt');
	becomes('good', 'delivered', '... and others are delivered');
	is(sql("SELECT max(attempts) " . status('good')), 1, '... at the first attempt');
	sql("SELECT redrive.drop_platform('$name')");
}
is(sql($pusher), $pid, 'the pusher is the same');

# A success_when that takes long costs its own pushes an attempt, and no other platform anything: the answers of 40 are judged for longer
# than a request may take.
#
# Seen red: without redrive_http_drive() beside redrive_judge_answers() (proc/pusher.c) requests that were answered run out of time; with the
# answers of all platforms asked about at once they are judged by the success_when of one.
start_over();
sql("SELECT redrive.create_platform('evil' || n, 'http://127.0.0.1:$receiver->{port}/numbers/5000', allow_http => true, allow_cidr => '{127.0.0.0/8}',
	max_retries => 0, success_when => 'exists(\$[*] ? (exists(\$[*] ? (@ < 0))))') FROM generate_series(1, 40) AS n");
platform($node, $receiver, 'well', '/delay/0.3', "max_retries => 0, timeout => '4 s', connect_timeout => '4 s'");
platform($node, $receiver, 'judged', '/json/%7B%22code%22%3A0%7D', "max_retries => 0, success_when => '\$.code == 0'");
sql("SELECT redrive.record_task('task', 'new')");
becomes('well', 'delivered', 'beside platforms whose success_when takes long: delivered');
becomes('judged', 'delivered', '... and so where another success_when is asked');
my $evil = "FROM redrive.push_status WHERE platform ~ 'evil'";
ok(poll_until($node, "SELECT count(*) $evil AND state = 'dead'", 40), '... and those are given up');
is(sql("SELECT DISTINCT error_class || ' ' || attempts || ' ' || message $evil"), 'rejected 1 success_when takes too long.', '... as rejected, after an attempt');
start_over();

# One answer that cannot be judged costs the others of its platform nothing.
#
# So redrive_judge_answers() (flow/push_judge.c) asks about one after the other when they cannot be judged at once.
platform($node, $receiver, 'poison', '/poison', "max_retries => 0, success_when => '\$.code == 0'");
sql("SELECT count(redrive.record_task(key, 'new')) FROM unnest(ARRAY['good', 'bad', 'after', 'last']) AS key");
ok(poll_until($node, "SELECT string_agg(task_key || ' ' || state, ', ' ORDER BY task_key) = 'after delivered, bad dead, good delivered, last delivered' " . status('poison')), 'one answer cannot be judged')
  || diag(sql('SELECT task_key, state, message ' . status('poison')));
is(sql("SELECT DISTINCT message " . status('poison') . " AND task_key = 'bad'"), 'The answer cannot be judged by success_when.', '... which its push says');

# Bodies that cannot be sent, or cannot even be made: here of bytes that are in no encoding.
#
# Seen red: with "alone = NULL" in take_turn() (proc/pusher.c) nothing is claimed any more.
start_over();
platform($node, $receiver, 'posted', '/posted');
sql("SELECT redrive.record_task('large', 'new', jsonb_build_object('text', repeat('x', 1100000))), redrive.record_task('after', 'new')");
ok(poll_until($node, "SELECT state = 'delivered' " . status('posted') . " AND task_key = 'after'"), 'beside a task that is too large another is delivered');
is(sql("SELECT state || ' ' || error_class " . status('posted') . " AND task_key = 'large'"), 'blocked body', '... and that one blocked');
is(sql("SELECT fact || ': ' || remedy FROM redrive.why_push('large', 'posted')"), 'blocked: Record the task again, with a payload that can be sent.', 'why');
sql("SELECT redrive.record_task('large', 'less')");
becomes('posted', 'delivered', '... until it is smaller');
sql("CREATE DATABASE bytes ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0; CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
foreach my $db ('bytes', 'latin')
{
	$node->safe_psql($db, "CREATE EXTENSION pg_redrive; SELECT redrive.create_platform('posted', 'http://127.0.0.1:$receiver->{port}/$db', allow_http => true, allow_cidr => '{127.0.0.0/8}');
		SELECT redrive.record_task('bad', convert_from('\\xe4', 'SQL_ASCII'))") if $db eq 'bytes';
	$node->safe_psql($db, "CREATE EXTENSION pg_redrive; SELECT redrive.create_platform('posted', 'http://127.0.0.1:$receiver->{port}/$db', allow_http => true, allow_cidr => '{127.0.0.0/8}');
		SELECT redrive.record_task('umlaut', chr(228))") if $db eq 'latin';
}
ok(poll_until($node, "SELECT state = 'blocked' AND error_class = 'body' FROM redrive.push_status", 't', dbname => 'bytes'), 'a body that cannot be made is blocked');
$node->safe_psql('bytes', "SELECT redrive.record_task('good', 'new')");
ok(poll_until($node, "SELECT state = 'delivered' FROM redrive.push_status WHERE task_key = 'good'", 't', dbname => 'bytes'), '... and another delivered');
ok(poll_until($node, "SELECT state = 'delivered' FROM redrive.push_status", 't', dbname => 'latin'), 'in another encoding a body is delivered');
like((received($receiver, '/latin'))[0]->{body}, qr/"status" : "\x{e4}"/, '... as UTF-8');

# Seen red: without PortalContext in redrive_worker_begin() (base/xact.c) each turn that fails leaves its statements behind, 40 MB in all.
SKIP:
{
	my @kb;

	foreach my $n (50, 500)
	{
		$node->safe_psql('bytes', "SELECT count(redrive.record_task(convert_from('\\xe4', 'SQL_ASCII') || n, 'new')) FROM generate_series(1, $n) AS n");
		ok(poll_until($node, "SELECT count(*) FROM redrive.push_status WHERE state = 'blocked'", $n + 1, dbname => 'bytes'), "$n bodies that cannot be made are blocked");
		push @kb, private_kb($node->safe_psql('bytes', "$pusher AND datname = 'bytes'"));
	}
	skip 'memory cannot be measured here', 1 unless defined $kb[1];
	cmp_ok($kb[1] - $kb[0], '<', 2000, 'turns that fail leave no memory behind');
}
sql("DROP DATABASE $_") foreach ('bytes', 'latin');
start_over();

# An error of each claim, whatever is claimed, is the fault of no push.  The pusher claims again after a second, so there are
# no more errors than seconds, but for the first ones.
#
# Seen red: without ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION in take_turn() (proc/pusher.c) they are blocked, and there are dozens of errors at once.
platform($node, $receiver, 'kept', '/kept');
sql("SELECT redrive.record_task('kept ' || n, 'old') FROM generate_series(1, 3) AS n");
becomes('kept', 'delivered', 'pushes that can be claimed');
my $from = -s $node->logfile;
my $began = time();
my $errors = 0;
sql("ALTER TABLE redrive.pushes RENAME push_key TO renamed; SELECT redrive.record_task('kept ' || n, 'new') FROM generate_series(1, 3) AS n");
while ($errors < 3 && time() < $began + 60)
{
	sql('SELECT 1');
	$errors = () = slurp_file($node->logfile, $from) =~ /column x.push_key does not exist/g;
}
cmp_ok($errors, '>=', 3, 'an error of each claim');
cmp_ok($errors, '<=', time() - $began + 3, '... is not met all the time');
is(sql('SELECT DISTINCT state, attempts ' . status('kept')), 'pending|1', '... and blocks nothing');
sql('ALTER TABLE redrive.pushes RENAME renamed TO push_key');
becomes('kept', 'delivered', 'they go on when it is mended');
is(sql("SELECT max(attempts) " . status('kept')), 2, '... each once');
start_over();

# Nor is it the fault of a push that somebody has locked a table.
#
# Seen red: without ERRCODE_LOCK_NOT_AVAILABLE at CLAIMING in take_turn() (proc/pusher.c) it is blocked.
platform($node, $receiver, 'patient', '/patient');
sql("SELECT redrive.pause_platform('patient'), redrive.record_task('patient', 'new')");
my $locker = $node->background_psql('postgres');
$locker->query_safe('BEGIN; LOCK TABLE redrive.tasks IN ACCESS EXCLUSIVE MODE');
$from = -s $node->logfile;
# resume_platform() would wait for the lock
sql('UPDATE redrive.platforms SET paused = false, config_version = config_version + 1; SELECT redrive._wake_pusher()');
$node->wait_for_log(qr/canceling statement due to lock timeout(.*\n)+.*canceling statement due to lock timeout/, $from);
$locker->query_safe('COMMIT');
$locker->quit;
becomes('patient', 'delivered', 'a push is sent when the lock of a table that it needs is gone');
start_over();

# A cancel ends a statement, not the pusher.
#
# Seen red: without QueryCancelPending = false in redrive_pusher_main().
platform($node, $receiver, 'slow', '/held/200/cancelled', 'max_retries => 0');
sql("SELECT redrive.record_task('slow', 'new')");
$pid = sql($pusher);
ok(wait_for_request($receiver, '/held/200/cancelled', 1), 'a request is under way');
sql("SELECT pg_cancel_backend(($pusher))");
release($receiver, 'cancelled');
becomes('slow', 'delivered', '... and goes on although the pusher is cancelled');
is(sql($pusher), $pid, 'the pusher is the same');
start_over();

# Nothing is kept of what was sent.
#
# Seen red: without MemoryContextSwitchTo(claim_cxt) after turn() (proc/pusher.c) 3 000 pushes leave 3 MB.
platform($node, $receiver, 'many', '/many', 'max_in_flight => 64');
sql("SELECT redrive.set_platform_secret('many', 'signing', '$secret')");
my @top;
foreach my $round (1 .. 2)
{
	sql("SELECT count(redrive.record_task('many ' || n, 'round $round')) FROM generate_series(1, 3000) AS n");
	becomes('many', 'delivered', 'many pushes');
	my $from = -s $node->logfile;
	sql("SELECT pg_log_backend_memory_contexts(($pusher))");
	$node->wait_for_log(qr/Grand total/, $from);
	my ($size) = slurp_file($node->logfile, $from) =~ /TopMemoryContext: (\d+) total/;
	push @top, $size;
}
cmp_ok($top[1] - $top[0], '<', 300_000, 'memory is given back');
start_over();

# While one platform has much to do, another gets its retries.
#
# Seen red: with redrive_look_at_all() only when nothing happens (proc/pusher.c).
sql("CREATE ROLE other LOGIN; SELECT redrive.grant_user('other'); SET SESSION AUTHORIZATION other; SELECT redrive.create_platform('busy', 'http://127.0.0.1:$receiver->{port}/delay/0.02', allow_http => true, max_in_flight => 8);
	RESET SESSION AUTHORIZATION; SELECT redrive.alter_platform('busy', allow_cidr => '{127.0.0.0/8}')");
platform($node, $receiver, 'again', '/first/2', "retry_interval => '100 ms'");
sql("SET SESSION AUTHORIZATION other; SELECT count(redrive.record_task('t' || n, 'new')) FROM generate_series(1, 1000) AS n; RESET SESSION AUTHORIZATION; SELECT redrive.record_task('again', 'new')");
becomes('busy', 'delivered', 'the busy one has all');
becomes('again', 'delivered', 'and the other too');
my ($last_busy) = reverse received($receiver, '/delay/0.02');
cmp_ok((received($receiver, '/first/2'))[2]->{at}, '<', $last_busy->{at}, '... which had its retries meanwhile');
start_over();

# More platforms than requests may be under way.
#
# Seen red: with the room shared out among those that may have something due, before it was known who has.
$node->append_conf('postgresql.conf', 'redrive.push_max_in_flight = 4');
$node->reload;
platform($node, $receiver, "p$_", "/ok/p$_") foreach 1 .. 15;
sql("SELECT redrive.record_task('everywhere', 'new')");
ok(poll_until($node, "SELECT count(*) = 15 FROM redrive.push_status WHERE state = 'delivered'", 't', timeout => 20), 'each of many platforms has its push');
start_over();

# Requests that hang, of one tenant after the other: none takes all the room, however many platforms it has, and platforms with nothing to do take none.
#
# Seen red: with an even share of the room for each platform, whoever owns it, as it was; with fair_room() that returns
# all the room; and with shares of all the room, not of the owner's, in share_out() (src/flow/push.c): then the pusher never slept.
sub tenant_platform
{
	my ($owner, $name, $path) = @_;

	sql("SET SESSION AUTHORIZATION $owner; SELECT redrive.create_platform('$name', 'http://127.0.0.1:$receiver->{port}$path', allow_http => true, timeout => '1 h', lease => '2 h');
		RESET SESSION AUTHORIZATION; SELECT redrive.alter_platform('$name', allow_cidr => '{127.0.0.0/8}')");
	return;
}
sub in_flight { return "SELECT count(*) FROM redrive.push_status WHERE platform ~ '^$_[0]' AND state = 'in_flight'"; }
$node->append_conf('postgresql.conf', 'redrive.push_max_in_flight = 8');
$node->reload;
sql("CREATE ROLE third LOGIN; SELECT redrive.grant_user('third')");
tenant_platform('other', "hang$_", '/delay/600') foreach 1 .. 10;
tenant_platform('third', 'well', '/well');
platform($node, $receiver, 'mine', '/delay/600', "timeout => '1 h', lease => '2 h'");
sql("SELECT count(redrive.record_task('t' || n, 'new')) FROM generate_series(1, 10) AS n");
ok(poll_until($node, in_flight('mine'), '4'), 'platforms with nothing to do leave the room to others');
sql("SET SESSION AUTHORIZATION other; SELECT redrive.record_task('task', 'new')");
ok(poll_until($node, in_flight('hang'), '3'), 'a tenant with many platforms takes its share of the rest');
ok(poll_until($node, "SELECT state_change < clock_timestamp() - interval '0.5 s' FROM pg_stat_activity WHERE backend_type = 'redrive pusher'"), '... and the pusher sleeps, although it has more');
sql("SET SESSION AUTHORIZATION third; SELECT redrive.record_task('task', 'new')");
becomes('well', 'delivered', '... which leaves room for another');
is(sql(in_flight('hang')), '3', '... as before');
$node->append_conf('postgresql.conf', 'redrive.push_max_in_flight = 128');
start_over();
$node->restart;

# An outage behind 200: success_when tells, the breaker learns.
#
# Seen red: with redrive_teach_platform() before the answer was judged.
platform($node, $receiver, 'behind', '/json/%7B%22code%22%3A500%7D', "success_when => '\$.code == 0', retry_interval => '1 ms', max_retries => 50");
sql("SELECT count(redrive.record_task('t' || n, 'new')) FROM generate_series(1, 30) AS n");
ok(poll_until($node, "SELECT breaker = 'open' AND delivered = 0 FROM redrive.platform_health WHERE platform = 'behind'"), 'answers that are no success open the breaker');
start_over();

# A task that always fails, on a platform that is well: it is given up, and holds up nobody.
#
# Seen red: with push->charged = false for every probe in flow/push_result.c.
platform($node, $receiver, 'picky', '/picky', "retry_interval => '1 ms', max_retries => 2");
sql("SELECT redrive.record_task('good', 'new')");
becomes('picky', 'delivered', 'a platform is well');
my $bad = 'pending';
foreach my $round (1 .. 30)
{
	half_open('picky');
	sql("SELECT redrive.record_task('bad', 'new'), redrive.record_task('good', 'round $round')");
	ok(poll_until($node, "SELECT pushed_status = 'round $round' " . status('picky') . " AND task_key = 'good'"), '... and stays so for others');
	$bad = sql('SELECT state ' . status('picky') . " AND task_key = 'bad'");
	last if $bad eq 'dead';
}
is($bad, 'dead', 'a task that fails always is given up');
start_over();
platform($node, $receiver, 'gone', '/status/404', "retry_interval => '1 ms', max_retries => 1");
half_open('gone');
sql("SELECT redrive.record_task('bad', 'new')");
becomes('gone', 'dead', 'a probe that is answered 404 is an attempt like any other');
is(scalar(received($receiver, '/status/404')), 2, '... of which there are as many as allowed');
start_over();

# Shutdown: what has been answered is recorded, although somebody has locked one push.
#
# Seen red: with an error thrown on in take_turn() while a shutdown is requested.
platform($node, $receiver, 'last', '/delay/0.3', 'max_retries => 0');
sql("SELECT redrive.record_task('held', 'first'), redrive.record_task('free', 'first')");
ok(wait_for_request($receiver, '/delay/0.3', 2), 'two requests are under way');
sql("BEGIN; SELECT redrive.record_task('held', 'second'); PREPARE TRANSACTION 'held'");
$node->stop('fast');
$node->start;
is(sql("SELECT state || ' ' || attempts " . status('last') . " AND task_key = 'free'"), 'delivered 1', 'a push that was answered at shutdown is recorded');
sql("COMMIT PREPARED 'held'");
ok(poll_until($node, "SELECT bool_and(state = 'delivered') AND count(*) = 2 " . status('last')), 'and the other goes on');

$node->stop;
stop_receiver($receiver);
done_testing();
