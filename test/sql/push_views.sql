-- What is shown of platforms and pushes: settings, health, why_push() and the findings of doctor(), each state
-- made by hand, in a transaction that is rolled back: no pusher ever sees the platforms.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools
SET datestyle = ISO;
-- of a test before; without platforms it does not come back
SELECT count(pg_terminate_backend(pid, 30000)) >= 0 AS gone FROM pg_stat_activity WHERE backend_type = 'redrive pusher' AND datname = current_database();

CREATE ROLE regress_views_a LOGIN;
CREATE ROLE regress_views_b LOGIN;
CREATE ROLE regress_views_member LOGIN IN ROLE regress_views_a;
CREATE ROLE regress_views_monitor LOGIN;
SELECT redrive.grant_user('regress_views_a'), redrive.grant_user('regress_views_b'), redrive.grant_user('regress_views_member'), redrive.grant_monitor('regress_views_monitor');
CREATE FUNCTION doctor(pattern text, as_of timestamptz DEFAULT clock_timestamp()) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql SET jit = off SET search_path = pg_catalog, pg_temp AS $$
    SELECT d.severity, regexp_replace(d.finding, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[-+]\d\d(:\d\d)?', 'T', 'g'), d.remedy FROM redrive._doctor_at(as_of) AS d WHERE d.finding ~ pattern
$$;
CREATE FUNCTION why(task text) RETURNS TABLE (fact text, detail text, remedy text) LANGUAGE sql AS $$
    SELECT w.fact, regexp_replace(w.detail, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?[-+]\d\d(:\d\d)?', 'T', 'g'), w.remedy FROM redrive.why_push(task, 'crm') AS w
$$;
CREATE FUNCTION push(task text) RETURNS bigint LANGUAGE sql SECURITY DEFINER AS $$
    SELECT u.push_id FROM redrive.pushes AS u JOIN redrive.tasks AS t USING (task_id) WHERE t.task_key = task
$$;

BEGIN;
SET LOCAL SESSION AUTHORIZATION regress_views_a;
CREATE FUNCTION body(task redrive.task) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$;
SELECT redrive.create_platform('crm', 'https://crm.example:8443/hook?token=abc', headers => '{"X-Tenant": "a", "Accept": "text/plain"}', success_when => '$.code == 0',
    permanent_status => '{404}', rate_limit => 10);
SELECT redrive.set_platform_secret('crm', 'bearer', 'a-very-secret-token');

-- Settings: the owner and its members see all but secrets, monitors no more than the host and the names of headers.
\x on
SELECT platform, owner, url, method, headers, secrets, build, success_when, max_retries, retry_interval, retry_factor, retry_delay_max, permanent_status, push_window,
    timeout, connect_timeout, lease, max_in_flight, rate_limit, allow_http, allow_cidr, paused FROM redrive.platform_settings;
\x off
SET LOCAL SESSION AUTHORIZATION regress_views_member;
SELECT platform, url, headers, secrets FROM redrive.platform_settings;
SET LOCAL SESSION AUTHORIZATION regress_views_monitor;
SELECT platform, url, headers, secrets FROM redrive.platform_settings;
SET LOCAL SESSION AUTHORIZATION regress_views_b;
SELECT platform, url, headers, secrets FROM redrive.platform_settings;
SET LOCAL SESSION AUTHORIZATION regress_views_a;

-- Why a status has not arrived.
SELECT count(redrive.record_task('task ' || i, 'new')) FROM generate_series(1, 8) AS i;
SELECT * FROM why('task 1');
RESET SESSION AUTHORIZATION;
SELECT finding, remedy FROM doctor('pusher');
UPDATE redrive.platform_states SET breaker = 'open', reason = 'HTTP 503', blocked_until = now() + interval '30 s', opened_at = now();
SELECT * FROM doctor('breaker');
SELECT fact, detail, remedy FROM why('task 1');
UPDATE redrive.platform_states SET breaker = 'half_open';
SELECT * FROM doctor('breaker');
SELECT fact FROM why('task 1');
-- paused: that comes before the breaker, and is no finding
SELECT redrive.pause_platform('crm');
SELECT fact, detail, remedy FROM why('task 1');
SELECT count(*) FROM doctor('breaker|pusher');
SELECT redrive.resume_platform('crm');
SELECT breaker, reason, blocked_until FROM redrive.platform_health;
DELETE FROM redrive.platform_secrets;
SELECT fact, detail, remedy FROM why('task 1');
SELECT * FROM doctor('ecrets');
SELECT redrive.set_platform_secret('crm', 'bearer', NULL);

-- One push in each state.
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT platform_id, 1, false, now(), now() + interval '1 min', ARRAY[push('task 2')], '{1}' FROM redrive.platforms;
UPDATE redrive.pushes AS u SET state = v.state::redrive.push_state, attempt_no = v.attempts, pushed_version = CASE WHEN v.state = 'delivered' THEN 1 END, pushed_status = CASE WHEN v.state = 'delivered' THEN 'new' END,
    error_class = v.class, message = v.message, failed_at = now(), delivered_at = now(), next_attempt_at = now() + v.due
FROM (VALUES ('task 3', 'waiting', 1, 'transient', 'HTTP 503', interval '5 min'), ('task 4', 'delivered', 1, NULL, NULL, '0'), ('task 5', 'dead', 4, 'transient', 'HTTP 500', '0'),
    ('task 6', 'blocked', 1, 'address', 'The address 127.0.0.1 is private.', '0'), ('task 7', 'blocked', 1, 'test', 'The task is a test.', '0'), ('task 8', 'waiting', 1, 'transient', 'HTTP 503', '-10 min'))
    AS v (task, state, attempts, class, message, due)
WHERE u.push_id = push(v.task);
SELECT n, w.fact, w.detail, w.remedy FROM unnest('{2, 3, 4, 5, 6, 8}'::int[]) AS n CROSS JOIN LATERAL why('task ' || n) AS w WHERE w.fact <> 'the pusher is not running' ORDER BY n;
SELECT platform, due, in_flight, waiting, dead, blocked, oldest_due_age FROM redrive.platform_health;
SELECT * FROM doctor('pushes');
-- under way for longer than the lease
SELECT * FROM doctor('lease', now() + interval '119 s');
SELECT * FROM doctor('lease', now() + interval '121 s');
DELETE FROM redrive.push_claims;

-- Due and not sent: others were due before, the rate, and as many are under way as may be.  Seen red: without _why_not_sent it is only "due".
SAVEPOINT sent;
UPDATE redrive.pushes SET state = 'pending', next_attempt_at = now() - interval '1 min' WHERE push_id = push('task 1');
UPDATE redrive.pushes SET next_attempt_at = now() WHERE push_id = push('task 3');
SELECT fact, detail, remedy FROM why('task 1') WHERE fact <> 'the pusher is not running';
UPDATE redrive.platforms SET rate_limit = NULL, max_in_flight = 2;
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT platform_id, 1, false, now(), now() + interval '1 min', ARRAY[push('task 2'), push('task 8')], '{1, 1}' FROM redrive.platforms;
SELECT fact, detail, remedy FROM why('task 3') WHERE fact <> 'the pusher is not running';
UPDATE redrive.platforms SET max_in_flight = 3;
UPDATE redrive.platform_states SET in_flight_limit = 2;
SELECT fact, detail, remedy FROM why('task 1') WHERE fact <> 'the pusher is not running';
UPDATE redrive.platforms SET max_in_flight = 1000;
UPDATE redrive.platform_states SET in_flight_limit = NULL;
UPDATE redrive.push_claims SET push_ids = array_fill(push('task 2'), ARRAY[98]), versions = array_fill(1::bigint, ARRAY[98]);
SELECT fact, detail, remedy FROM why('task 1') WHERE fact <> 'the pusher is not running';
ROLLBACK TO sent;

-- Speed: of the last five minutes.
INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe)
SELECT 0, 1, i, p.platform_id, 1, x.at - interval '10 ms' * i, x.at, true, true, false
FROM redrive.platforms AS p, generate_series(1, 100) AS i, (VALUES (now() - interval '1 min'), (now() - interval '2 min'), (now() - interval '2 min'), (now() - interval '301 s')) AS x (at);
UPDATE redrive.platform_states SET attempts = 400, delivered = 300, last_delivered_at = now() + interval '50 s', in_flight_limit = 4;
SELECT attempts, delivered, per_second, p50_ms, p95_ms, in_flight_limit, max_in_flight FROM redrive.platform_health;

-- The clock, and sockets.
SELECT * FROM doctor('clock');
UPDATE redrive.platform_states SET last_failed_at = now() + interval '2 min';
SELECT * FROM doctor('clock');
SELECT count(*) FROM doctor('sockets');
SELECT severity, replace(finding, current_setting('max_files_per_process'), 'N') AS finding, remedy FROM redrive._doctor_sockets(1200, 330);
SELECT count(*) FROM redrive._doctor_sockets(330, 330);
SELECT redrive._max_sockets() BETWEEN 10 AND current_setting('max_files_per_process')::int / 3 AS a_third;
ROLLBACK;

-- What keeps bodies from being made, and a platform that paused itself.  Seen red: doctor() without _platform_problems is silent.
BEGIN;
SET LOCAL SESSION AUTHORIZATION regress_views_a;
CREATE FUNCTION body(task redrive.task) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$;
SELECT redrive.create_platform('crm', 'https://crm.example/', build => 'body');
RESET SESSION AUTHORIZATION;
SELECT * FROM doctor('"crm"');
SAVEPOINT good;
ALTER FUNCTION body OWNER TO CURRENT_USER;
REVOKE EXECUTE ON FUNCTION body FROM PUBLIC, regress_views_a;
SELECT * FROM doctor('"crm"');
ROLLBACK TO good;
DROP FUNCTION body;
SELECT * FROM doctor('"crm"');
SET LOCAL SESSION AUTHORIZATION regress_views_a;
SELECT redrive.record_task('task', 'new');
SELECT * FROM why('task');
RESET SESSION AUTHORIZATION;
SELECT severity, finding FROM doctor('"crm"');
ROLLBACK TO good;
REVOKE CONNECT ON DATABASE contrib_regression FROM PUBLIC;
SELECT * FROM doctor('"crm"');
UPDATE redrive.platforms SET build = NULL;
SELECT count(*) FROM doctor('"crm"');
ROLLBACK TO good;
UPDATE redrive.platforms SET owner = 1::oid::regrole;
SELECT * FROM doctor('"crm"');
ROLLBACK TO good;
UPDATE redrive.platforms SET paused = true;
UPDATE redrive.platform_states SET reason = 'it answered 503';
SELECT count(*) FROM doctor('"crm"');
UPDATE redrive.platform_states SET reason = 'it answered 410: it wants no more pushes';
SELECT * FROM doctor('"crm"');
ROLLBACK;

-- The time before a retry: never less than the interval, nor more than a tenth above it, up to the longest.
SELECT n, min(d) >= least(interval '1 min' * 2 ^ n, interval '10 min') AS not_earlier, max(d) < least(interval '1 min' * 2 ^ n, interval '10 min') * 1.12 AS not_much_later, count(DISTINCT d) > 50 AS spread
FROM generate_series(0, 6) AS n
CROSS JOIN LATERAL (SELECT redrive._retry_delay('1 min', 2, '10 min', n, seed) AS d FROM generate_series(1, 100) AS seed) AS x
GROUP BY n ORDER BY n;
SELECT redrive._retry_delay('1 min', 100, '100 years', 1000, 1) < interval '200 years' AS no_overflow, redrive._retry_delay('0', 100, '1 h', 1000, 1) AS at_once;

-- A task as a body is what json_build_object() makes of it; what is longer than 1 MiB is none.
SELECT b.body = json_build_object('task_key', t.task_key, 'status', t.status, 'version', 5, 'process', t.process, 'payload', t.payload,
    'created_at', now(), 'changed_at', timestamptz '2020-01-01 UTC')::text AS same, octet_length(b.body) IS NULL AS too_long
FROM (VALUES (E'k"\u00f6\n\\', '', NULL, '{"a": [1, 2.50, {"b": null}], "\u00f6": "\\u0041"}'), ('k', 's', 'p', '[]'), ('k', 's', '', '"s"'),
    ('k', 's', 'p', to_jsonb(repeat('x', 1024 * 1024)))) AS t (task_key, status, process, payload)
CROSS JOIN LATERAL (SELECT redrive._task_body(t.task_key, t.status, 5, t.process, t.payload, now(), '2020-01-01 UTC') AS body) AS b;

-- Headers cannot be injected by alter_platform() either.
BEGIN;
SELECT redrive.create_platform('crm', 'https://crm.example/', headers => '{"X-Tenant": "a"}');
SELECT f FROM (VALUES
    ($$SELECT redrive.alter_platform('crm', headers => '{"A": "b\r\nHost: c"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"A\r\nHost": "c"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"A": "b\u0001"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"content-LENGTH": "0"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"Transfer-Encoding": "chunked"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"Cookie": "a=b"}')$$),
    ($$SELECT redrive.alter_platform('crm', url => E'https://crm.example/\r\nX: y')$$),
    ($$SELECT redrive.alter_platform('crm', method => 'POST / HTTP/1.1')$$)
) AS x (statement) CROSS JOIN LATERAL fails(x.statement) AS f;
SELECT url, headers FROM redrive.platform_settings;
ROLLBACK;

SELECT redrive.revoke_user('regress_views_a'), redrive.revoke_user('regress_views_b'), redrive.revoke_user('regress_views_member'), redrive.revoke_user('regress_views_monitor');
DROP ROLE regress_views_a, regress_views_b, regress_views_member, regress_views_monitor;
