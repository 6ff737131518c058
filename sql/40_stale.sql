-- Stale: find batches that are stuck, and the passes that put them right.
--
-- redrive._stale says for each live batch from when on which reason holds;
-- stale_batches_at(as_of) is that list at one time, and the passes act on it.
-- No code of users runs in a pass: what has to run is left to workers.

CREATE FUNCTION redrive._preloaded() RETURNS boolean
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__preloaded';
CREATE FUNCTION redrive._owner_needs_login() RETURNS boolean
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__owner_needs_login';

-- May the owner of the extension, who asks for all, see what sessions of others do?  One who
-- is no superuser may not; then nobody can be said to be missing.
CREATE FUNCTION redrive._sees_sessions() RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT pg_has_role('pg_read_all_stats', 'USAGE')
$$;

-- Worker slots of this database in shared memory; none without preload.
-- open_*: items done in the commit interval that is not committed yet.
CREATE FUNCTION redrive._slots()
RETURNS TABLE (
    pid int, kind text, owner oid, handler_id int, batch_id bigint, chunk_id bigint, state text,
    open_succeeded bigint, open_failed bigint, item_no bigint, item_started_at timestamptz,
    claimed_at timestamptz, items_per_second float8, started_at timestamptz)
LANGUAGE c STABLE ROWS 10 AS 'MODULE_PATHNAME', 'redrive__slots';

-- Handlers whose rows the current user may see.  "mine": with payloads and
-- messages.  The others are seen by monitors, counts only: a monitor is a role
-- with SELECT on the column redrive.batches.batch_id.
CREATE VIEW redrive._visible WITH (security_barrier) AS
SELECT h.handler_id, h.name, h.kind, h.owner, h.max_retries, h.stale_after, h.start_timeout, h.retry_window, h.max_workers, h.paused,
    pg_has_role(h.owner::oid, 'USAGE') AS mine
FROM redrive.handlers AS h
WHERE pg_has_role(h.owner::oid, 'USAGE')
   OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

-- What the chunks that are not folded yet add to the counters of their batch.
CREATE VIEW redrive._unfolded AS
SELECT c.batch_id,
    sum(c.succeeded)::bigint AS succeeded,
    sum(c.ignored)::bigint AS ignored,
    sum(c.failed)::bigint AS failed,
    sum(c.cancelled)::bigint AS cancelled,
    sum(c.waiting)::bigint AS waiting,
    coalesce(sum(c.items - c.done) FILTER (WHERE c.state = 'running' OR (c.state = 'orphaned' AND c.kind = 'retry')), 0)::bigint AS running,
    coalesce(sum(c.items - c.done) FILTER (WHERE c.state = 'orphaned' AND c.kind = 'first'), 0)::bigint AS pending,
    count(*) FILTER (WHERE c.state = 'running') AS running_chunks,
    count(*) FILTER (WHERE c.state = 'orphaned') AS orphaned_chunks,
    count(*) FILTER (WHERE c.state = 'done') AS done_chunks,
    max(c.progress_at) AS progress_at
FROM redrive.chunks AS c
WHERE NOT c.folded
GROUP BY c.batch_id;

-- Since when this server takes writes: the start of a process that is started
-- only then, after a crash and on a promoted standby too.
CREATE VIEW redrive._up AS
SELECT max(a.backend_start) AS since
FROM pg_stat_get_activity(NULL) AS a
WHERE a.backend_type = 'walwriter';

-- Claims and whether their worker lives.  Facts, not clocks: a process of that
-- pid and start is there or it is not, and it is here: a database restored from
-- a dump next to the original has the claims of workers of that one.  The start of a process of another role
-- is hidden from ordinary users, who then go by the pid.
-- An external worker lives as long as its lease, and while the server was down it
-- could not renew that: then the lease counts from the server's start.  It is
-- stuck when it settles nothing for longer than stale_after and than its lease.
CREATE VIEW redrive._running_chunks AS
SELECT c.chunk_id, c.batch_id, c.lease_token, c.progress_at,
    CASE WHEN c.lease_until IS NULL THEN a.pid IS NOT NULL ELSE l.ends_at > clock_timestamp() END AS alive,
    s.item_no IS NOT NULL AS in_item,
    l.ends_at AS lease_ends_at,
    c.progress_at + greatest(c.lease, h.stale_after) AS stuck_from
FROM redrive.chunks AS c
JOIN redrive.handlers AS h ON h.handler_id = c.handler_id
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.lease_until IS NOT NULL THEN greatest(c.lease_until, (SELECT u.since FROM redrive._up AS u) + c.lease) END AS ends_at
) AS l
LEFT JOIN pg_stat_get_activity(NULL) AS a
    ON a.pid = c.worker_pid AND a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND (a.backend_start = c.worker_started_at OR a.backend_start IS NULL)
