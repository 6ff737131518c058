-- Control: pause, resume, cancel, redrive, wait.

CREATE FUNCTION redrive._pause_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
BEGIN
    IF b.state NOT IN ('ready', 'running', 'retrying') THEN
        RAISE EXCEPTION 'batch % cannot be paused', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a ready, running or retrying batch can be paused.';
    END IF;
    PERFORM redrive._pause(b, format('paused by %s', p_caller::regrole));
END
$$;

CREATE FUNCTION redrive.pause_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.pause_batch IS
'Stop a batch after the running commit interval of each worker. Errors: 42704 unknown batch, 42501 not yours, 55000 not live.';

CREATE FUNCTION redrive._resume_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
    v_owner oid;
BEGIN
    IF b.state <> 'paused' THEN
        RAISE EXCEPTION 'batch % is not paused', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a paused batch can be resumed.';
    END IF;
    UPDATE redrive.batches
    SET pause_reason = NULL, last_progress_at = clock_timestamp(),
        -- whoever resumes it has seen the failures so far
        failures_accepted = failed + coalesce((SELECT sum(c.failed) FROM redrive.chunks AS c WHERE c.batch_id = p_batch_id AND NOT c.folded), 0),
        state = CASE WHEN started_at IS NULL THEN 'ready'
                     WHEN attempted_at IS NOT NULL AND claimed_to = total THEN 'retrying'
                     ELSE 'running' END::redrive.batch_state
    WHERE batch_id = p_batch_id;
    PERFORM redrive._fold(p_batch_id);
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = b.handler_id;
    PERFORM redrive._wake(v_owner), redrive._notify(b.handler_id);
END
$$;

CREATE FUNCTION redrive.resume_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.resume_batch IS
'Let a paused batch go on, whether a user, a rule with action pause or tolerated_failures stopped it. Errors: 42704 unknown batch, 42501 not yours, 55000 not paused.';

-- Everything that no worker holds is cancelled at once; a worker in a chunk
-- ends its interval, sees the state and gives the rest back as cancelled.
CREATE FUNCTION redrive._cancel(b redrive.batches) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_pending bigint := b.total - b.claimed_to;
    v_waiting bigint;
    c redrive.chunks;
BEGIN
    UPDATE redrive.batches
    SET state = 'cancelled', pause_reason = NULL, claimed_to = total, cancelled = cancelled + v_pending, next_retry_at = NULL,
        oldest_failure_at = NULL
    WHERE batch_id = b.batch_id;
    PERFORM redrive._unlock_range(b, b.claimed_to + 1, b.total);
    FOR c IN
        SELECT * FROM redrive.chunks WHERE batch_id = b.batch_id AND state = 'orphaned' FOR UPDATE
    LOOP
        PERFORM redrive._cancel_chunk(b, c);
    END LOOP;
    v_waiting := redrive._end_waiting(b, 'cancelled', NULL, NULL);
    UPDATE redrive.batches SET cancelled = cancelled + v_waiting, waiting = waiting - v_waiting WHERE batch_id = b.batch_id;
    PERFORM redrive._fold(b.batch_id);
END
$$;

