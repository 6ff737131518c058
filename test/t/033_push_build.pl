# Build functions: they run as the owner of the platform and in no process that has secrets, their errors are failures of
# the push, and none is sent what is not its own version.
#
# Taken out, these turn it red: awaits_build in the claim (flow/push.c): the task itself is sent; the comparison of versions in
# record_builds (flow/build.c): the old body is sent; redrive_enter_user_code in redrive_run_callbacks: SET ROLE works; 'build' in _blame
# (sql/32_crash.sql): the server is restarted again and again.
use strict;
use warnings;

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my $node = new_node('push_build');
my $receiver = start_receiver();

sub as_app
{
	return $node->safe_psql('postgres', join('; ', 'SET SESSION AUTHORIZATION app', @_));
}

# wait until the push of a task has come to something
sub becomes
{
	my ($task, $what, $expected, $name) = @_;
	my $query = "SELECT $what FROM redrive.pushes AS u JOIN redrive.tasks AS t ON t.task_id = u.task_id WHERE t.task_key = '$task'";

	return ok(poll_until($node, $query, $expected), $name);
}

# bodies that have arrived for a task, decoded
sub bodies
{
	my ($task) = @_;

	return grep { ($_->{task} // '') eq $task } map { decode_json($_->{body}) } received($receiver, '/build');
}

$node->safe_psql(
	'postgres', q{
CREATE ROLE app LOGIN;
CREATE ROLE other LOGIN;
GRANT other TO app;
SELECT redrive.grant_user('app');
CREATE TABLE names (key text, name text);
CREATE TABLE gates (key text);
GRANT ALL ON names, gates TO app;
CREATE FUNCTION crash() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    COPY (SELECT 1) TO PROGRAM 'kill -SEGV $PPID';
    RAISE 'it survived';
END $$ SECURITY DEFINER;
CREATE SCHEMA app AUTHORIZATION app;
SET SESSION AUTHORIZATION app;
SET search_path = app;
CREATE FUNCTION to_body(task redrive.task) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
    IF task.payload ? 'role' THEN
        EXECUTE format('SET ROLE %I', task.payload->>'role');
    ELSIF task.payload ? 'crash' THEN
        PERFORM public.crash();
    ELSIF task.payload ? 'null' THEN
        RETURN NULL;
    ELSIF task.payload ? 'error' AND NOT EXISTS (SELECT FROM public.names AS n WHERE n.key = task.task_key) THEN
        RAISE EXCEPTION 'no name for %', task.task_key USING ERRCODE = 'no_data_found';
    ELSIF task.payload ? 'gate' THEN
        WHILE NOT EXISTS (SELECT FROM public.gates) LOOP
            PERFORM pg_sleep(0.01); -- slow handler
        END LOOP;
    END IF;
    RETURN jsonb_build_object('task', task.task_key, 'is', task.status, 'version', task.version, 'as', session_user || ' ' || current_user,
        'process', task.process, 'backend', (SELECT a.backend_type FROM pg_stat_activity AS a WHERE a.pid = pg_backend_pid()),
        'name', (SELECT max(n.name) FROM public.names AS n WHERE n.key = task.task_key));
END $$;
});
$node->safe_psql('postgres',
	"SET SESSION AUTHORIZATION app; SET search_path = app;
	 SELECT redrive.create_platform('p', 'http://127.0.0.1:$receiver->{port}/build', allow_http => true, build => 'to_body', max_retries => 1, retry_interval => '1 h')");
# private addresses are for superusers to open
$node->safe_psql('postgres', "SELECT redrive.alter_platform('p', allow_cidr => '{127.0.0.0/8}')");

# --- what is built is sent
as_app("INSERT INTO names VALUES ('a', 'first')", "SELECT redrive.record_task('a', 'new', '{}', 'approval')");
becomes('a', "u.state = 'delivered'", 't', 'a task is pushed');
my ($body) = bodies('a');
is_deeply(
	$body,
	{ task => 'a', is => 'new', version => 1, as => 'app app', process => 'approval', backend => 'redrive executor', name => 'first' },
	'... what was built, by an executor, as the owner');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.push_bodies'), '0', 'the body is not kept');
as_app("UPDATE names SET name = 'second'", "SELECT redrive.record_task('a', 'done')");
becomes('a', "u.state = 'delivered' AND u.pushed_version = 2", 't', 'a new status');
is((bodies('a'))[1]{name}, 'second', '... is built from current data');

# --- errors are failures
as_app("SELECT redrive.record_task('b', 'new', '{\"error\": 1}')");
becomes('b', "u.state || ' ' || u.retry_count || ' ' || u.attempt_no || ' ' || u.error_class || ' ' || u.message", 'waiting 1 1 build P0002: no name for b', 'an error is recorded');
is(as_app("SELECT fact FROM redrive.why_push('b', 'p')"), 'waiting for a retry', '... why_push() tells');
as_app("SELECT redrive.redrive_push('p', 'b')");
becomes('b', "u.state || ' ' || u.attempt_no", 'waiting 2', '... it is tried again');
$node->safe_psql('postgres', "UPDATE redrive.pushes SET next_attempt_at = now() WHERE state = 'waiting'; SELECT redrive._wake_supervisor()");
becomes('b', "u.state || ' ' || u.attempt_no", 'dead 3', '... until there are no retries left');
is(as_app("SELECT count(*), bool_and(charged AND NOT delivered AND error_class = 'build') FROM redrive.push_attempts WHERE task_key = 'b'"), '3|t', '... each in the log');
is(scalar(bodies('b')), 0, '... and nothing was sent');
as_app("INSERT INTO names VALUES ('b', 'x')", "SELECT redrive.redrive_push('p', 'b')");
becomes('b', "u.state = 'delivered'", 't', '... and is pushed when it is mended');
as_app("SELECT redrive.record_task('c', 'new', '{\"null\": 1}')");
becomes('c', 'u.message', '22004: the build function returned NULL', 'NULL is an error');
as_app("SELECT redrive.record_task('d', 'new', '{\"role\": \"other\"}')");
becomes('d', 'u.message', '42501: cannot set parameter "role" within security-definer function', 'it stays its owner');

# --- a status that changes while its body is built
as_app("SELECT redrive.record_task('e', 'new', '{\"gate\": 1}')");
ok(poll_until($node, "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'redrive executor' AND wait_event = 'PgSleep'"), 'a build is under way');
is(as_app("SET statement_timeout = '30 s'", "SELECT redrive.record_task('e', 'done')"), '2', '... a new status does not wait for it');
as_app("INSERT INTO gates VALUES ('open')");
becomes('e', "u.state = 'delivered' AND u.pushed_version = 2", 't', '... and is pushed');
is_deeply([ map { "$_->{is} $_->{version}" } bodies('e') ], ['done 2'], '... with its own body');

# --- a push that somebody has locked holds up no other, and is built soon after, though nobody tells
#
# Seen red: without SKIP LOCKED in redrive._free_builds (sql/47_push.sql); and without LOOK_MS in proc/executor.c and the timer of
# redrive_arm_stop(), which is left to fire once and wakes an executor as well.
$node->safe_psql('postgres', "UPDATE redrive.platforms SET paused = true");
as_app("SELECT redrive.record_task('locked', 'new')");
$node->safe_psql('postgres', "BEGIN; SELECT FROM redrive.pushes AS u JOIN redrive.tasks AS t USING (task_id) WHERE t.task_key = 'locked' FOR NO KEY UPDATE OF u; PREPARE TRANSACTION 'lock'");
$node->safe_psql('postgres', "UPDATE redrive.platforms SET paused = false");
as_app("SELECT redrive.record_task('beside', 'new')");
becomes('beside', "u.state = 'delivered'", 't', 'a push beside one that is locked');
$node->safe_psql('postgres', "ROLLBACK PREPARED 'lock'");
ok( poll_until($node, "SELECT u.state = 'delivered' FROM redrive.pushes AS u JOIN redrive.tasks AS t USING (task_id) WHERE t.task_key = 'locked'", 't', timeout => 15),
	'... and that one when it is free');

# --- not executable, gone, and back; another one, and none
as_app('DROP FUNCTION app.to_body(redrive.task)', "SELECT redrive.record_task('f', 'new')");
becomes('f', "u.message LIKE '42883: function app.to_body(redrive.task) does not exist'", 't', 'a function that is gone');
as_app("CREATE FUNCTION app.short(task redrive.task) RETURNS jsonb LANGUAGE sql AS 'SELECT jsonb_build_object(''task'', task.task_key)'",
	"SELECT redrive.alter_platform('p', build => 'app.short')", "SELECT redrive.redrive_push('p', 'f')");
becomes('f', "u.state = 'delivered'", 't', '... another one');
is_deeply([ bodies('f') ], [ { task => 'f' } ], '... makes the body');
as_app("SELECT redrive.alter_platform('p', unset => '{build}')", "SELECT redrive.record_task('g', 'new')");
becomes('g', "u.state = 'delivered'", 't', 'without a function');
my ($plain) = grep { ($_->{task_key} // '') eq 'g' } map { decode_json($_->{body}) } received($receiver, '/build');
is($plain->{status}, 'new', '... the task itself is sent');

# --- one that crashes the server: not again before somebody says so
$node->append_conf('postgresql.conf', 'restart_after_crash = on');
$node->reload;
as_app(
	q{CREATE FUNCTION app.crashing(task redrive.task) RETURNS jsonb LANGUAGE plpgsql AS 'BEGIN IF task.payload ? ''crash'' THEN PERFORM public.crash(); END IF; RETURN to_jsonb(task); END'},
	"SELECT redrive.alter_platform('p', build => 'app.crashing')");
# the crash may take this session with it
$node->psql('postgres', "SET SESSION AUTHORIZATION app; SELECT redrive.record_task('h', 'new', '{\"crash\": 1}')", on_error_stop => 0);
my $reason = "SELECT paused, reason FROM redrive.platform_health";
ok(poll_until($node, $reason, 't|its build function crashed the server'), 'a crash pauses the platform');
my $log = slurp_file($node->logfile);
is(scalar(() = $log =~ /terminated by signal 11/g), 1, '... after one');
like($log, qr/It was in the build function for push \d+ of database/, '... which the log explains');
as_app("SELECT redrive.record_task('h', 'other', '{}')", "SELECT redrive.resume_platform('p')");
becomes('h', "u.state = 'delivered'", 't', '... it goes on when it is resumed');
is(scalar(() = slurp_file($node->logfile) =~ /terminated by signal 11/g), 1, '... and the server stayed up');

$node->stop;
stop_receiver($receiver);
done_testing();
