-- Platforms and tasks, without a network: what is checked when it is set, who
-- may do what, versions, and the pass.  The platforms are paused: what would be
-- sent waits.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE ROLE regress_push_a LOGIN;
CREATE ROLE regress_push_b LOGIN;
CREATE ROLE regress_push_monitor;
SELECT redrive.grant_user('regress_push_a'), redrive.grant_user('regress_push_b'), redrive.grant_monitor('regress_push_monitor');
SET SESSION AUTHORIZATION regress_push_a;
BEGIN;
SELECT redrive.create_platform('crm', 'https://crm.example/hook');
SELECT redrive.pause_platform('crm');
COMMIT;

-- What is refused: nothing of it is stored.
SELECT f FROM (VALUES
    ($$SELECT redrive.create_platform('crm', 'https://x.example/')$$),
    ($$SELECT redrive.create_platform(NULL, 'https://x.example/')$$),
    ($$SELECT redrive.create_platform('', 'https://x.example/')$$),
    ($$SELECT redrive.create_platform('x', NULL)$$),
    ($$SELECT redrive.create_platform('x', 'http://x.example/')$$),
    ($$SELECT redrive.create_platform('x', 'ftp://x.example/')$$),
    ($$SELECT redrive.create_platform('x', 'https://')$$),
    ($$SELECT redrive.create_platform('x', 'https:/x.example/')$$),
    ($$SELECT redrive.create_platform('x', 'https:///x.example/')$$),
    ($$SELECT redrive.create_platform('x', 'https://u:secret@x.example/')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/#a')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example:0/')$$),
    ($$SELECT redrive.create_platform('x', E'https://x.example/\r\nHost: y')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/' || repeat('x', 2000))$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', method => 'TRACE')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '[]')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"A": 1}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"A b": "c"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"A": "b\r\nHost: c"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"Host": "c"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', success_when => '$x == 1')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"Webhook-Id": "c"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"a": "b", "A": "c"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', headers => '{"authorization": "Bearer secret"}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', timeout => '1 h 1 s')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', timeout => '40 s')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', connect_timeout => '20 s')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', max_in_flight => 0)$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', rate_limit => 0)$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', permanent_status => '{99}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', permanent_status => '{400, NULL}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', permanent_status => '{{400}, {401}}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', allow_cidr => '{{10.0.0.0/8}, {11.0.0.0/8}}')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', max_retries => NULL)$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', build => 'f')$$),
    ($$SELECT redrive.create_platform('x', 'https://x.example/', allow_cidr => '{10.0.0.0/8}')$$),
    ($$SELECT redrive.alter_platform('crm', allow_cidr => '{10.0.0.0/8}')$$),
    ($$SELECT redrive.alter_platform('crm', permanent_status => '{{400}, {401}}')$$),
    ($$SELECT redrive.alter_platform('crm', allow_cidr => '{{10.0.0.0/8}, {11.0.0.0/8}}')$$),
    ($$SELECT redrive.alter_platform('crm', unset => '{url}')$$),
    ($$SELECT redrive.alter_platform('crm', url => 'http://x.example/')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"A": "b\nHost: c"}')$$),
    ($$SELECT redrive.alter_platform('crm', headers => '{"A\r\nHost: c": "b"}')$$),
    ($$SELECT redrive.alter_platform('none')$$),
    ($$SELECT redrive.set_platform_secret('crm', 'password', 'not shown')$$),
    ($$SELECT redrive.set_platform_secret('crm', 'signing', 'not shown')$$),
    ($$SELECT redrive.set_platform_secret('crm', 'signing', 'whsec_not shown')$$),
    ($$SELECT redrive.set_platform_secret('crm', 'basic', 'not_shown')$$),
    ($$SELECT redrive.set_platform_secret('crm', 'bearer', E'not\nshown')$$),
    ($$SELECT redrive.record_task(NULL, 'x')$$),
    ($$SELECT redrive.record_task('', 'x')$$),
    ($$SELECT redrive.record_task('x', NULL)$$),
    ($$SELECT redrive.record_task(repeat('x', 1001), 'x')$$),
    ($$SELECT redrive.record_task((SELECT string_agg(chr(19968 + n * 7919 % 20000), '') FROM generate_series(1, 1000) AS n), 'x')$$),
    ($$SELECT redrive.redrive_push('none')$$),
    ($$SELECT * FROM redrive.why_push('x', 'none')$$),
    ($$SELECT redrive.attach_task_source('pg_class', 'oid', 'relname')$$)
) AS x (statement) CROSS JOIN LATERAL fails(x.statement) AS f;
SELECT platform FROM redrive.platform_health;
-- Variables of a path, also where an empty answer does not reach them, and what only looks like one.
SELECT p AS path, f AS outcome
FROM unnest(ARRAY['$.a == $x', '$.a ? (@.b > $"a b").c == 1', '$.list[$n] == 1', '$."a" == "\\\"$\" $x" && $.b like_regex "^" || $y == 2']) AS p
CROSS JOIN LATERAL fails(format('SELECT redrive.alter_platform(''crm'', success_when => %L)', p)) AS f;
SELECT p AS path, redrive.alter_platform('crm', success_when => p::jsonpath)
FROM unnest(ARRAY['$."$x" == "$y"', '$ == "cost $"', '$."a$"."$" == "\"$\"" && $.b like_regex "$"']) AS p;
SELECT redrive.alter_platform('crm', unset => '{success_when}');
-- A secret is not in the context that callers add to an error.  Seen red: without error_context_stack in redrive_set_platform_secret().
DO $$
DECLARE
    v_context text;
