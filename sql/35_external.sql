-- External: workers outside of the database, in any language, over the same
-- ledger.  A claim is a chunk with a lease instead of a worker process; the token
-- of the lease is the fence, and all that a worker has to keep.
--
-- Items are settled in any order: those behind done_to are in chunks.settled.  A
-- first chunk moves done_to on when it can, a retry chunk only at its end.

-- Tell those who listen, at commit, that there is something to claim.
CREATE FUNCTION redrive._notify(p_handler_id int) RETURNS void
LANGUAGE sql AS $$
    SELECT pg_notify('redrive_' || h.name, '') FROM redrive.handlers AS h WHERE h.handler_id = $1 AND h.notify
$$;

-- When the next lease ends, in the past too.  In plpgsql, as _next_due.
CREATE FUNCTION redrive._next_lease() RETURNS timestamptz
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        SELECT min(greatest(c.lease_until, (SELECT u.since FROM redrive._up AS u) + c.lease))
        FROM redrive.chunks AS c
        WHERE c.state = 'running' AND c.lease_until IS NOT NULL);
END
$$;

CREATE FUNCTION redrive._check_lease(p_lease interval) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF p_lease IS NULL THEN
        RAISE EXCEPTION 'lease must not be null' USING ERRCODE = '22004', HINT = 'Leave it out to have 5 minutes.';
    ELSIF p_lease < interval '1 ms' OR p_lease > interval '30 days' THEN
        RAISE EXCEPTION 'lease must be between 1 ms and 30 days' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', p_lease), HINT = 'Take a few minutes, and renew it with redrive.heartbeat().';
    END IF;
END
$$;

-- Wait a moment for whoever claims of this batch; 55P03 if it takes longer.  The caller may
-- hold locks by what it settled in the same transaction, and somebody may wait for those:
-- it gives up before its deadlock_timeout, unless that is short.
CREATE FUNCTION redrive._lock_soon(p_batch_id bigint) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '800ms' AS $$
BEGIN
    PERFORM FROM redrive.batches AS b WHERE b.batch_id = p_batch_id FOR UPDATE;
END
$$;

-- Take some work of a handler for an external worker: by priority, then what has
-- been due longest; what another session has locked is skipped.
--   claimed  c is the claim
--   busy     another session has locked what there is
--   changed  nothing to claim, but something was written down: do not wait now
--   none     nothing to claim
-- The row of a batch is locked from its claim to the commit.  Whoever has waited
-- for that sets a lot of items aside, as an orphaned chunk, from which claims are
-- taken under its own lock: soon there are as many lots as claims at a time.  lot
-- is the one that has something left; claim() goes on with it for a moment.
CREATE FUNCTION redrive._take_work(h redrive.handlers, p_max_items bigint, p_lease interval, p_worker text, p_waited boolean,
    OUT outcome text, OUT c redrive.chunks, OUT more boolean, OUT lot bigint)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_work text;
    v_batch_id bigint;
    v_priority int;
    v_locked bigint; -- the first batch that was skipped
    v_due bigint[];
    b redrive.batches;
    t record;
    n bigint;
    v_lot bigint;
