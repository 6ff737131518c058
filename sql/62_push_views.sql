-- Views of the task centre, by the same rules as those of batches: owners and
-- their members see their own, monitors no keys, payloads or messages.

CREATE VIEW redrive.task_status WITH (security_barrier) AS
SELECT t.task_key, t.process, t.status, t.version, t.is_test, t.created_at, t.changed_at, t.payload, pg_get_userbyid(t.owner) AS owner
FROM redrive.tasks AS t
WHERE pg_has_role(t.owner::oid, 'USAGE');

CREATE VIEW redrive.push_status WITH (security_barrier) AS
SELECT CASE WHEN m.mine THEN t.task_key END AS task_key, p.name AS platform, CASE WHEN f.push_id IS NULL THEN u.state ELSE 'in_flight' END AS state,
    u.wanted_status, u.pushed_status, u.retry_count,
    CASE WHEN u.state IN ('pending', 'waiting') AND f.push_id IS NULL THEN u.next_attempt_at END AS next_attempt_at, u.failed_at, u.http_status,
    CASE WHEN m.mine THEN u.message END AS message,
    u.error_class, u.wanted_version, u.pushed_version, u.attempt_no + (f.push_id IS NOT NULL)::int AS attempts,
    u.delivered_at, f.lease_until
FROM redrive.pushes AS u
LEFT JOIN redrive._in_flight AS f ON f.push_id = u.push_id
JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
JOIN redrive.tasks AS t ON t.task_id = u.task_id
CROSS JOIN LATERAL (SELECT pg_has_role(p.owner::oid, 'USAGE') AS mine) AS m
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

CREATE VIEW redrive.push_attempts WITH (security_barrier) AS
SELECT CASE WHEN m.mine THEN t.task_key END AS task_key, p.name AS platform, l.attempt_no, l.version, l.started_at, l.finished_at,
    l.delivered, l.charged, l.is_probe, l.error_class, l.http_status, l.curl_code,
    CASE WHEN m.mine THEN l.message END AS message,
    CASE WHEN m.mine THEN l.response END AS response
FROM redrive.push_log AS l
JOIN redrive.platforms AS p ON p.platform_id = l.platform_id
JOIN redrive.pushes AS u ON u.push_id = l.push_id
JOIN redrive.tasks AS t ON t.task_id = u.task_id
CROSS JOIN LATERAL (SELECT pg_has_role(p.owner::oid, 'USAGE') AS mine) AS m
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

CREATE VIEW redrive.platform_health WITH (security_barrier) AS
WITH f AS MATERIALIZED (SELECT x.push_id, x.platform_id FROM redrive._in_flight AS x)
SELECT p.name AS platform, p.paused, s.breaker, s.reason, s.blocked_until,
    q.due, q.in_flight, q.waiting, q.dead, q.blocked, date_trunc('second', q.oldest_due_age) AS oldest_due_age,
    s.attempts, s.delivered, s.last_delivered_at, s.last_failed_at,
    round(r.n / 300.0, 1) AS per_second, r.p50_ms, r.p95_ms, s.in_flight_limit, p.max_in_flight
FROM redrive.platforms AS p
JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE u.state IN ('pending', 'waiting') AND u.next_attempt_at <= now()) AS due,
        (SELECT count(*) FROM f WHERE f.platform_id = p.platform_id) AS in_flight,
        count(*) FILTER (WHERE u.state = 'waiting' AND u.next_attempt_at > now()) AS waiting,
        count(*) FILTER (WHERE u.state = 'dead') AS dead,
        count(*) FILTER (WHERE u.state = 'blocked') AS blocked,
        now() - min(u.next_attempt_at) FILTER (WHERE u.state IN ('pending', 'waiting') AND u.next_attempt_at <= now()) AS oldest_due_age
    FROM (
        -- one part for each partial index: what is delivered is not read
        SELECT x.state, x.next_attempt_at FROM redrive.pushes AS x WHERE x.platform_id = p.platform_id AND x.state IN ('pending', 'waiting')
          AND x.push_id NOT IN (SELECT f.push_id FROM f)
        UNION ALL
        SELECT x.state, x.next_attempt_at FROM redrive.pushes AS x WHERE x.platform_id = p.platform_id AND x.state IN ('dead', 'blocked')
    ) AS u) AS q
CROSS JOIN LATERAL (
    SELECT count(*) AS n,
        round((percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM l.finished_at - l.started_at)) * 1000)::numeric, 1) AS p50_ms,
        round((percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM l.finished_at - l.started_at)) * 1000)::numeric, 1) AS p95_ms
    FROM redrive.push_log AS l
    WHERE l.platform_id = p.platform_id AND l.finished_at > now() - interval '5 min') AS r
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

