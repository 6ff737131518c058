-- The pass push_tasks as the net under record_task(): what is missing, what is
-- late and what is too old; and what a larger window or budget brings back.  The
-- platforms are paused: what would be sent waits.
\getenv here PG_ABS_SRCDIR
\set tools :here '/sql/tools.psql'
\i :tools

CREATE ROLE regress_plan LOGIN;
SELECT redrive.grant_user('regress_plan');
SET SESSION AUTHORIZATION regress_plan;
BEGIN;
SELECT redrive.create_platform('crm', 'https://crm.example/hook', max_retries => 1, retry_interval => '10 min', permanent_status => '{404}'),
    redrive.create_platform('erp', 'https://erp.example/');
SELECT redrive.pause_platform('crm'), redrive.pause_platform('erp');
COMMIT;
SELECT count(redrive.record_task('task ' || i, 'new')) FROM generate_series(1, 6) AS i;
RESET SESSION AUTHORIZATION;
CREATE VIEW pass AS SELECT p.outcome, p.acted, p.more, p.detail FROM redrive.push_tasks() AS p;
CREATE FUNCTION pass(as_of timestamptz) RETURNS TABLE (outcome text, acted bigint, more boolean, detail text) LANGUAGE sql AS 'SELECT p.outcome, p.acted, p.more, p.detail FROM redrive.push_tasks($1) AS p';
CREATE VIEW states AS
SELECT p.name AS platform, u.state, u.wanted_status, u.retry_count, u.error_class, string_agg(substr(t.task_key, 6), ' ' ORDER BY t.task_key) AS tasks
FROM redrive.pushes AS u JOIN redrive.platforms AS p USING (platform_id) JOIN redrive.tasks AS t USING (task_id)
GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5;
CREATE FUNCTION task(n int) RETURNS bigint LANGUAGE sql AS $$ SELECT task_id FROM redrive.tasks WHERE task_key = 'task ' || n $$;
-- before the start of any transaction that may be open
UPDATE redrive.tasks SET changed_at = now() - interval '1 hour';
SELECT * FROM pass;

-- What got lost comes back: a version that was not wanted; and when a platform was changed also a row that is missing, and a delivery of an older version.
DELETE FROM redrive.pushes WHERE task_id = task(1);
UPDATE redrive.tasks SET version = 2, status = 'done', changed_at = now() WHERE task_id = task(2);
UPDATE redrive.pushes SET state = 'delivered', pushed_version = 0, pushed_status = 'old', retry_count = 1 WHERE task_id = task(3);
UPDATE redrive.pushes SET state = 'delivered', pushed_version = 1, pushed_status = 'new' WHERE task_id = task(4);
SELECT * FROM pass;
SELECT redrive.alter_platform('crm'), redrive.alter_platform('erp');
SELECT * FROM pass;
SELECT * FROM states;
SELECT * FROM pass;

-- The pass reads what has changed since the last one, however much is waiting or was delivered.
SET SESSION AUTHORIZATION regress_plan;
SELECT count(redrive.record_task('bulk ' || i, 'new')) FROM generate_series(1, 3000) AS i;
BEGIN;
SELECT redrive.create_platform('bulk', 'https://bulk.example/');
SELECT redrive.pause_platform('bulk');
COMMIT;
RESET SESSION AUTHORIZATION;
SELECT * FROM pass;
UPDATE redrive.tasks SET changed_at = now() - interval '1 day' WHERE task_key LIKE 'bulk%';
VACUUM ANALYZE redrive.tasks, redrive.pushes;
CREATE FUNCTION rows_read() RETURNS bigint LANGUAGE sql AS $$
    SELECT sum(pg_stat_get_xact_tuples_returned(i) + pg_stat_get_xact_tuples_fetched(i))::bigint
    FROM unnest(ARRAY['redrive.tasks', 'redrive.pushes', 'redrive.tasks_changed_idx', 'redrive.tasks_pkey', 'redrive.pushes_due_idx', 'redrive.pushes_task_id_platform_id_key']::regclass[]) AS i