BEGIN
    outcome := 'none';
    FOR v_work, v_batch_id, v_priority IN
        SELECT w.work, w.batch_id, w.priority FROM redrive._work(h.handler_id, v_now) AS w
        WHERE w.work <> 'callback'
        ORDER BY w.priority DESC, w.due, (w.work = 'orphan') <> p_waited DESC
    LOOP
        -- nobody folds after an external worker's commit but the supervisor, and failures may pause the batch
        IF h.tolerated_failures IS NOT NULL
           AND EXISTS (SELECT FROM redrive.chunks AS x WHERE x.batch_id = v_batch_id AND NOT x.folded AND x.state = 'done' AND x.failed > 0) THEN
            PERFORM redrive._fold(s.batch_id)
            FROM (SELECT x.batch_id FROM redrive.batches AS x WHERE x.batch_id = v_batch_id FOR UPDATE SKIP LOCKED) AS s;
            IF FOUND THEN
                outcome := 'changed';
            END IF;
        END IF;
        IF v_work = 'first' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = h.handler_id AND s.claimable AND s.serve_after <= (SELECT clock_timestamp())
            ORDER BY s.priority DESC, s.serve_after
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            n := least(p_max_items, b.total - b.claimed_to);
            v_lot := CASE WHEN p_waited AND b.total - b.claimed_to >= 64 * p_max_items THEN 63 * p_max_items ELSE 0 END;
            -- its turn is over, but an update in place is cheaper: not each time if no other batch waits for its own
            UPDATE redrive.batches AS s
            SET state = 'running', claimed_to = b.claimed_to + n + v_lot, last_progress_at = v_now, started_at = coalesce(s.started_at, v_now),
                serve_after = CASE WHEN s.serve_after < v_now - interval '100 ms'
                        OR EXISTS (SELECT FROM redrive.batches AS o
                                   WHERE o.handler_id = b.handler_id AND o.claimable AND o.priority = b.priority AND o.serve_after <= v_now
                                     AND o.batch_id <> b.batch_id)
                    THEN v_now ELSE s.serve_after END
            WHERE s.batch_id = b.batch_id;
            IF v_lot > 0 THEN
                INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, claimed_at, progress_at)
                VALUES (b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'orphaned', b.claimed_to + n + 1, b.claimed_to + n + v_lot, b.claimed_to + n, v_lot,
                    v_now, v_now)
                RETURNING chunk_id INTO lot;
            END IF;
            INSERT INTO redrive.chunks AS x (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
                lease_token, claimed_at, progress_at, worker, lease, lease_until)
            VALUES (b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', b.claimed_to + 1, b.claimed_to + n, b.claimed_to, n,
                redrive._lease_token(), v_now, v_now, p_worker, p_lease, v_now + p_lease)
            RETURNING x.* INTO c;
            outcome := 'claimed';
            more := b.claimed_to + n < b.total;
            RETURN;
        ELSIF v_work = 'retry' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = h.handler_id AND s.priority <= v_priority AND s.next_retry_at <= v_now AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.next_retry_at
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            SELECT array_agg(d.item_no ORDER BY d.item_no) INTO v_due
            FROM (
                SELECT f.item_no
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at <= v_now
                ORDER BY f.next_attempt_at
                LIMIT p_max_items
            ) AS d;
            IF v_due IS NOT NULL THEN
                c := redrive._take_up(b, v_due, NULL, NULL, NULL);
            END IF;
            UPDATE redrive.batches AS s
            SET next_retry_at = (SELECT min(f.next_attempt_at) FROM redrive.failures AS f
                                 WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                last_progress_at = v_now
            WHERE s.batch_id = b.batch_id;
            IF v_due IS NULL THEN
                outcome := 'changed';
                CONTINUE;
            END IF;
        ELSE
            SELECT r.* INTO c
            FROM redrive.chunks AS r
            JOIN redrive.batches AS s ON s.batch_id = r.batch_id
            WHERE r.handler_id = h.handler_id AND r.state = 'orphaned' AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.serve_after, r.chunk_id
            LIMIT 1
            FOR UPDATE OF r SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            -- an item that is the end of its worker is soon alone
            n := greatest(least(p_max_items, (c.items - c.done) >> least(c.rescue_count - c.excused, 30)), 1);
            IF n < c.items - c.done THEN
                lot := c.chunk_id;
                c := redrive._split(c, n, v_now, p_lease, p_worker);
                outcome := 'claimed';
                more := true;
                RETURN;
            END IF;
        END IF;
        UPDATE redrive.chunks AS x
        SET state = 'running', lease_token = redrive._lease_token(), claim_done = x.done, claimed_at = v_now, progress_at = v_now,
            worker = p_worker, lease = p_lease, lease_until = v_now + p_lease
        WHERE x.chunk_id = c.chunk_id
        RETURNING x.* INTO c;
        outcome := 'claimed';
        more := true;
        RETURN;
    END LOOP;
    IF v_locked IS NOT NULL AND outcome = 'none' THEN
        outcome := 'busy';
        IF NOT p_waited THEN
            BEGIN
                PERFORM redrive._lock_soon(v_locked);
                SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker, true);
                outcome := t.outcome;
                c := t.c;
                more := t.more;
                lot := t.lot;
                IF outcome IN ('busy', 'none') THEN
                    RAISE EXCEPTION 'unlock the batch' USING ERRCODE = 'RD000';
                END IF;
            EXCEPTION WHEN lock_not_available OR SQLSTATE 'RD000' THEN
                NULL; -- whoever waits for work keeps no others from it
            END;
        END IF;
    END IF;