BEGIN
    PERFORM redrive.set_platform_secret('crm', 'basic', 'not_shown');
EXCEPTION WHEN invalid_parameter_value THEN
    GET STACKED DIAGNOSTICS v_context = PG_EXCEPTION_CONTEXT;
    RAISE NOTICE '%, secret in the context: %', SQLERRM, v_context ~ 'not_shown';
END
$$;

-- Of another role nothing can be seen or touched.
SET SESSION AUTHORIZATION regress_push_b;
SELECT fails(s) FROM unnest(ARRAY['SELECT redrive.pause_platform(''crm'')', 'SELECT redrive.drop_platform(''crm'')', 'SELECT redrive.set_platform_secret(''crm'', ''bearer'', ''x'')',
    'SELECT redrive.redrive_push(''crm'')', 'SELECT * FROM redrive.why_push(''x'', ''crm'')', 'SELECT * FROM redrive.platform_secrets', 'SELECT redrive.push_tasks()',
    'SELECT redrive.http_request(''GET'', ''https://x.example/'')']) AS s;
SELECT redrive.record_task('form', 'of another role');
SET SESSION AUTHORIZATION regress_push_a;

-- Tasks: a version per status, and what is to be pushed.
SELECT redrive.record_task('form', 'new', '{"a": 1}', 'approval') AS version;
SELECT redrive.record_task('form', 'new', '{"a": 2}') AS version;
SELECT redrive.record_task('form', 'done', '{"a": 3}') AS version;
SELECT redrive.record_task('trial', 'new', is_test => true) AS version;
SELECT task_key, process, status, version, is_test, payload FROM redrive.task_status ORDER BY task_key;
SELECT task_key, platform, state, wanted_status, wanted_version, pushed_status, retry_count FROM redrive.push_status ORDER BY task_key;
BEGIN;
SELECT redrive.record_task('form', 'undone') AS version;
ROLLBACK;
SELECT version, status FROM redrive.task_status WHERE task_key = 'form';
-- One that becomes a test is not pushed, and is when it is none again.
SELECT redrive.record_task('form', 'done', is_test => true) AS version;
SELECT fact, detail FROM redrive.why_push('form', 'crm');
SELECT state, message FROM redrive.push_status;
SELECT redrive.record_task('form', 'done') AS version;
SELECT state FROM redrive.push_status;
SELECT fact, remedy FROM redrive.why_push('form', 'crm');
SELECT fact FROM redrive.why_push('none', 'crm');

