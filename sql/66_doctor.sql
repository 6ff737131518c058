-- Doctor: what is wrong with the set-up.  Each function here looks at one
-- side of it and returns a row for each thing that is wrong; time is an
-- argument, as in the passes.
--
-- error = batches do not run, or rows are wrong; warning = it will make trouble.

-- Three versions: that of the library, that of the SQL objects, and that of the files on disk.
CREATE FUNCTION redrive._doctor_version(p_library text, p_objects text, p_files text) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'error', format('The library is of version %s, the SQL objects of this database are of version %s.', $1, $2),
        CASE WHEN $3 = $1 THEN 'ALTER EXTENSION pg_redrive UPDATE;'
            WHEN $3 = $2 THEN 'restart the server: it has the library of before'
            ELSE 'restart the server, if new files were installed since it started; then ALTER EXTENSION pg_redrive UPDATE;' END
    WHERE $1 <> $2
    UNION ALL
    SELECT 'warning', format('Files of version %s are installed, and the server still runs version %s.', $3, $2), 'restart the server; then ALTER EXTENSION pg_redrive UPDATE;'
    WHERE $1 = $2 AND $3 <> $2
$$;

CREATE FUNCTION redrive._doctor_settings() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    w record;
    v_wanted int;
BEGIN
    SELECT * INTO w FROM redrive._processes();
    RETURN QUERY
    SELECT v.* FROM redrive._doctor_version(redrive._library_version(), (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'pg_redrive'),
        (SELECT a.default_version FROM pg_available_extensions AS a WHERE a.name = 'pg_redrive')) AS v;

    IF NOT redrive._preloaded() THEN
        RETURN QUERY VALUES ('error', format('pg_redrive is not preloaded, so there are no workers: shared_preload_libraries is "%s".', coalesce(redrive._setting('shared_preload_libraries'), '...')),
            'add pg_redrive to shared_preload_libraries and restart the server; until then CALL redrive.work();');
    ELSE
        IF NOT current_setting('redrive.enabled')::boolean THEN
            RETURN QUERY VALUES ('error', 'redrive.enabled is off: no batch is run and passes do nothing.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();');
        END IF;
        IF current_setting('redrive.max_workers') = '0' THEN
            RETURN QUERY VALUES ('error', 'redrive.max_workers is 0: there are no workers.', 'ALTER SYSTEM SET redrive.max_workers = 4; SELECT pg_reload_conf();');
        END IF;
        IF pg_is_in_recovery() THEN
            NULL;
        ELSIF w.no_process_since IS NOT NULL THEN
            RETURN QUERY VALUES ('error', format('A worker is wanted and cannot be started since %s, as all of max_worker_processes, %s, are taken.',
                    redrive._seconds(w.no_process_since), current_setting('max_worker_processes')),
                'ALTER SYSTEM SET max_worker_processes = ...; and restart the server');
        ELSIF w.launcher_pid IS NULL THEN
            RETURN QUERY VALUES ('error', 'The process "redrive launcher" is not there.', 'look in the server log; if it says "too many background workers", increase max_worker_processes and restart the server');
        ELSIF w.supervisor_pid IS NULL THEN
            RETURN QUERY VALUES ('error', 'The process "redrive supervisor" of this database is not there.',
                'look in the server log for its errors; it is started again within a minute, if redrive.max_databases is high enough');
        END IF;
        RETURN QUERY
        SELECT 'error', format('Executors of role %s end as soon as they are started.', o::regrole), 'look in the server log for their error'
        FROM unnest(w.held_back) AS o;
        -- launcher, supervisors, executors; pushers, here and elsewhere; pg_cron and the passes; logical replication launcher; a parallel query
        v_wanted := 1 + greatest(w.databases, 1) + current_setting('redrive.max_workers')::int
            + (EXISTS (SELECT FROM redrive.platforms))::int
            + (SELECT count(*) FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive pusher' AND a.datname <> current_database())
            + redrive._cron_processes()
            + (current_setting('max_logical_replication_workers')::int > 0)::int
            + least(current_setting('max_parallel_workers_per_gather')::int, current_setting('max_parallel_workers')::int);
        IF v_wanted > current_setting('max_worker_processes')::int THEN
            RETURN QUERY VALUES ('warning',
                format('max_worker_processes is %s, and %s may be wanted: launcher, supervisors of %s databases, their pushers, redrive.max_workers = %s, pg_cron, replication and a parallel query.',
                    current_setting('max_worker_processes'), v_wanted, greatest(w.databases, 1), current_setting('redrive.max_workers')),
                format('ALTER SYSTEM SET max_worker_processes = %s; and restart the server', greatest(16, v_wanted)));
        END IF;
    END IF;
    IF NOT current_setting('track_activities')::boolean THEN
        RETURN QUERY VALUES ('warning', 'track_activities is off, so why() cannot tell what a blocking session does.', 'ALTER SYSTEM SET track_activities = on; SELECT pg_reload_conf();');
    END IF;
END
$$;

-- What keeps vacuum from removing dead rows of our tables, and the clock.
CREATE FUNCTION redrive._doctor_server(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'warning', format('Pid %s (%s, %s) is in a transaction since %s, and keeps vacuum from removing dead rows.', a.pid, a.usename, coalesce(a.state, a.backend_type), redrive._seconds(a.xact_start)),
        format('let it end its transaction, or SELECT pg_terminate_backend(%s);', a.pid)
    FROM pg_stat_activity AS a
    WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.xact_start <= $1 - interval '10 min' AND a.backend_type <> 'autovacuum worker'
    UNION ALL
    SELECT 'warning', format('Transaction %L of %s is prepared since %s and not ended, and keeps vacuum from removing dead rows.', p.gid, p.owner, redrive._seconds(p.prepared)),
        format('in database %s: COMMIT PREPARED %2$L; or ROLLBACK PREPARED %2$L;', p.database, p.gid)
    FROM pg_prepared_xacts AS p
    WHERE p.prepared <= $1 - interval '10 min'
    UNION ALL
    SELECT 'warning', format('Replication slot %L is not in use, and keeps vacuum from removing rows since transaction %s.', s.slot_name, coalesce(s.xmin, s.catalog_xmin)),
        format('let its consumer go on, or SELECT pg_drop_replication_slot(%L);', s.slot_name)
    FROM pg_replication_slots AS s
    WHERE NOT s.active AND (s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL)
    UNION ALL
    SELECT 'warning', format('%s is off: nothing removes dead rows.', o.name), format('ALTER SYSTEM SET %s = on; SELECT pg_reload_conf();', o.name)
    FROM unnest(ARRAY['autovacuum', 'track_counts']) AS o (name)
    WHERE NOT current_setting(o.name)::boolean
    UNION ALL
    SELECT 'warning', format('Autovacuum is off for %s.', c.oid::regclass), format('ALTER TABLE %s RESET (autovacuum_enabled);', c.oid::regclass)
    FROM pg_class AS c
    CROSS JOIN LATERAL pg_options_to_table(c.reloptions) AS o
    WHERE c.relnamespace = 'redrive'::regnamespace AND o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean
    UNION ALL
    SELECT 'warning', format('%s has %s dead rows and %s live ones.', t.relid::regclass, t.n_dead_tup, t.n_live_tup), format('VACUUM %s; if that does not help, something above keeps old rows', t.relid::regclass)
    FROM pg_stat_all_tables AS t
    WHERE t.schemaname = 'redrive' AND t.n_dead_tup > 10000 AND t.n_dead_tup > t.n_live_tup
    UNION ALL
    SELECT 'warning', format('The last thing that was written down happened at %s, and now it is %s: the clock was set back.', redrive._seconds(l.last_at), redrive._seconds($1)),
        'set the clock right; until it has caught up, batches may wait longer than they should'
    FROM (
        SELECT greatest(
            (SELECT max(b.last_progress_at) FROM redrive.batches AS b WHERE b.state NOT IN ('finished', 'cancelled')),
            (SELECT max(c.finished_at) FROM redrive.chunks AS c WHERE c.state = 'done'),
            (SELECT max(p.started_at) FROM redrive.pass_log AS p)) AS last_at
    ) AS l
    WHERE l.last_at > $1 + interval '1 min'
$$;

-- Rows that point nowhere.  Items and failures may outlive their batch for a
-- while: purge removes batches first, and then truncates the part.
CREATE FUNCTION redrive._doctor_rows(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    WITH kept AS MATERIALIZED (
        SELECT p.part
        FROM redrive.rotation AS r
        CROSS JOIN LATERAL generate_series(0, r.parts - 1) AS p (part)
        WHERE redrive._part_state(p.part, $1 - r.retention) = 'kept'
    )
    SELECT 'error', format('%s rows of redrive.%s belong to a %s that does not exist.', o.n, o.name, o.of),
        format('report it; then DELETE FROM redrive.%1$I AS x WHERE NOT EXISTS (SELECT FROM redrive.%2$s AS y WHERE y.%3$s_id = x.%3$s_id);',
            o.name, CASE o.of WHEN 'chunk' THEN 'chunks' ELSE 'batches' END, o.of)
    FROM (
        SELECT 'chunks' AS name, 'batch' AS of, count(*) AS n FROM redrive.chunks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'retry_lists', 'chunk', count(*) FROM redrive.retry_lists AS x
        WHERE NOT EXISTS (SELECT FROM redrive.chunks AS c WHERE c.chunk_id = x.chunk_id)
        UNION ALL
        SELECT 'crashes', 'batch', count(*) FROM redrive.crashes AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'canaries', 'batch', count(*) FROM redrive.canaries AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'callbacks', 'batch', count(*) FROM redrive.callbacks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'locks', 'batch', count(*) FROM redrive.locks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'failures', 'batch', count(*) FROM redrive.failures AS x
        WHERE x.part IN (SELECT k.part FROM kept AS k) AND NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'item_blocks', 'batch', count(*) FROM redrive.item_blocks AS x
        WHERE x.part IN (SELECT k.part FROM kept AS k) AND NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
    ) AS o
    WHERE o.n > 0
    UNION ALL
    SELECT 'error', format('%s keys are locked by batches that ended, for example %s.', count(*), min(b.batch_id)),
        'report it; then DELETE FROM redrive.locks AS l USING redrive.batches AS b WHERE b.batch_id = l.batch_id AND b.finished_at IS NOT NULL;'
    FROM redrive.locks AS l
    JOIN redrive.batches AS b ON b.batch_id = l.batch_id
    WHERE b.finished_at IS NOT NULL
    HAVING count(*) > 0
    UNION ALL
    SELECT 'warning', format('%s batches are stale: %s, since %s. %s', count(*), s.reason, redrive._seconds(min(s.since)),
            CASE WHEN s.reason IN ('failed_recently', 'overdue_retry', 'expired') THEN redrive._pass_runs('retry_failed') ELSE redrive._pass_runs('rescue_stale') END),
        format('SELECT * FROM redrive.why(%s); CALL redrive.run_pass(%L);', min(s.batch_id),
            CASE WHEN s.reason IN ('failed_recently', 'overdue_retry', 'expired') THEN 'retry_failed' ELSE 'rescue_stale' END)
    FROM redrive.stale_batches_at($1) AS s
    GROUP BY s.reason
$$;

-- What the owner of the extension, as whom all this is asked, has no right to see, being no superuser any more.
CREATE FUNCTION redrive._sees_files() RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT has_table_privilege('pg_file_settings', 'SELECT') AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE')
$$;

CREATE FUNCTION redrive._doctor_rights() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'warning',
        format('Role %I, which owns pg_redrive, is no superuser and may not see %s: what is wrong there is not found.', current_user, string_agg(r.what, ', ' ORDER BY r.place)),
        string_agg(format(r.remedy, current_user), ' ' ORDER BY r.place)
    FROM (VALUES
        (1, redrive._sees_sessions(), 'what sessions of other roles do', 'GRANT pg_read_all_stats TO %I;'),
        (2, pg_has_role('pg_read_all_settings', 'USAGE'), 'what is preloaded', 'GRANT pg_read_all_settings TO %I;'),
        (3, redrive._sees_files(), 'settings in files', 'GRANT SELECT ON pg_file_settings TO %1$I; GRANT EXECUTE ON FUNCTION pg_show_all_file_settings() TO %1$I;')) AS r (place, allowed, what, remedy)
    WHERE NOT r.allowed
    HAVING count(*) > 0
$$;

CREATE FUNCTION redrive._file_setting(p_name text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT redrive._sees_files() THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT f.setting FROM pg_file_settings AS f WHERE f.name = p_name AND f.applied);
END
$$;

-- Handlers that cannot run, and settings of their owners that end workers.
CREATE FUNCTION redrive._doctor_handlers() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM redrive.batches AS b WHERE b.handler_id = h.handler_id AND b.state NOT IN ('finished', 'cancelled'))
                THEN 'error' ELSE 'warning' END,
        p.detail, p.remedy
    FROM redrive.handlers AS h
    CROSS JOIN LATERAL redrive._handler_problems(h.handler_id) AS p
    UNION ALL
    SELECT 'warning',
        CASE s.name
            WHEN 'exit_on_error' THEN format('%s is %s for workers of role %s: an item that fails ends its worker.', s.name, s.value, s.owner)
            WHEN 'lock_timeout' THEN format('%s is %s for workers of role %s: one that waits longer for a lock may end.', s.name, s.value, s.owner)
            ELSE format('%s is %s for workers of role %s: one whose transaction takes longer ends.', s.name, s.value, s.owner)
        END,
        format('ALTER ROLE %s IN DATABASE %I SET %s = %L;', s.owner, current_database(), s.name, s.harmless)
    FROM (
        -- the most special one counts, as at the start of a session
        SELECT DISTINCT ON (h.owner, w.name) h.owner, w.name, w.harmless, v.value
        FROM (SELECT DISTINCT x.owner FROM redrive.handlers AS x) AS h
        CROSS JOIN (VALUES ('exit_on_error', 'off'), ('lock_timeout', '0'), ('transaction_timeout', '0')) AS w (name, harmless)
        CROSS JOIN LATERAL (
            SELECT 1 AS place, substring(c FROM '=(.*)') AS value
            FROM pg_db_role_setting AS d
            CROSS JOIN LATERAL unnest(d.setconfig) AS c
            WHERE c LIKE w.name || '=%' AND d.setrole = h.owner::oid
              AND d.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
            UNION ALL
            SELECT CASE WHEN d.setrole <> 0 THEN 2 WHEN d.setdatabase <> 0 THEN 3 ELSE 4 END, substring(c FROM '=(.*)')
            FROM pg_db_role_setting AS d
            CROSS JOIN LATERAL unnest(d.setconfig) AS c
            WHERE c LIKE w.name || '=%'
              AND ((d.setrole = h.owner::oid AND d.setdatabase = 0)
                   OR (d.setrole = 0 AND d.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))))
            UNION ALL
            SELECT 5, redrive._file_setting(w.name)
        ) AS v
        ORDER BY h.owner, w.name, v.place
    ) AS s
    WHERE s.value NOT IN ('0', 'off', 'false', 'no')
