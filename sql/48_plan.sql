-- Plan: the pass push_tasks, the net under what record_task() does at once.

-- Let a platform have what it has not: a portion of the tasks of its owner that
-- changed within its window.  There may be more of them.
CREATE FUNCTION redrive._plan_platform(p_platform_id int, p_as_of timestamptz, OUT planned bigint, OUT more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_ids bigint[];
BEGIN
    SELECT array_agg(x.task_id) INTO v_ids
    FROM (
        SELECT t.task_id
        FROM redrive.platforms AS p
        JOIN redrive.tasks AS t ON t.owner = p.owner AND NOT t.is_test AND t.changed_at >= p_as_of - p.push_window
        WHERE p.platform_id = p_platform_id
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.platform_id = p.platform_id)
        LIMIT c_portion
        FOR SHARE OF t SKIP LOCKED) AS x; -- who records one now plans it
    planned := CASE WHEN v_ids IS NULL THEN 0 ELSE redrive._plan_tasks(v_ids, p_platform_id) END;
    more := coalesce(cardinality(v_ids), 0) = c_portion;
END
$$;

-- Is a transaction still open that began before?  What it records, it records
-- perhaps without having seen what was committed since.  When a prepared one
-- began cannot be told, nor any one of a session without track_activities.
CREATE FUNCTION redrive._older_transaction(p_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_stat_clear_snapshot();
    RETURN EXISTS (
            SELECT FROM pg_stat_activity AS a
            WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type NOT LIKE 'autovacuum%'
              AND (a.xact_start < p_at OR (a.state = 'disabled' AND num_nonnulls(a.backend_xid, a.backend_xmin) > 0)))
        OR EXISTS (SELECT FROM pg_prepared_xacts AS x WHERE x.database = current_database());
END
$$;

CREATE FUNCTION redrive._push_tasks(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_platform record;
    v_portion record;
    v_older boolean;
    v_planned bigint := 0;
    v_reaped bigint;
    v_expired bigint;
    v_due boolean;
BEGIN
    more := false;
    FOR v_platform IN
        SELECT p.platform_id, coalesce(p.planned_at, clock_timestamp()) AS planned_at
        FROM redrive.platforms AS p
        WHERE p.needs_plan
        ORDER BY p.platform_id
        FOR NO KEY UPDATE SKIP LOCKED -- one that is being changed waits for the next pass
    LOOP
        -- asked first: of a transaction that ends now the tasks are seen
        v_older := redrive._older_transaction(v_platform.planned_at);
        SELECT * INTO v_portion FROM redrive._plan_platform(v_platform.platform_id, p_as_of);
        v_planned := v_planned + v_portion.planned;
        more := more OR v_portion.more;
        UPDATE redrive.platforms AS p SET needs_plan = v_older OR v_portion.more, planned_at = v_platform.planned_at
        WHERE p.platform_id = v_platform.platform_id AND (p.planned_at IS NULL OR NOT (v_older OR v_portion.more));
        IF clock_timestamp() > p_deadline THEN
            more := true;
            EXIT;
        END IF;
    END LOOP;
    v_reaped := redrive._reap_pushes(p_as_of, NULL);
    -- older than the window: nothing waits for ever
    WITH old AS (
        SELECT u.push_id
        FROM redrive.platforms AS p
        JOIN redrive.pushes AS u ON u.platform_id = p.platform_id AND u.state IN ('pending', 'waiting')
        JOIN redrive.tasks AS t ON t.task_id = u.task_id
        WHERE t.changed_at < p_as_of - p.push_window
        LIMIT c_portion
        FOR NO KEY UPDATE OF u SKIP LOCKED) -- its task is being recorded
    UPDATE redrive.pushes AS u SET state = 'dead', error_class = 'expired', message = 'The task changed longer ago than push_window.'
    FROM old AS o
    WHERE u.push_id = o.push_id;
    GET DIAGNOSTICS v_expired = ROW_COUNT;
    SELECT EXISTS (
        SELECT FROM redrive.platforms AS p
        WHERE EXISTS (SELECT FROM redrive.pushes AS u WHERE u.platform_id = p.platform_id AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of))
    INTO v_due;
    IF v_due THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    acted := v_planned + v_reaped + v_expired;
    more := more OR v_expired = c_portion;
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

CREATE FUNCTION redrive.push_tasks(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN redrive._pass('push_tasks', as_of);
END
$$;
COMMENT ON FUNCTION redrive.push_tasks IS
'Pass: plan pushes that are missing (a new platform, a larger push_window), end attempts whose lease is over, give up what is older than push_window, and wake the pusher when something is due. Returns one row, which is also kept in redrive.pass_history; more = call again.';
