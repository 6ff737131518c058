-- Claim: what a worker takes, in a short transaction of its own.

-- What a claim is known by: no number of a sequence, as that goes back with WAL
-- that is lost, and a worker from before would fit the claim of another one.
CREATE FUNCTION redrive._lease_token() RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__lease_token';

-- The batch with the first of the due retries, when one of priority p_least is due: perhaps one of a higher priority is, too.
-- One index probe for each priority of which some wait; if these are many, the last probe passes all entries that are not due.
CREATE FUNCTION redrive._first_retry(p_handler_id int, p_as_of timestamptz, p_least int)
RETURNS TABLE (batch_id bigint, priority int, due timestamptz)
LANGUAGE plpgsql STABLE ROWS 1 AS $$
DECLARE
    v_most bigint := 2147483647;
BEGIN
    FOR probe IN 1 .. 16 LOOP
        SELECT b.batch_id, b.priority, b.next_retry_at INTO batch_id, priority, due
        FROM redrive.batches AS b
        WHERE b.handler_id = p_handler_id AND b.priority BETWEEN p_least AND v_most
          AND b.next_retry_at <= CASE WHEN probe < 16 THEN 'infinity' ELSE p_as_of END AND b.state IN ('running', 'retrying')
        ORDER BY b.priority DESC, b.next_retry_at
        LIMIT 1;
        EXIT WHEN NOT FOUND;
        IF due <= p_as_of THEN
            RETURN NEXT;
            EXIT;
        END IF;
        v_most := priority::bigint - 1;
    END LOOP;
END
$$;

-- The best candidate of each kind of work of a handler: a few index probes,
-- whatever the number of batches.
CREATE FUNCTION redrive._work(p_handler_id int, p_as_of timestamptz)
RETURNS TABLE (work text, batch_id bigint, priority int, due timestamptz)
LANGUAGE sql STABLE AS $$
    (SELECT 'orphan', b.batch_id, b.priority, b.serve_after
     FROM redrive.chunks AS c
     JOIN redrive.batches AS b ON b.batch_id = c.batch_id
     WHERE c.handler_id = $1 AND c.state = 'orphaned' AND b.state IN ('running', 'retrying')
     ORDER BY b.priority DESC, b.serve_after
     LIMIT 1)
    UNION ALL
    (SELECT 'first', b.batch_id, b.priority, b.serve_after
     FROM redrive.batches AS b
     -- somebody may have claimed of it, and committed, since we looked at the clock
     WHERE b.handler_id = $1 AND b.claimable AND b.serve_after <= greatest($2, (SELECT clock_timestamp()))
     ORDER BY b.priority DESC, b.serve_after
     LIMIT 1)
    UNION ALL
    (SELECT 'retry', r.batch_id, r.priority, r.due
     -- mostly none is due, and one probe is all
     FROM (SELECT b.priority
           FROM redrive.batches AS b
           WHERE b.handler_id = $1 AND b.next_retry_at <= $2 AND b.state IN ('running', 'retrying')
           ORDER BY b.next_retry_at
           LIMIT 1) AS d
     CROSS JOIN LATERAL redrive._first_retry($1, $2, d.priority) AS r)
    UNION ALL
    (SELECT 'callback', k.batch_id, 2147483647, k.next_attempt_at
     FROM redrive.callbacks AS k
     WHERE k.handler_id = $1 AND k.next_attempt_at <= $2
     LIMIT 1)
$$;

