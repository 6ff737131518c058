-- Record and finish.  A worker's own statements (fence, counters, failures)
-- are in src/flow/record.c; here is what happens to a batch when one of its
-- chunks has ended.

-- Add the ended chunks of a batch to its counters and, when nothing is left,
-- move it on.  In a transaction of its own after the chunk's commit, so that
-- under READ COMMITTED the last of several workers sees everything; repeated
-- by the stale pass if a crash swallowed it.
CREATE FUNCTION redrive._fold(p_batch_id bigint) RETURNS redrive.batch_state
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    s record;
    v_live boolean;
    v_waiting bigint;
    v_next timestamptz;
BEGIN
    SELECT * INTO b FROM redrive.batches WHERE batch_id = p_batch_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    WITH ended AS (
        UPDATE redrive.chunks
        SET folded = true
        WHERE batch_id = p_batch_id AND NOT folded AND state = 'done'
        RETURNING chunk_id, succeeded, ignored, failed, cancelled, waiting, done - claim_done AS done, finished_at, claimed_at
    ), lists AS (
        DELETE FROM redrive.retry_lists WHERE chunk_id IN (SELECT ended.chunk_id FROM ended)
    )
    SELECT count(*) AS chunks, coalesce(sum(succeeded), 0) AS succeeded, coalesce(sum(ignored), 0) AS ignored,
        coalesce(sum(failed), 0) AS failed, coalesce(sum(cancelled), 0) AS cancelled, coalesce(sum(waiting), 0) AS waiting,
        sum(done) FILTER (WHERE finished_at > claimed_at) / nullif(extract(epoch FROM sum(finished_at - claimed_at)), 0) AS rate
    INTO s FROM ended;
    IF s.chunks > 0 THEN
        UPDATE redrive.batches
        SET succeeded = succeeded + s.succeeded, ignored = ignored + s.ignored, failed = failed + s.failed,
            cancelled = cancelled + s.cancelled, waiting = waiting + s.waiting,
            items_per_second = CASE WHEN s.rate > 0 THEN coalesce((items_per_second + s.rate) / 2, s.rate) ELSE items_per_second END,
            last_progress_at = clock_timestamp(),
            -- its turn is over: external workers claim orphaned chunks without a change of the batch
            serve_after = CASE WHEN EXISTS (SELECT FROM redrive.chunks AS o WHERE o.batch_id = p_batch_id AND NOT o.folded AND o.state = 'orphaned')
                THEN clock_timestamp() ELSE serve_after END
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
    END IF;
    IF s.chunks > 0 AND b.waiting > 0 AND b.state IN ('running', 'retrying', 'paused') THEN
        -- A retry that was claimed while a worker had failures not yet committed
        -- did not see them, and took them out of next_retry_at.
        SELECT min(f.next_attempt_at) INTO v_next
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting';
        IF v_next < b.next_retry_at OR (v_next IS NOT NULL AND b.next_retry_at IS NULL) THEN
            UPDATE redrive.batches SET next_retry_at = v_next WHERE batch_id = p_batch_id RETURNING * INTO b;
            PERFORM redrive._wake_supervisor();
        END IF;
    END IF;

    IF b.run_no > 1 AND redrive._judge_canary(b) THEN
        RETURN 'running';
    END IF;
    v_live := b.claimed_to < b.total OR EXISTS (SELECT FROM redrive.chunks WHERE batch_id = p_batch_id AND NOT folded);
    SELECT * INTO h FROM redrive.handlers WHERE handler_id = b.handler_id;
    IF b.state IN ('running', 'retrying') AND (b.waiting > 0 OR v_live) AND b.failed - b.failures_accepted > h.tolerated_failures THEN
        PERFORM redrive._pause(b, format('%s items failed, %s are tolerated', b.failed - b.failures_accepted, h.tolerated_failures));
        RETURN 'paused';
    END IF;
    IF v_live THEN
        RETURN b.state;
    END IF;
    IF b.state = 'cancelled' AND b.finished_at IS NULL THEN
        -- failures that a worker committed after the cancel
        v_waiting := redrive._end_waiting(b, 'cancelled', NULL, NULL);
        UPDATE redrive.batches
        SET finished_at = clock_timestamp(), cancelled = cancelled + v_waiting, waiting = waiting - v_waiting,
            next_retry_at = NULL, oldest_failure_at = NULL
        WHERE batch_id = p_batch_id;
    ELSIF b.state = 'running' AND b.waiting > 0 THEN
        UPDATE redrive.batches
        SET state = 'retrying', attempted_at = clock_timestamp()
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
    ELSIF b.state IN ('running', 'retrying') AND b.waiting = 0 THEN
        UPDATE redrive.batches
        SET state = 'finished', finished_at = clock_timestamp(), attempted_at = coalesce(attempted_at, clock_timestamp()),
            next_retry_at = NULL, oldest_failure_at = NULL
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
        IF h.on_finish IS NOT NULL THEN
            INSERT INTO redrive.callbacks (handler_id, batch_id, kind, run_no, next_attempt_at)
            VALUES (b.handler_id, b.batch_id, 'on_finish', b.run_no, clock_timestamp());
            PERFORM redrive._wake(h.owner);
        END IF;
    END IF;
    RETURN b.state;