END
$$;

-- Claim the next n open items of an orphaned chunk that the caller has locked: they
-- are a new chunk.  The rest keeps its row, where cancel_batch() waits for it.
CREATE FUNCTION redrive._split(c redrive.chunks, n bigint, p_now timestamptz, p_lease interval, p_worker text) RETURNS redrive.chunks
LANGUAGE plpgsql AS $$
DECLARE
    v_chunk redrive.chunks;
    v_cut bigint := c.done_to + n; -- the last item of the part
    v_tail int8multirange;
    v_done bigint := 0;
BEGIN
    IF c.kind = 'first' THEN
        IF c.settled IS NOT NULL THEN
            SELECT x.item_no INTO STRICT v_cut
            FROM unnest(redrive._open_ranges(c)) AS r
            CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS x (item_no)
            ORDER BY x.item_no
            OFFSET n - 1
            LIMIT 1;
            v_tail := nullif(c.settled * int8multirange(int8range(v_cut, NULL, '()')), '{}');
            v_done := coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(v_tail) AS r), 0);
        END IF;
        INSERT INTO redrive.chunks AS x (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
            done, succeeded, ignored, failed, waiting, claim_done, settled, rescue_count, excused,
            lease_token, claimed_at, progress_at, worker, lease, lease_until)
        VALUES (c.batch_id, c.handler_id, c.part, c.run_no, 'first', 'running', c.from_no, v_cut, c.done_to, c.items - (c.to_no - v_cut),
            c.done - v_done, c.succeeded, c.ignored, c.failed, c.waiting, c.done - v_done, nullif(c.settled - coalesce(v_tail, '{}'), '{}'), c.rescue_count, c.excused,
            redrive._lease_token(), p_now, p_now, p_worker, p_lease, p_now + p_lease)
        RETURNING x.* INTO v_chunk;
        UPDATE redrive.chunks AS x
        SET from_no = v_cut + 1, done_to = v_cut, items = c.to_no - v_cut, done = v_done, claim_done = v_done, settled = v_tail,
            succeeded = 0, ignored = 0, failed = 0, waiting = 0
        WHERE x.chunk_id = c.chunk_id;
        RETURN v_chunk;
    END IF;

    WITH part AS (
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND redrive._open_ranges(c) @> u.item_no
        ORDER BY u.item_no
        LIMIT n
    ), chunk AS (
        INSERT INTO redrive.chunks AS x (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
            rescue_count, excused, lease_token, claimed_at, progress_at, worker, lease, lease_until)
        SELECT c.batch_id, c.handler_id, c.part, c.run_no, 'retry', 'running', min(p.item_no), max(p.item_no), min(p.item_no) - 1, n,
            c.rescue_count, c.excused, redrive._lease_token(), p_now, p_now, p_worker, p_lease, p_now + p_lease
        FROM part AS p
        RETURNING x.chunk_id, x.to_no
    ), list AS (
        INSERT INTO redrive.retry_lists (chunk_id, item_nos, attempts, free_counts, first_failed_at)
        SELECT (SELECT k.chunk_id FROM chunk AS k), array_agg(p.item_no ORDER BY p.item_no), array_agg(p.attempts ORDER BY p.item_no),
            array_agg(p.free_count ORDER BY p.item_no), array_agg(p.first_failed_at ORDER BY p.item_no)
        FROM part AS p
        RETURNING chunk_id
    ), rest AS (
        UPDATE redrive.chunks AS x
        SET done_to = k.to_no, items = x.items - n,
            settled = CASE WHEN x.settled - int8multirange(int8range(NULL, k.to_no, '(]')) <> '{}'
                           THEN x.settled - int8multirange(int8range(NULL, k.to_no, '(]')) END
        FROM chunk AS k
        WHERE x.chunk_id = c.chunk_id
    )
    SELECT l.chunk_id INTO STRICT v_cut FROM list AS l;
    SELECT x.* INTO STRICT v_chunk FROM redrive.chunks AS x WHERE x.chunk_id = v_cut;
    RETURN v_chunk;
END
$$;

