# The extension belongs to a role that is no superuser any more: work goes on, and
# doctor() answers, says what it cannot see, and what helps.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('owner', extension => 0);
my $err;

# What nobody but its owner may use: a schema with functions and deferred constraints.
$node->safe_psql(
	'postgres', q{
CREATE EXTENSION pg_cron;
CREATE ROLE plain LOGIN SUPERUSER;
CREATE ROLE app LOGIN;
CREATE SCHEMA private AUTHORIZATION app;
SET ROLE plain;
CREATE EXTENSION pg_redrive;
SELECT redrive.grant_user('app');
SET SESSION AUTHORIZATION app;
SET search_path = private;
CREATE TABLE parents (id int PRIMARY KEY);
CREATE TABLE children (parent int CONSTRAINT children_parent_fkey REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION add_child(payload jsonb) RETURNS void LANGUAGE sql AS 'INSERT INTO private.children VALUES (payload::int)';
CREATE FUNCTION make_body(task redrive.task) RETURNS jsonb LANGUAGE sql AS 'SELECT to_jsonb(task.status)';
SELECT redrive.create_handler('add_child', 'add_child', max_retries => 0);
SELECT redrive.create_platform('crm', 'https://crm.example/', build => 'make_body');
RESET SESSION AUTHORIZATION;
RESET search_path;
ALTER ROLE plain NOSUPERUSER;
INSERT INTO private.parents SELECT n FROM generate_series(1, 10) AS n WHERE n <> 7;
});

# Seen red: with redrive_owner() in redrive_fire_deferred() (flow/deferred.c) the batch is paused for 42501, permission denied for schema private.
$node->safe_psql('postgres', q{SELECT redrive.submit('add_child', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 10) AS i), label => 'work')}, extra_params => [ '-U', 'app' ]);
batch_is($node, 'work');
is($node->safe_psql('postgres', 'SELECT item_no, error_class, constraint_name FROM redrive.failed_items'), '7|missing_parent|children_parent_fkey', 'deferred constraints are fired and deferred again');

# Seen red: with to_regprocedure() in _problems_of() (65_why.sql), permission denied for schema private.
is($node->safe_psql('postgres', q{SELECT fact FROM redrive.why(1)}, extra_params => [ '-U', 'app' ]), 'finished', 'why() answers');

# Seen red: with pg_file_settings in _doctor_handlers(), permission denied.  Without _sees_sessions() it misses pg_cron launcher and pusher.
$node->safe_psql('postgres', q{CALL redrive.run_pass('purge'); CALL redrive.run_pass('rescue_stale'); CALL redrive.run_pass('retry_failed'); CALL redrive.run_pass('push_tasks')}, extra_params => [ '-U', 'plain' ]);
my $doctor = q{SELECT severity, finding FROM redrive.doctor()};
is( $node->safe_psql('postgres', $doctor),
	'warning|Role plain, which owns pg_redrive, is no superuser and may not see what sessions of other roles do, what is preloaded, settings in files: what is wrong there is not found.',
	'doctor() says what it cannot see, and nothing else');
is($node->safe_psql('postgres', $doctor, extra_params => [ '-U', 'plain' ]), $node->safe_psql('postgres', $doctor), '... and so it does to the owner');

# Seen red: without _sees_sessions() in _open_since() this is the only transaction that there is.
is($node->safe_psql('postgres', 'SELECT planned_at IS NULL FROM redrive.platforms'), 't', 'what push_tasks has seen is not known where transactions cannot be seen');

$node->psql('postgres', 'SELECT redrive.schedule_passes()', stderr => \$err, extra_params => [ '-U', 'plain' ]);
like($err, qr/permission denied to look for pg_cron.*DETAIL:.*HINT:.*GRANT pg_read_all_settings TO plain/s, 'schedule_passes() says what the owner needs');

# What doctor() says helps.
$node->safe_psql('postgres', $node->safe_psql('postgres', 'SELECT remedy FROM redrive.doctor()'));
# the pusher may just be starting
ok(poll_until($node, $doctor, 'ok|Nothing is wrong.'), 'with its remedy nothing is wrong');
$node->safe_psql('postgres', q{CALL redrive.run_pass('push_tasks')});
is($node->safe_psql('postgres', 'SELECT planned_at IS NULL FROM redrive.platforms'), 'f', '... and the pass knows what it has seen');
$node->psql('postgres', 'SELECT redrive.schedule_passes()', stderr => \$err, extra_params => [ '-U', 'plain' ]);
like($err, qr/permission denied for schema cron.*DETAIL:.*HINT:.*GRANT USAGE ON SCHEMA cron TO plain/s, '... and what else');
$node->safe_psql('postgres', 'GRANT USAGE ON SCHEMA cron TO plain');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.schedule_passes()', extra_params => [ '-U', 'plain' ]), '4', 'the owner schedules the passes');
is($node->safe_psql('postgres', $doctor), 'ok|Nothing is wrong.', 'still nothing is wrong');
verified_ok($node, 'at the end');

$node->stop;
done_testing();