-- For the report and the metrics: attempts without their tasks.
CREATE VIEW redrive._pushed WITH (security_barrier) AS
SELECT l.finished_at, (SELECT p.name FROM redrive.platforms AS p WHERE p.platform_id = l.platform_id) AS platform, l.delivered, l.charged
FROM redrive.push_log AS l
WHERE l.platform_id = ANY (ARRAY(
    SELECT p.platform_id
    FROM redrive.platforms AS p
    WHERE pg_has_role(p.owner::oid, 'USAGE') OR has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT')));

CREATE VIEW redrive.http_requests WITH (security_barrier) AS
SELECT h.requested_at, pg_get_userbyid(h.requested_by) AS role, h.method, h.host, h.ok, h.http_status, h.attempts, h.milliseconds, h.error
FROM redrive.http_log AS h
WHERE pg_has_role(h.requested_by::oid, 'USAGE');

-- What a platform was created or altered with.  Of the address a monitor sees
-- the host, and of headers the names: the rest may hold what the platform keeps
-- to itself.  Of secrets there are the kinds that were set.
CREATE VIEW redrive.platform_settings WITH (security_barrier) AS
SELECT p.name AS platform, pg_get_userbyid(p.owner) AS owner,
    CASE WHEN m.mine THEN p.url ELSE substring(p.url FROM '^[^:]+://[^/?#]*') END AS url,
    p.method,
    CASE WHEN m.mine THEN p.headers ELSE (SELECT coalesce(jsonb_object_agg(h.name, NULL), '{}') FROM jsonb_object_keys(p.headers) AS h (name)) END AS headers,
    p.secrets, p.build, p.success_when, p.max_retries, p.retry_interval, p.retry_factor, p.retry_delay_max, p.permanent_status, p.push_window,
    p.timeout, p.connect_timeout, p.lease, p.max_in_flight, p.rate_limit, p.allow_http, p.allow_cidr, p.paused, p.created_at
FROM redrive.platforms AS p
CROSS JOIN LATERAL (SELECT pg_has_role(p.owner::oid, 'USAGE') AS mine) AS m
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

-- What keeps a push that is due from being sent at once, as far as tables tell: what the
-- pusher asks before it claims (redrive_room_of).
CREATE FUNCTION redrive._why_not_sent(p_push_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.pushes AS u
    JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
    JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE f.platform_id = p.platform_id) AS n, count(*) FILTER (WHERE x.owner = p.owner) AS of_role,
            7 * (current_setting('redrive.push_max_in_flight')::int - count(*)) AS left_to_others
        FROM redrive._in_flight AS f JOIN redrive.platforms AS x ON x.platform_id = f.platform_id
    ) AS sent
    CROSS JOIN LATERAL (
        SELECT l.what || ' reached' AS fact, format('%s requests to platform "%s" are under way, of %s at most.', sent.n, p.name, l.most) AS detail, l.remedy
        FROM (VALUES
            ('max_in_flight of the platform', p.max_in_flight::bigint, format('wait; or SELECT redrive.alter_platform(%L, max_in_flight => ...);', p.name)),
            ('limit of the platform', s.in_flight_limit, 'wait: it is halved by time-outs, and grows with each push that is delivered')) AS l (what, most, remedy)
        WHERE sent.n >= l.most
        UNION ALL
        SELECT 'share of redrive.push_max_in_flight reached',
            format('%s requests of role %s are under way, %s of them to platform "%s"; a role may take seven eighths of what others leave, and a platform seven eighths of that.',
                sent.of_role, p.owner, sent.n, p.name),
            'wait; or ALTER SYSTEM SET redrive.push_max_in_flight = ...; SELECT pg_reload_conf();'
        WHERE CASE WHEN sent.of_role = 0 THEN sent.left_to_others <= 0
                   ELSE sent.left_to_others - sent.of_role < 8 OR (sent.n > 0 AND 7 * ((sent.left_to_others - sent.of_role) / 8) - sent.n < 8) END
        UNION ALL
        SELECT 'rate_limit of the platform', format('No more than %s requests per second are sent to it.', p.rate_limit),
            format('wait; or SELECT redrive.alter_platform(%L, rate_limit => ...);', p.name)
        WHERE p.rate_limit IS NOT NULL
        UNION ALL
        SELECT 'other pushes come first', format('%s pushes to the platform have been due for longer.', count(*)), 'wait'
        FROM redrive.pushes AS x
        WHERE x.platform_id = p.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at < u.next_attempt_at
          AND x.push_id NOT IN (SELECT f.push_id FROM redrive._in_flight AS f)
        HAVING count(*) > 0
    ) AS r
    WHERE u.push_id = $1
$$;

-- Why a status has not arrived.
CREATE FUNCTION redrive._why_push(p_caller oid, p_task_key text, p_platform text) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_platform);
    t redrive.tasks;
    u redrive.pushes;
    s redrive.platform_states;
    v_lease_until timestamptz;
    v_no_workers boolean := false;