-- One attempt to claim, for claim(); outcome as in _take_work.
CREATE FUNCTION redrive._claim_external(p_caller oid, p_handler text, p_max_items int, p_lease interval, p_worker text)
RETURNS TABLE (outcome text, owner oid, more boolean, chunk_id bigint, lease_token bigint, lease_until timestamptz, batch_id bigint,
    part smallint, retry boolean, done_to bigint, to_no bigint, settled bigint[], lot bigint)
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_handler);
    t record;
BEGIN
    IF h.kind <> 'external' THEN
        RAISE EXCEPTION 'handler "%" is not external', p_handler USING ERRCODE = '55000',
            DETAIL = format('Its kind is "%s".', h.kind), HINT = 'Its items are done by the workers of the server.';
    ELSIF p_max_items IS NULL OR p_max_items NOT BETWEEN 1 AND 10000 THEN
        RAISE EXCEPTION 'max_items must be between 1 and 10000' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', coalesce(p_max_items::text, 'NULL')), HINT = 'Claim no more than the worker does within its lease.';
    END IF;
    PERFORM redrive._check_lease(p_lease);
    owner := h.owner;
    outcome := 'none';
    IF h.paused OR NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
        RETURN NEXT;
        RETURN;
    END IF;
    IF h.max_workers IS NOT NULL AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE EXCEPTION 'cannot count the claims of handler "%" in a transaction with one snapshot', p_handler USING ERRCODE = '55000',
            DETAIL = 'It has max_workers, and claims that were committed since would not be seen.', HINT = 'Claim at isolation level READ COMMITTED.';
    END IF;
    IF h.max_workers IS NULL THEN
        SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker, false);
        outcome := t.outcome;
    ELSE
        BEGIN
            PERFORM FROM redrive.handlers AS x WHERE x.handler_id = h.handler_id FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                outcome := 'busy';
            ELSIF h.max_workers > (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running') THEN
                SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker, false);
                outcome := t.outcome;
            END IF;
            IF outcome IN ('busy', 'none') THEN
                RAISE EXCEPTION 'unlock the handler' USING ERRCODE = 'RD000';
            END IF;
        EXCEPTION WHEN SQLSTATE 'RD000' THEN
            NULL; -- whoever waits for work keeps no others from it
        END;
    END IF;
    IF outcome <> 'claimed' AND NOT redrive._preloaded() AND redrive._orphan_lost() + redrive._fold_ended() > 0 THEN
        outcome := 'changed'; -- there is no supervisor to do it
    END IF;
    IF outcome = 'claimed' THEN
        PERFORM redrive._wake_supervisor_by((t.c).lease_until);
        SELECT (t.c).chunk_id, (t.c).lease_token, (t.c).lease_until, (t.c).batch_id, (t.c).part, (t.c).kind = 'retry', (t.c).done_to, (t.c).to_no, t.more, t.lot
        INTO chunk_id, lease_token, lease_until, batch_id, part, retry, done_to, to_no, more, lot;
        IF (t.c).settled IS NOT NULL THEN
            SELECT array_agg(x.item_no ORDER BY x.item_no) INTO settled
            FROM unnest((t.c).settled) AS r
            CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS x (item_no);
        END IF;
    END IF;
    RETURN NEXT;
END
$$;

CREATE FUNCTION redrive.claim(handler text, max_items int DEFAULT 100, lease interval DEFAULT '5 min', worker text DEFAULT NULL, wait interval DEFAULT NULL)
RETURNS TABLE (chunk_id bigint, lease_token bigint, batch_id bigint, item_no bigint, key text, payload jsonb, attempt int, lease_until timestamptz)
LANGUAGE c VOLATILE ROWS 100 AS 'MODULE_PATHNAME', 'redrive_claim_external';
COMMENT ON FUNCTION redrive.claim IS
'For external workers: claim up to max_items items of one batch, one chunk of work, until the lease ends. All rows have the same chunk_id and lease_token; no rows when nothing is due. Commit before the work, so that the others see it. wait: if nothing is due, wait for it up to so long, at most 60 s, in one go at READ COMMITTED. Errors: 42704 unknown handler, 42501 not yours, 55000 not external, or at another isolation level with wait, or of a handler with max_workers, or before ALTER EXTENSION pg_redrive UPDATE, 22023 max_items, lease or wait out of range, 22004 lease NULL, 08006 the client has gone while it waited.';

