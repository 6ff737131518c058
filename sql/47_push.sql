-- Push: what the statements of the pusher (flow/push.c) and the pass share.

-- Time from an attempt to the next; n counts retries from 0.
CREATE FUNCTION redrive._retry_delay(base interval, factor float8, most interval, n int, seed bigint) RETURNS interval
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'redrive__retry_delay';

-- The body that is pushed when the platform has no build function: the task as JSON, NULL if that is too long.
CREATE FUNCTION redrive._task_body(task_key text, status text, version bigint, process text, payload jsonb, created_at timestamptz, changed_at timestamptz) RETURNS text
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__task_body';

-- End attempts of which nobody will tell any more: those of pushers other than p_pusher,
-- which are dead; or with NULL those of which the lease is over.
-- The request may have arrived, so it is charged.  What somebody has locked is left
-- for the next time.  Returns how many were ended.
CREATE FUNCTION redrive._reap_pushes(p_as_of timestamptz, p_pusher bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_claims bigint[];
    v_count bigint;
BEGIN
    SELECT array_agg(x.claim_id) INTO v_claims
    FROM (
        SELECT c.claim_id
        FROM redrive.push_claims AS c
        WHERE CASE WHEN p_pusher IS NULL THEN c.lease_until <= p_as_of ELSE c.pusher <> p_pusher END
        ORDER BY c.claim_id
        FOR UPDATE SKIP LOCKED) AS x;
    WITH lost AS (
        SELECT c.claim_id, c.is_probe, c.claimed_at, m.push_id, m.version
        FROM unnest(v_claims) AS n (claim_id)
        JOIN redrive.push_claims AS c ON c.claim_id = n.claim_id
        CROSS JOIN LATERAL unnest(c.push_ids, c.versions) AS m (push_id, version)
        CROSS JOIN LATERAL (
            SELECT FROM redrive.pushes AS x
            WHERE x.push_id = m.push_id AND x.last_claim_id < c.claim_id
            FOR NO KEY UPDATE SKIP LOCKED) AS u),
    ended AS (
        UPDATE redrive.pushes AS u SET
            state = CASE WHEN u.state IN ('dead', 'blocked') THEN u.state::text
                         WHEN u.wanted_version > l.version OR l.is_probe THEN 'pending'
                         WHEN u.retry_count >= p.max_retries THEN 'dead'
                         ELSE 'waiting' END::redrive.push_state,
            retry_count = CASE WHEN u.wanted_version > l.version OR l.is_probe OR u.retry_count >= p.max_retries THEN u.retry_count ELSE u.retry_count + 1 END,
            next_attempt_at = CASE WHEN u.wanted_version > l.version OR l.is_probe THEN p_as_of
                                   ELSE p_as_of + redrive._retry_delay(p.retry_interval, p.retry_factor, p.retry_delay_max, u.retry_count, u.push_id) END,
            failed_at = p_as_of, http_status = NULL, error_class = 'unknown', message = 'Nothing is known of the last attempt: the pusher ended or lost its lease.',
            attempt_no = u.attempt_no + 1, last_claim_id = l.claim_id
        FROM lost AS l, redrive.platforms AS p
        WHERE u.push_id = l.push_id AND p.platform_id = u.platform_id
        RETURNING u.push_id, u.attempt_no, u.platform_id, l.version, l.is_probe, l.claimed_at)
    INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe, error_class, message)
    SELECT (SELECT r.part FROM redrive.rotation AS r), e.push_id, e.attempt_no, e.platform_id, e.version, e.claimed_at, p_as_of, false, NOT e.is_probe, e.is_probe,
        'unknown', 'Nothing is known of the attempt: the pusher ended or lost its lease.'
    FROM ended AS e;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM redrive.push_claims AS c
    USING unnest(v_claims) AS n (claim_id)
    WHERE c.claim_id = n.claim_id AND NOT EXISTS (SELECT FROM redrive._in_flight AS f WHERE f.claim_id = c.claim_id);
    RETURN v_count;
END
$$;

-- A platform of this role with bodies to be built, and their pushes, the oldest first.  Nobody else
-- builds for it until the transaction ends.  What somebody has locked is left out: it could not be
-- recorded.  To find out it is locked here, too, and let go.
CREATE FUNCTION redrive._free_builds(p_owner oid, p_as_of timestamptz, p_limit int, OUT platform redrive.platforms, OUT push_ids bigint[])
LANGUAGE plpgsql AS $$
BEGIN
    FOR platform IN
        SELECT p.* FROM redrive.platforms AS p
        WHERE p.owner = p_owner AND p.build IS NOT NULL AND NOT p.paused AND EXISTS (
            SELECT FROM redrive.pushes AS u
            WHERE u.platform_id = p.platform_id AND u.awaits_build AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of)
        ORDER BY p.platform_id
    LOOP
        BEGIN
            CONTINUE WHEN NOT redrive._lock_pass('build ' || platform.platform_id);
            SELECT array_agg(x.push_id) INTO push_ids
            FROM (
                SELECT u.push_id
                FROM redrive.pushes AS u
                WHERE u.platform_id = platform.platform_id AND u.awaits_build AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of
                ORDER BY u.next_attempt_at
                LIMIT p_limit
                FOR NO KEY UPDATE SKIP LOCKED) AS x;
            RAISE EXCEPTION 'unlock the pushes' USING ERRCODE = 'RD000';
        EXCEPTION WHEN SQLSTATE 'RD000' THEN
            IF push_ids IS NOT NULL AND redrive._lock_pass('build ' || platform.platform_id) THEN
                RETURN;
            END IF;
        END;
    END LOOP;
    push_ids := NULL;
END
$$;

CREATE FUNCTION redrive._redrive_push(p_caller oid, p_platform text, p_task_key text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_platform_id int;
    v_count bigint;
BEGIN
    IF p_platform IS NOT NULL THEN
        SELECT p.platform_id INTO v_platform_id FROM redrive._platform(p_caller, p_platform) AS p;
    END IF;
    WITH wanted AS (
        -- in the order in which tasks are recorded
        SELECT u.push_id
        FROM redrive.pushes AS u
        JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
        JOIN redrive.tasks AS t ON t.task_id = u.task_id
        WHERE NOT t.is_test
          AND u.state IN ('dead', 'waiting', 'blocked')
          AND p.platform_id = coalesce(v_platform_id, p.platform_id)
          AND (p_task_key IS NULL OR t.task_key = p_task_key)
          AND pg_has_role(p_caller, p.owner, 'USAGE')
        ORDER BY u.task_id, u.platform_id
        FOR NO KEY UPDATE OF u)
    UPDATE redrive.pushes AS u SET state = 'pending', retry_count = 0, free_count = 0, next_attempt_at = now()
    FROM wanted AS w
    WHERE u.push_id = w.push_id;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count > 0 THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive.redrive_push(platform text DEFAULT NULL, task_key text DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.redrive_push IS
'Try again at once, with a new budget, pushes that are dead, blocked or wait for a retry: of one platform or all of the caller''s, of one task or all. Returns how many. Errors: 42704 unknown platform, 42501 not yours.';