END
$$;

-- Fold the ended chunks whose worker could not do it, or did it in a commit that
-- a crash swallowed; return how many batches had any.  A batch that somebody has
-- locked is left for the next call: the supervisor must not wait for users.
CREATE FUNCTION redrive._fold_ended() RETURNS bigint
LANGUAGE sql AS $$
    SELECT count(redrive._fold(f.batch_id))
    FROM (SELECT DISTINCT x.batch_id FROM redrive.chunks AS x WHERE NOT x.folded AND x.state = 'done') AS c
    CROSS JOIN LATERAL (SELECT b.batch_id FROM redrive.batches AS b WHERE b.batch_id = c.batch_id FOR UPDATE SKIP LOCKED) AS f
$$;

-- Pause a live batch; the caller holds its row lock or does not care who wins.
CREATE FUNCTION redrive._pause(b redrive.batches, p_reason text) RETURNS void
LANGUAGE sql AS $$
    UPDATE redrive.batches
    SET state = 'paused', pause_reason = p_reason
    WHERE batch_id = b.batch_id AND state IN ('ready', 'running', 'retrying')
$$;

-- Give a claim back.  The chunk of a paused or live batch becomes orphaned, to
-- be taken by the next worker; what is left of a cancelled batch's chunk is
-- counted as cancelled.  p_lost: the worker is gone (counted as a rescue, and
-- against the chunk unless it is known that the chunk is not to blame).
CREATE FUNCTION redrive._give_back(p_chunk_id bigint, p_lease_token bigint, p_lost boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    c redrive.chunks;
    b redrive.batches;
    v_left bigint;
    v_owner oid;
    v_excused boolean;
BEGIN
    -- batch first, then chunk: the order every statement here keeps
    SELECT s.* INTO b FROM redrive.batches AS s JOIN redrive.chunks AS r ON r.batch_id = s.batch_id
    WHERE r.chunk_id = p_chunk_id FOR UPDATE OF s;
    SELECT * INTO c FROM redrive.chunks
    WHERE chunk_id = p_chunk_id AND lease_token = p_lease_token FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = c.handler_id;
    v_left := c.items - c.done;
    IF b.state = 'cancelled' THEN
        PERFORM redrive._cancel_chunk(b, c);
        PERFORM redrive._fold(c.batch_id);
    ELSIF v_left = 0 THEN
        UPDATE redrive.chunks
        SET state = 'done', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL, finished_at = clock_timestamp()
        WHERE chunk_id = p_chunk_id;
        PERFORM redrive._fold(c.batch_id);
    ELSIF p_lost AND c.lease_until IS NOT NULL AND v_left = 1 AND c.rescue_count + 1 - c.excused >= 10 THEN
        PERFORM redrive._quarantine(b, c, c.rescue_count + 1 - c.excused);
        PERFORM redrive._fold(c.batch_id);
    ELSE
        -- the rate so far decides how much the next worker takes
        UPDATE redrive.batches
        SET items_per_second = greatest(c.done - c.claim_done, 0.1) / greatest(extract(epoch FROM clock_timestamp() - c.claimed_at), 0.001)
        WHERE batch_id = c.batch_id AND NOT p_lost;
        -- another process crashed, or an item that has been counted
        v_excused := p_lost AND EXISTS (
            SELECT FROM redrive._crumbs() AS k
            WHERE k.chunk_id = p_chunk_id AND k.lease_token = p_lease_token AND k.kind IN ('item', 'unlock', 'innocent'));
        UPDATE redrive.chunks
        SET state = 'orphaned', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL,
            rescue_count = rescue_count + p_lost::int, excused = excused + v_excused::int
        WHERE chunk_id = p_chunk_id;
        IF p_lost AND NOT v_excused AND c.rescue_count + 1 - c.excused >= 10 THEN
            PERFORM redrive._pause(b, format('chunk %s lost its worker %s times', c.chunk_id, c.rescue_count + 1 - c.excused));
        END IF;
    END IF;
    PERFORM redrive._wake(v_owner), redrive._notify(c.handler_id);
    RETURN true;
END
$$;

-- What is not done of a chunk; of a retry chunk also numbers that are not in
-- its list.  Only external workers do items out of their order.
CREATE FUNCTION redrive._open_ranges(c redrive.chunks) RETURNS int8multirange
LANGUAGE sql IMMUTABLE AS $$
    SELECT int8multirange(int8range(c.done_to, c.to_no, '(]')) - coalesce(c.settled, '{}')
$$;

-- Cancel what is left of a chunk and unlock its keys; the caller has locked both.
CREATE FUNCTION redrive._cancel_chunk(b redrive.batches, c redrive.chunks) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF c.kind = 'first' THEN
        PERFORM redrive._unlock_range(b, lower(r), upper(r) - 1) FROM unnest(redrive._open_ranges(c)) AS r;
    ELSE
        PERFORM redrive._put_back(b, c);
    END IF;
    UPDATE redrive.chunks
    SET state = 'done', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL, finished_at = clock_timestamp(),
        cancelled = cancelled + items - done, items = done, to_no = CASE WHEN kind = 'first' THEN coalesce(upper(settled) - 1, done_to) ELSE to_no END
    WHERE chunk_id = c.chunk_id;
END
$$;

-- The items of a retry chunk that were not run again become cancelled failures,
-- with the error that is in the log.
CREATE FUNCTION redrive._put_back(b redrive.batches, c redrive.chunks) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_keys text[];
BEGIN
    WITH left_over AS (
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND redrive._open_ranges(c) @> u.item_no
    ), unlogged AS (
        DELETE FROM redrive.failure_log AS g
        USING left_over AS u
        WHERE g.part = c.part AND g.batch_id = c.batch_id AND g.item_no = u.item_no AND g.attempt = u.attempts
        RETURNING g.*, u.free_count, u.first_failed_at
    ), cancelled AS (
        INSERT INTO redrive.failures (part, batch_id, item_no, handler_id, run_no, state, error_class, sqlstate, fingerprint, retry_count,
            free_count, attempts, first_failed_at, last_failed_at, key, message, detail, hint, context, constraint_name)
        SELECT g.part, g.batch_id, g.item_no, c.handler_id, g.run_no, 'cancelled', g.error_class, g.sqlstate, g.fingerprint,
            greatest(g.attempt - g.free_count - 1, 0), g.free_count, g.attempt, g.first_failed_at, g.failed_at,
            k.keys[g.item_no - k.first_no + 1], g.message, g.detail, g.hint, g.context, g.constraint_name
        FROM unlogged AS g
        CROSS JOIN LATERAL (
            SELECT x.first_no, x.keys
            FROM redrive.item_blocks AS x
            WHERE x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= g.item_no
            ORDER BY x.first_no DESC
            LIMIT 1) AS k
        RETURNING key
    )
    SELECT array_agg(x.key) FILTER (WHERE x.key IS NOT NULL) INTO v_keys FROM cancelled AS x;
    PERFORM redrive._unlock_keys(b, v_keys);
END
$$;

-- Unlock the keys of a range of items that became final where no user code may
-- run.
CREATE FUNCTION redrive._unlock_range(b redrive.batches, p_from bigint, p_to bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_keys text[];
BEGIN
    IF NOT b.keyed OR p_from > p_to THEN
        RETURN 0;
    END IF;
    SELECT array_agg(i.key) INTO v_keys
    FROM redrive._items(b.part, b.batch_id, p_from, p_to) AS i
    WHERE i.key IS NOT NULL;
    RETURN redrive._unlock_keys(b, v_keys);
END
$$;

-- Unlock these keys of a batch; on_unlock is left to an executor of the owner.
CREATE FUNCTION redrive._unlock_keys(b redrive.batches, p_keys text[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_on_unlock text;
    v_count bigint;
BEGIN
    IF p_keys IS NULL THEN
        RETURN 0;
    END IF;
    SELECT on_unlock INTO v_on_unlock FROM redrive.handlers WHERE handler_id = b.handler_id;
    WITH freed AS (
        -- one probe of the index per key, whatever is known of the table when this is planned
        DELETE FROM redrive.locks
        WHERE ctid = ANY (ARRAY(
            SELECT x.ctid
            FROM unnest(p_keys) AS u (key)
            CROSS JOIN LATERAL (
                SELECT l.ctid FROM redrive.locks AS l
                WHERE l.handler_id = b.handler_id AND l.key = u.key AND l.batch_id = b.batch_id
                OFFSET 0) AS x))
        RETURNING key
    ), later AS (
        INSERT INTO redrive.callbacks (handler_id, batch_id, kind, key, run_no, next_attempt_at)
        SELECT b.handler_id, b.batch_id, 'on_unlock', freed.key, b.run_no, clock_timestamp()
        FROM freed
        WHERE v_on_unlock IS NOT NULL
    )
    SELECT count(*) INTO v_count FROM freed;
    RETURN v_count;
END
$$;
