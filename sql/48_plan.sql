-- Plan: the pass push_tasks, the net under what record_task() does at once.

-- Let a platform have what it has not, of the tasks of its owner that changed within its
-- window, and give up what is older: a portion of each.  Of the tasks that changed
-- before p_since it had all last time: with NULL all are looked at, else
-- those that changed since then, or have become too old since then.
-- all_done is false if there is more, or if somebody who records a task now has locked it.
CREATE FUNCTION redrive._plan_platform(p_platform_id int, p_as_of timestamptz, p_since timestamptz DEFAULT NULL, p_portion int DEFAULT 50000,
    OUT planned bigint, OUT expired bigint, OUT all_done boolean, OUT more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms;
    v_missing bigint;
    v_ids bigint[];
    v_old bigint;
BEGIN
    SELECT * INTO p FROM redrive.platforms AS x WHERE x.platform_id = p_platform_id;
    WITH missing AS MATERIALIZED (
        SELECT t.task_id
        FROM redrive.tasks AS t
        WHERE t.owner = p.owner AND NOT t.is_test AND t.changed_at >= greatest(p_as_of - p.push_window, p_since)
          AND NOT EXISTS (
            SELECT FROM redrive.pushes AS u
            WHERE u.task_id = t.task_id AND u.platform_id = p_platform_id AND u.wanted_version >= t.version
              AND NOT (u.state = 'delivered' AND u.pushed_version < u.wanted_version)
            OFFSET 0) -- looked up one by one: of a new platform the planner knows nothing
        LIMIT p_portion)
    SELECT count(*), array_agg(x.task_id) FILTER (WHERE x.task_id IS NOT NULL) INTO v_missing, v_ids
    FROM missing AS m
    LEFT JOIN LATERAL (SELECT t.task_id FROM redrive.tasks AS t WHERE t.task_id = m.task_id FOR SHARE SKIP LOCKED) AS x ON true;
    planned := CASE WHEN v_ids IS NULL THEN 0 ELSE redrive._plan_tasks(v_ids, p_platform_id) END;
    -- nothing waits for ever: looked for among the tasks that became too old since then, or, of all, among the pushes that wait
    WITH old AS MATERIALIZED (
        SELECT t.task_id, u.push_id
        FROM redrive.tasks AS t
        CROSS JOIN LATERAL (
            SELECT x.push_id
            FROM redrive.pushes AS x
            WHERE x.task_id = t.task_id AND x.platform_id = p_platform_id AND x.state IN ('pending', 'waiting')
            OFFSET 0) AS u
        WHERE p_since IS NOT NULL AND t.owner = p.owner AND t.changed_at < p_as_of - p.push_window AND t.changed_at >= p_since - p.push_window
        UNION ALL
        SELECT u.task_id, u.push_id
        FROM redrive.pushes AS u
        CROSS JOIN LATERAL (
            SELECT FROM redrive.tasks AS x
            WHERE x.task_id = u.task_id AND x.owner = p.owner AND x.changed_at < p_as_of - p.push_window
            OFFSET 0) AS t
        WHERE p_since IS NULL AND u.platform_id = p_platform_id AND u.state IN ('pending', 'waiting')
        LIMIT p_portion),
    free AS MATERIALIZED (
        SELECT o.push_id
        FROM old AS o
        CROSS JOIN LATERAL (SELECT FROM redrive.tasks AS t WHERE t.task_id = o.task_id AND t.changed_at + p.push_window < p_as_of FOR SHARE SKIP LOCKED) AS x
        CROSS JOIN LATERAL (SELECT FROM redrive.pushes AS u WHERE u.push_id = o.push_id FOR NO KEY UPDATE SKIP LOCKED) AS y),
    ended AS (
        UPDATE redrive.pushes AS u SET state = 'dead', error_class = 'expired', message = 'The task changed longer ago than push_window.'
        FROM free AS f
        WHERE u.push_id = f.push_id
        RETURNING u.push_id)
    SELECT (SELECT count(*) FROM old), (SELECT count(*) FROM ended) INTO v_old, expired;
    all_done := greatest(v_missing, v_old) < p_portion AND cardinality(v_ids) IS NOT DISTINCT FROM nullif(v_missing, 0) AND expired = v_old;
    more := (v_missing = p_portion AND planned > 0) OR (v_old = p_portion AND expired > 0);
END
$$;

-- Since when a transaction is open, at least: what changed before can be seen.  Without
-- track_activities it is told by its session; NULL if there is a prepared one, of which
-- nothing is known, or if those of others cannot be seen.
CREATE FUNCTION redrive._open_since() RETURNS timestamptz
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_stat_clear_snapshot();
    RETURN (
        SELECT min(CASE WHEN a.state = 'disabled' THEN a.backend_start ELSE a.xact_start END)
        FROM pg_stat_activity AS a
        WHERE a.datname = current_database() AND a.backend_type NOT LIKE 'autovacuum%' AND redrive._sees_sessions()
          AND NOT EXISTS (SELECT FROM pg_prepared_xacts AS x WHERE x.database = current_database()));
END
$$;

CREATE FUNCTION redrive._push_tasks(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    v_platform record;
    v_portion record;
    -- asked first: of a transaction that ends now the tasks are seen
    v_open_since timestamptz := redrive._open_since();
    v_done int[] := '{}';
    v_versions bigint[] := '{}';
    v_planned bigint := 0;
    v_reaped bigint;
    v_expired bigint := 0;
BEGIN
    more := false;
    FOR v_platform IN
        -- planned_at may lie ahead after a test with another as_of
        SELECT p.platform_id, p.config_version, CASE WHEN p.planned_at <= p_as_of THEN p.planned_at END AS planned_at
        FROM redrive.platforms AS p
        WHERE redrive._share_planning(p.platform_id, false)
        ORDER BY p.platform_id
        FOR KEY SHARE SKIP LOCKED -- one that is being dropped waits for the next pass
    LOOP
        IF clock_timestamp() > p_deadline THEN
            more := true;
            EXIT;
        END IF;
        SELECT * INTO v_portion FROM redrive._plan_platform(v_platform.platform_id, p_as_of, v_platform.planned_at);
        v_planned := v_planned + v_portion.planned;
        v_expired := v_expired + v_portion.expired;
        more := more OR v_portion.more;
        IF v_portion.all_done THEN
            v_done := v_done || v_platform.platform_id;
            v_versions := v_versions || v_platform.config_version;
        END IF;
    END LOOP;
    v_reaped := redrive._reap_pushes(p_as_of, NULL);
    -- last, lest an owner waits for the pass; one that was changed meanwhile is looked at anew
    IF v_open_since IS NOT NULL THEN
        UPDATE redrive.platforms AS p SET planned_at = least(v_open_since, p_as_of)
        FROM (
            SELECT x.platform_id
            FROM redrive.platforms AS x
            JOIN unnest(v_done, v_versions) AS d (platform_id, config_version) ON d.platform_id = x.platform_id AND d.config_version = x.config_version
            FOR NO KEY UPDATE OF x SKIP LOCKED) AS f
        WHERE p.platform_id = f.platform_id;
    END IF;
    IF EXISTS (
        SELECT FROM redrive.platforms AS p
        WHERE EXISTS (SELECT FROM redrive.pushes AS u WHERE u.platform_id = p.platform_id AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of))
    THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    acted := v_planned + v_reaped + v_expired;
    detail := concat_ws(', ', CASE WHEN v_planned > 0 THEN v_planned || ' planned' END, CASE WHEN v_reaped > 0 THEN v_reaped || ' leases ended' END,
        CASE WHEN v_expired > 0 THEN v_expired || ' expired' END);
    detail := nullif(detail, '');
END
$$;

-- Delete tasks that did not change since then and that nothing is to be pushed
-- of, with their pushes.  Returns how many.
CREATE FUNCTION redrive._purge_tasks(p_before timestamptz, p_limit bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_ids bigint[];
BEGIN
    SELECT array_agg(x.task_id) INTO v_ids
    FROM (
        SELECT t.task_id
        FROM redrive.tasks AS t
        WHERE t.changed_at < p_before
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.state IN ('pending', 'waiting'))
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED) AS x;
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM redrive.pushes AS u USING unnest(v_ids) AS i WHERE u.task_id = i;
    DELETE FROM redrive.tasks AS t USING unnest(v_ids) AS i WHERE t.task_id = i;
    RETURN cardinality(v_ids);
END
$$;

CREATE FUNCTION redrive._push_tasks(p_caller oid, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._require_operator(p_caller, 'push_tasks');
    RETURN redrive._pass('push_tasks', p_as_of);
END
$$;

CREATE FUNCTION redrive.push_tasks(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.push_tasks IS
'Pass: plan pushes of tasks that changed since the last pass and have none of their version, of all tasks in the window after a platform was made or changed; end attempts whose lease is over, give up what is older than push_window, and wake the pusher when something is due. Returns one row, which is also kept in redrive.pass_history; more = call again.';