-- Make waiting failures final and unlock their keys; return how many.
CREATE FUNCTION redrive._end_waiting(b redrive.batches, p_state redrive.failure_state, p_reason redrive.fail_reason, p_before timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_count bigint;
    v_keys text[];
BEGIN
    WITH ended AS (
        UPDATE redrive.failures AS f
        SET state = p_state, reason = p_reason, next_attempt_at = NULL
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
          AND (p_before IS NULL OR f.first_failed_at <= p_before)
        RETURNING f.key
    )
    SELECT count(*), array_agg(ended.key) FILTER (WHERE ended.key IS NOT NULL) INTO v_count, v_keys FROM ended;
    PERFORM redrive._unlock_keys(b, v_keys);
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive._cancel_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
BEGIN
    IF b.state IN ('finished', 'cancelled') THEN
        RAISE EXCEPTION 'batch % cannot be cancelled', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a live batch can be cancelled.';
    END IF;
    PERFORM redrive._cancel(b);
    PERFORM redrive._wake(owner) FROM redrive.handlers WHERE handler_id = b.handler_id;
END
$$;

CREATE FUNCTION redrive.cancel_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.cancel_batch IS
'Cancel a live batch: finished work stays, items that run end their commit interval, the others are not run; keys are unlocked. Errors: 42704 unknown batch, 42501 not yours, 55000 not live.';

CREATE FUNCTION redrive._redrive(p_caller oid, p_batch_id bigint, p_fingerprint text, p_error_class text, p_item_nos bigint[],
    p_canary int, p_canary_ratio float8) RETURNS int
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- as in _take_up
AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
    v_now timestamptz := clock_timestamp();
    v_item_nos bigint[];
    v_held bigint[];
    v_count bigint;
    v_key record;
BEGIN
    IF p_canary < 1 THEN
        RAISE EXCEPTION 'canary must be positive' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', p_canary), HINT = 'Give the number of items to run first, or leave it out.';
    ELSIF p_canary_ratio IS NULL OR NOT (p_canary_ratio > 0 AND p_canary_ratio <= 1) THEN
        RAISE EXCEPTION 'canary_ratio must be above 0 and at most 1' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', coalesce(p_canary_ratio::text, 'NULL')), HINT = 'Give the part of the canary items that has to succeed, for example 0.9.';
    END IF;
    IF b.state NOT IN ('finished', 'running', 'retrying') THEN
        RAISE EXCEPTION 'batch % cannot be redriven', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Resume a paused batch first; a cancelled one stays cancelled.';
    END IF;
    IF p_canary IS NOT NULL AND EXISTS (SELECT FROM redrive.canaries AS c WHERE c.batch_id = p_batch_id AND c.decided_at IS NULL) THEN
        RAISE EXCEPTION 'batch % has a canary already', p_batch_id USING ERRCODE = '55000',
            DETAIL = 'Its items have not all ended.', HINT = format('See redrive.why(%s); wait for its end, or redrive without a canary.', p_batch_id);
    END IF;
    SELECT array_agg(f.item_no ORDER BY f.item_no), count(*) INTO v_item_nos, v_count
    FROM redrive.failures AS f
    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'failed'
      AND (p_fingerprint IS NULL OR f.fingerprint = p_fingerprint)
      AND (p_error_class IS NULL OR f.error_class = p_error_class)
      AND (p_item_nos IS NULL OR f.item_no = ANY (p_item_nos));
    IF v_count = 0 THEN
        RAISE EXCEPTION 'batch % has no failed items to redrive', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s", %s items failed.', b.state, b.failed),
            HINT = 'See redrive.failed_items for what can be redriven.';
    ELSIF v_count > p_canary THEN
        v_held := v_item_nos[p_canary + 1:];
        v_item_nos := v_item_nos[:p_canary];
        v_count := p_canary;
    END IF;
    IF b.keyed THEN
        -- The key of a failed item was unlocked: take it again, unless another batch has it now.
        INSERT INTO redrive.locks (handler_id, key, batch_id, item_no)
        SELECT b.handler_id, f.key, b.batch_id, f.item_no
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos) AND f.key IS NOT NULL
        ORDER BY f.key
        ON CONFLICT DO NOTHING;
        SELECT l.key, l.batch_id INTO v_key
        FROM redrive.failures AS f
        JOIN redrive.locks AS l ON l.handler_id = b.handler_id AND l.key = f.key
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos)
          AND (l.batch_id, l.item_no) IS DISTINCT FROM (f.batch_id, f.item_no)
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'key "%" is locked', v_key.key USING ERRCODE = '55P03',
                DETAIL = format('Batch %s holds it.', v_key.batch_id),
                HINT = 'Wait for that batch, or redrive other items by item_nos.';
        END IF;
    END IF;

    UPDATE redrive.batches
    SET run_no = run_no + 1,
        -- whoever redrives some of them has seen the others
        failures_accepted = failed - v_count + coalesce((SELECT sum(c.failed) FROM redrive.chunks AS c WHERE c.batch_id = p_batch_id AND NOT c.folded), 0)
    WHERE batch_id = p_batch_id
    RETURNING * INTO b;
    IF v_held IS NOT NULL THEN
        INSERT INTO redrive.canaries (batch_id, run_no, items, needed, held)
        VALUES (p_batch_id, b.run_no, v_item_nos, greatest(ceil(round((v_count * p_canary_ratio)::numeric, 6)), 1), v_held)
        ON CONFLICT (batch_id) DO UPDATE
        SET run_no = excluded.run_no, items = excluded.items, needed = excluded.needed, held = excluded.held, decided_at = NULL, released = NULL;
    END IF;
    PERFORM redrive._run_again(b, v_item_nos, v_now);
    RETURN b.run_no;