$$;

-- The pusher needs a socket for each push that is under way.
CREATE FUNCTION redrive._max_sockets() RETURNS int
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__max_sockets';

CREATE FUNCTION redrive._doctor_sockets(p_wanted int, p_sockets int) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'warning', format('redrive.push_max_in_flight is %s, but the pusher may open only %s sockets: a third of max_files_per_process, %s, or of the limit of the server.', $1, $2, current_setting('max_files_per_process')),
        format('ALTER SYSTEM SET max_files_per_process = %s; and restart the server with a limit of open files as large (LimitNOFILE of its service); or ALTER SYSTEM SET redrive.push_max_in_flight = %s; SELECT pg_reload_conf();', 3 * $1 + 100, $2)
    WHERE $1 > $2
$$;

-- Platforms: what keeps their pushes from being sent.
CREATE FUNCTION redrive._doctor_pushes(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'error', format('Secrets of platform "%s" are missing; nothing is pushed there.', p.name), format('SELECT redrive.set_platform_secret(%L, ...); dumps do not have them', p.name)
    FROM redrive.platforms AS p
    WHERE p.secrets::text[] <> ARRAY(SELECT k.kind::text FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id ORDER BY k.kind)
    UNION ALL
    SELECT CASE WHEN EXISTS (SELECT FROM redrive.pushes AS u WHERE u.platform_id = p.platform_id AND u.awaits_build AND u.state IN ('pending', 'waiting'))
                THEN 'error' ELSE 'warning' END,
        r.detail, r.remedy
    FROM redrive.platforms AS p
    CROSS JOIN LATERAL redrive._platform_problems(p.platform_id) AS r
    UNION ALL
    -- by itself, not by pause_platform()
    SELECT 'warning', format('Platform "%s" is paused: %s.', p.name, s.reason), format('when it wants them again: SELECT redrive.resume_platform(%1$L); or SELECT redrive.drop_platform(%1$L);', p.name)
    FROM redrive.platforms AS p JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
    WHERE p.paused AND s.reason LIKE 'it answered 410:%'
    UNION ALL
    SELECT 'warning', format('The breaker of platform "%s" is %s: %s.', p.name, replace(s.breaker::text, '_', ' '), s.reason), format('mend the platform; to try at once: SELECT redrive.resume_platform(%L);', p.name)
    FROM redrive.platforms AS p JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
    WHERE s.breaker <> 'closed' AND NOT p.paused
    UNION ALL
    SELECT 'warning', format('%s pushes to platform "%s" were given up.', count(*), p.name), format('SELECT * FROM redrive.push_status WHERE platform = %1$L AND state = ''dead''; when it is mended: SELECT redrive.redrive_push(%1$L);', p.name)
    FROM redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
    WHERE u.state = 'dead'
    GROUP BY p.name
    UNION ALL
    SELECT 'warning', format('%s pushes to platform "%s" are blocked.', count(*), p.name), format('SELECT message FROM redrive.push_status WHERE platform = %1$L AND state = ''blocked''; then SELECT redrive.alter_platform(%1$L, ...); or, if the cause was elsewhere, SELECT redrive.redrive_push(%1$L);', p.name)
    FROM redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
    WHERE u.state = 'blocked' AND u.error_class IS DISTINCT FROM 'test'
    GROUP BY p.name
    UNION ALL
    SELECT 'error', format('%s pushes have been under way for longer than their lease.', count(*)), 'CALL redrive.run_pass(''push_tasks''); and look whether a process "redrive pusher" is in pg_stat_activity'
    FROM redrive._in_flight AS f
    WHERE f.lease_until < p_as_of - interval '1 min'
    HAVING count(*) > 0
    UNION ALL
    SELECT 'error', 'There are platforms, but the pusher is not running.', 'look in the server log for its errors; it takes one of max_worker_processes'
    WHERE EXISTS (SELECT FROM redrive.platforms AS p WHERE NOT p.paused) AND redrive._preloaded() AND coalesce(current_setting('redrive.enabled', true), 'on')::boolean
      AND NOT pg_is_in_recovery()
      AND redrive._sees_sessions()
      AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive pusher' AND a.datname = current_database())
    UNION ALL
    SELECT s.severity, s.finding, s.remedy
    FROM redrive._doctor_sockets(coalesce(current_setting('redrive.push_max_in_flight', true), '128')::int, redrive._max_sockets()) AS s
    WHERE EXISTS (SELECT FROM redrive.platforms AS p WHERE NOT p.paused)
    UNION ALL
    SELECT 'warning', format('The last attempt to push happened at %s, and now it is %s: the clock was set back.', redrive._seconds(l.last_at), redrive._seconds(p_as_of)),
        'set the clock right; until it has caught up, retries and the end of leases are late'
    FROM (SELECT max(greatest(s.last_delivered_at, s.last_failed_at)) AS last_at FROM redrive.platform_states AS s) AS l
    WHERE l.last_at > p_as_of + interval '1 min'
$$;

CREATE FUNCTION redrive._doctor_at(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    SELECT f.severity, f.finding, f.remedy
    FROM (
        SELECT 1 AS side, s.* FROM redrive._doctor_settings() AS s
        UNION ALL
        SELECT 2, s.* FROM redrive._doctor_handlers() AS s
        UNION ALL
        SELECT 3, s.* FROM redrive._doctor_rows(p_as_of) AS s
        UNION ALL
        SELECT 4, s.* FROM redrive._doctor_passes(p_as_of) AS s
        UNION ALL
        SELECT 5, s.* FROM redrive._doctor_pushes(p_as_of) AS s
        UNION ALL
        SELECT 6, s.* FROM redrive._doctor_server(p_as_of) AS s
        UNION ALL
        SELECT 7, s.* FROM redrive._doctor_rights() AS s
    ) AS f
    ORDER BY f.severity, f.side, f.finding COLLATE "C";
    IF NOT FOUND THEN
        RETURN QUERY VALUES ('ok', 'Nothing is wrong.', NULL);
    END IF;
END
$$;

CREATE FUNCTION redrive._doctor(p_caller oid) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT pg_has_role(p_caller, (SELECT e.extowner FROM pg_extension AS e WHERE e.extname = 'pg_redrive'), 'USAGE')
       AND NOT redrive._is_monitor(p_caller) THEN
        RAISE EXCEPTION 'permission denied for redrive.doctor()' USING ERRCODE = '42501',
            DETAIL = 'It tells of handlers and sessions of all roles.',
            HINT = 'Ask a superuser to call it, or to run redrive.grant_monitor() for your role; redrive.why() tells about your own batches.';
    END IF;
    RETURN QUERY SELECT d.severity, d.finding, d.remedy FROM redrive._doctor_at(clock_timestamp()) AS d;
END
$$;

CREATE FUNCTION redrive.doctor() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE c STABLE ROWS 3 AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.doctor IS
'What is wrong with the set-up of pg_redrive, errors first, each with the statement that helps; one row with severity ok if nothing is. For superusers, the owner of the extension and monitors. Errors: 42501 for others.';