-- What our own workers can do, of all handlers and platforms that are not paused.
CREATE FUNCTION redrive._candidates(p_as_of timestamptz)
RETURNS TABLE (handler_id int, owner oid, work text, priority int, due timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT h.handler_id, h.owner::oid, w.work, w.priority, w.due
    FROM redrive.handlers AS h
    CROSS JOIN LATERAL redrive._work(h.handler_id, $1) AS w
    WHERE (h.kind <> 'external' OR w.work = 'callback') AND NOT h.paused
      AND (h.max_workers IS NULL OR w.work = 'callback'
           OR h.max_workers > (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running'))
    UNION ALL
    -- bodies of pushes
    SELECT NULL, p.owner::oid, 'build', 2147483647, u.next_attempt_at
    FROM redrive.platforms AS p
    CROSS JOIN LATERAL (
        SELECT x.next_attempt_at
        FROM redrive.pushes AS x
        WHERE x.platform_id = p.platform_id AND x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= $1
        ORDER BY x.next_attempt_at
        LIMIT 1) AS u
    WHERE p.build IS NOT NULL AND NOT p.paused
$$;

-- When the next work that is not due yet becomes due.  In plpgsql, which keeps the plan: the supervisor asks in each turn.
CREATE FUNCTION redrive._next_due(p_as_of timestamptz) RETURNS timestamptz
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN least(
        -- once claimed it has been due; the time of the last claim may be a moment later than ours
        (SELECT min(b.serve_after) FROM redrive.batches AS b WHERE b.claimable AND b.state = 'ready' AND b.serve_after > p_as_of),
        (SELECT min(w.due)
         FROM redrive.handlers AS h
         CROSS JOIN LATERAL (
            (SELECT b.next_retry_at AS due
             FROM redrive.batches AS b
             WHERE b.handler_id = h.handler_id AND b.next_retry_at > p_as_of AND b.state IN ('running', 'retrying')
             ORDER BY b.next_retry_at
             LIMIT 1)
            UNION ALL
            (SELECT k.next_attempt_at
             FROM redrive.callbacks AS k
             WHERE k.handler_id = h.handler_id AND k.next_attempt_at > p_as_of
             ORDER BY k.next_attempt_at
             LIMIT 1)) AS w
         WHERE NOT h.paused),
        (SELECT min(u.next_attempt_at)
         FROM redrive.platforms AS p
         CROSS JOIN LATERAL (
            SELECT x.next_attempt_at
            FROM redrive.pushes AS x
            WHERE x.platform_id = p.platform_id AND x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at > p_as_of
            ORDER BY x.next_attempt_at
            LIMIT 1) AS u
         WHERE p.build IS NOT NULL AND NOT p.paused));
END
$$;

-- Take one chunk for a worker of p_owner: by priority, then the work that has
-- been due longest; of a batch an orphaned chunk first.  Returns no row when
-- there is nothing to do.  The batch row is locked to the end of the caller's
-- (short) transaction; batches that another session has locked are skipped.
-- A claim waits for nobody: not for a user who changes a handler, nor for claimers
-- of a handler with max_workers, who would wait for each other if they had to
-- look at several.  If the locked ones are all there is, a row without a chunk
-- says that there is more.
-- p_workers: how many workers may share a batch, so that none takes all of it.
-- p_callbacks: return a row of NULLs when callbacks or builds are due, which come before any chunk.
CREATE FUNCTION redrive._claim(p_owner oid, p_pid int, p_started_at timestamptz, p_workers int, p_callbacks boolean)
RETURNS TABLE (
    chunk_id bigint, batch_id bigint, handler_id int, part smallint, run_no int, kind redrive.chunk_kind,
    done_to bigint, to_no bigint, items bigint, lease_token bigint, rescue_count int, keyed boolean, more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    cand record;
    h redrive.handlers;
    b redrive.batches;
    c redrive.chunks;
    n bigint;
    v_due bigint[];
    v_locked boolean := false;
BEGIN
    FOR cand IN
        SELECT x.handler_id, x.work, x.priority FROM redrive._candidates(v_now) AS x
        WHERE x.owner = p_owner AND (p_callbacks OR x.work NOT IN ('callback', 'build'))
        ORDER BY x.priority DESC, x.due, x.work = 'orphan' DESC
    LOOP
        IF cand.work IN ('callback', 'build') THEN
            RETURN NEXT;
            RETURN;
        END IF;
        SELECT * INTO h FROM redrive.handlers AS x WHERE x.handler_id = cand.handler_id;
        IF h.max_workers IS NOT NULL THEN
            PERFORM FROM redrive.handlers AS x WHERE x.handler_id = cand.handler_id FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := true;
                CONTINUE;
            END IF;
            CONTINUE WHEN h.max_workers <= (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running');
        END IF;

        IF cand.work = 'orphan' THEN
            SELECT r.* INTO c
            FROM redrive.chunks AS r
            JOIN redrive.batches AS s ON s.batch_id = r.batch_id
            WHERE r.handler_id = cand.handler_id AND r.state = 'orphaned' AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.serve_after, r.chunk_id
            LIMIT 1
            FOR UPDATE OF s, r SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            UPDATE redrive.batches AS s SET serve_after = v_now WHERE s.batch_id = c.batch_id RETURNING * INTO b;
            n := redrive._chunk_size(b, p_workers, c.to_no - c.done_to);
            IF c.kind = 'first' AND c.to_no - c.done_to > 2 * n THEN
                -- too much for one worker: keep a part, leave the rest
                INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, claimed_at, progress_at)
                VALUES (c.batch_id, c.handler_id, c.part, c.run_no, 'first', 'orphaned', c.done_to + n + 1, c.to_no, c.done_to + n, c.to_no - c.done_to - n, c.claimed_at, c.progress_at);
                c.items := c.items - (c.to_no - c.done_to - n);
                c.to_no := c.done_to + n;
            END IF;
            UPDATE redrive.chunks AS r
            SET state = 'running', lease_token = redrive._lease_token(), worker_pid = p_pid, worker_started_at = p_started_at,
                to_no = c.to_no, items = c.items, claim_done = r.done, claimed_at = v_now, progress_at = v_now
            WHERE r.chunk_id = c.chunk_id
            RETURNING r.* INTO c;
            RETURN QUERY SELECT c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
                c.done_to, c.to_no, c.items - c.done, c.lease_token, c.rescue_count, b.keyed, true;
            RETURN;
        END IF;

        IF cand.work = 'first' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = cand.handler_id AND s.claimable AND s.serve_after <= v_now
            ORDER BY s.priority DESC, s.serve_after
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            RETURN QUERY SELECT * FROM redrive._carve(b, p_pid, p_started_at, p_workers, v_now);
            RETURN;
        ELSE
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = cand.handler_id AND s.priority <= cand.priority AND s.next_retry_at <= v_now AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.next_retry_at
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            SELECT array_agg(d.item_no ORDER BY d.item_no) INTO v_due
            FROM (
                SELECT f.item_no
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at <= v_now
                ORDER BY f.next_attempt_at
                LIMIT redrive._retry_size(b, p_workers, 1000000000)
            ) AS d;
            IF v_due IS NOT NULL THEN
                c := redrive._take_up(b, v_due, NULL, p_pid, p_started_at);
            END IF;
            UPDATE redrive.batches AS s
            SET next_retry_at = (SELECT min(f.next_attempt_at) FROM redrive.failures AS f
                                 WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                last_progress_at = v_now
            WHERE s.batch_id = b.batch_id;
            CONTINUE WHEN v_due IS NULL;
        END IF;
        RETURN QUERY SELECT c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
            c.done_to, c.to_no, c.items, c.lease_token, c.rescue_count, b.keyed, c.items >= 1000;
        RETURN;
    END LOOP;
    IF v_locked THEN
        more := true;
        RETURN NEXT;
    END IF;
END
$$;

-- Carve the next range off a batch whose row the caller has locked.
CREATE FUNCTION redrive._carve(b redrive.batches, p_pid int, p_started_at timestamptz, p_workers int, p_now timestamptz)
RETURNS TABLE (
    chunk_id bigint, batch_id bigint, handler_id int, part smallint, run_no int, kind redrive.chunk_kind,
    done_to bigint, to_no bigint, items bigint, lease_token bigint, rescue_count int, keyed boolean, more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    n bigint := redrive._chunk_size(b, p_workers, b.total - b.claimed_to);
BEGIN
    UPDATE redrive.batches AS s
    SET state = 'running', claimed_to = s.claimed_to + n, serve_after = p_now, last_progress_at = p_now,
        started_at = coalesce(s.started_at, p_now)
    WHERE s.batch_id = b.batch_id;
    RETURN QUERY
    INSERT INTO redrive.chunks AS c (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
        lease_token, worker_pid, worker_started_at, claimed_at, progress_at)
    VALUES (b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', b.claimed_to + 1, b.claimed_to + n, b.claimed_to, n,
        redrive._lease_token(), p_pid, p_started_at, p_now, p_now)
    RETURNING c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
        c.done_to, c.to_no, c.items, c.lease_token, c.rescue_count, b.keyed, c.to_no < b.total;
END
$$;

-- How many items a chunk gets: about two seconds of work at the measured rate,
-- and no more than half of an even share, so that workers end together.
CREATE FUNCTION redrive._chunk_size(b redrive.batches, p_workers int, p_left bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(1, least(
        p_left,
        greatest(ceil(least(2 * coalesce(b.items_per_second, 50), 100000)), 1)::bigint,
        greatest(ceil(p_left / (2.0 * greatest(p_workers, 1))), ceil(least(0.1 * coalesce(b.items_per_second, 50), 10000)))::bigint))
$$;

-- How many items a retry chunk gets: its list is held in memory.
CREATE FUNCTION redrive._retry_size(b redrive.batches, p_workers int, p_left bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT least(20000, redrive._chunk_size(b, p_workers, p_left))
$$;

-- Take failures up again: their rows go to the log, the items to the list of a
-- new chunk.  What succeeds then leaves nothing to write, what fails again is a
-- new failure.  The caller has locked the batch.  Without a worker the chunk is
-- orphaned, for the next one to claim.  p_afresh: a redrive began then, and the
-- items have their retries and their time again.  The numbers are in order.
CREATE FUNCTION redrive._take_up(b redrive.batches, p_item_nos bigint[], p_afresh timestamptz, p_pid int, p_started_at timestamptz) RETURNS redrive.chunks
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- else a plan made for a small table compares each row with each number
AS $$
DECLARE
    c redrive.chunks;
    v_chunk_id bigint := nextval(pg_get_serial_sequence('redrive.chunks', 'chunk_id'));
    v_now timestamptz := clock_timestamp();
BEGIN
    WITH taken AS (
        DELETE FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (p_item_nos)
          AND f.item_no BETWEEN p_item_nos[1] AND p_item_nos[cardinality(p_item_nos)]
        RETURNING f.*
    ), logged AS (
        INSERT INTO redrive.failure_log (part, batch_id, item_no, attempt, run_no, failed_at, error_class, sqlstate,
            fingerprint, message, detail, hint, context, constraint_name)
        SELECT t.part, t.batch_id, t.item_no, t.attempts, t.run_no, t.last_failed_at, t.error_class, t.sqlstate,
            t.fingerprint, t.message, t.detail, t.hint, t.context, t.constraint_name
        FROM taken AS t
    ), list AS (
        INSERT INTO redrive.retry_lists (chunk_id, item_nos, attempts, free_counts, first_failed_at)
        SELECT v_chunk_id, array_agg(t.item_no), array_agg(t.attempts), array_agg(t.free_count), array_agg(t.first_failed_at)
        FROM (
            SELECT x.item_no, x.attempts,
                CASE WHEN p_afresh IS NULL THEN x.free_count ELSE x.attempts END AS free_count,
                coalesce(p_afresh, x.first_failed_at) AS first_failed_at
            FROM taken AS x
            ORDER BY x.item_no
        ) AS t
        RETURNING item_nos
    )
    INSERT INTO redrive.chunks AS k (chunk_id, batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, waiting,
        lease_token, worker_pid, worker_started_at, claimed_at, progress_at)
    OVERRIDING SYSTEM VALUE
    SELECT v_chunk_id, b.batch_id, b.handler_id, b.part, b.run_no, 'retry',
        CASE WHEN p_pid IS NULL THEN 'orphaned'::redrive.chunk_state ELSE 'running' END,
        l.item_nos[1], l.item_nos[n.items], l.item_nos[1] - 1, n.items, CASE WHEN p_afresh IS NULL THEN -n.items ELSE 0 END,
        CASE WHEN p_pid IS NOT NULL THEN redrive._lease_token() END, p_pid, p_started_at, v_now, v_now
    FROM list AS l CROSS JOIN LATERAL (SELECT cardinality(l.item_nos) AS items) AS n
    RETURNING k.* INTO STRICT c;
    RETURN c;
END
$$;