END
$$;

-- Take failed items of a locked batch up again, with their budgets afresh; they
-- have their keys.
CREATE FUNCTION redrive._run_again(b redrive.batches, p_item_nos bigint[], p_now timestamptz) RETURNS void
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- as in _take_up
AS $$
DECLARE
    v_count int := cardinality(p_item_nos);
    v_size bigint;
BEGIN
    -- those that crashed the server have a fresh chance
    DELETE FROM redrive.crashes WHERE batch_id = b.batch_id AND item_no = ANY (p_item_nos);
    UPDATE redrive.batches
    SET state = 'running', failed = failed - v_count, finished_at = NULL, attempted_at = NULL, last_progress_at = p_now
    WHERE batch_id = b.batch_id
    RETURNING * INTO b;
    v_size := redrive._retry_size(b, current_setting('redrive.max_workers')::int, v_count);
    FOR i IN 0 .. (v_count - 1) / v_size LOOP
        PERFORM redrive._take_up(b, p_item_nos[i * v_size + 1:(i + 1) * v_size], p_now, NULL, NULL);
    END LOOP;
    PERFORM redrive._wake(h.owner), redrive._notify(h.handler_id) FROM redrive.handlers AS h WHERE h.handler_id = b.handler_id;
END
$$;

CREATE FUNCTION redrive.redrive(batch_id bigint, fingerprint text DEFAULT NULL, error_class text DEFAULT NULL, item_nos bigint[] DEFAULT NULL,
    canary int DEFAULT NULL, canary_ratio float8 DEFAULT 0.9) RETURNS int
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.redrive IS
'Run the failed items of a batch again, all of them or those of one fingerprint, error class or list of items, with a fresh retry budget, and two chances more if they crashed the server; return the number of the new run. Their keys are locked again. With canary, only that many of them run first, in order of item_no, and the others follow in the same run as soon as the part canary_ratio of the canary, rounded up, has succeeded; if that cannot be reached any more the others stay failed. Errors: 42704 unknown batch, 42501 not yours, 22023 canary or canary_ratio out of range, 55000 nothing to redrive or a canary is not decided, 55P03 key held by another batch.';

CREATE PROCEDURE redrive.wait(batch_id bigint, timeout interval DEFAULT NULL, INOUT state redrive.batch_state DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'redrive_wait';
COMMENT ON PROCEDURE redrive.wait IS
'Wait until a batch is finished, cancelled or paused, or until the timeout; state tells which. Holds no snapshot while it waits, so it cannot be called in a transaction block. Errors: 42704 unknown batch, 42501 not yours, 55000 when no workers can run it.';

CREATE PROCEDURE redrive.work(max_time interval DEFAULT NULL, until_idle boolean DEFAULT true)
LANGUAGE c AS 'MODULE_PATHNAME', 'redrive_work';
COMMENT ON PROCEDURE redrive.work IS
'Run batches of the handlers that the caller owns in this session, with the same engine as the workers: until nothing is due (until_idle), or for max_time. Commits as it goes, so it cannot be called in a transaction block. Errors: 2D000 in a transaction block, 55000 before ALTER EXTENSION pg_redrive UPDATE.';
