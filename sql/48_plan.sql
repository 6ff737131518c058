-- Plan: the pass push_tasks, the net under what record_task() does at once.

-- Let a platform have what it has not: the tasks of its owner that changed
-- within its window, in portions.  Returns how many.
CREATE FUNCTION redrive._plan_platform(p_platform_id int, p_as_of timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_ids bigint[];
    v_count bigint;
BEGIN
    SELECT array_agg(x.task_id) INTO v_ids
    FROM (
        SELECT t.task_id
        FROM redrive.platforms AS p
        JOIN redrive.tasks AS t ON t.owner = p.owner AND NOT t.is_test AND t.changed_at >= p_as_of - p.push_window
        WHERE p.platform_id = p_platform_id
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.platform_id = p.platform_id)
        LIMIT c_portion) AS x;
    v_count := CASE WHEN v_ids IS NULL THEN 0 ELSE redrive._plan_tasks(v_ids, p_platform_id) END;
    UPDATE redrive.platforms SET needs_plan = coalesce(cardinality(v_ids), 0) = c_portion WHERE platform_id = p_platform_id;
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive._push_tasks(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_platform record;
    v_planned bigint := 0;
    v_reaped bigint;
    v_expired bigint;
    v_due boolean;
BEGIN
    more := false;
    FOR v_platform IN SELECT p.platform_id FROM redrive.platforms AS p WHERE p.needs_plan ORDER BY p.platform_id LOOP
        v_planned := v_planned + redrive._plan_platform(v_platform.platform_id, p_as_of);
        EXIT WHEN clock_timestamp() > p_deadline;
    END LOOP;
    more := EXISTS (SELECT FROM redrive.platforms AS p WHERE p.needs_plan);
    v_reaped := redrive._reap_pushes(p_as_of, NULL);
    -- older than the window: nothing waits for ever
    WITH old AS (
        SELECT u.push_id
        FROM redrive.platforms AS p
        CROSS JOIN LATERAL (
            SELECT x.push_id, x.task_id FROM redrive.pushes AS x
            WHERE x.platform_id = p.platform_id AND x.state IN ('pending', 'waiting')) AS u
        JOIN redrive.tasks AS t ON t.task_id = u.task_id
        WHERE t.changed_at < p_as_of - p.push_window
        LIMIT c_portion)
    UPDATE redrive.pushes AS u SET state = 'dead', error_class = 'expired', message = 'The task changed longer ago than push_window.'
    FROM old AS o
    WHERE u.push_id = o.push_id AND u.state IN ('pending', 'waiting');
    GET DIAGNOSTICS v_expired = ROW_COUNT;
    SELECT EXISTS (
        SELECT FROM redrive.platforms AS p
        WHERE EXISTS (SELECT FROM redrive.pushes AS u WHERE u.platform_id = p.platform_id AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of))
    INTO v_due;
    IF v_due THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    acted := v_planned + v_reaped + v_expired;
    more := more OR v_reaped = 10000 OR v_expired = c_portion;
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
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.state IN ('pending', 'in_flight', 'waiting'))
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