BEGIN
    IF p_task_key IS NULL THEN
        RAISE EXCEPTION 'task_key must not be null' USING ERRCODE = '22004', HINT = 'Give the key that the task was recorded with.';
    END IF;
    SELECT * INTO t FROM redrive.tasks AS x WHERE x.owner = p.owner AND x.task_key = p_task_key;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'not recorded', format('Role "%s", the owner of the platform, has no task of this key.', pg_get_userbyid(p.owner)),
            'Record it as this role: SELECT redrive.record_task(...), or redrive.attach_task_source(...).';
        RETURN;
    END IF;
    SELECT * INTO u FROM redrive.pushes AS x WHERE x.task_id = t.task_id AND x.platform_id = p.platform_id;
    SELECT f.lease_until INTO v_lease_until FROM redrive._in_flight AS f WHERE f.push_id = u.push_id;
    IF t.is_test THEN
        RETURN QUERY SELECT 'is a test', 'Tests are recorded and not pushed.', NULL::text;
    ELSIF u.push_id IS NULL THEN
        RETURN QUERY SELECT 'not planned', format('The task changed at %s; push_window is %s.', t.changed_at, p.push_window), 'CALL redrive.run_pass(''push_tasks'');';
    ELSIF v_lease_until IS NOT NULL THEN
        RETURN QUERY SELECT 'being sent', format('Attempt %s; if nothing is known of it at %s it is tried again.', u.attempt_no + 1, v_lease_until), NULL::text;
    ELSIF u.state = 'delivered' THEN
        RETURN QUERY SELECT 'delivered', format('Status "%s", version %s, at %s.', u.pushed_status, u.pushed_version, u.delivered_at), NULL::text;
    ELSIF u.state = 'dead' THEN
        RETURN QUERY SELECT 'given up', format('After %s attempts, the last at %s: %s', u.attempt_no, u.failed_at, u.message), format('SELECT redrive.redrive_push(%L, %L);', p.name, t.task_key);
    ELSIF u.state = 'blocked' THEN
        RETURN QUERY SELECT 'blocked', u.message, CASE u.error_class WHEN 'body' THEN 'Record the task again, with a payload that can be sent.' ELSE format('SELECT redrive.alter_platform(%L, ...);', p.name) END;
    ELSIF u.next_attempt_at > now() THEN
        RETURN QUERY SELECT 'waiting for a retry', format('Until %s. The last attempt: %s', u.next_attempt_at, u.message), format('SELECT redrive.redrive_push(%L, %L);', p.name, t.task_key);
    ELSIF u.awaits_build THEN
        RETURN QUERY SELECT 'not built yet', format('Due since %s; a worker of role "%s" calls %s first.', u.next_attempt_at, pg_get_userbyid(p.owner), p.build), NULL::text;
        RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._platform_problems(p.platform_id) AS x;
        RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._why_no_workers(p.owner) AS x;
        v_no_workers := FOUND;
        RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._why_no_executor(p.owner) AS x WHERE NOT v_no_workers;
    ELSE
        RETURN QUERY SELECT 'due', format('Since %s.', u.next_attempt_at), NULL::text;
    END IF;
    IF u.state IN ('pending', 'waiting') AND v_lease_until IS NULL THEN
        SELECT * INTO s FROM redrive.platform_states AS x WHERE x.platform_id = p.platform_id;
        IF p.paused THEN
            RETURN QUERY SELECT 'the platform is paused', coalesce('Reason: ' || s.reason || '.', 'By pause_platform().'), format('SELECT redrive.resume_platform(%L);', p.name);
        ELSIF s.breaker <> 'closed' THEN
            RETURN QUERY SELECT 'the breaker of the platform is ' || s.breaker, format('Until %s, because %s.', s.blocked_until, s.reason), format('SELECT redrive.resume_platform(%L);', p.name);
        ELSIF u.next_attempt_at <= now() AND NOT u.awaits_build THEN
            RETURN QUERY SELECT x.fact, x.detail, x.remedy FROM redrive._why_not_sent(u.push_id) AS x;
        END IF;
        IF p.secrets::text[] <> ARRAY(SELECT k.kind::text FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id ORDER BY k.kind) THEN
            RETURN QUERY SELECT 'secrets are missing', 'Dumps do not have them.', format('SELECT redrive.set_platform_secret(%L, ...);', p.name);
        END IF;
        IF v_no_workers THEN
            NULL; -- that has been said
        ELSIF pg_is_in_recovery() THEN
            RETURN QUERY SELECT 'standby', 'This server is a standby, the pusher runs on the primary only.', 'Ask the primary.';
        ELSIF NOT redrive._preloaded() THEN
            RETURN QUERY SELECT 'there are no workers', 'pg_redrive is not in shared_preload_libraries.', 'Add it and restart the server.';
        ELSIF NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
            RETURN QUERY SELECT 'redrive.enabled is off', 'Nothing is pushed.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();';
        ELSIF redrive._sees_sessions() AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive pusher' AND a.datname = current_database()) THEN
            RETURN QUERY SELECT 'the pusher is not running', 'The supervisor starts it when there is a free worker process.', 'Look in the server log for its errors; it takes one of max_worker_processes.';
        END IF;
    END IF;
END
$$;

CREATE FUNCTION redrive.why_push(task_key text, platform text) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.why_push IS
'Why the status of a task has not arrived at a platform, and the statement that helps. Errors: 42704 unknown platform, 42501 not yours, 22004 NULL.';
