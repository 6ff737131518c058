-- Doctor: each thing that it finds, and who may ask.  What needs other
-- settings or processes is in test/t/021_why.pl.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS pg_cron;
RESET client_min_messages;
\pset format unaligned
\pset tuples_only on

-- Times, pids and the superuser vary, and so does what other sessions leave.
CREATE FUNCTION plain(value text) RETURNS text LANGUAGE sql AS $$
    SELECT regexp_replace(regexp_replace(regexp_replace(regexp_replace(value, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[-+]\d\d(:\d\d)?', 'T', 'g'), '(\m[Pp]id |terminate_backend\()\d+', '\1N', 'g'),
        'oid \d+', 'oid N', 'g'), '\m' || (SELECT rolname FROM pg_roles WHERE oid = 10) || '\M', 'SUPERUSER', 'g')
$$;
CREATE FUNCTION doctor(pattern text, as_of timestamptz DEFAULT clock_timestamp()) RETURNS TABLE (severity text, finding text, remedy text)
-- settings as doctor() has them
LANGUAGE sql SET jit = off SET search_path = pg_catalog, pg_temp AS $$
    SELECT d.severity, scratch.plain(d.finding), scratch.plain(d.remedy) FROM redrive._doctor_at(as_of) AS d WHERE d.finding ~ pattern
$$;
CREATE FUNCTION take(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF payload = '"fail"' THEN
        RAISE EXCEPTION 'told to';
    END IF;
END
$$;
SELECT redrive.create_handler('h', 'take');

-- These servers have no executors: that is an error and comes first.
SELECT severity, plain(finding), plain(remedy) FROM redrive.doctor() LIMIT 1;
-- Errors come before warnings.
BEGIN;
SET LOCAL track_activities = off;
SELECT string_agg(DISTINCT severity, ' ') AS severities, array_agg(severity) = array_agg(severity ORDER BY severity) AS sorted FROM redrive.doctor();
SELECT * FROM doctor('track_activities');
ROLLBACK;

-- Processes that may be wanted: with the launcher, the pusher, pg_cron's own and one for each of its jobs, replication and 30 of a parallel query.
CREATE FUNCTION wanted() RETURNS int LANGUAGE sql AS $$
    SELECT m[1]::int - m[2]::int FROM redrive.doctor() AS d CROSS JOIN LATERAL regexp_match(d.finding, 'and (\d+) may be wanted: .* of (\d+) databases') AS m WHERE m IS NOT NULL
$$;
BEGIN;
SET LOCAL max_parallel_workers_per_gather = 30;
SET LOCAL max_parallel_workers = 30;
SELECT wanted();
SELECT redrive.create_platform('crm', 'https://crm.example/');
SELECT wanted();
SELECT * FROM doctor('the pusher');
SELECT redrive.pause_platform('crm');
SELECT * FROM doctor('the pusher');
-- What does not go to a platform, and is not held back by a pause.
SELECT redrive.resume_platform('crm');
SELECT count(redrive.record_task('form ' || n, 'done')) FROM generate_series(1, 5) AS n;
UPDATE redrive.platform_states SET breaker = 'half_open', reason = 'it answers 503';
UPDATE redrive.pushes SET state = CASE WHEN push_id <= min THEN 'blocked' WHEN push_id <= min + 2 THEN 'dead' ELSE 'pending' END::redrive.push_state FROM (SELECT min(push_id) FROM redrive.pushes) AS x;
SELECT * FROM doctor('platform "');
ROLLBACK;

-- Versions of library and SQL objects.
BEGIN;
UPDATE pg_extension SET extversion = '0.0' WHERE extname = 'pg_redrive';
-- where the server finds the files it knows that a restart is not needed
SELECT severity, regexp_replace(finding, '\d+\.\d+,', 'N,') AS finding, regexp_replace(remedy, '^restart.*then ', '') AS remedy FROM doctor('version');
ROLLBACK;
SELECT * FROM doctor('version');

-- Passes, without pg_cron, with it, and with jobs in each state.
CREATE FUNCTION passes(as_of timestamptz DEFAULT clock_timestamp()) RETURNS TABLE (severity text, finding text, remedy text) LANGUAGE sql AS $$ SELECT * FROM scratch.doctor('\m(pass|job)\M', as_of) $$;
SELECT * FROM passes();
CALL redrive.run_pass('rescue_stale');
CALL redrive.run_pass('retry_failed');
CALL redrive.run_pass('purge');
SELECT * FROM passes();
SELECT * FROM passes(clock_timestamp() + interval '61 min');
SELECT count(*) FROM passes(clock_timestamp() + interval '25 h');
CREATE EXTENSION pg_cron;
SELECT * FROM passes();
SELECT * FROM passes(clock_timestamp() + interval '61 min');
SELECT count(*) FROM redrive.schedule_passes('0 0 1 1 *');
TRUNCATE cron.job_run_details;
-- Scheduled a moment ago: it may not have run yet.
SELECT * FROM passes(clock_timestamp() + interval '25 h');
INSERT INTO cron.job_run_details (jobid, runid, command, status, return_message, start_time, end_time)
SELECT jobid, jobid, command, 'succeeded', '3 rows', now(), now() FROM cron.job;
SELECT * FROM passes();
SELECT * FROM passes(clock_timestamp() + interval '61 min');
INSERT INTO cron.job_run_details (jobid, runid, command, status, return_message, start_time, end_time)
SELECT jobid, jobid + 1000, command, 'failed', 'ERROR: no such thing', now(), now() FROM cron.job WHERE jobname ~ 'purge';
SELECT * FROM passes();
INSERT INTO cron.job_run_details (jobid, runid, command, status, return_message, start_time, end_time)
SELECT jobid, jobid + 2000, command, 'succeeded', '3 rows', now(), now() FROM cron.job WHERE jobname ~ 'purge';
SELECT * FROM passes();
SELECT cron.alter_job(jobid, active := false) FROM cron.job WHERE jobname ~ 'rescue_stale';
SELECT * FROM passes();
SELECT cron.unschedule(jobid) FROM cron.job WHERE jobname ~ 'retry_failed';
DELETE FROM redrive.pass_log WHERE pass = 'retry_failed';
SELECT * FROM passes();
DROP EXTENSION pg_cron;

-- Stale batches, with the passes that did not run.
SELECT redrive.submit('h', ARRAY['1']::jsonb[], label => 'stale') > 0 AS submitted;
SELECT redrive.open_batch('h', label => 'open') > 0 AS opened;
SELECT * FROM doctor('stale:');
SELECT * FROM doctor('stale:', clock_timestamp() + interval '61 min');
CALL redrive.work();
SELECT redrive.cancel_batch(batch('open'));

-- Handlers that cannot run: a warning, an error when they have work to do.
CREATE ROLE regress_doctor_a LOGIN;
CREATE ROLE regress_doctor_monitor LOGIN;
SELECT redrive.grant_user('regress_doctor_a'), redrive.grant_monitor('regress_doctor_monitor') \g /dev/null
SET SESSION AUTHORIZATION regress_doctor_a;
CREATE FUNCTION take_a(payload jsonb) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION ended(batch_id bigint, run_no int) RETURNS void LANGUAGE sql AS '';
SELECT redrive.create_handler('a', 'take_a', on_finish => 'ended');
RESET SESSION AUTHORIZATION;
SELECT * FROM doctor('"a"');
BEGIN;
DROP FUNCTION take_a;
DROP FUNCTION ended;
SELECT * FROM doctor('"a"');
SELECT redrive.submit('a', ARRAY['1']::jsonb[]) > 0 AS submitted;
SELECT severity, finding FROM doctor('"a"');
ROLLBACK;
BEGIN;
REVOKE EXECUTE ON FUNCTION take_a FROM PUBLIC, regress_doctor_a;
ALTER FUNCTION take_a OWNER TO CURRENT_USER;
SELECT * FROM doctor('"a"');
ROLLBACK;
BEGIN;
REVOKE CONNECT ON DATABASE contrib_regression FROM PUBLIC;
SELECT * FROM doctor('"a"');
ROLLBACK;
BEGIN;
UPDATE redrive.handlers SET owner = 1::oid::regrole WHERE name = 'a';
SELECT * FROM doctor('"a"');
ROLLBACK;
-- Settings of the owner that end workers; the most special one counts.
BEGIN;
ALTER ROLE regress_doctor_a SET lock_timeout = '1s';
ALTER ROLE regress_doctor_a SET exit_on_error = on;
ALTER ROLE regress_doctor_a SET statement_timeout = '1s';
SELECT * FROM doctor('workers of role regress_doctor_a');
ALTER ROLE regress_doctor_a IN DATABASE contrib_regression SET lock_timeout = 0;
SELECT * FROM doctor('workers of role regress_doctor_a');
ALTER ROLE regress_doctor_a RESET exit_on_error;
ALTER DATABASE contrib_regression SET exit_on_error = on;
SELECT finding FROM doctor('workers of role regress_doctor_a');
ALTER DATABASE contrib_regression RESET exit_on_error;
ALTER ROLE ALL SET exit_on_error = on;
SELECT finding FROM doctor('workers of role regress_doctor_a');
-- A setting of PostgreSQL 17.
UPDATE pg_db_role_setting SET setconfig = ARRAY['transaction_timeout=1s'] WHERE setrole = 0 AND setdatabase = 0;
SELECT finding, remedy FROM doctor('workers of role regress_doctor_a');
ROLLBACK;

-- Rows that point nowhere.
SELECT redrive.submit('h', ARRAY['1', '"fail"']::jsonb[], ARRAY['a', 'b'], label => 'torn') > 0 AS submitted;
CALL redrive.work();
SELECT * FROM doctor('rows of redrive|ended');
BEGIN;
INSERT INTO redrive.callbacks (handler_id, batch_id, kind, run_no) VALUES (1, batch('torn'), 'on_finish', 1);
INSERT INTO redrive.canaries (batch_id, run_no, items, needed, held) VALUES (batch('torn'), 2, '{1}', 1, '{2}');
INSERT INTO redrive.crashes VALUES (batch('torn'), 1, 1, now(), now());
INSERT INTO redrive.retry_lists VALUES (-1, '{1}', '{1}', '{1}', '{now}');
DELETE FROM redrive.batches WHERE label = 'torn';
SELECT * FROM doctor('rows of redrive|ended');
ROLLBACK;
BEGIN;
UPDATE redrive.batches SET state = 'cancelled', finished_at = now() WHERE label = 'torn';
SELECT * FROM doctor('rows of redrive|ended');
ROLLBACK;
-- What purge leaves for a moment is fine: items in a part whose batches are all gone.
BEGIN;
DELETE FROM redrive.locks;
DELETE FROM redrive.chunks;
DELETE FROM redrive.batches;
SELECT count(*) > 0 AS items FROM redrive.item_blocks;
SELECT * FROM doctor('rows of redrive|ended');
ROLLBACK;

-- Old transactions and prepared ones hold vacuum back.
BEGIN;
SELECT pg_current_xact_id() IS NOT NULL AS has_xid;
SELECT finding, remedy FROM doctor('keeps vacuum', clock_timestamp() + interval '9 min');
SELECT severity, regexp_replace(finding, 'SUPERUSER, \w+', 'SUPERUSER, STATE') AS finding, remedy FROM doctor('keeps vacuum', clock_timestamp() + interval '11 min') WHERE finding ~ 'SUPERUSER, active';
ROLLBACK;
BEGIN;
CREATE TABLE prepared ();
PREPARE TRANSACTION 'left behind';
SELECT severity, finding, remedy FROM doctor('prepared', clock_timestamp() + interval '11 min');
SELECT count(*) FROM doctor('prepared', clock_timestamp() + interval '9 min');
ROLLBACK PREPARED 'left behind';
-- Vacuum.
BEGIN;
ALTER TABLE redrive.chunks SET (autovacuum_enabled = off);
SELECT * FROM doctor('utovacuum is off');
ROLLBACK;
ALTER TABLE redrive.locks SET (autovacuum_enabled = off);
INSERT INTO redrive.locks SELECT -1, i::text, -1, i FROM generate_series(1, 10100) AS i;
DELETE FROM redrive.locks WHERE handler_id = -1;
SELECT pg_stat_force_next_flush();
SELECT severity, regexp_replace(finding, '\d+', 'N', 'g'), remedy FROM doctor('dead rows and');
VACUUM redrive.locks;
ALTER TABLE redrive.locks RESET (autovacuum_enabled);
-- The clock.
BEGIN;
UPDATE redrive.chunks SET finished_at = now() + interval '50 s' WHERE state = 'done';
SELECT * FROM doctor('clock');
UPDATE redrive.chunks SET finished_at = now() + interval '2 min' WHERE state = 'done';
SELECT * FROM doctor('clock');
ROLLBACK;
BEGIN;
UPDATE redrive.pass_log SET started_at = now() + interval '2 min';
SELECT count(*) FROM doctor('clock');
ROLLBACK;
BEGIN;
UPDATE redrive.batches SET last_progress_at = now() + interval '2 min';
SELECT count(*) FROM doctor('clock');
ROLLBACK;

-- Who may ask: superusers and monitors.
SET SESSION AUTHORIZATION regress_doctor_a;
SELECT fails('SELECT * FROM redrive.doctor()');
SELECT fails('SELECT * FROM redrive._doctor(10)');
SET SESSION AUTHORIZATION regress_doctor_monitor;
SELECT severity, plain(finding) FROM redrive.doctor() LIMIT 1;
RESET SESSION AUTHORIZATION;
\pset format aligned
\pset tuples_only off
SET client_min_messages = warning;
SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled') ORDER BY batch_id \g /dev/null
SELECT redrive.drop_handler(name) FROM redrive.handlers ORDER BY name \g /dev/null
DROP OWNED BY regress_doctor_a, regress_doctor_monitor;
DROP ROLE regress_doctor_a, regress_doctor_monitor;

-- Versions of the library, the SQL objects and the files: each that differs has a remedy.
SELECT v.*, d.severity, d.remedy
FROM (VALUES ('1.1', '1.1', '1.1'), ('1.1', '1.0', '1.1'), ('1.0', '1.1', '1.1'), ('1.0', '1.0', '1.1'), ('1.0', '1.1', '1.2')) AS v (library, objects, files)
LEFT JOIN redrive._doctor_version(v.library, v.objects, v.files) AS d ON true;
BEGIN;
UPDATE pg_extension SET extversion = '0.9' WHERE extname = 'pg_redrive';
SELECT severity, remedy ~ 'ALTER EXTENSION pg_redrive UPDATE;$' AS told FROM redrive.doctor() WHERE finding LIKE 'The library%0.9.';
ROLLBACK;