LEFT JOIN redrive._slots() AS s ON s.pid = c.worker_pid AND s.chunk_id = c.chunk_id
WHERE c.state = 'running';

-- Live batches and when each has to be looked at closer.  look_from is not later
-- than the time from which any reason holds, and cheap: it takes no look at
-- failures.
CREATE VIEW redrive._live AS
SELECT l.batch_id, l.part, l.state, l.run_at, l.sealed_at, l.last_progress_at, l.attempted_at, l.next_retry_at,
    v.name AS handler, v.owner, v.kind, v.paused, v.max_retries, v.retry_window, w.lost_since, w.stuck_since, w.stuck_from,
    greatest(l.last_progress_at, u.progress_at) AS progress_at,
    CASE WHEN l.state = 'open' THEN l.last_progress_at + v.start_timeout END AS unsealed_from,
    CASE WHEN l.state = 'ready' THEN greatest(l.run_at, l.sealed_at) + v.start_timeout END AS start_from,
    CASE WHEN l.state IN ('running', 'retrying') AND coalesce(u.running_chunks, 0) = 0 AND (l.claimed_to < l.total OR u.orphaned_chunks > 0)
         THEN greatest(l.last_progress_at, u.progress_at) + v.stale_after END AS idle_from,
    CASE WHEN l.claimed_to = l.total AND coalesce(u.running_chunks + u.orphaned_chunks, 0) = 0
              AND (l.state = 'cancelled'
                   OR (l.state IN ('running', 'retrying')
                       AND (u.done_chunks > 0 OR l.waiting = 0 OR (l.state = 'running' AND l.next_retry_at IS NULL))))
         THEN greatest(l.last_progress_at, u.progress_at) + interval '1 min' END AS unfinished_from,
    CASE WHEN l.state = 'retrying' AND l.next_retry_at IS NULL THEN l.attempted_at END AS failed_from,
    l.state IN ('running', 'retrying') AS may_be_overdue,
    l.oldest_failure_at + v.retry_window AS expired_from,
    least(w.lost_since, w.stuck_from, CASE l.state
        WHEN 'ready' THEN greatest(l.run_at, l.sealed_at) + v.start_timeout
        WHEN 'open' THEN l.last_progress_at + v.start_timeout
        WHEN 'paused' THEN l.oldest_failure_at + v.retry_window
        ELSE least(
            l.next_retry_at + interval '1 min',
            l.oldest_failure_at + v.retry_window,
            CASE WHEN l.claimed_to < l.total OR u.orphaned_chunks > 0 THEN greatest(l.last_progress_at, u.progress_at) + v.stale_after
                 WHEN l.next_retry_at IS NULL OR l.waiting = 0 OR u.done_chunks > 0 THEN l.last_progress_at END,
            CASE WHEN l.next_retry_at IS NULL THEN l.oldest_failure_at END)
    END) AS look_from
FROM (
    SELECT x.batch_id, x.handler_id, x.part, x.state, x.total, x.claimed_to, x.waiting, x.run_at, x.sealed_at,
        x.last_progress_at, x.attempted_at, x.next_retry_at, x.oldest_failure_at
    FROM redrive.batches AS x
    WHERE x.state NOT IN ('finished', 'cancelled')
    UNION ALL
    SELECT x.batch_id, x.handler_id, x.part, x.state, x.total, x.claimed_to, x.waiting, x.run_at, x.sealed_at,
        x.last_progress_at, x.attempted_at, x.next_retry_at, x.oldest_failure_at
    FROM redrive.batches AS x
    WHERE x.state = 'cancelled' AND x.finished_at IS NULL
      AND x.batch_id IN (SELECT c.batch_id FROM redrive.chunks AS c WHERE NOT c.folded)
) AS l
JOIN redrive._visible AS v ON v.handler_id = l.handler_id
LEFT JOIN redrive._unfolded AS u ON u.batch_id = l.batch_id
LEFT JOIN (
    SELECT c.batch_id,
        min(coalesce(c.lease_ends_at, c.progress_at)) FILTER (WHERE NOT c.alive OR c.lease_ends_at IS NOT NULL) AS lost_since,
        min(c.progress_at) FILTER (WHERE c.alive AND NOT c.in_item) AS stuck_since,
        min(c.stuck_from) FILTER (WHERE c.alive AND NOT c.in_item) AS stuck_from
    FROM redrive._running_chunks AS c
    GROUP BY c.batch_id
) AS w ON w.batch_id = l.batch_id;