-- A table as a source: statements of any size, the last row of a key counts.
CREATE TABLE forms (no int PRIMARY KEY, state text, trial boolean, amount numeric, note text);
SELECT redrive.attach_task_source('forms', 'no', 'state', 'trial', '{amount, note}');
SELECT fails($$SELECT redrive.attach_task_source('forms', 'no', 'state')$$);
SELECT fails($$SELECT redrive.attach_task_source('forms', 'no', 'none')$$);
GRANT SELECT, INSERT, UPDATE ON forms TO regress_push_b;
SET SESSION AUTHORIZATION regress_push_b;
INSERT INTO forms SELECT n, 'new', n = 3, n * 10, 'note ' || n FROM generate_series(1, 4) AS n;
UPDATE forms SET state = 'done' WHERE no IN (1, 2);
UPDATE forms SET amount = 0 WHERE no = 4;
INSERT INTO forms VALUES (5, NULL);
SELECT task_key, status FROM redrive.task_status ORDER BY 1;
SELECT fails($$SELECT redrive.detach_task_source('forms')$$);
SELECT fails($$UPDATE forms SET state = repeat('x', 1001) WHERE no = 1$$);
SET SESSION AUTHORIZATION regress_push_a;
SELECT task_key, status, version, is_test, payload FROM redrive.task_status WHERE task_key ~ '^\d' ORDER BY task_key;
SELECT task_key, state, wanted_status FROM redrive.push_status WHERE task_key ~ '^\d' ORDER BY task_key;
SELECT redrive.detach_task_source('forms');
UPDATE forms SET state = 'after';
SELECT count(*) FROM redrive.task_status WHERE status = 'after';
-- The payload is the row, whatever its columns are called.  Seen red: with to_jsonb(r) it was the column r.
BEGIN;
CREATE TABLE letters (s text PRIMARY KEY, t text, r int, redrive_rows int);
SELECT redrive.attach_task_source('letters', 's', 't');
INSERT INTO letters VALUES ('letter', 'new', 7, 8);
SELECT task_key, status, payload FROM redrive.task_status WHERE task_key = 'letter';
ROLLBACK;

-- A new platform gets what changed within its window; the pass gives up what is older, and what nobody will tell of.
RESET SESSION AUTHORIZATION;
UPDATE redrive.tasks SET changed_at = now() - interval '2 days' WHERE task_key = '4';
SET SESSION AUTHORIZATION regress_push_a;
BEGIN;
SELECT redrive.create_platform('erp', 'https://erp.example/', push_window => '1 day');
SELECT redrive.pause_platform('erp');
COMMIT;
SELECT task_key, platform, state FROM redrive.push_status WHERE task_key IN ('1', '4') ORDER BY 1, 2;
SELECT redrive.alter_platform('erp', push_window => '30 days');
RESET SESSION AUTHORIZATION;
SELECT outcome, acted, more, detail FROM redrive.push_tasks();
SELECT outcome, acted, more, detail FROM redrive.push_tasks();
SELECT task_key, platform, state FROM redrive.push_status WHERE task_key IN ('1', '4') ORDER BY 1, 2;
-- claims of another pusher, which the one that may be there does not get to see
BEGIN;
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT platform_id, 1, false, now(), now(), array_agg(push_id), array_agg(wanted_version) FROM redrive.pushes GROUP BY platform_id;
SELECT DISTINCT state, attempts, lease_until IS NOT NULL AS leased FROM redrive.push_status;
SELECT outcome, acted, detail FROM redrive.push_tasks(now() - interval '1 min');
SELECT outcome, acted, detail FROM redrive.push_tasks(now() + interval '1 min');
SELECT DISTINCT state, retry_count, error_class, message, next_attempt_at > now() + interval '5 min' AS later FROM redrive.push_status;
SELECT DISTINCT attempt_no, version > 0 AS v, delivered, charged, error_class FROM redrive.push_attempts;
SELECT count(*) AS claims FROM redrive.push_claims;
UPDATE redrive.pushes SET retry_count = 3 WHERE task_id = (SELECT min(task_id) FROM redrive.tasks WHERE task_key = 'form' AND status = 'done');
INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)
SELECT platform_id, 1, false, now(), now(), ARRAY[push_id], ARRAY[wanted_version] FROM redrive.pushes WHERE task_id = (SELECT min(task_id) FROM redrive.tasks WHERE task_key = 'form' AND status = 'done');
SELECT outcome, acted, detail FROM redrive.push_tasks(now() + interval '1 min');
COMMIT;
SELECT state, count(*) FROM redrive.push_status GROUP BY 1 ORDER BY 1;
SELECT DISTINCT fact, remedy FROM redrive.why_push('form', 'crm');
SELECT outcome, acted, detail FROM redrive.push_tasks(now() + interval '31 days');
SELECT platform, state, error_class, count(*) FROM redrive.push_status GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
SELECT redrive.redrive_push('crm', '1') AS one, redrive.redrive_push('crm') AS of_crm, redrive.redrive_push() AS others;

