-- Scheduling through pg_cron: from this database, from another one, without it.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

-- pg_cron is loaded, but not created here.
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS pg_cron;
RESET client_min_messages;
SELECT fails($$SELECT redrive.schedule_passes()$$);
SELECT fails($$SELECT redrive.unschedule_passes()$$);
SELECT fails($$SELECT redrive.schedule_passes(NULL)$$);

CREATE EXTENSION pg_cron;
CREATE VIEW jobs AS SELECT jobname, schedule, command, database = current_database() AS here, username = current_user AS mine, active FROM cron.job ORDER BY jobname;
SELECT * FROM redrive.unschedule_passes();
-- Rolled back, so that none of them starts while this runs.
BEGIN;
SELECT * FROM redrive.schedule_passes();
SELECT * FROM jobs;
ROLLBACK;
SELECT * FROM jobs;
-- Once a year; twice is the same as once; another schedule replaces it.
SELECT * FROM redrive.schedule_passes('0 0 1 1 *');
SELECT * FROM jobs;
SELECT * FROM redrive.schedule_passes('0 0 1 1 *');
SELECT * FROM redrive.schedule_passes('0 0 2 1 *');
SELECT * FROM jobs;
-- What was changed by hand is set back; jobs of others stay.
SELECT cron.alter_job(jobid, schedule := '0 0 3 1 *', active := false) FROM cron.job WHERE jobname = 'pg_redrive purge';
UPDATE cron.job SET active = false, command = 'SELECT 1' WHERE jobname = 'pg_redrive retry_failed';
SELECT cron.schedule('not ours', '0 0 4 1 *', 'SELECT 1') > 0 AS scheduled;
SELECT * FROM redrive.schedule_passes('0 0 1 1 *');
SELECT * FROM jobs;
-- A job of the same name that another role has is taken over, not doubled.
CREATE ROLE regress_cron_a SUPERUSER LOGIN;
UPDATE cron.job SET username = 'regress_cron_a' WHERE jobname = 'pg_redrive rescue_stale';
SELECT * FROM redrive.schedule_passes('0 0 1 1 *');
SELECT * FROM jobs;
DROP ROLE regress_cron_a;
-- The commands run.
SELECT command FROM cron.job WHERE jobname LIKE 'pg_redrive %' ORDER BY jobname \gexec
SELECT pass, acted, more, detail FROM redrive.pass_history ORDER BY pass;
-- What pg_cron does not take; newer ones add a hint.
SELECT f FROM fails($$SELECT redrive.schedule_passes('every now and then')$$) AS f WHERE f !~ '^ *hint';
SELECT f FROM fails($$SELECT redrive.schedule_passes('')$$) AS f WHERE f !~ '^ *hint';
SELECT * FROM jobs;
-- Unschedule: they are returned, the others stay; twice is fine.
SELECT * FROM redrive.unschedule_passes() ORDER BY job_name;
SELECT * FROM jobs;
SELECT * FROM redrive.unschedule_passes();

-- Who may: nobody by grant_user.
CREATE ROLE regress_cron_b LOGIN;
SELECT redrive.grant_user('regress_cron_b');
SET SESSION AUTHORIZATION regress_cron_b;
SELECT fails($$SELECT redrive.schedule_passes()$$);
SELECT fails($$SELECT redrive.unschedule_passes()$$);
RESET SESSION AUTHORIZATION;
DROP OWNED BY regress_cron_b;
DROP ROLE regress_cron_b;

-- From another database: the error says what to run where, and that works.
SELECT cron.unschedule('not ours');
SELECT current_database() AS home \gset
CREATE DATABASE regress_cron_other TEMPLATE template0;
\c regress_cron_other
SET client_min_messages = warning;
CREATE EXTENSION pg_redrive;
SELECT redrive.schedule_passes('0 0 1 1 *');
\echo :SQLSTATE
SELECT redrive.unschedule_passes();
\echo :SQLSTATE
DO $$
DECLARE
    v_hint text;
BEGIN
    PERFORM redrive.schedule_passes('0 0 1 1 *');
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS v_hint = PG_EXCEPTION_HINT;
    PERFORM set_config('my.hint', v_hint, false);
END
$$;
SELECT substring(current_setting('my.hint') FROM E'\n(.*)') AS statements \gset
DROP EXTENSION pg_redrive;
\c :home
SET search_path = scratch;
:statements
SELECT jobname, schedule, command, database FROM cron.job ORDER BY jobname;
SELECT cron.unschedule(jobid) FROM cron.job ORDER BY jobid;
DROP DATABASE regress_cron_other WITH (FORCE);
DROP VIEW jobs;
DROP EXTENSION pg_cron;