-- Refuse whoever has not the claim he says, or has it no more.
CREATE FUNCTION redrive._refuse_claim(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    SELECT x.state, x.lease_until, x.finished_at, x.lease_token INTO c
    FROM redrive.chunks AS x
    JOIN redrive.handlers AS h ON h.handler_id = x.handler_id
    WHERE x.chunk_id = p_chunk_id AND pg_has_role(p_caller, h.owner::oid, 'USAGE');
    RAISE EXCEPTION 'chunk % is not claimed with lease token %', coalesce(p_chunk_id::text, 'NULL'), coalesce(p_lease_token::text, 'NULL') USING ERRCODE = 'RD004',
        DETAIL = CASE
            WHEN c.state IS NULL THEN 'You have no such chunk.'
            WHEN c.state = 'done' THEN format('It ended at %s.', redrive._seconds(c.finished_at))
            WHEN c.state = 'orphaned' THEN 'It was taken back, and waits for another worker.'
            WHEN c.lease_until IS NULL THEN 'A worker of the server has it.'
            ELSE 'Another worker has claimed it.' END,
        HINT = 'Roll back, forget its items, and claim others.';
END
$$;

CREATE FUNCTION redrive._claim_of(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS redrive.chunks
LANGUAGE plpgsql STABLE AS $$
DECLARE
    c redrive.chunks;
BEGIN
    SELECT x.* INTO c
    FROM redrive.chunks AS x
    WHERE x.chunk_id = p_chunk_id AND x.lease_token = p_lease_token AND x.lease_until IS NOT NULL;
    IF NOT FOUND THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
    PERFORM redrive._check_member(p_caller, (SELECT h.owner::oid FROM redrive.handlers AS h WHERE h.handler_id = c.handler_id), format('chunk %s', p_chunk_id));
    RETURN c;
END
$$;

CREATE FUNCTION redrive._heartbeat(p_caller oid, p_chunk_id bigint, p_lease_token bigint, p_lease interval) RETURNS timestamptz
LANGUAGE plpgsql AS $$
DECLARE
    c redrive.chunks := redrive._claim_of(p_caller, p_chunk_id, p_lease_token);
    v_lease interval := coalesce(p_lease, c.lease);
    v_until timestamptz;
BEGIN
    PERFORM redrive._check_lease(v_lease);
    IF EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = c.batch_id AND b.state = 'cancelled') THEN
        RETURN NULL;
    END IF;
    UPDATE redrive.chunks AS x
    SET lease = v_lease, lease_until = clock_timestamp() + v_lease
    WHERE x.chunk_id = p_chunk_id AND x.lease_token = p_lease_token AND x.lease_until IS NOT NULL
    RETURNING x.lease_until INTO v_until;
    IF NOT FOUND THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
    PERFORM redrive._wake_supervisor_by(v_until);
    RETURN v_until;
END
$$;

CREATE FUNCTION redrive.heartbeat(chunk_id bigint, lease_token bigint, lease interval DEFAULT NULL) RETURNS timestamptz
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.heartbeat IS
'For external workers: renew the lease of a claim, from now, for as long as it was claimed for or for another time; return when it ends. NULL: the batch was cancelled and the lease stays as it is; settle what is done and release the rest. Errors: RD004 not your claim, or not any more, 42501 not yours, 22023 lease out of range.';

CREATE FUNCTION redrive._release(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._claim_of(p_caller, p_chunk_id, p_lease_token);
    IF NOT redrive._give_back(p_chunk_id, p_lease_token, false) THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
END
$$;

CREATE FUNCTION redrive.release(chunk_id bigint, lease_token bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.release IS
'For external workers: give back the items of a claim that are not settled, at no cost, and end it. Errors: RD004 not your claim, or not any more, 42501 not yours.';

-- The items of a claim that are not settled, or those of them that are wanted.
CREATE FUNCTION redrive._open_items(p_chunk_id bigint, p_wanted bigint[])
RETURNS TABLE (item_no bigint, key text, attempts int, free_count int, first_failed_at timestamptz)
LANGUAGE plpgsql STABLE ROWS 100 AS $$
DECLARE
    c redrive.chunks;
    v_keyed boolean;
    v_open int8multirange;
BEGIN
    SELECT x.* INTO STRICT c FROM redrive.chunks AS x WHERE x.chunk_id = p_chunk_id;
    SELECT b.keyed INTO STRICT v_keyed FROM redrive.batches AS b WHERE b.batch_id = c.batch_id;
    v_open := redrive._open_ranges(c);
    RETURN QUERY
    SELECT i.item_no, k.key, i.attempts, i.free_count, i.first_failed_at
    FROM (
        SELECT w.item_no, 0 AS attempts, 0 AS free_count, NULL::timestamptz AS first_failed_at
        FROM unnest(p_wanted) AS w (item_no)
        WHERE c.kind = 'first' AND v_open @> w.item_no
        UNION ALL
        SELECT g.item_no, 0, 0, NULL
        FROM unnest(v_open) AS r
        CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS g (item_no)
        WHERE c.kind = 'first' AND p_wanted IS NULL
        UNION ALL
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND v_open @> u.item_no AND (p_wanted IS NULL OR u.item_no = ANY (p_wanted))
    ) AS i
    LEFT JOIN LATERAL (
        SELECT x.keys[i.item_no - x.first_no + 1] AS key
        FROM redrive.item_blocks AS x
        WHERE x.part = c.part AND x.batch_id = c.batch_id AND x.first_no <= i.item_no
        ORDER BY x.first_no DESC
        LIMIT 1
    ) AS k ON v_keyed
    ORDER BY i.item_no;
END
$$;

-- Unlock the keys of items that an external worker settled; on_unlock, which is
-- the owner's to run, is left to an executor.
CREATE FUNCTION redrive._unlock_settled(p_batch_id bigint, p_keys text[]) RETURNS void
LANGUAGE sql AS $$
    SELECT redrive._unlock_keys(b, $2) FROM redrive.batches AS b WHERE b.batch_id = $1
$$;

-- The last open item of an external claim was lost with its worker too often: it
-- is not tried again.  The caller has locked batch and chunk.
CREATE FUNCTION redrive._quarantine(b redrive.batches, c redrive.chunks, p_times int) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_key text;
BEGIN
    INSERT INTO redrive.failures AS f (part, batch_id, item_no, handler_id, run_no, state, reason, error_class, sqlstate, fingerprint, retry_count,
        free_count, attempts, first_failed_at, last_failed_at, key, message, detail, hint)
    SELECT c.part, c.batch_id, i.item_no, c.handler_id, c.run_no, 'failed', 'quarantined', 'crash', '57P02', left(md5('lost'), 16),
        greatest(i.attempts - i.free_count, 0), i.free_count, i.attempts + 1, coalesce(i.first_failed_at, clock_timestamp()), clock_timestamp(), i.key,
        format('the item was lost with its worker %s times', p_times),
        'The worker died, or settled nothing until its lease ended.',
        'When the worker is mended, run the item again with redrive.redrive().'
    FROM redrive._open_items(c.chunk_id, NULL) AS i
    RETURNING f.key INTO STRICT v_key;
    UPDATE redrive.chunks
    SET state = 'done', lease_token = NULL, lease_until = NULL, finished_at = clock_timestamp(), progress_at = clock_timestamp(),
        done_to = to_no, settled = NULL, done = items, failed = failed + 1, rescue_count = rescue_count + 1
    WHERE chunk_id = c.chunk_id;
    IF v_key IS NOT NULL THEN
        PERFORM redrive._unlock_keys(b, ARRAY[v_key]);
    END IF;
END
$$;

CREATE FUNCTION redrive.settle(chunk_id bigint, lease_token bigint, outcomes redrive.outcome[]) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_settle';
COMMENT ON FUNCTION redrive.settle IS
'For external workers: write down what became of these items of a claim, in any order; the claim goes on. Part of the caller''s transaction: what the worker wrote in it is done exactly once. Errors: RD004 not your claim, or not any more, RD005 an item that is not in the claim, twice or settled already, or a delay out of range, 42501 not yours, 22004 NULL.';

CREATE FUNCTION redrive.complete(chunk_id bigint, lease_token bigint, exceptions redrive.outcome[] DEFAULT '{}') RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_complete';
COMMENT ON FUNCTION redrive.complete IS
'For external workers: all items of a claim that are not settled succeeded, but for the exceptions; end it. Part of the caller''s transaction, as settle(). Errors: those of settle().';
