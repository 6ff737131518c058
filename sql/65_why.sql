-- Questions: why does a batch not move (why), and what is wrong here (doctor)?
--
-- The internal functions run with the rights of the extension and get the
-- caller's role.  They show of others' sessions what pg_stat_activity would
-- show that role, and of others' batches what a monitor may see.

-- The background processes that serve this database, and what keeps others
-- from being started; all NULL without preload.  executors: of the cluster.
CREATE FUNCTION redrive._processes(OUT launcher_pid int, OUT supervisor_pid int, OUT databases int, OUT executors int,
    OUT no_process_since timestamptz, OUT held_back oid[]) RETURNS record
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__processes';

CREATE FUNCTION redrive._library_version() RETURNS text
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__library_version';

-- A role sees counts of all batches if it may read this column.
CREATE FUNCTION redrive._is_monitor(p_role oid) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT has_column_privilege($1, 'redrive.batches', 'batch_id', 'SELECT')
$$;

CREATE FUNCTION redrive._seconds(p_time timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT to_char($1, 'YYYY-MM-DD HH24:MI:SSOF')
$$;

CREATE FUNCTION redrive._pass_runs(p_pass text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce('It ran last at ' || redrive._seconds(max(l.started_at)) || '.', 'It has not run yet.')
    FROM redrive.pass_log AS l
    WHERE l.pass = $1
$$;

-- Who keeps a process waiting for a lock: one row for each, none if nobody.
CREATE FUNCTION redrive._blockers(p_caller oid, p_pids int[]) RETURNS TABLE (detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT CASE
            WHEN p.pid = 0 THEN 'a prepared transaction'
            WHEN pg_has_role($1, 'pg_read_all_stats', 'USAGE') OR pg_has_role($1, a.usesysid, 'USAGE')
                THEN format('pid %s (%s, %s, transaction since %s): %s', p.pid, a.usename, coalesce(a.state, a.backend_type),
                            redrive._seconds(a.xact_start), left(regexp_replace(a.query, '[[:space:]]+', ' ', 'g'), 300))
            ELSE format('pid %s', p.pid)
        END,
        CASE
            WHEN p.pid = 0 THEN 'SELECT * FROM pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED the right one'
            ELSE format('let it end its transaction, or SELECT pg_terminate_backend(%s);', p.pid)
        END
    FROM (SELECT DISTINCT x AS pid FROM unnest($2) AS x) AS p
    LEFT JOIN pg_stat_activity AS a ON a.pid = p.pid
    ORDER BY p.pid
$$;

-- What keeps workers from running functions of a handler or a platform, of which
-- p_what says what they are for; a signature of NULL = there is none.
CREATE FUNCTION redrive._problems_of(p_kind text, p_name text, p_owner regrole, p_needs_workers boolean, p_what text[], p_signatures text[])
RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM (SELECT) AS one
    LEFT JOIN pg_roles AS o ON o.oid = p_owner::oid
    CROSS JOIN LATERAL (
        SELECT 'owner gone' AS fact,
            format('The owner of %s "%s", role with oid %s, was dropped.', p_kind, p_name, p_owner::oid) AS detail,
            format('UPDATE redrive.%ss SET owner = ''another_role'' WHERE name = %L;', p_kind, p_name) AS remedy
        WHERE o.oid IS NULL
        UNION ALL
        SELECT 'owner cannot log in',
            format('Workers connect as role %s, the owner of %s "%s".', p_owner, p_kind, p_name),
            format('ALTER ROLE %s LOGIN;', p_owner)
        WHERE p_needs_workers AND NOT o.rolcanlogin AND redrive._owner_needs_login()
        UNION ALL
        SELECT 'owner cannot connect',
            format('Role %s, the owner of %s "%s", has no right to connect to database "%s".', p_owner, p_kind, p_name, current_database()),
            format('GRANT CONNECT ON DATABASE %I TO %s;', current_database(), p_owner)
        WHERE p_needs_workers AND o.oid IS NOT NULL AND NOT has_database_privilege(o.oid, current_database(), 'CONNECT')
        UNION ALL
        SELECT CASE WHEN p.oid IS NULL THEN f.what || ' missing' ELSE f.what || ' not executable' END,
            CASE WHEN p.oid IS NULL THEN format('Function %s of %s "%s" does not exist.', f.signature, p_kind, p_name)
                 ELSE format('Role %s, the owner of %s "%s", may not execute function %s.', p_owner, p_kind, p_name, f.signature) END,
            CASE WHEN p.oid IS NULL THEN format('Create the function again, or name another one with redrive.alter_%s(%L, ...).', p_kind, p_name)
                 WHEN has_function_privilege(o.oid, p.oid, 'EXECUTE') THEN format('GRANT USAGE ON SCHEMA %s TO %s;', p.pronamespace::regnamespace, p_owner)
                 ELSE format('GRANT EXECUTE ON FUNCTION %s TO %s;', f.signature, p_owner) END
        FROM unnest(p_what, p_signatures) AS f (what, signature)
        -- to_regprocedure() asks for rights on the schema
        CROSS JOIN LATERAL (SELECT parse_ident(f.signature, false) AS name) AS i
        LEFT JOIN pg_namespace AS n ON n.nspname = i.name[1]
        LEFT JOIN pg_proc AS p ON p.pronamespace = n.oid AND p.proname = i.name[2]
            AND right(f.signature, length(oidvectortypes(p.proargtypes)) + 2) = '(' || oidvectortypes(p.proargtypes) || ')'
        WHERE f.signature IS NOT NULL
          AND (p.oid IS NULL
               OR (o.oid IS NOT NULL
                   AND NOT (has_function_privilege(o.oid, p.oid, 'EXECUTE') AND has_schema_privilege(o.oid, p.pronamespace, 'USAGE'))))
    ) AS r
$$;

-- What keeps a handler from running, whatever the batch.
CREATE FUNCTION redrive._handler_problems(p_handler_id int) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.handlers AS h
    -- workers of ours only run the callbacks of an external handler
    CROSS JOIN LATERAL redrive._problems_of('handler', h.name, h.owner, h.kind <> 'external' OR h.on_unlock IS NOT NULL OR h.on_finish IS NOT NULL,
        ARRAY['handler function', 'on_unlock', 'on_finish'],
        ARRAY[h.function || CASE h.signature WHEN 'payload' THEN '(jsonb)' WHEN 'key_payload' THEN '(text, jsonb)' WHEN 'item' THEN '(redrive.item)' WHEN 'items' THEN '(redrive.item[])' END,
            h.on_unlock || '(text)', h.on_finish || '(bigint, integer)']) AS r
    WHERE h.handler_id = $1
$$;

-- What keeps a platform from getting its bodies; workers of ours only build them.
CREATE FUNCTION redrive._platform_problems(p_platform_id int) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.platforms AS p
    CROSS JOIN LATERAL redrive._problems_of('platform', p.name, p.owner, p.build IS NOT NULL, '{build}', ARRAY[p.build || '(redrive.task)']) AS r
    WHERE p.platform_id = $1
$$;

-- The workers of a batch, what they are in, and who blocks them.
CREATE FUNCTION redrive._why_workers(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.chunks AS c
    JOIN redrive.handlers AS h ON h.handler_id = c.handler_id
    JOIN redrive._running_chunks AS w ON w.chunk_id = c.chunk_id
    LEFT JOIN redrive._slots() AS s ON s.pid = c.worker_pid AND s.chunk_id = c.chunk_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.lease_until IS NULL THEN format('Pid %s has', c.worker_pid)
                 ELSE format('An external worker%s claimed', ' "' || CASE WHEN pg_has_role($1, h.owner::oid, 'USAGE') THEN c.worker END || '"') END
            || format(' items %s to %s of this batch', CASE WHEN c.lease_until IS NULL THEN c.done_to + 1 ELSE c.from_no END, c.to_no)
            || CASE WHEN c.kind = 'retry' THEN ', those of them that are tried again' ELSE '' END
            || coalesce(', and is in item ' || s.item_no || ' since ' || redrive._seconds(s.item_started_at), '') AS who,
            CASE WHEN w.alive AND c.lease_until IS NULL THEN pg_blocking_pids(c.worker_pid) ELSE '{}' END AS blocking
    ) AS k
    CROSS JOIN LATERAL (
        SELECT 'worker gone' AS fact,
            k.who || CASE WHEN c.lease_until IS NULL THEN '; this process is not there any more.' ELSE format('; its lease ended at %s.', redrive._seconds(w.lease_ends_at)) END AS detail,
            'CALL redrive.run_pass(''rescue_stale''); the supervisor does the same within 30 s' AS remedy
        WHERE NOT w.alive
        UNION ALL
        SELECT 'blocked by a lock', format('%s. It waits for %s', k.who, b.detail), b.remedy
        FROM redrive._blockers($1, k.blocking) AS b
        UNION ALL
        SELECT 'worker inside an item', k.who || '.',
            format('wait; or SELECT pg_cancel_backend(%s); to fail the item', c.worker_pid)
                || CASE WHEN h.item_timeout IS NULL THEN format('; SELECT redrive.alter_handler(%L, item_timeout => ''1 min''); limits all items', h.name) ELSE '' END
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NOT NULL
        UNION ALL
        SELECT 'worker does nothing',
            k.who || format(CASE WHEN c.lease_until IS NULL THEN ', but is in none of them and has not committed since %s.'
                            ELSE ', and renews its lease, but has settled none since %s.' END, redrive._seconds(c.progress_at)),
            'CALL redrive.run_pass(''rescue_stale'');'
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NULL AND w.stuck_from <= clock_timestamp()
        UNION ALL
        SELECT CASE WHEN c.lease_until IS NULL THEN 'running' ELSE 'claimed by an external worker' END,
            k.who || CASE WHEN c.lease_until IS NULL THEN format('; it committed last at %s.', redrive._seconds(c.progress_at))
                          WHEN c.items > c.done THEN format(' until %s; %s of them are left.', redrive._seconds(c.lease_until), c.items - c.done)
                          ELSE format(' until %s. All of them are settled, but the claim was not ended.', redrive._seconds(c.lease_until)) END,
            CASE WHEN c.lease_until IS NOT NULL AND c.items = c.done THEN 'wait for its lease; the worker should end each claim with redrive.complete()' END
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NULL AND w.stuck_from > clock_timestamp()
    ) AS r
    WHERE c.batch_id = $2 AND c.state = 'running'
    ORDER BY c.chunk_id
$$;

-- What a batch waits for by itself, if it waits.
CREATE FUNCTION redrive._why_waits(p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.batches AS b
    JOIN redrive.handlers AS h ON h.handler_id = b.handler_id
    LEFT JOIN redrive._unfolded AS u ON u.batch_id = b.batch_id
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE f.next_attempt_at IS NULL) AS for_pass,
            count(*) FILTER (WHERE f.next_attempt_at > clock_timestamp()) AS later,
            min(f.next_attempt_at) AS next_at,
            max(f.next_attempt_at) AS last_at
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
    ) AS f
    CROSS JOIN LATERAL (
        SELECT 'not due' AS fact, format('It was submitted to run at %s, not before.', redrive._seconds(b.run_at)) AS detail, 'wait, or cancel it and submit it anew' AS remedy
        WHERE b.claimable AND b.serve_after > clock_timestamp()
        UNION ALL
        SELECT 'waiting for a retry',
            CASE WHEN b.state = 'retrying' AND f.later = b.waiting
                 THEN format('All %s items that are left failed and wait, the first until %s, the last until %s.', f.later, redrive._seconds(f.next_at), redrive._seconds(f.last_at))
                 ELSE format('%s items failed and wait, the first until %s.', f.later, redrive._seconds(f.next_at)) END,
            format('wait; SELECT * FROM redrive.failed_items WHERE batch_id = %s; shows the errors', b.batch_id)
        WHERE f.later > 0
        UNION ALL
        SELECT 'waiting for the pass retry_failed',
            format('%s items failed and wait for a pass, as handler "%s" had no retry_delay when they failed. %s', f.for_pass, h.name, redrive._pass_runs('retry_failed')),
            'CALL redrive.run_pass(''retry_failed''); and to have it called: SELECT * FROM redrive.schedule_passes();'
        WHERE f.for_pass > 0
        UNION ALL
        SELECT 'retry time lost', format('Items are to be tried again from %s on, but the batch does not say so.', redrive._seconds(f.next_at)),
            'CALL redrive.run_pass(''retry_failed'');'
        WHERE b.next_retry_at IS NULL AND f.next_at IS NOT NULL
        UNION ALL
        SELECT 'all done, not marked so', 'All items are done, but the one who did the last could not write that down.',
            'CALL redrive.run_pass(''rescue_stale'');'
        WHERE b.claimed_to = b.total AND coalesce(u.running_chunks + u.orphaned_chunks, 0) = 0 AND (u.done_chunks > 0 OR b.waiting = 0)
    ) AS r
    WHERE b.batch_id = $1 AND b.state IN ('ready', 'running', 'retrying')
$$;

-- Who is changing a batch, so that claims pass over it: by whom its row is locked is in its xmax.  Our own processes have it
-- for a moment, and are not to be ended; those whose xact_start is null began after our first look at pg_stat_activity.
CREATE FUNCTION redrive._changed_by(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'blocked by a lock', 'The batch is being changed by ' || k.detail, k.remedy
    FROM redrive.batches AS x
    JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.transactionid = x.xmax AND l.mode = 'ExclusiveLock' AND l.granted
    CROSS JOIN LATERAL redrive._blockers($1, ARRAY[coalesce(l.pid, 0)]) AS k
    WHERE x.batch_id = $2 AND l.pid IS DISTINCT FROM pg_backend_pid()
      AND NOT EXISTS (SELECT FROM pg_stat_activity AS a
                      WHERE a.pid = l.pid AND a.backend_type LIKE 'redrive %' AND (a.xact_start < clock_timestamp() - interval '10 s') IS NOT TRUE)
$$;

-- Why no application claims what a batch of an external handler has due.
CREATE FUNCTION redrive._why_not_claimed(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.batches AS b
    JOIN redrive.handlers AS h ON h.handler_id = b.handler_id
    CROSS JOIN LATERAL (
        SELECT (SELECT count(*) FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running') AS running,
            (SELECT max(c.claimed_at) FROM redrive.chunks AS c WHERE c.batch_id = b.batch_id) AS claimed_at
    ) AS k
    CROSS JOIN LATERAL (
        SELECT 'max_workers of the handler reached' AS fact,
            format('%s claims, as many as handler "%s" may have, are not ended.', k.running, h.name) AS detail,
            format('wait, or SELECT redrive.alter_handler(%L, max_workers => %s);', h.name, h.max_workers + 1) AS remedy
        WHERE k.running >= h.max_workers
        UNION ALL
        SELECT x.fact, x.detail, x.remedy FROM redrive._changed_by($1, b.batch_id) AS x
        UNION ALL
        SELECT 'not claimed',
            'No application claims it. '
                || coalesce('The last claim was made at ' || redrive._seconds(k.claimed_at) || '.', 'Nothing of it was ever claimed.'),
            format('start a worker that calls redrive.claim(%L)', h.name)
        WHERE (k.running >= h.max_workers) IS NOT TRUE
    ) AS r
    WHERE b.batch_id = $2
$$;

-- Why there are no workers for anybody; p_owner could do the work itself.
CREATE FUNCTION redrive._why_no_workers(p_owner regrole) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    w record;
BEGIN
    SELECT * INTO w FROM redrive._processes();
    IF pg_is_in_recovery() THEN
        RETURN QUERY VALUES ('standby', 'This server is a standby, workers run on the primary only.', 'ask the primary');
    ELSIF NOT redrive._preloaded() THEN
        RETURN QUERY VALUES ('not preloaded', 'pg_redrive is not in shared_preload_libraries, so there are no workers.',
            format('CALL redrive.work(); as role %s; or add pg_redrive to shared_preload_libraries and restart the server', p_owner));
    ELSIF NOT current_setting('redrive.enabled')::boolean THEN
        RETURN QUERY VALUES ('redrive.enabled is off', 'No batch of the cluster is run.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();');
    ELSIF current_setting('redrive.max_workers') = '0' THEN
        RETURN QUERY VALUES ('redrive.max_workers is 0', 'There are no workers.',
            format('CALL redrive.work(); as role %s; or ALTER SYSTEM SET redrive.max_workers = 4; SELECT pg_reload_conf();', p_owner));
    ELSIF w.launcher_pid IS NULL OR w.supervisor_pid IS NULL THEN
        RETURN QUERY VALUES ('workers not running',
            CASE WHEN w.no_process_since IS NOT NULL
                 THEN format('The supervisor of this database cannot be started since %s: all of max_worker_processes, %s, are taken.', redrive._seconds(w.no_process_since), current_setting('max_worker_processes'))
                 WHEN w.launcher_pid IS NULL THEN 'The process "redrive launcher" is not there.'
                 ELSE 'The process "redrive supervisor" of this database is not there.' END,
            CASE WHEN w.no_process_since IS NOT NULL THEN 'ALTER SYSTEM SET max_worker_processes = ...; and restart the server'
                 WHEN w.launcher_pid IS NULL THEN 'look in the server log; if it says "too many background workers", increase max_worker_processes and restart the server'
                 ELSE 'look in the server log for its errors; it is started again within a minute' END);
    END IF;
END
$$;

-- Where there are workers: why there is none for this role.
CREATE FUNCTION redrive._why_no_executor(p_owner regrole) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive._processes() AS w
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE s.chunk_id IS NULL) AS free, count(*) FILTER (WHERE s.chunk_id IS NOT NULL) AS busy
        FROM redrive._slots() AS s
        WHERE s.owner = p_owner::oid AND s.kind = 'executor'
    ) AS e
    CROSS JOIN LATERAL (
        SELECT 'executors end at once' AS fact, format('Executors of role %s end as soon as they are started; this is tried again after a while, a minute at most.', p_owner) AS detail,
            'look in the server log for their error' AS remedy
        WHERE p_owner::oid = ANY (w.held_back)
        UNION ALL
        SELECT 'no free worker process',
            format('No executor can be started since %s: all of max_worker_processes, %s, are taken.', redrive._seconds(w.no_process_since), current_setting('max_worker_processes')),
            'ALTER SYSTEM SET max_worker_processes = ...; and restart the server'
        WHERE e.free = 0 AND w.no_process_since IS NOT NULL
        UNION ALL
        SELECT 'no free executor',
            format('%s executors are all that redrive.max_workers allows; %s of them work for role %s in this database.', w.executors, e.busy, p_owner),
            format('wait, or ALTER SYSTEM SET redrive.max_workers = %s; SELECT pg_reload_conf();', w.executors + 1)
        WHERE e.free = 0 AND w.no_process_since IS NULL AND w.executors >= current_setting('redrive.max_workers')::int
    ) AS r
$$;

-- Why nobody takes what a batch has due; no row when nothing is due.
CREATE FUNCTION redrive._why_not_taken(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    v_now timestamptz := clock_timestamp();
    v_orphaned record;
    v_busy bigint;
    v_before bigint;
    v_blocked boolean := false;
BEGIN
    SELECT * INTO STRICT b FROM redrive.batches AS x WHERE x.batch_id = p_batch_id;
    SELECT * INTO STRICT h FROM redrive.handlers AS x WHERE x.handler_id = b.handler_id;
    SELECT count(*) AS chunks, sum(c.items - c.done) FILTER (WHERE NOT l.lot) AS items, max(c.rescue_count) AS lost INTO v_orphaned
    FROM redrive.chunks AS c
    -- a lot, set aside and in no claim so far, is not special (_take_work)
    CROSS JOIN LATERAL (SELECT h.kind = 'external' AND c.kind = 'first' AND c.lease IS NULL AND c.done = 0 AND c.rescue_count = 0 AS lot) AS l
    WHERE c.batch_id = b.batch_id AND c.state = 'orphaned';
    IF b.state NOT IN ('ready', 'running', 'retrying')
       OR NOT (v_orphaned.chunks > 0 OR (b.claimable AND b.serve_after <= v_now) OR coalesce(b.next_retry_at <= v_now, false)) THEN
        RETURN;
    END IF;

    IF v_orphaned.items > 0 THEN
        RETURN QUERY VALUES ('orphaned items',
            format('%s items wait for a worker: another one gave them back, or they were redriven', v_orphaned.items)
                || CASE WHEN v_orphaned.lost > 0 THEN format('. Workers were lost with them %s times.', v_orphaned.lost) ELSE '.' END,
            NULL);
    END IF;

    -- what nobody but a person can change
    IF h.paused THEN
        RETURN QUERY VALUES ('handler paused', format('Nothing is started for handler "%s".', h.name), format('SELECT redrive.resume_handler(%L);', h.name));
    END IF;
    RETURN QUERY SELECT p.fact, p.detail, p.remedy FROM redrive._handler_problems(h.handler_id) AS p;
    v_blocked := h.paused OR FOUND;
    IF h.kind = 'external' THEN
        IF NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
            RETURN QUERY VALUES ('redrive.enabled is off', 'Nothing is claimed.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();');
            v_blocked := true;
        END IF;
        RETURN QUERY SELECT c.fact, c.detail, c.remedy FROM redrive._why_not_claimed(p_caller, p_batch_id) AS c WHERE NOT v_blocked;
        RETURN;
    END IF;
    RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._why_no_workers(h.owner) AS x;
    IF FOUND THEN
        RETURN;
    END IF;

    -- what others have
    v_busy := (SELECT count(*) FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running');
    IF v_busy >= h.max_workers THEN
        RETURN QUERY VALUES ('max_workers of the handler reached',
            format('%s workers, as many as handler "%s" may have, are in batches %s.', v_busy, h.name,
                (SELECT string_agg(DISTINCT c.batch_id::text, ', ') FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running')),
            format('wait, or SELECT redrive.alter_handler(%L, max_workers => %s);', h.name, h.max_workers + 1));
        v_blocked := true;
    END IF;
    -- an executor that looks for work and cannot go on
    FOR fact, detail, remedy IN
        SELECT 'blocked by a lock', format('Pid %s looks for work of role %s, and waits for %s', s.pid, h.owner, k.detail), k.remedy
        FROM redrive._slots() AS s
        CROSS JOIN LATERAL redrive._blockers(p_caller, pg_blocking_pids(s.pid)) AS k
        WHERE s.owner = h.owner::oid AND s.chunk_id IS NULL
    LOOP
        v_blocked := true;
        RETURN NEXT;
    END LOOP;
    -- a claim passes over a batch whose row is locked; and over a handler that it cannot lock to count its workers, whose xmax
    -- does not tell when a subtransaction has changed it
    FOR fact, detail, remedy IN
        SELECT x.fact, x.detail, x.remedy FROM redrive._changed_by(p_caller, b.batch_id) AS x
        UNION ALL
        SELECT 'blocked by a lock', format('The workers of handler "%s" cannot be counted if it is being changed by %s', h.name, k.detail), k.remedy
        FROM pg_locks AS l
        CROSS JOIN LATERAL redrive._blockers(p_caller, ARRAY[coalesce(l.pid, 0)]) AS k
        WHERE h.max_workers IS NOT NULL AND l.relation = 'redrive.handlers'::regclass AND l.mode = 'RowExclusiveLock'
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.pid IS DISTINCT FROM pg_backend_pid()
    LOOP
        v_blocked := true;
        RETURN NEXT;
    END LOOP;
    IF v_blocked THEN
        RETURN;
    END IF;

    v_before := (
        SELECT count(*)
        FROM redrive.batches AS x
        JOIN redrive.handlers AS y ON y.handler_id = x.handler_id
        WHERE y.owner = h.owner AND x.batch_id <> b.batch_id AND NOT y.paused
          AND ((x.claimable AND x.serve_after <= v_now AND (x.priority > b.priority OR (x.priority = b.priority AND x.serve_after < b.serve_after)))
               OR (x.next_retry_at <= v_now AND x.state IN ('running', 'retrying') AND x.priority > b.priority)));
    RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._why_no_executor(h.owner) AS x;
    v_blocked := FOUND;
    IF v_before > 0 THEN
        RETURN QUERY VALUES ('other batches come first',
            format('%s other batches of role %s have a higher priority, or have waited longer at the same one; this one has priority %s.', v_before, h.owner, b.priority), 'wait');
    ELSIF NOT v_blocked THEN
        RETURN QUERY VALUES ('due', 'Nothing is in its way: a worker is called and takes it.', 'ask again; if it stays so, CALL redrive.run_pass(''rescue_stale'');');
    END IF;
END
$$;

CREATE FUNCTION redrive._why(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    b record;
    h redrive.handlers;
    v_mine boolean;
    v_held record;
    v_canary redrive.canaries;
BEGIN
    SELECT * INTO b FROM redrive._batches AS x WHERE x.batch_id = p_batch_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'batch % does not exist', coalesce(p_batch_id::text, 'NULL') USING ERRCODE = '42704',
            HINT = 'See redrive.batch_progress for the batches there are.';
    END IF;
    SELECT * INTO STRICT h FROM redrive.handlers AS x WHERE x.handler_id = b.handler_id;
    v_mine := pg_has_role(p_caller, h.owner::oid, 'USAGE');
    IF NOT v_mine AND NOT redrive._is_monitor(p_caller) THEN
        PERFORM redrive._check_member(p_caller, h.owner::oid, format('batch %s', p_batch_id));
    END IF;

    CASE b.state
        WHEN 'finished' THEN
            RETURN QUERY VALUES ('finished',
                format('Run %s ended at %s: of %s items %s succeeded, %s were ignored, %s failed.', b.run_no, redrive._seconds(b.finished_at), b.total, b.succeeded, b.ignored, b.failed),
                CASE WHEN b.failed > 0 THEN format('when the cause is mended: SELECT redrive.redrive(%s);', b.batch_id) END);
        WHEN 'cancelled' THEN
            RETURN QUERY VALUES ('cancelled',
                CASE WHEN b.finished_at IS NULL THEN 'Its workers are on the way out: each ends the item it is in.'
                     ELSE format('It ended at %s: of %s items %s succeeded, %s were ignored, %s failed, %s were cancelled.',
                        redrive._seconds(b.finished_at), b.total, b.succeeded, b.ignored, b.failed, b.cancelled) END,
                NULL::text);
        WHEN 'open' THEN
            RETURN QUERY VALUES ('not sealed', format('It has %s items so far, the last were added at %s, and runs only when it is sealed.', b.total, redrive._seconds(b.last_progress_at)),
                format('SELECT redrive.seal_batch(%1$s); or SELECT redrive.cancel_batch(%1$s);', b.batch_id));
        WHEN 'paused' THEN
            RETURN QUERY VALUES ('paused', CASE WHEN v_mine THEN b.pause_reason ELSE 'Only members of the owning role see by what.' END,
                format('when the cause is gone: SELECT redrive.resume_batch(%s);', b.batch_id));
            IF h.paused THEN
                RETURN QUERY VALUES ('handler paused', format('Nothing is started for handler "%s".', h.name), format('SELECT redrive.resume_handler(%L);', h.name));
            END IF;
            RETURN QUERY SELECT p.fact, p.detail, p.remedy FROM redrive._handler_problems(h.handler_id) AS p;
        ELSE
            NULL;
    END CASE;

    SELECT c.* INTO v_canary FROM redrive.canaries AS c WHERE c.batch_id = b.batch_id AND b.state <> 'cancelled';
    IF v_canary.decided_at IS NULL AND v_canary.batch_id IS NOT NULL THEN
        RETURN QUERY
        SELECT 'canary runs',
            format('%s of %s canary items succeeded; when it is %s, %s more items follow.', x.succeeded, cardinality(v_canary.items), v_canary.needed, cardinality(v_canary.held)),
            format('wait, or run all without waiting for it: SELECT redrive.redrive(%s);', b.batch_id)
        FROM redrive.batches AS y
        CROSS JOIN LATERAL redrive._canary(y) AS x
        WHERE y.batch_id = b.batch_id;
    ELSIF v_canary.run_no = b.run_no AND v_canary.released IS NULL THEN
        RETURN QUERY VALUES ('canary failed',
            format('Fewer than %s of its %s items succeeded, so %s others were not run and stay failed.', v_canary.needed, cardinality(v_canary.items), cardinality(v_canary.held)),
            format('when the cause is mended: SELECT redrive.redrive(%s, canary => %s);', b.batch_id, cardinality(v_canary.items)));
    ELSIF v_canary.run_no = b.run_no AND v_canary.released < cardinality(v_canary.held) THEN
        RETURN QUERY VALUES ('canary succeeded',
            format('%s items followed it, %s did not and stay failed: another batch had their keys, or they were redriven meanwhile.',
                v_canary.released, cardinality(v_canary.held) - v_canary.released), NULL);
    END IF;

    -- callbacks outlive the batch
    RETURN QUERY
    SELECT 'callback waiting',
        format('%s calls of %s are not made yet, %s.', count(*), k.kind,
            CASE WHEN bool_and(k.next_attempt_at IS NULL) THEN 'and will not: it crashed the server twice'
                 WHEN max(k.failures) > 0 THEN format('it failed %s times and is called again at %s', max(k.failures), redrive._seconds(min(k.next_attempt_at)))
                 ELSE format('due since %s', redrive._seconds(min(k.next_attempt_at))) END)
            || CASE WHEN v_mine THEN coalesce(' The last error: ' || max(k.message), '') ELSE '' END,
        CASE WHEN bool_and(k.next_attempt_at IS NULL) THEN format('when it is mended: UPDATE redrive.callbacks SET crash_count = 0, next_attempt_at = now() WHERE batch_id = %s AND next_attempt_at IS NULL;', b.batch_id)
             ELSE 'an executor of the owner, or CALL redrive.work(); makes them' END
    FROM redrive.callbacks AS k
    WHERE k.batch_id = b.batch_id
    GROUP BY k.kind, k.next_attempt_at IS NULL
    ORDER BY k.kind, k.next_attempt_at IS NULL;
    SELECT count(*) AS keys, min(l.batch_id) AS batch_id INTO v_held
    FROM redrive.failures AS f
    JOIN redrive.locks AS l ON l.handler_id = f.handler_id AND l.key = f.key AND (l.batch_id, l.item_no) <> (f.batch_id, f.item_no)
    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'failed';
    IF v_held.keys > 0 THEN
        RETURN QUERY VALUES ('keys are held by another batch', format('%s failed items cannot be redriven now, as another batch has their keys, for example %s.', v_held.keys, v_held.batch_id),
            format('SELECT * FROM redrive.why(%s);', v_held.batch_id));
    END IF;

    RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_workers(p_caller, p_batch_id) AS w;
    RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_waits(p_batch_id) AS w;
    -- with a worker in it that is not blocked it moves
    IF NOT EXISTS (
        SELECT FROM redrive.chunks AS c
        JOIN redrive._running_chunks AS r ON r.chunk_id = c.chunk_id
        WHERE c.batch_id = p_batch_id AND r.alive AND coalesce(pg_blocking_pids(c.worker_pid), '{}') = '{}') THEN
        RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_not_taken(p_caller, p_batch_id) AS w;
    END IF;
END
$$;

CREATE FUNCTION redrive.why(batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE c STABLE ROWS 3 AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.why IS
'Why a batch does not move, or what it is doing: one row per fact, with the statement that helps. The query of a session that blocks it is shown to those who may see it in pg_stat_activity. Errors: 42704 unknown batch, 42501 not yours.';