$$;
SELECT * FROM pass;
SELECT pg_stat_force_next_flush();
BEGIN;
SELECT * FROM pass;
SELECT CASE WHEN rows_read() < 100 THEN 'few' ELSE rows_read()::text END AS rows_read;
ROLLBACK;
SELECT redrive.drop_platform('bulk');
DELETE FROM redrive.pushes WHERE task_id > task(6);
DELETE FROM redrive.tasks WHERE task_key LIKE 'bulk%';

-- Too old: given up once, and what a larger window covers comes back; portions do not matter.
UPDATE redrive.tasks SET changed_at = now() - interval '4 days' WHERE task_id IN (task(1), task(2));
UPDATE redrive.tasks SET changed_at = now() - interval '40 days' WHERE task_id = task(3);
SELECT redrive.alter_platform('crm');
SELECT * FROM pass;
SELECT redrive.alter_platform('crm', push_window => '10 days');
SELECT * FROM states WHERE platform = 'crm';
SELECT * FROM pass;
SELECT * FROM pass(now() + interval '6 days 1 s');
SELECT * FROM pass;
SELECT * FROM states WHERE platform = 'crm';
SELECT redrive.redrive_push('crm');
SELECT redrive.alter_platform('crm', push_window => '3 days');
SELECT * FROM pass;

-- A larger budget takes up what the old one gave up, at its interval; but not what a permanent status ended, or what is too old.
UPDATE redrive.pushes AS u SET state = 'dead', retry_count = 1, http_status = v.status, error_class = 'transient', failed_at = now() - interval '1 min', next_attempt_at = now() - interval '11 min'
FROM (VALUES (3, 500), (4, 500), (5, 404), (6, NULL)) AS v (n, status), redrive.platforms AS p
WHERE u.task_id = task(v.n) AND u.platform_id = p.platform_id AND p.name = 'crm';
SELECT redrive.alter_platform('crm', max_retries => 0);
SELECT redrive.alter_platform('crm', max_retries => 1);
SELECT * FROM states WHERE platform = 'crm';
SELECT redrive.alter_platform('crm', max_retries => 3);
SELECT * FROM states WHERE platform = 'crm';
SELECT DISTINCT next_attempt_at > now() + interval '8 min' AS at_its_interval FROM redrive.push_status WHERE platform = 'crm' AND state = 'waiting';

-- Portions: more = call again.
BEGIN;
DELETE FROM redrive.pushes;
UPDATE redrive.tasks SET changed_at = now();
SELECT n, x.* FROM generate_series(1, 3) AS n, redrive.platforms AS p, redrive._plan_platform(p.platform_id, now() + n * interval '0', NULL, 4) AS x WHERE p.name = 'crm' ORDER BY n;
UPDATE redrive.tasks SET changed_at = now() - interval '4 days';
SELECT n, x.* FROM generate_series(1, 3) AS n, redrive.platforms AS p, redrive._plan_platform(p.platform_id, now() + n * interval '0', NULL, 4) AS x WHERE p.name = 'crm' ORDER BY n;
ROLLBACK;

-- While a transaction is prepared nothing is known of when it began, so the time to which all has been seen stands still.
CREATE VIEW moved AS SELECT name, planned_at > now() - interval '1 hour' AS moved FROM redrive.platforms ORDER BY name;
UPDATE redrive.platforms SET planned_at = now() - interval '1 day';
BEGIN;
CREATE TABLE prepared ();
PREPARE TRANSACTION 'plan';
SELECT * FROM redrive.push_tasks() \g /dev/null
SELECT * FROM moved;
ROLLBACK PREPARED 'plan';
SELECT * FROM redrive.push_tasks() \g /dev/null
SELECT * FROM moved;

SELECT redrive.drop_platform('crm'), redrive.drop_platform('erp');
DELETE FROM redrive.tasks;
SELECT redrive.revoke_user('regress_plan');
DROP ROLE regress_plan;
-- Leave no statistics of what is gone.
VACUUM ANALYZE redrive.tasks, redrive.pushes;
