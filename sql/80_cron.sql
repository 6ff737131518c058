-- Scheduling through pg_cron, which may be absent: nothing here names its
-- objects before they are known to be there.

CREATE TYPE redrive.scheduled_pass AS (job_name text, schedule text, command text);
COMMENT ON TYPE redrive.scheduled_pass IS 'A job of pg_cron that runs a pass';

-- The jobs, one per pass.
CREATE FUNCTION redrive._cron_jobs(p_schedule text) RETURNS SETOF redrive.scheduled_pass
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'pg_redrive ' || p.pass, p.schedule, format('CALL redrive.run_pass(%L)', p.pass)
    FROM (VALUES ('rescue_stale', $1), ('retry_failed', $1), ('purge', '7 * * * *')) AS p (pass, schedule)
$$;

-- Raise an error that says why pg_cron cannot be used in this database, and
-- what to do about it.
CREATE FUNCTION redrive._check_cron(p_schedule text) RETURNS void
LANGUAGE plpgsql STABLE AS $$
DECLARE
    -- defined by the preloaded library of pg_cron
    v_database text := current_setting('cron.database_name', true);
    v_here text := current_database();
    v_statements text;
BEGIN
    -- the setting alone may be a left-over line of the configuration file
    IF v_database IS NULL OR current_setting('shared_preload_libraries') !~ '\mpg_cron\M' THEN
        RAISE EXCEPTION 'pg_cron is not loaded' USING ERRCODE = '55000',
            DETAIL = format('shared_preload_libraries is "%s".', current_setting('shared_preload_libraries')),
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
'Have pg_cron run the passes: rescue_stale and retry_failed on this schedule, purge once an hour. Can be repeated; it sets schedules back and activates jobs again. Errors: 55000 when pg_cron cannot be used from this database, the hint says what to do.';

CREATE FUNCTION redrive.unschedule_passes()
RETURNS SETOF redrive.scheduled_pass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
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