-- Every reason a live batch may be stale for, with the time from which it
-- holds.  Ask with a condition on look_from as well, so that the closer look is
-- paid for the few candidates only.
CREATE VIEW redrive._stale WITH (security_barrier) AS
SELECT b.batch_id, b.handler, r.reason, r.since, r.action, b.look_from, r.stale_from, r.stale_until
FROM redrive._live AS b
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN b.paused THEN format('none: the handler is paused, see redrive.resume_handler(%L)', b.handler)
        WHEN NOT (SELECT coalesce(current_setting('redrive.enabled', true), 'on')::boolean) THEN 'none: redrive.enabled is off'
        WHEN b.kind = 'external' THEN 'none: no application claims it'
        WHEN NOT (SELECT redrive._preloaded()) THEN 'none: no workers, as pg_redrive is not in shared_preload_libraries; CALL redrive.work()'
        WHEN (SELECT current_setting('redrive.max_workers', true)) = '0' THEN 'none: no workers, as redrive.max_workers is 0; CALL redrive.work()'
        WHEN NOT EXISTS (SELECT FROM pg_roles AS o WHERE o.oid = b.owner::oid AND (o.rolcanlogin OR NOT redrive._owner_needs_login()))
            THEN format('none: role %s may not log in, so it can have no workers; CALL redrive.work()', b.owner)
        ELSE format('wake the workers of %s', b.owner)
    END AS wake
) AS k
CROSS JOIN LATERAL (
    SELECT 'orphaned' AS reason, b.lost_since AS since, 'give the items of its lost worker to another' AS action, b.lost_since AS stale_from, NULL::timestamptz AS stale_until
    UNION ALL
    SELECT 'no_progress', b.stuck_since, 'take the items away from a worker that does nothing', b.stuck_from, NULL
    UNION ALL
    SELECT 'no_progress', b.progress_at, k.wake, b.idle_from, NULL
    UNION ALL
    SELECT 'never_started', greatest(b.run_at, b.sealed_at), k.wake, b.start_from, NULL
    UNION ALL
    SELECT 'unsealed', b.last_progress_at, 'cancel it and unlock its keys', b.unsealed_from, NULL
    UNION ALL
    SELECT 'unfinished', b.progress_at, 'mark its end', b.unfinished_from, NULL
    UNION ALL
    SELECT 'failed_recently', b.attempted_at, 'start a new run', b.failed_from, b.attempted_at + b.retry_window
    WHERE b.failed_from IS NOT NULL
      AND EXISTS (
        SELECT FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at IS NULL)
    UNION ALL
    SELECT 'overdue_retry', d.due, k.wake, d.due + interval '1 min', NULL
    FROM (
        SELECT coalesce(b.next_retry_at, (
            SELECT min(f.next_attempt_at)
            FROM redrive.failures AS f
            WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')) AS due
        WHERE b.may_be_overdue
        OFFSET 0
    ) AS d
    UNION ALL
    SELECT 'expired', d.first_failed_at, 'fail the items that waited too long and unlock their keys', d.first_failed_at + b.retry_window, NULL
    FROM (
        SELECT min(f.first_failed_at) AS first_failed_at
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
    ) AS d
    WHERE b.expired_from IS NOT NULL
) AS r;

CREATE FUNCTION redrive.stale_batches_at(as_of timestamptz)
RETURNS TABLE (batch_id bigint, handler text, reason text, since timestamptz, action text)
LANGUAGE sql STABLE AS $$
    SELECT s.batch_id, s.handler, s.reason, s.since, s.action
    FROM redrive._stale AS s
    WHERE s.look_from <= $1 AND s.stale_from <= $1 AND (s.stale_until IS NULL OR s.stale_until >= $1)
$$;
COMMENT ON FUNCTION redrive.stale_batches_at IS
'The list redrive.stale_batches as it is, or will be if nothing moves, at another time: batches that are stuck, why, since when, and what the next pass does about it.';

-- Count the items that crashed the server, then give back the chunks whose
-- worker is gone, or whose lease has ended as of that time.  Called by the
-- supervisor and by the pass rescue_stale; returns how many.  A chunk that fails
-- or whose batch is locked is left for the next call.
CREATE FUNCTION redrive._orphan_lost(p_as_of timestamptz DEFAULT clock_timestamp()) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_chunks bigint[];
    v_tokens bigint[];
BEGIN
    PERFORM redrive._blame();
    PERFORM pg_stat_clear_snapshot();
    SELECT array_agg(c.chunk_id ORDER BY c.chunk_id), array_agg(c.lease_token ORDER BY c.chunk_id) INTO v_chunks, v_tokens
    FROM redrive._running_chunks AS c
    WHERE CASE WHEN c.lease_ends_at IS NULL THEN NOT c.alive ELSE c.lease_ends_at <= p_as_of END;
    RETURN CASE WHEN v_chunks IS NULL THEN 0 ELSE redrive._give_back_lost(v_chunks, v_tokens) END;
END
$$;

-- Give back these claims, in one subtransaction when all goes well; halve the
-- list to find the one that fails.
CREATE FUNCTION redrive._give_back_lost(p_chunks bigint[], p_tokens bigint[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    n int := cardinality(p_chunks);
    v_count bigint := 0;
BEGIN
    BEGIN
        FOR i IN 1 .. n LOOP
            -- an external worker may be settling items, in a transaction of its own
            PERFORM FROM redrive.batches AS b
            JOIN redrive.chunks AS c ON c.batch_id = b.batch_id
            WHERE c.chunk_id = p_chunks[i]
            FOR UPDATE SKIP LOCKED;
            IF FOUND AND redrive._give_back(p_chunks[i], p_tokens[i], true) THEN
                v_count := v_count + 1;
            END IF;
        END LOOP;
        RETURN v_count;
    EXCEPTION WHEN OTHERS THEN
        IF n = 1 THEN
            RAISE WARNING 'could not give back chunk %', p_chunks[1] USING DETAIL = SQLERRM;
            RETURN 0;
        END IF;
    END;
    RETURN redrive._give_back_lost(p_chunks[:n / 2], p_tokens[:n / 2])
         + redrive._give_back_lost(p_chunks[n / 2 + 1:], p_tokens[n / 2 + 1:]);
END
$$;

-- What a pass does about one stale batch; returns the number of rows changed.
-- The batch is locked, then the detector is asked again: nobody can move the
-- batch any more.  A batch that somebody else has locked is left alone.
CREATE FUNCTION redrive._put_right(p_reason text, p_batch_id bigint, p_as_of timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    c record;
    -- an as_of in the future must not make anything due in the future
    v_due timestamptz := least(p_as_of, clock_timestamp());
    v_count bigint := 0;
BEGIN
    SELECT * INTO b FROM redrive.batches WHERE batch_id = p_batch_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR NOT EXISTS (
        SELECT FROM redrive.stale_batches_at(p_as_of) AS s WHERE s.batch_id = p_batch_id AND s.reason = p_reason) THEN
        RETURN 0;
    END IF;
    SELECT * INTO h FROM redrive.handlers WHERE handler_id = b.handler_id;

    CASE p_reason
        WHEN 'no_progress' THEN
            FOR c IN
                SELECT r.chunk_id, r.lease_token
                FROM redrive._running_chunks AS r
                WHERE r.batch_id = p_batch_id AND r.alive AND NOT r.in_item AND r.stuck_from <= p_as_of
            LOOP
                PERFORM FROM redrive.chunks AS x WHERE x.chunk_id = c.chunk_id FOR UPDATE SKIP LOCKED;
                CONTINUE WHEN NOT FOUND;
                v_count := v_count + redrive._give_back(c.chunk_id, c.lease_token, true)::int;
            END LOOP;
        WHEN 'unsealed' THEN
            PERFORM redrive._cancel(b);
            PERFORM redrive._wake(h.owner);
            v_count := 1;
        WHEN 'unfinished' THEN
            PERFORM redrive._fold(p_batch_id);
            v_count := 1;
        WHEN 'failed_recently' THEN
            -- max_retries was asked when they failed: what waits has its retry
            UPDATE redrive.failures
            SET next_attempt_at = v_due
            WHERE part = b.part AND batch_id = b.batch_id AND state = 'waiting' AND next_attempt_at IS NULL;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            UPDATE redrive.batches
            SET state = 'running', run_no = run_no + 1, attempted_at = NULL, next_retry_at = v_due, last_progress_at = clock_timestamp()
            WHERE batch_id = p_batch_id;
            PERFORM redrive._wake(h.owner), redrive._notify(h.handler_id);
        WHEN 'overdue_retry' THEN
            UPDATE redrive.batches
            SET next_retry_at = (
                SELECT min(f.next_attempt_at)
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')
            WHERE batch_id = p_batch_id AND next_retry_at IS NULL;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            PERFORM redrive._wake(h.owner) WHERE v_count > 0;
        WHEN 'expired' THEN
            v_count := redrive._end_waiting(b, 'failed', 'expired', p_as_of - h.retry_window);
            UPDATE redrive.batches
            SET failed = failed + v_count, waiting = waiting - v_count,
                next_retry_at = (
                    SELECT min(f.next_attempt_at)
                    FROM redrive.failures AS f
                    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                oldest_failure_at = (
                    SELECT min(f.first_failed_at)
                    FROM redrive.failures AS f
                    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')
            WHERE batch_id = p_batch_id;
            PERFORM redrive._fold(p_batch_id);
            PERFORM redrive._wake(h.owner);
        ELSE
            NULL;
    END CASE;
    RETURN v_count;
END
$$;

-- The same for several batches, in one subtransaction when all goes well; an
-- error costs the batch that has it and no other.
CREATE FUNCTION redrive._put_right_all(p_reason text, p_batch_ids bigint[], p_as_of timestamptz, OUT acted bigint, OUT errors bigint)
LANGUAGE plpgsql AS $$
DECLARE
    n int := cardinality(p_batch_ids);
    v_part record;
    v_batch_id bigint;
BEGIN
    acted := 0;
    errors := 0;
    BEGIN
        FOREACH v_batch_id IN ARRAY p_batch_ids LOOP
            acted := acted + redrive._put_right(p_reason, v_batch_id, p_as_of);
        END LOOP;
        RETURN;
    EXCEPTION WHEN OTHERS THEN
        acted := 0;
        IF n = 1 THEN
            RAISE WARNING 'could not put right batch %, which is stale: "%"', v_batch_id, p_reason USING DETAIL = SQLERRM;
            errors := 1;
            RETURN;
        END IF;
    END;
    FOR v_part IN
        SELECT x.acted, x.errors FROM redrive._put_right_all(p_reason, p_batch_ids[:n / 2], p_as_of) AS x
        UNION ALL
        SELECT x.acted, x.errors FROM redrive._put_right_all(p_reason, p_batch_ids[n / 2 + 1:], p_as_of) AS x
    LOOP
        acted := acted + v_part.acted;
        errors := errors + v_part.errors;
    END LOOP;
END
$$;

-- Act on all batches that are stale for one of these reasons, until p_limit
-- rows are changed or the time is up; detail says what was done for which.
CREATE FUNCTION redrive._act(p_reasons text[], p_as_of timestamptz, p_limit bigint, p_deadline timestamptz,
    OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    s record;
    v_done record;
    v_acted bigint;
    v_errors bigint := 0;
    v_notes text[] := '{}';
    v_woken bigint := 0;
BEGIN
    acted := 0;
    more := false;
    -- most often there is nothing, and planning the detector takes longer than this
    IF NOT EXISTS (SELECT FROM redrive._live AS l WHERE l.look_from <= p_as_of) THEN
        RETURN;
    END IF;
    FOR s IN
        SELECT x.reason, array_agg(x.batch_id ORDER BY x.since) AS batch_ids,
            array_agg(DISTINCT x.handler) FILTER (WHERE x.action LIKE 'wake %') AS handlers,
            count(*) FILTER (WHERE x.action LIKE 'wake %') AS woken
        FROM redrive.stale_batches_at(p_as_of) AS x
        WHERE x.reason = ANY (p_reasons)
        GROUP BY x.reason
        ORDER BY array_position(p_reasons, x.reason)
    LOOP
        PERFORM redrive._wake(o.owner)
        FROM (SELECT DISTINCT h.owner::oid AS owner FROM redrive.handlers AS h WHERE h.name = ANY (s.handlers)) AS o;
        v_woken := v_woken + s.woken;
        CONTINUE WHEN s.reason = 'never_started';
        v_acted := 0;
        FOR i IN 1 .. cardinality(s.batch_ids) BY 100 LOOP
            IF acted >= p_limit OR clock_timestamp() > p_deadline THEN
                more := true;
                EXIT;
            END IF;
            SELECT x.acted, x.errors INTO v_done FROM redrive._put_right_all(s.reason, s.batch_ids[i:i + 99], p_as_of) AS x;
            acted := acted + v_done.acted;
            v_acted := v_acted + v_done.acted;
            v_errors := v_errors + v_done.errors;
        END LOOP;
        IF v_acted > 0 THEN
            v_notes := v_notes || format('%s %s', s.reason, v_acted);
        END IF;
    END LOOP;
    IF v_woken > 0 THEN
        v_notes := v_notes || format('woken for %s batches', v_woken);
    END IF;
    IF v_errors > 0 THEN
        v_notes := v_notes || format('errors %s', v_errors);
    END IF;
    detail := nullif(array_to_string(v_notes, ', '), '');
END
$$;

CREATE FUNCTION redrive._rescue_stale(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    v_lost bigint := redrive._orphan_lost(p_as_of);
BEGIN
    SELECT x.acted, x.more, x.detail INTO acted, more, detail
    FROM redrive._act(ARRAY['no_progress', 'unfinished', 'unsealed', 'never_started'], p_as_of, 1000, p_deadline) AS x;
    IF v_lost > 0 THEN
        acted := acted + v_lost;
        detail := concat_ws(', ', format('orphaned %s', v_lost), detail);
    END IF;
END
$$;

CREATE FUNCTION redrive._retry_failed(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE sql AS $$
    -- expired first: what has waited too long is not run again
    SELECT x.acted, x.more, x.detail
    FROM redrive._act(ARRAY['expired', 'failed_recently', 'overdue_retry'], $1, 100000, $2) AS x
$$;

-- Old parts.  New batches go to the current part; retention / (parts - 2)
-- later to the next one, and so do attempts to push.  When all batches of a part
-- ended longer than the retention ago, and so did its attempts, the batches go, some
-- per call, and then the part is truncated.
CREATE FUNCTION redrive._purge(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    c_limit constant bigint := 20000;
    r redrive.rotation;
    v_before timestamptz;
    v_count bigint;
    v_next int;
    v_notes text[] := '{}';
BEGIN
    SELECT * INTO STRICT r FROM redrive.rotation;
    v_before := p_as_of - r.retention;
    acted := 0;
    more := false;

    FOR p IN 0 .. r.parts - 1 LOOP
        CONTINUE WHEN p = r.part OR redrive._part_state(p, v_before) = 'kept';
        IF acted >= c_limit OR clock_timestamp() > p_deadline THEN
            more := true;
            EXIT;
        END IF;
        v_count := redrive._purge_batches(p, v_before, c_limit - acted);
        acted := acted + v_count;
        IF v_count > 0 THEN
            v_notes := v_notes || format('part %s: %s batches', p, v_count);
        END IF;
        CASE redrive._part_state(p, v_before)
            WHEN 'empty' THEN
                IF redrive._truncate_part(p, v_before) THEN
                    v_notes := v_notes || format('part %s truncated', p);
                    acted := acted + 1;
                ELSIF redrive._part_bytes(p) > 0 THEN
                    v_notes := v_notes || format('part %s skipped: in use', p);
                END IF;
            WHEN 'old' THEN
                IF v_count > 0 THEN
                    more := true;
                ELSE
                    v_notes := v_notes || format('part %s skipped: in use', p);
                END IF;
            ELSE
                NULL;
        END CASE;
    END LOOP;

    -- rotated_at may lie ahead after a test with another as_of
    IF r.rotated_at < p_as_of - r.retention / (r.parts - 2) OR r.rotated_at > p_as_of THEN
        v_next := (r.part + 1) % r.parts;
        IF redrive._part_state(v_next, v_before) = 'empty' AND redrive._part_bytes(v_next) = 0 THEN
            UPDATE redrive.rotation SET part = v_next, rotated_at = p_as_of;
            acted := acted + 1;
            v_notes := v_notes || format('now part %s', v_next);
        ELSIF r.rotated_at < p_as_of - r.retention THEN
            v_notes := v_notes || format('part %s is still needed: part %s takes new batches on', v_next, r.part);
        END IF;
    END IF;

    v_count := redrive._purge_tasks(v_before, c_limit);
    acted := acted + v_count;
    more := more OR v_count = c_limit;
    IF v_count > 0 THEN
        v_notes := v_notes || format('%s tasks', v_count);
    END IF;

    DELETE FROM redrive.http_log WHERE requested_at < v_before;
    DELETE FROM redrive.pass_log WHERE started_at < v_before;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    acted := acted + v_count;
    IF v_count > 0 THEN
        v_notes := v_notes || format('%s rows of the pass history', v_count);
    END IF;
    detail := nullif(array_to_string(v_notes, ', '), '');
END
$$;

-- empty = nothing to keep and no batch, old = all ended before p_before, kept = neither.
CREATE FUNCTION redrive._part_state(p_part int, p_before timestamptz) RETURNS text
LANGUAGE sql STABLE SET enable_seqscan = off AS $$
    SELECT CASE
        WHEN EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1 AND b.finished_at IS NULL)
          OR EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1 AND b.finished_at >= $2)
          OR EXISTS (SELECT FROM redrive.push_log AS l WHERE l.part = $1 AND l.finished_at >= $2) THEN 'kept'
        WHEN EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1) THEN 'old'
        ELSE 'empty'
    END
$$;

CREATE FUNCTION redrive._part_bytes(p_part int) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT sum(pg_relation_size(('redrive.' || t || '_' || $1)::regclass))::bigint
    FROM unnest(ARRAY['item_blocks', 'failures', 'failure_log', 'push_log']) AS t
$$;

-- Delete up to p_limit ended batches of an old part, with their chunks, crashes
-- and whatever is left of their locks and callbacks.  Rows in use are left.
CREATE FUNCTION redrive._purge_batches(p_part int, p_before timestamptz, p_limit bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_batch_ids bigint[];
BEGIN
    SELECT array_agg(x.batch_id) INTO v_batch_ids
    FROM (
        SELECT b.batch_id
        FROM redrive.batches AS b
        WHERE b.part = p_part AND b.finished_at < p_before AND b.state IN ('finished', 'cancelled')
          AND NOT EXISTS (SELECT FROM redrive.chunks AS c WHERE c.batch_id = b.batch_id AND c.state = 'running')
        ORDER BY b.finished_at
        LIMIT p_limit
        FOR UPDATE OF b SKIP LOCKED
    ) AS x;
    IF v_batch_ids IS NULL THEN
        RETURN 0;
    END IF;
    -- one that is running code of users is left to its worker
    DELETE FROM redrive.callbacks AS k
    USING (SELECT x.callback_id FROM redrive.callbacks AS x WHERE x.batch_id = ANY (v_batch_ids) FOR UPDATE SKIP LOCKED) AS f
    WHERE k.callback_id = f.callback_id;
    DELETE FROM redrive.crashes AS x USING unnest(v_batch_ids) AS i WHERE x.batch_id = i;
    DELETE FROM redrive.locks AS l USING unnest(v_batch_ids) AS i WHERE l.batch_id = i;
    DELETE FROM redrive.canaries AS c USING unnest(v_batch_ids) AS i WHERE c.batch_id = i;
    DELETE FROM redrive.chunks AS c USING unnest(v_batch_ids) AS i WHERE c.batch_id = i;
    DELETE FROM redrive.batches AS b USING unnest(v_batch_ids) AS i WHERE b.batch_id = i;
    RETURN cardinality(v_batch_ids);
END
$$;

-- Truncate the partitions of a part that is empty.  False when there is nothing
-- to do, or somebody uses them: a submitter whose batch cannot be seen
-- yet holds a lock, and the look at batches comes after ours.
CREATE FUNCTION redrive._truncate_part(p_part int, p_before timestamptz) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '300ms' AS $$
DECLARE
    v_tables text := format('redrive.item_blocks_%1$s, redrive.failures_%1$s, redrive.failure_log_%1$s, redrive.push_log_%1$s', p_part);
BEGIN
    IF redrive._part_bytes(p_part) = 0 THEN
        RETURN false;
    END IF;
    EXECUTE 'LOCK TABLE ' || v_tables || ' IN ACCESS EXCLUSIVE MODE';
    IF redrive._part_state(p_part, p_before) <> 'empty' THEN
        RETURN false;
    END IF;
    EXECUTE 'TRUNCATE ' || v_tables;
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN false;
END
$$;

CREATE FUNCTION redrive.set_retention(retention interval) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF retention IS NULL THEN
        RAISE EXCEPTION 'retention must not be null' USING ERRCODE = '22004', HINT = 'Give an interval, for example ''30 days''.';
    END IF;
    IF retention <= interval '0' THEN
        RAISE EXCEPTION 'retention must be positive' USING ERRCODE = '22023',
            DETAIL = format('It is "%s".', retention), HINT = 'Give an interval, for example ''30 days''.';
    END IF;
    UPDATE redrive.rotation AS r SET retention = set_retention.retention;
END
$$;
COMMENT ON FUNCTION redrive.set_retention IS
'Set how long ended batches are kept before the pass purge removes them; live ones always stay. What is older goes in portions of a sixth of this time. Errors: 22004 NULL, 22023 not positive.';

-- Lock a pass to the end of the transaction; false when another session has it.
-- Like an advisory lock, but out of reach of pg_advisory_lock(): no user can
-- keep the passes from running.
CREATE FUNCTION redrive._lock_pass(pass text) RETURNS boolean
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__lock_pass';

-- What all passes share: the switch, the lock, the time budget, the history.
CREATE FUNCTION redrive._pass(p_pass text, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
DECLARE
    r redrive.pass_result;
    v_started_at timestamptz := clock_timestamp();
    v_deadline timestamptz;
BEGIN
    IF p_as_of IS NULL THEN
        RAISE EXCEPTION 'as_of must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out to mean now.';
    END IF;
    r.pass := p_pass;
    r.outcome := 'done';
    r.acted := 0;
    r.more := false;
    -- a first call into the library defines the settings
    PERFORM redrive._preloaded();
    v_deadline := v_started_at + coalesce(current_setting('redrive.pass_time_budget', true), '20s')::interval;
    IF NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
        r.outcome := 'disabled';
        r.detail := 'redrive.enabled is off';
    ELSIF NOT redrive._lock_pass(p_pass) THEN
        r.outcome := 'already running';
        r.detail := 'already running';
    ELSIF p_pass = 'rescue_stale' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._rescue_stale(p_as_of, v_deadline) AS x;
    ELSIF p_pass = 'retry_failed' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._retry_failed(p_as_of, v_deadline) AS x;
    ELSIF p_pass = 'push_tasks' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._push_tasks(p_as_of, v_deadline) AS x;
    ELSE
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._purge(p_as_of, v_deadline) AS x;
    END IF;
    INSERT INTO redrive.pass_log (pass, as_of, started_at, finished_at, acted, more, detail)
    VALUES (p_pass, p_as_of, v_started_at, clock_timestamp(), r.acted, r.more, r.detail);
    RETURN r;
END
$$;

-- Refuse who may not run passes: they act on the batches of all roles.  Whoever may
-- run all of them may run each.
CREATE FUNCTION redrive._require_operator(p_caller oid, p_function text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pg_has_role(p_caller, (SELECT e.extowner FROM pg_extension AS e WHERE e.extname = 'pg_redrive'), 'USAGE')
       AND NOT has_function_privilege(p_caller, 'redrive.run_pass(text, timestamptz)', 'EXECUTE') THEN
        RAISE EXCEPTION 'permission denied for redrive.%()', p_function USING ERRCODE = '42501',
            DETAIL = 'It acts on the batches of all roles.',
            HINT = 'Ask a superuser or the owner of the extension; redrive.why() tells about your own batches.';
    END IF;
END
$$;

CREATE FUNCTION redrive._rescue_stale(p_caller oid, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._require_operator(p_caller, 'rescue_stale');
    RETURN redrive._pass('rescue_stale', p_as_of);
END
$$;

CREATE FUNCTION redrive.rescue_stale(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.rescue_stale IS
'Pass: put right the batches of redrive.stale_batches that lost their worker, do not move, were never sealed or not marked as finished, and wake workers for those that did not start. Returns one row, which is also kept in redrive.pass_history; more = call again. As of another time for tests.';

CREATE FUNCTION redrive._retry_failed(p_caller oid, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._require_operator(p_caller, 'retry_failed');
    RETURN redrive._pass('retry_failed', p_as_of);
END
$$;

CREATE FUNCTION redrive.retry_failed(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.retry_failed IS
'Pass: start a new run of batches whose failed items wait for this pass (handlers without retry_delay), wake workers for retries that are overdue, and end items that waited longer than retry_window as failed, reason expired. Returns one row, which is also kept in redrive.pass_history; more = call again.';

CREATE FUNCTION redrive._purge(p_caller oid, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._require_operator(p_caller, 'purge');
    RETURN redrive._pass('purge', p_as_of);
END
$$;

CREATE FUNCTION redrive.purge(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.purge IS
'Pass: remove what ended longer ago than the retention (redrive.set_retention()), part by part; live batches stay. A part in use is skipped until the next time. Returns one row, which is also kept in redrive.pass_history; more = call again.';

CREATE PROCEDURE redrive.run_pass(pass text, as_of timestamptz DEFAULT NULL)
LANGUAGE plpgsql AS $$
DECLARE
    r redrive.pass_result;
    v_deadline timestamptz;
BEGIN
    IF pass IS NULL OR pass NOT IN ('rescue_stale', 'retry_failed', 'push_tasks', 'purge') THEN
        RAISE EXCEPTION 'unknown pass "%"', coalesce(pass, 'NULL') USING ERRCODE = '22023',
            HINT = 'Valid passes are: rescue_stale, retry_failed, push_tasks, purge.';
    END IF;
    LOOP
        CASE pass
            WHEN 'rescue_stale' THEN r := redrive.rescue_stale(coalesce(as_of, clock_timestamp()));
            WHEN 'retry_failed' THEN r := redrive.retry_failed(coalesce(as_of, clock_timestamp()));
            WHEN 'push_tasks' THEN r := redrive.push_tasks(coalesce(as_of, clock_timestamp()));
            ELSE r := redrive.purge(coalesce(as_of, clock_timestamp()));
        END CASE;
        v_deadline := coalesce(v_deadline, clock_timestamp() + coalesce(current_setting('redrive.pass_time_budget', true), '20s')::interval);
        EXIT WHEN NOT r.more OR clock_timestamp() > v_deadline;
        COMMIT;
    END LOOP;
END
$$;
COMMENT ON PROCEDURE redrive.run_pass IS
'Run a pass (rescue_stale, retry_failed, push_tasks or purge) again and again, each time in a transaction of its own, until nothing is left or redrive.pass_time_budget is used up. This is what pg_cron calls; see redrive.schedule_passes(). Errors: 22023 unknown pass.';