-- Secrets: two keys live while they are rotated; whoever restores a dump has to set them again.
SELECT redrive.set_platform_secret('crm', 'signing', 'a key of twenty-four bytes'), redrive.set_platform_secret('crm', 'signing', 'another of twenty-four bytes'),
    redrive.set_platform_secret('crm', 'signing', 'another of twenty-four bytes');
SELECT kind, left(secret, 7) AS begin FROM redrive.platform_secrets ORDER BY kind;
SELECT finding FROM redrive.doctor() WHERE finding ~ 'ecrets';
DELETE FROM redrive.platform_secrets;
SELECT finding FROM redrive.doctor() WHERE finding ~ 'ecrets';
SELECT redrive.set_platform_secret('crm', 'signing', NULL);
SELECT finding FROM redrive.doctor() WHERE finding ~ 'ecrets';

-- A monitor sees states, but no keys.
SET SESSION AUTHORIZATION regress_push_monitor;
SELECT count(*) > 0 AS some, count(task_key) AS keys, count(message) AS messages FROM redrive.push_status;
SELECT count(*) AS tasks FROM redrive.task_status;
SELECT platform, paused, breaker FROM redrive.platform_health ORDER BY platform;
RESET SESSION AUTHORIZATION;

-- What http_request() does not take; nothing is sent or logged.
SELECT f FROM (VALUES
    ($$SELECT redrive.http_request('FETCH', 'https://x.example/')$$),
    ($$SELECT redrive.http_request(NULL, 'https://x.example/')$$),
    ($$SELECT redrive.http_request('GET', 'no url')$$),
    ($$SELECT redrive.http_request('GET', 'https:/10.0.0.1/')$$),
    ($$SELECT redrive.http_request('GET', 'https:///10.0.0.1/')$$),
    ($$SELECT redrive.http_request('GET', E'https://x.example/ HTTP/1.1\r\nHost: y')$$),
    ($$SELECT redrive.http_request(E'GET / HTTP/1.1\r\nHost: y', 'https://x.example/')$$),
    ($$SELECT redrive.http_request('GET', 'https://x.example/', timeout => '0')$$),
    ($$SELECT redrive.http_request('GET', 'https://x.example/', timeout => '2 h')$$),
    ($$SELECT redrive.http_request('GET', 'https://x.example/', retry_delay => '-1 s')$$),
    ($$SELECT redrive.http_request('GET', 'https://x.example/', max_attempts => 0)$$),
    ($$SELECT redrive.http_request('POST', 'https://x.example/', repeat('x', 1048577))$$),
    ($$SELECT redrive.http_request('POST', 'https://x.example/', headers => '{"Host": "y"}')$$),
    ($$SELECT redrive.http_request('POST', 'https://x.example/', headers => '{"A": "b\r\nAuthorization: c"}')$$),
    ($$SELECT redrive.http_request('POST', 'https://x.example/', headers => '{"A\nB": "c"}')$$)
) AS x (statement) CROSS JOIN LATERAL fails(x.statement) AS f;
BEGIN READ ONLY;
SELECT fails($$SELECT redrive.http_request('GET', 'https://10.0.0.1/')$$);
COMMIT;
SELECT count(*) FROM redrive.http_log;

-- The purge keeps what is still to be pushed.
SELECT count(*) FROM redrive.tasks;
UPDATE redrive.pushes SET state = 'delivered' WHERE platform_id = (SELECT platform_id FROM redrive.platforms WHERE name = 'erp');
SELECT redrive.purge(now() + interval '31 days') IS NOT NULL AS purged;
SELECT task_key FROM redrive.tasks WHERE NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = tasks.task_id AND u.state = 'pending');
SELECT redrive.drop_platform('crm'), redrive.drop_platform('erp');
SELECT count(*) FROM redrive.pushes;

DROP TABLE forms;
SELECT redrive.revoke_user('regress_push_a'), redrive.revoke_user('regress_push_b'), redrive.revoke_user('regress_push_monitor');
DELETE FROM redrive.tasks;
DROP ROLE regress_push_a, regress_push_b, regress_push_monitor;
