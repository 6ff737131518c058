-- Scheduling through pg_cron, which may be absent: nothing here names its
-- objects before they are known to be there.

CREATE TYPE redrive.scheduled_pass AS (job_name text, schedule text, command text);
COMMENT ON TYPE redrive.scheduled_pass IS 'A job of pg_cron that runs a pass';

-- The jobs, one per pass.
CREATE FUNCTION redrive._cron_jobs(p_schedule text) RETURNS SETOF redrive.scheduled_pass
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'pg_redrive ' || p.pass, p.schedule, format('CALL redrive.run_pass(%L)', p.pass)
    FROM (VALUES ('rescue_stale', $1), ('retry_failed', $1), ('push_tasks', $1), ('purge', '7 * * * *')) AS p (pass, schedule)
$$;

-- A setting; NULL if there is none of this name, or the role may not see it.
CREATE FUNCTION redrive._setting(p_name text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT s.setting FROM pg_settings AS s WHERE s.name = $1
$$;

-- Raise an error that says why pg_cron cannot be used in this database, and
-- what to do about it.
CREATE FUNCTION redrive._check_cron(p_schedule text) RETURNS void
LANGUAGE plpgsql STABLE AS $$
DECLARE
    -- defined by the preloaded library of pg_cron
    v_database text := redrive._setting('cron.database_name');
    v_here text := current_database();
    v_statements text;
BEGIN
    IF NOT pg_has_role('pg_read_all_settings', 'USAGE') THEN
        RAISE EXCEPTION 'permission denied to look for pg_cron' USING ERRCODE = '42501',
            DETAIL = format('Role "%s" may not see what is preloaded.', current_user), HINT = format('Ask a superuser to run GRANT pg_read_all_settings TO %I.', current_user);
    END IF;
    -- the setting alone may be a left-over line of the configuration file
    IF v_database IS NULL OR redrive._setting('shared_preload_libraries') !~ '[[:<:]]pg_cron[[:>:]]' THEN
        RAISE EXCEPTION 'pg_cron is not loaded' USING ERRCODE = '55000',
            DETAIL = format('shared_preload_libraries is "%s".', redrive._setting('shared_preload_libraries')),
            HINT = format('Put pg_cron in shared_preload_libraries, set cron.database_name = ''%s'', restart the server, and run CREATE EXTENSION pg_cron. Without pg_cron, call redrive.run_pass() from another scheduler.', v_here);
    ELSIF v_database <> v_here THEN
        SELECT string_agg(CASE WHEN p_schedule IS NULL
                THEN format('SELECT cron.unschedule(%L);', j.job_name || ' ' || v_here)
                ELSE format('SELECT cron.schedule_in_database(%L, %L, %L, %L);', j.job_name || ' ' || v_here, j.schedule, j.command, v_here) END, E'\n')
        INTO v_statements
        FROM redrive._cron_jobs(p_schedule) AS j;
        RAISE EXCEPTION 'pg_cron is in another database' USING ERRCODE = '55000',
            DETAIL = format('Its database is "%s", this one is "%s".', v_database, v_here),
            HINT = format(E'Connect to database "%s" and run:\n%s', v_database, v_statements);
    ELSIF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron') THEN
        RAISE EXCEPTION 'extension "pg_cron" does not exist' USING ERRCODE = '55000',
            DETAIL = format('It is loaded and its database is "%s".', v_database),
            HINT = 'Run CREATE EXTENSION pg_cron, then try again.';
    ELSIF NOT has_schema_privilege('cron', 'USAGE') THEN
        RAISE EXCEPTION 'permission denied for schema cron' USING ERRCODE = '42501',
            DETAIL = format('Jobs of pg_cron are in it, and role "%s" may not see them.', current_user), HINT = format('Ask a superuser to run GRANT USAGE ON SCHEMA cron TO %I.', current_user);
    END IF;
END
$$;

-- Jobs are found by name.  pg_cron keeps names apart by role: jobs of the same
-- name that another role has scheduled, and that the caller may see, are taken
-- over or removed rather than doubled.
CREATE FUNCTION redrive.schedule_passes(schedule text DEFAULT '* * * * *')
RETURNS SETOF redrive.scheduled_pass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    j record;
    v_ids bigint[];
BEGIN
    PERFORM redrive._require_operator((SELECT r.oid FROM pg_roles AS r WHERE r.rolname = current_user), 'schedule_passes');
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'schedule must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out to run the passes each minute.';
    END IF;
    PERFORM redrive._check_cron($1);
    FOR j IN SELECT x.job_name, x.schedule, x.command FROM redrive._cron_jobs($1) AS x LOOP
        EXECUTE 'SELECT array_agg(c.jobid ORDER BY c.jobid) FROM cron.job AS c WHERE c.jobname = $1 AND c.database = current_database()'
        INTO v_ids USING j.job_name;
        IF v_ids IS NULL THEN
            EXECUTE 'SELECT cron.schedule($1, $2, $3)' USING j.job_name, j.schedule, j.command;
        ELSE
            -- schedule() would leave a job that was made inactive so
            EXECUTE 'SELECT cron.alter_job($1, schedule := $2, command := $3, username := current_user::text, active := true)' USING v_ids[1], j.schedule, j.command;
            EXECUTE 'SELECT cron.unschedule(i) FROM unnest($1) AS i' USING v_ids[2:];
        END IF;
    END LOOP;
    RETURN QUERY SELECT x.job_name, x.schedule, x.command FROM redrive._cron_jobs($1) AS x;
END
$$;
COMMENT ON FUNCTION redrive.schedule_passes IS
'Have pg_cron run the passes: rescue_stale, retry_failed and push_tasks on this schedule, purge once an hour. Can be repeated; it sets schedules back and activates jobs again. Errors: 55000 when pg_cron cannot be used from this database, the hint says what to do.';

CREATE FUNCTION redrive.unschedule_passes()
RETURNS SETOF redrive.scheduled_pass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM redrive._require_operator((SELECT r.oid FROM pg_roles AS r WHERE r.rolname = current_user), 'unschedule_passes');
    PERFORM redrive._check_cron(NULL);
    RETURN QUERY EXECUTE
        'SELECT c.jobname::text, c.schedule, c.command
         FROM cron.job AS c
         WHERE c.database = current_database() AND c.jobname IN (SELECT x.job_name FROM redrive._cron_jobs(NULL) AS x)
         ORDER BY c.jobid';
    EXECUTE
        'SELECT cron.unschedule(c.jobid)
         FROM cron.job AS c
         WHERE c.database = current_database() AND c.jobname IN (SELECT x.job_name FROM redrive._cron_jobs(NULL) AS x)';
END
$$;
COMMENT ON FUNCTION redrive.unschedule_passes IS
'Remove the jobs of redrive.schedule_passes() from pg_cron and return what they were; none is fine. Errors: 55000 when pg_cron cannot be used from this database.';

-- Background processes that pg_cron takes: its launcher, and one for each pass
-- when it does not use connections.
CREATE FUNCTION redrive._cron_processes() RETURNS int
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN coalesce(redrive._setting('shared_preload_libraries'), '') !~ '[[:<:]]pg_cron[[:>:]]' THEN 0
        WHEN redrive._setting('cron.use_background_workers') = 'on' THEN 1 + (SELECT count(*)::int FROM redrive._cron_jobs(''))
        ELSE 1
    END
$$;

-- For the doctor: do the passes run?  pg_cron tells about the jobs of its own
-- database only; from another one, and with another scheduler, what counts is
-- when a pass ran last.
CREATE FUNCTION redrive._doctor_passes(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_trouble text;
    v_hint text;
    v_here boolean := false;
    v_ran_at timestamptz;
    v_late boolean;
    p record;
    j record;
BEGIN
    BEGIN
        PERFORM redrive._check_cron('* * * * *');
        v_here := true;
    EXCEPTION WHEN object_not_in_prerequisite_state OR insufficient_privilege THEN
        GET STACKED DIAGNOSTICS v_trouble = MESSAGE_TEXT, v_hint = PG_EXCEPTION_HINT;
    END;
    IF v_here AND redrive._sees_sessions() AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'pg_cron launcher') THEN
        RETURN QUERY VALUES ('error', 'The process "pg_cron launcher" is not there.', 'look in the server log for its errors; pg_terminate_backend() ends it until the server is restarted');
    END IF;

    FOR p IN SELECT x.job_name, x.command, substring(x.job_name FROM ' (.*)') AS pass FROM redrive._cron_jobs('* * * * *') AS x LOOP
        -- without platforms it has nothing to do
        CONTINUE WHEN p.pass = 'push_tasks' AND NOT EXISTS (SELECT FROM redrive.platforms);
        v_ran_at := (SELECT max(l.started_at) FROM redrive.pass_log AS l WHERE l.pass = p.pass);
        v_late := v_ran_at IS NULL OR v_ran_at < p_as_of - CASE p.pass WHEN 'purge' THEN interval '1 day' ELSE interval '1 hour' END;
        IF NOT v_here THEN
            IF v_late THEN
                RETURN QUERY VALUES ('warning', format('Nobody runs the pass %s. %s And %s.', p.pass, redrive._pass_runs(p.pass), v_trouble), v_hint);
            END IF;
            CONTINUE;
        END IF;
        EXECUTE 'SELECT count(*) AS jobs, count(*) FILTER (WHERE c.active) AS active, min(c.schedule) AS schedule, min(r.status) AS status,
                     min(r.return_message) AS message, min(r.start_time) AS run_at
                 FROM cron.job AS c
                 LEFT JOIN LATERAL (SELECT d.status, d.return_message, d.start_time FROM cron.job_run_details AS d
                                    WHERE d.jobid = c.jobid AND d.end_time IS NOT NULL ORDER BY d.runid DESC LIMIT 1) AS r ON true
                 WHERE c.database = current_database() AND c.command = $1'
        INTO j USING p.command;
        IF j.jobs = 0 THEN
            IF v_late THEN
                RETURN QUERY VALUES ('warning', format('The pass %s is not scheduled. %s', p.pass, redrive._pass_runs(p.pass)), 'SELECT * FROM redrive.schedule_passes();');
            END IF;
        ELSIF j.active = 0 THEN
            RETURN QUERY VALUES ('warning', format('The job %L of pg_cron is not active. %s', p.job_name, redrive._pass_runs(p.pass)), 'SELECT * FROM redrive.schedule_passes();');
        ELSIF j.status = 'failed' THEN
            RETURN QUERY VALUES ('error', format('The job %L of pg_cron failed at %s: %s', p.job_name, redrive._seconds(j.run_at), j.message),
                format('SELECT * FROM cron.job_run_details WHERE command = %L ORDER BY runid DESC;', p.command));
        ELSIF v_late AND j.run_at IS NOT NULL THEN
            RETURN QUERY VALUES ('warning', format('The pass %s is scheduled (%s), but late. %s', p.pass, j.schedule, redrive._pass_runs(p.pass)),
                format('SELECT * FROM cron.job_run_details WHERE command = %L ORDER BY runid DESC;', p.command));
        END IF;
    END LOOP;
END
$$;
